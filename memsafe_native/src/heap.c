#include <pthread.h>

#include "ms.h"
#include "budget.h"
#include "heap.h"

struct account {
    ms_budget *budget; /* referenced; NULL: nobody's */
    uint64_t serial;   /* tells it from those that had its place before */
    uint32_t opened;
    bool shut;  /* its budget was closed meanwhile, which gave back all */
    bool tight; /* its limit is less than a quantum away: it books to the byte */
    int64_t booked;
    int64_t existing; /* the part of booked that passed the limit */
    int64_t pardoned; /* a count up to which its threads are not refused again; 0: none */
    int64_t refusals;
};

/* The lock guards all accounts and the bounds. It checks for errors, so that an allocation by a fork handler that runs
 * while we hold it finds it taken by itself, and goes uncounted by the accounts until the next. */
static pthread_mutex_t lock;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct account accounts[MS_HEAP_ACCOUNTS_MAX];
static uint64_t serials;
static int injecting; /* threads whose refusal is still to come */
static struct ms_heap_thread *threads;
static int64_t others_credit; /* of the threads that a child will not have */
static pthread_key_t ending;

_Atomic int64_t ms_heap_count_bytes;
_Atomic int64_t ms_heap_ceiling = MS_HEAP_UNBOUNDED;
static _Atomic int64_t lowest = -MS_HEAP_UNBOUNDED; /* the count below which an account gives back */
static _Atomic int64_t credit_at_a_time = MS_HEAP_CREDIT;

_Thread_local struct ms_heap_thread ms_heap_thread;

static _Thread_local struct {
    struct {
        uint64_t serial;
        uint32_t depth;
    } inside[MS_HEAP_ACCOUNTS_MAX];
    int64_t injection;
} here;

static void take_lock(void)
{
    pthread_mutex_lock(&lock);
}

static void drop_lock(void)
{
    pthread_mutex_unlock(&lock);
}

/* ------------------------------------------------------------------------------------------- the count, by threads */

/* Also in a child, whose thread has another id than the one that the lock knows as its owner. */
static void make_lock(void)
{
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ERRORCHECK);
    pthread_mutex_init(&lock, &attributes);
    pthread_mutexattr_destroy(&attributes);
}

static int64_t all_credit(void)
{
    int64_t bytes = 0;
    for (const struct ms_heap_thread *thread = threads; thread; thread = thread->next)
        bytes += atomic_load_explicit(&thread->credit_bytes, memory_order_relaxed);
    return bytes;
}

static int64_t positive(int64_t bytes)
{
    return bytes > 0 ? bytes : 0;
}

/* The count may be negative: what was there before the counting began may be freed. */

/* What is allocated and what the threads have for their next allocations. */
static int64_t count_ahead(void)
{
    return positive(atomic_load_explicit(&ms_heap_count_bytes, memory_order_relaxed));
}

/* What is allocated, but for what other threads do meanwhile. pre: the lock is held. */
static int64_t count_now(void)
{
    return positive(atomic_load_explicit(&ms_heap_count_bytes, memory_order_relaxed) - all_credit());
}

static void before_fork(void)
{
    take_lock();
    others_credit = all_credit() - atomic_load_explicit(&ms_heap_thread.credit_bytes, memory_order_relaxed);
}

/* The memory of the other threads may serve new ones already, so it is not looked at. */
static void forked(void)
{
    make_lock();
    atomic_fetch_sub_explicit(&ms_heap_count_bytes, others_credit, memory_order_relaxed);
    ms_heap_thread.next = NULL;
    threads = ms_heap_thread.listed ? &ms_heap_thread : NULL;
}

static void end_thread(void *ended)
{
    struct ms_heap_thread *thread = ended;
    take_lock();
    for (struct ms_heap_thread **place = &threads; *place; place = &(*place)->next)
        if (*place == thread) {
            *place = thread->next;
            break;
        }
    thread->listed = false;
    thread->ended = true;
    atomic_fetch_sub_explicit(&ms_heap_count_bytes, thread->credit_bytes, memory_order_relaxed);
    thread->credit_bytes = 0;
    drop_lock();
}

static void start(void)
{
    make_lock();
    pthread_key_create(&ending, end_thread);
    pthread_atfork(before_fork, drop_lock, forked); /* so that no child finds the accounts half-way */
}

/* Returns whether the thread is in the list, so that its credit is known to all. */
static bool list(struct ms_heap_thread *thread)
{
    if (thread->listed || thread->ended)
        return thread->listed;
    pthread_once(&once, start);
    if (pthread_mutex_lock(&lock))
        return false;
    thread->listed = pthread_setspecific(ending, thread) == 0;
    if (thread->listed) {
        thread->next = threads;
        threads = thread;
    }
    bool listed = thread->listed;
    drop_lock();
    return listed;
}

/* ------------------------------------------------------------------------------------------------- the accounts */

static int64_t whole_quanta(int64_t bytes)
{
    return (bytes + MS_HEAP_QUANTUM - 1) / MS_HEAP_QUANTUM * MS_HEAP_QUANTUM;
}

static void set_bounds(void)
{
    int64_t ceiling = MS_HEAP_UNBOUNDED, floor = -MS_HEAP_UNBOUNDED, credit = MS_HEAP_CREDIT;
    for (int i = 0; i < MS_HEAP_ACCOUNTS_MAX; i++) {
        const struct account *account = &accounts[i];
        if (!account->budget || account->shut)
            continue;
        if (account->tight)
            credit = 0;
        if (account->booked < ceiling)
            ceiling = account->booked;
        if (account->booked - MS_HEAP_SLACK > floor)
            floor = account->booked - MS_HEAP_SLACK;
    }
    atomic_store_explicit(&ms_heap_ceiling, injecting ? -MS_HEAP_UNBOUNDED : ceiling, memory_order_relaxed);
    atomic_store_explicit(&lowest, floor, memory_order_relaxed);
    atomic_store_explicit(&credit_at_a_time, injecting ? 0 : credit, memory_order_relaxed);
}

/* Returns as ms_budget_charge; notices that the budget was closed. */
static int charge(struct account *account, int64_t bytes)
{
    int result = ms_budget_charge(account->budget, bytes, NULL, NULL);
    if (result >= 0)
        account->booked += bytes;
    account->shut |= result == -ESHUTDOWN;
    return result;
}

/* By how much the account lags behind what is allocated and size bytes more; 0 where it does not: other threads, whose
 * credit was counted as well, free meanwhile. */
static int64_t lag(const struct account *account, int64_t size)
{
    return positive(count_now() + size - account->booked);
}

/* Book up to the count and a little more where the limit allows it: ahead, in whole quanta, else to the byte; size is
 * still to be counted. Returns as ms_budget_charge. */
static int book(struct account *account, int64_t size)
{
    int64_t bytes = positive(whole_quanta(count_ahead() + size) - account->booked);
    int result = charge(account, bytes);
    account->tight = result == -ENOMEM;
    if (account->tight) {
        bytes = lag(account, size);
        result = charge(account, bytes);
    }
    if (result >= 0 && bytes)
        account->pardoned = 0;
    return result;
}

static int book_whatever_the_limit(struct account *account)
{
    int result = book(account, 0);
    if (result != -ENOMEM)
        return result;
    int64_t bytes = lag(account, 0);
    result = ms_budget_charge_existing(account->budget, bytes, NULL);
    if (result >= 0) {
        account->booked += bytes;
        account->existing += bytes;
    }
    account->shut |= result == -ESHUTDOWN;
    return result;
}

static void give_back(struct account *account, int64_t bytes)
{
    int64_t existing = bytes < account->existing ? bytes : account->existing;
    account->booked -= bytes;
    account->existing -= existing;
    ms_budget_uncharge_existing(account->budget, existing);
    ms_budget_uncharge(account->budget, bytes - existing, NULL);
}

static int settle(void)
{
    int told = 0;
    int64_t count = count_ahead();
    for (int i = 0; i < MS_HEAP_ACCOUNTS_MAX; i++) {
        struct account *account = &accounts[i];
        if (!account->budget || account->shut)
            continue;
        if (account->booked < count)
            told |= book_whatever_the_limit(account) == MS_BUDGET_SOFT_PASSED;
        else if (account->booked - count > MS_HEAP_SLACK)
            give_back(account, account->booked - whole_quanta(count));
        if (account->pardoned > count + MS_HEAP_STEP)
            account->pardoned = count + MS_HEAP_STEP;
    }
    set_bounds();
    return told ? MS_BUDGET_SOFT_PASSED : 0;
}

/* Returns as ms_heap_count. */
static int add(int64_t bytes)
{
    int64_t count = atomic_fetch_add_explicit(&ms_heap_count_bytes, bytes, memory_order_relaxed) + bytes;
    if (MS_LIKELY(count <= atomic_load_explicit(&ms_heap_ceiling, memory_order_relaxed) &&
                  count >= atomic_load_explicit(&lowest, memory_order_relaxed)))
        return 0;
    if (pthread_mutex_lock(&lock))
        return 0;
    int told = settle();
    drop_lock();
    return told;
}

int ms_heap_count_shared(struct ms_heap_thread *thread, int64_t credit_bytes)
{
    int64_t credit = atomic_load_explicit(&credit_at_a_time, memory_order_relaxed);
    if (credit && !list(thread))
        credit = 0;
    atomic_store_explicit(&thread->credit_bytes, credit, memory_order_relaxed);
    int told = add(credit - credit_bytes);
    if (credit && !atomic_load_explicit(&credit_at_a_time, memory_order_relaxed)) { /* that was the way to the limit */
        atomic_store_explicit(&thread->credit_bytes, 0, memory_order_relaxed);
        atomic_fetch_sub_explicit(&ms_heap_count_bytes, credit, memory_order_relaxed);
    }
    return told;
}

static bool is_inside(int at)
{
    return here.inside[at].depth && here.inside[at].serial == accounts[at].serial;
}

static bool would_refuse(struct account *account, int64_t size, int64_t bearable, int *told)
{
    int64_t count = count_now();
    if (account->shut || count + size <= account->booked)
        return false;
    int result = book(account, size);
    if (result == MS_BUDGET_SOFT_PASSED)
        *told = MS_BUDGET_SOFT_PASSED;
    return result == -ENOMEM && count + size > account->pardoned && account->existing >= bearable;
}

static bool injection_is_due(void)
{
    if (here.injection == 0 || --here.injection > 0)
        return false;
    injecting--;
    return true;
}

int ms_heap_refuser(int64_t size, int64_t bearable_bytes, int *told)
{
    *told = 0;
    if (size > MS_HEAP_UNBOUNDED || pthread_mutex_lock(&lock))
        return -1; /* more than there is address space: malloc itself refuses */
    int found = -1;
    for (int i = 0; i < MS_HEAP_ACCOUNTS_MAX && found < 0; i++) {
        struct account *account = &accounts[i];
        if (account->budget && is_inside(i) &&
            (would_refuse(account, size, bearable_bytes, told) || injection_is_due()))
            found = i;
    }
    if (found >= 0 && settle()) /* what the accounts before it have booked for this */
        *told = MS_BUDGET_SOFT_PASSED;
    set_bounds();
    drop_lock();
    return found;
}

void ms_heap_note_refusal(int account)
{
    take_lock();
    accounts[account].pardoned = count_now() + MS_HEAP_STEP;
    accounts[account].refusals++;
    drop_lock();
}

int64_t ms_heap_inject(int64_t n)
{
    take_lock();
    int64_t left = here.injection;
    here.injection = n;
    atomic_fetch_sub_explicit(&ms_heap_count_bytes, ms_heap_thread.credit_bytes, memory_order_relaxed);
    ms_heap_thread.credit_bytes = 0;
    injecting += (n > 0) - (left > 0);
    set_bounds();
    drop_lock();
    return left;
}

static int open_account(ms_budget *budget)
{
    int found = -ENOSPC;
    for (int i = 0; i < MS_HEAP_ACCOUNTS_MAX; i++) {
        if (accounts[i].budget == budget && !accounts[i].shut) {
            accounts[i].opened++;
            return i;
        }
        if (!accounts[i].budget && found < 0)
            found = i;
    }
    if (found < 0)
        return found;
    ms_budget_ref(budget);
    accounts[found] = (struct account){.budget = budget, .serial = ++serials, .opened = 1};
    charge(&accounts[found], 0); /* is it closed? */
    return found;
}

static void close_account(struct account *account)
{
    if (--account->opened)
        return;
    if (!account->shut)
        give_back(account, account->booked);
    ms_budget_unref(account->budget);
    account->budget = NULL;
}

int ms_heap_open(ms_budget *budget, int *told)
{
    pthread_once(&once, start);
    take_lock();
    int found = open_account(budget), passed = settle();
    if (found >= 0 && accounts[found].shut) {
        close_account(&accounts[found]);
        found = -ESHUTDOWN;
    }
    drop_lock();
    if (found >= 0)
        *told = passed;
    return found;
}

void ms_heap_close(int account)
{
    take_lock();
    close_account(&accounts[account]);
    set_bounds();
    drop_lock();
}

void ms_heap_enter(int account)
{
    if (!is_inside(account))
        here.inside[account].depth = 0; /* of one that had its place before */
    here.inside[account].serial = accounts[account].serial;
    here.inside[account].depth++;
}

int ms_heap_leave(int account)
{
    if (!is_inside(account))
        return -EPERM;
    here.inside[account].depth--;
    return 0;
}

void ms_heap_read(int account, ms_heap_stats *stats)
{
    take_lock();
    *stats = (ms_heap_stats){.heap_bytes = count_now(), .refusals = accounts[account].refusals};
    drop_lock();
}
