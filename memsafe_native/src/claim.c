/* The line of those who wait for bytes: see cdef/claim.h for the contract. */
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "budget_internal.h"

/* Lists that a claim is in. Each is known by its first element, whose `previous` is the last. */
enum list { LINE, EVERYONE, MAIL, LISTS };

struct ms_claim {
    struct {
        ms_claim *next, *previous; /* previous is NULL where it is not in that list */
    } in[LISTS];
    ms_budget *budget;  /* referenced */
    ms_budget *held_up; /* the level that refuses it; NULL once it left the line */
    ms_mailbox *mailbox;
    uint64_t token;
    int64_t n;
    _Atomic int state;
    _Atomic uint32_t signalled; /* a futex: 1 when there is something to see */
    int soft_passed;
};

struct ms_mailbox {
    ms_claim *first;
    int fd;
    uint32_t users; /* its maker and its claims */
};

/* Guards every field above but the atomic ones, and in budgets what their declaration says. */
static pthread_mutex_t line_lock = PTHREAD_MUTEX_INITIALIZER;
static ms_claim *everyone; /* claims of all trees, so that a forked child finds them */
static uint32_t turns;

static void append(ms_claim **first, ms_claim *claim, enum list list)
{
    claim->in[list].next = NULL;
    claim->in[list].previous = *first ? (*first)->in[list].previous : claim;
    if (*first) {
        (*first)->in[list].previous->in[list].next = claim;
        (*first)->in[list].previous = claim;
    } else {
        *first = claim;
    }
}

static void take_out(ms_claim **first, ms_claim *claim, enum list list)
{
    ms_claim *next = claim->in[list].next, *previous = claim->in[list].previous;
    if (!previous)
        return;
    if (claim == *first)
        *first = next;
    else
        previous->in[list].next = next;
    if (next)
        next->in[list].previous = previous;
    else if (*first)
        (*first)->in[list].previous = previous;
    claim->in[list].previous = NULL;
}

static void renew_gate(ms_budget *budget)
{
    int shut = atomic_load(&budget->waiting) || atomic_load(&budget->aborted);
    atomic_store(&budget->gate, shut ? SHUT : atomic_load(&budget->limit));
}

/* Threads that another thread's fork() did not copy wait for nothing here: open the gates that they had shut. */
static void forget_everyone(void)
{
    for (ms_claim *claim = everyone; claim; claim = claim->in[EVERYONE].next) {
        ms_budget *root = claim->budget;
        for (ms_budget *at = root; at; at = parent_of(at)) {
            atomic_store(&at->waiting, 0);
            renew_gate(at);
            root = at;
        }
        root->first = NULL;
        atomic_store(&root->in_line, 0);
        claim->in[LINE].previous = NULL;
        claim->held_up = NULL;
        if (atomic_load(&claim->state) == MS_CLAIM_IN_LINE)
            atomic_store(&claim->state, -ECANCELED);
    }
}

static void lock_for_fork(void)
{
    pthread_mutex_lock(&line_lock);
}

static void unlock_after_fork(void)
{
    pthread_mutex_unlock(&line_lock);
}

static void renew_in_child(void)
{
    forget_everyone();
    pthread_mutex_unlock(&line_lock);
}

static void watch_forks(void)
{
    pthread_atfork(lock_for_fork, unlock_after_fork, renew_in_child);
}

static void lock(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    pthread_mutex_lock(&line_lock);
}

static void unlock(void)
{
    pthread_mutex_unlock(&line_lock);
}

static ms_budget *root_of(ms_budget *budget)
{
    for (ms_budget *above; (above = parent_of(budget));)
        budget = above;
    return budget;
}

static void signal_claim(ms_claim *claim)
{
    if (claim->mailbox) {
        if (!claim->in[MAIL].previous)
            append(&claim->mailbox->first, claim, MAIL);
        eventfd_write(claim->mailbox->fd, 1);
        return;
    }
    atomic_store(&claim->signalled, 1);
    syscall(SYS_futex, &claim->signalled, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void hold_up(ms_claim *claim, ms_budget *level)
{
    ms_budget *before = claim->held_up;
    claim->held_up = level;
    if (level && atomic_fetch_add(&level->waiting, 1) == 0)
        renew_gate(level);
    if (before && atomic_fetch_sub(&before->waiting, 1) == 1)
        renew_gate(before);
}

static void leave_line(ms_claim *claim, ms_budget *root)
{
    hold_up(claim, NULL);
    take_out(&root->first, claim, LINE);
    atomic_fetch_sub(&root->in_line, 1);
}

static void leave(ms_claim *claim, ms_budget *root, int state)
{
    leave_line(claim, root);
    atomic_store(&claim->state, state);
    signal_claim(claim);
}

static ms_budget *ancestor(ms_budget *budget, int level)
{
    while (level--)
        budget = parent_of(budget);
    return budget;
}

/* Why the claim can never be granted, as things are: -errno; else 0. */
static int hopeless(const ms_claim *claim)
{
    for (const ms_budget *at = claim->budget; at; at = parent_of(at)) {
        if (atomic_load(&at->used) & CLOSED)
            return -ESHUTDOWN;
        if (atomic_load(&at->aborted))
            return -ECANCELED;
        if (claim->n > atomic_load(&at->limit))
            return -E2BIG;
    }
    return 0;
}

/* Have the claim take its bytes. Returns NULL when it has left the line, with them or without hope; else the level
 * that refuses it, where by now every give-back is announced. */
static ms_budget *attempt(ms_claim *claim, ms_budget *root)
{
    for (;;) {
        int up = 0;
        int result = ms_budget_charge_by(claim->budget, claim->n, NULL, CHARGE_IN_TURN, &up);
        if (result >= 0) {
            claim->soft_passed = result == MS_BUDGET_SOFT_PASSED;
            leave(claim, root, MS_CLAIM_GRANTED);
            return NULL;
        }
        if (result != -ENOMEM) {
            leave(claim, root, result);
            return NULL;
        }
        ms_budget *level = ancestor(claim->budget, up);
        if (claim->held_up == level)
            return level;
        hold_up(claim, level); /* and look again: what was given back before this was not announced */
    }
}

/* Serve one claim, which those before it hold up at a level, or not (NULL). Returns as attempt(). */
static ms_budget *consider(ms_claim *claim, ms_budget *root, ms_budget *level)
{
    if (!level)
        return attempt(claim, root);
    hold_up(claim, level);
    return level;
}

/* The topmost level of the claim's path that this look along the line found full. */
static ms_budget *full_level(const ms_claim *claim)
{
    ms_budget *found = NULL;
    for (ms_budget *at = claim->budget; at; at = parent_of(at))
        if (at->turn == turns)
            found = at;
    return found;
}

/* Look along the line of a tree, first to last. Nobody passes a root that is full, nor what holds up all of them. */
static void serve(ms_budget *root)
{
    turns++;
    for (ms_claim *claim = root->first, *next; claim && root->turn != turns; claim = next) {
        next = claim->in[LINE].next;
        ms_budget *level = consider(claim, root, full_level(claim));
        if (!level)
            continue;
        level->turn = turns;
        if (atomic_load(&level->waiting) == atomic_load(&root->in_line))
            break;
    }
}

/* The topmost level of the claim's path that holds up somebody. */
static ms_budget *waited_level(const ms_claim *claim)
{
    ms_budget *found = NULL;
    for (ms_budget *at = claim->budget; at; at = parent_of(at))
        if (atomic_load(&at->waiting))
            found = at;
    return found;
}

void ms_line_serve(ms_budget *budget)
{
    lock();
    serve(root_of(budget));
    unlock();
}

/* Something that makes claims hopeless may have happened: fail those, then serve the others. */
static void weed(ms_budget *root)
{
    for (ms_claim *claim = root->first, *next; claim; claim = next) {
        int error = hopeless(claim);
        next = claim->in[LINE].next;
        if (error)
            leave(claim, root, error);
    }
    serve(root);
}

void ms_line_weed(ms_budget *budget)
{
    lock();
    weed(root_of(budget));
    unlock();
}

void ms_budget_set_limit(ms_budget *budget, int64_t limit)
{
    lock();
    atomic_store(&budget->limit, limit);
    renew_gate(budget);
    weed(root_of(budget));
    unlock();
}

void ms_budget_abort(ms_budget *budget)
{
    lock();
    atomic_store(&budget->aborted, 1);
    renew_gate(budget);
    weed(root_of(budget));
    unlock();
}

ms_claim *ms_claim_new(ms_budget *budget, int64_t n, ms_mailbox *mailbox, uint64_t token)
{
    ms_claim *claim = calloc(1, sizeof *claim);
    if (!claim)
        return NULL;
    ms_budget_ref(budget);
    claim->budget = budget;
    claim->mailbox = mailbox;
    claim->token = token;
    claim->n = n;
    lock();
    ms_budget *root = root_of(budget);
    if (mailbox)
        mailbox->users++;
    append(&everyone, claim, EVERYONE);
    append(&root->first, claim, LINE);
    atomic_fetch_add(&root->in_line, 1);
    int error = hopeless(claim);
    if (error)
        leave(claim, root, error);
    else
        consider(claim, root, waited_level(claim));
    unlock();
    return claim;
}

int ms_claim_state(const ms_claim *claim)
{
    return atomic_load(&claim->state);
}

static void add_ns(struct timespec *time, int64_t ns)
{
    ns += time->tv_nsec;
    time->tv_sec += (time_t)(ns / 1000000000);
    time->tv_nsec = (long)(ns % 1000000000);
}

int ms_claim_wait(ms_claim *claim, int64_t timeout_ns)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    add_ns(&until, timeout_ns);
    while (!atomic_exchange(&claim->signalled, 0)) {
        if (atomic_load(&claim->state) != MS_CLAIM_IN_LINE)
            break;
        if (syscall(SYS_futex, &claim->signalled, FUTEX_WAIT_BITSET_PRIVATE, 0, &until, NULL, FUTEX_BITSET_MATCH_ANY) &&
            errno != EAGAIN)
            return -errno;
    }
    return 0;
}

void ms_claim_nudge(ms_claim *claim)
{
    lock();
    signal_claim(claim);
    unlock();
}

static int64_t add_saturated(int64_t a, int64_t b)
{
    int64_t sum;
    return __builtin_add_overflow(a, b, &sum) ? INT64_MAX : sum;
}

static int is_below(const ms_budget *budget, const ms_budget *above)
{
    while (budget && budget != above)
        budget = parent_of(budget);
    return budget != NULL;
}

int64_t ms_claim_shortfall(ms_claim *claim, int *level)
{
    int64_t need = 0;
    lock();
    /* Not held_up: where a full root ended the look, that of those behind is as it was before. */
    ms_budget *at = claim->held_up ? waited_level(claim) : NULL;
    if (at) {
        ms_claim *first = root_of(at)->first;
        int up = 0;
        for (ms_budget *below = claim->budget; below != at; below = parent_of(below))
            up++;
        for (ms_claim *other = claim;; other = other->in[LINE].previous) {
            if (is_below(other->budget, at))
                need = add_saturated(need, other->n);
            if (other == first)
                break;
        }
        need = add_saturated(need, COUNT(atomic_load(&at->used)) - atomic_load(&at->limit));
        if (need < 1)
            need = 1;
        if (level)
            *level = up;
    }
    unlock();
    return need;
}

void ms_mailbox_free(ms_mailbox *mailbox)
{
    if (!mailbox)
        return;
    lock();
    int last = --mailbox->users == 0;
    unlock();
    if (last) {
        close(mailbox->fd);
        free(mailbox);
    }
}

int ms_claim_end(ms_claim *claim, int *soft_passed)
{
    lock();
    int state = atomic_load(&claim->state);
    take_out(&everyone, claim, EVERYONE);
    if (claim->mailbox)
        take_out(&claim->mailbox->first, claim, MAIL);
    if (state == MS_CLAIM_IN_LINE) {
        ms_budget *root = root_of(claim->budget);
        leave_line(claim, root);
        serve(root); /* it may have held up others */
    }
    unlock();
    if (state == MS_CLAIM_GRANTED && soft_passed)
        *soft_passed = claim->soft_passed;
    ms_mailbox_free(claim->mailbox);
    ms_budget_unref(claim->budget);
    free(claim);
    return state;
}

ms_mailbox *ms_mailbox_new(void)
{
    ms_mailbox *mailbox = calloc(1, sizeof *mailbox);
    if (!mailbox)
        return NULL;
    mailbox->users = 1;
    mailbox->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (mailbox->fd < 0) {
        free(mailbox);
        return NULL;
    }
    return mailbox;
}

int ms_mailbox_fd(const ms_mailbox *mailbox)
{
    return mailbox->fd;
}

int ms_mailbox_take(ms_mailbox *mailbox, uint64_t *token)
{
    lock();
    ms_claim *claim = mailbox->first;
    if (claim) {
        *token = claim->token;
        take_out(&mailbox->first, claim, MAIL);
    } else {
        eventfd_t count;
        eventfd_read(mailbox->fd, &count);
    }
    unlock();
    return claim != NULL;
}
