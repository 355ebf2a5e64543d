#include <stdlib.h>

#include "budget_internal.h"

/* A reclaimer may need a buffer to write out what it frees: beyond each limit, all of them together get a 64th of it,
 * from 1 MiB (a good size for a write) to 64 MiB, and never more than a 16th. */
static int64_t overdraft_of(int64_t limit)
{
    const int64_t least = INT64_C(1) << 20, most = INT64_C(64) << 20;
    int64_t share = limit / 64 < least ? least : limit / 64 > most ? most : limit / 64;
    return share < limit / 16 ? share : limit / 16;
}

static struct batched_budget *batched(ms_budget *budget)
{
    return (struct batched_budget *)budget;
}

static int64_t slack_of(const ms_budget *budget)
{
    return budget->batched ? atomic_load(&((const struct batched_budget *)budget)->slack) : 0;
}

ms_budget *ms_budget_new(ms_budget *parent, int64_t limit)
{
    return ms_budget_new_batched(parent, limit, 0);
}

ms_budget *ms_budget_new_batched(ms_budget *parent, int64_t limit, int64_t quantum)
{
    if (parent && parent->depth + 1 >= MS_BUDGET_DEPTH_MAX) {
        errno = EINVAL;
        return NULL;
    }
    ms_budget *budget = calloc(1, quantum ? sizeof(struct batched_budget) : sizeof *budget);
    if (!budget)
        return NULL;
    if (quantum) {
        budget->batched = 1;
        batched(budget)->quantum = quantum;
    }
    atomic_init(&budget->gate, limit);
    atomic_init(&budget->limit, limit);
    atomic_init(&budget->soft_above, INT64_MAX);
    atomic_init(&budget->soft_rearm, -1);
    atomic_init(&budget->soft_limit, INT64_MAX);
    atomic_init(&budget->references, 1);
    if (parent) {
        ms_budget_ref(parent);
        budget->parent = (ptrdiff_t)((uintptr_t)parent - (uintptr_t)budget);
        budget->depth = (parent->depth + 1) & 0x7f;
    }
    return budget;
}

void ms_budget_ref(ms_budget *budget)
{
    atomic_fetch_add_explicit(&budget->references, 1, memory_order_relaxed);
}

void ms_budget_unref(ms_budget *budget)
{
    while (budget && atomic_fetch_sub_explicit(&budget->references, 1, memory_order_acq_rel) == 1) {
        ms_budget *parent = parent_of(budget);
        free(budget);
        budget = parent;
    }
}

static void raise_peak(ms_budget *budget, int64_t used)
{
    int64_t peak = atomic_load_explicit(&budget->peak, memory_order_relaxed);
    while (used > peak && !atomic_compare_exchange_weak_explicit(&budget->peak, &peak, used, memory_order_relaxed,
                                                                 memory_order_relaxed))
        ;
}

static void rearm_if_below(ms_budget *budget, int64_t used)
{
    int64_t rearm = atomic_load_explicit(&budget->soft_rearm, memory_order_acquire);
    if (MS_LIKELY(used > rearm))
        return;
    if (atomic_compare_exchange_strong(&budget->soft_rearm, &rearm, -1))
        atomic_store(&budget->soft_above, atomic_load(&budget->soft_limit));
}

/* One caller alone disarms the trigger and leaves word for whoever tells. */
static int note_soft_passed(ms_budget *budget, int64_t used)
{
    int64_t above = atomic_load_explicit(&budget->soft_above, memory_order_relaxed);
    if (MS_LIKELY(used <= above) || !atomic_compare_exchange_strong(&budget->soft_above, &above, INT64_MAX))
        return 0;
    atomic_store(&budget->soft_passed, 1);
    atomic_store(&budget->soft_rearm, above - above / 10);
    rearm_if_below(budget, COUNT(atomic_load(&budget->used)));
    return MS_BUDGET_SOFT_PASSED;
}

static int somebody_stands_in_line(ms_budget *budget)
{
    for (ms_budget *above; (above = parent_of(budget));)
        budget = above;
    return atomic_load(&budget->in_line) != 0;
}

/* Take up to n bytes of slack; returns how many. */
static int64_t take_slack(ms_budget *budget, int64_t n)
{
    int64_t slack = atomic_load(&batched(budget)->slack), taken;
    do
        taken = slack < n ? slack : n;
    while (taken && !atomic_compare_exchange_weak(&batched(budget)->slack, &slack, slack - taken));
    return taken;
}

/* Keep n bytes, which every level above was charged, as slack. Returns how many must be given back above instead: all
 * of it where the budget was closed or somebody stands in line, what is beyond one quantum where it came to two. */
static int64_t keep_slack(ms_budget *budget, int64_t n)
{
    int64_t quantum = batched(budget)->quantum;
    int64_t slack = atomic_fetch_add(&batched(budget)->slack, n) + n;
    if (atomic_load(&budget->used) & CLOSED || somebody_stands_in_line(budget))
        return take_slack(budget, INT64_MAX);
    return slack - quantum >= quantum ? take_slack(budget, slack - quantum) : 0;
}

/* Returns where it ended: stop, or the level that it found closed. *waited: whether somebody waits at a level. */
static ms_budget *subtract(ms_budget *budget, int64_t n, ms_budget *stop, uint32_t *waited)
{
    for (; budget != stop; budget = parent_of(budget)) {
        /* Sequentially consistent, as is hold_up() in claim.c: either this sees the claim or the claim sees this. */
        uint64_t before = atomic_fetch_sub(&budget->used, (uint64_t)n);
        if (MS_UNLIKELY(before & CLOSED))
            break;
        rearm_if_below(budget, COUNT(before) - n);
        *waited |= atomic_load(&budget->waiting);
        if (MS_UNLIKELY(budget->batched) && parent_of(budget) != stop && !(n = keep_slack(budget, n)))
            return stop;
    }
    return budget;
}

static ms_budget *give_back(ms_budget *budget, int64_t n, ms_budget *stop)
{
    uint32_t waited = 0;
    ms_budget *end = subtract(budget, n, stop, &waited);
    if (MS_UNLIKELY(waited))
        ms_line_serve(budget);
    return end;
}

static inline int64_t bound_of(const ms_budget *budget, enum charge_mode mode)
{
    int64_t limit;
    switch (mode) {
    case CHARGE_ASKING:
        return atomic_load_explicit(&budget->gate, memory_order_relaxed);
    case CHARGE_EXISTING:
        return INT64_MAX;
    default:
        limit = atomic_load(&budget->aborted) ? SHUT : atomic_load(&budget->limit);
        return mode == CHARGE_OVERDRAFT && limit < INT64_MAX / 2 ? limit + overdraft_of(limit) : limit;
    }
}

/* Whether a level that holds `word` would take n more: 0, -ENOMEM or -ESHUTDOWN. */
static inline int would_take(const ms_budget *budget, uint64_t word, int64_t n, enum charge_mode mode)
{
    if (MS_UNLIKELY(word & CLOSED))
        return -ESHUTDOWN;
    if (MS_LIKELY(COUNT(word) <= bound_of(budget, mode) - n))
        return 0;
    /* Nothing never passes a limit, though others may have; only an aborted budget refuses it. */
    return n == 0 && !atomic_load(&budget->aborted) ? 0 : -ENOMEM;
}

static inline int take(ms_budget *budget, int64_t n, enum charge_mode mode, int64_t *used)
{
    uint64_t word = atomic_load_explicit(&budget->used, memory_order_relaxed);
    do {
        int refused = would_take(budget, word, n, mode);
        if (MS_UNLIKELY(refused))
            return refused;
    } while (!atomic_compare_exchange_weak_explicit(&budget->used, &word, word + (uint64_t)n, memory_order_acq_rel,
                                                    memory_order_relaxed));
    *used = COUNT(word) + n;
    return 0;
}

/* Have n bytes for a batched budget, from its slack or in its own steps from the levels above, up to stop.
 * Returns as charge(), level counted from the budget itself; *drawn says how many there are now. */
static int draw(ms_budget *budget, int64_t n, ms_budget *stop, enum charge_mode mode, int *level, int64_t *drawn)
{
    ms_budget *above = parent_of(budget);
    int64_t quantum = batched(budget)->quantum;
    int up = 1;
    for (ms_budget *at = above; at != stop; at = parent_of(at), up++) {
        int ended = would_take(at, atomic_load(&at->used), 0, mode); /* slack or not */
        if (ended) {
            *level = up;
            return ended;
        }
    }
    int64_t have = take_slack(budget, n), missing = n - have, more = missing;
    int result = 0;
    /* Bytes that exist, and what is given in turn or as an overdraft, are no reason to take more. */
    if (mode == CHARGE_ASKING && missing <= INT64_MAX - quantum)
        more = (missing + quantum - 1) / quantum * quantum;
    if (missing)
        result = ms_budget_charge_by(above, more, stop, mode, &up);
    if (result == -ENOMEM && more > missing)
        result = ms_budget_charge_by(above, more = missing, stop, mode, &up);
    *drawn = result < 0 ? have : have + more;
    if (result < 0)
        *level = up + 1;
    return result;
}

/* As charge(), where the budget at `at`, the first batched one of the path, has its index; those below it would take
 * the charge. */
static int charge_batched(ms_budget *budget, ms_budget *at, int index, int64_t n, ms_budget *stop,
                          enum charge_mode mode, int *level)
{
    uint32_t waited = 0;
    int64_t left = 0;
    int refuser = 0;
    int drawn = would_take(at, atomic_load(&at->used), n, mode), result;
    if (!drawn)
        drawn = draw(at, n, stop, mode, &refuser, &left);
    result = drawn;
    if (drawn < 0)
        refuser += index;
    else
        result = ms_budget_charge_by(budget, n, parent_of(at), mode, &refuser);
    if (result >= 0)
        left -= n;
    if (left && (left = keep_slack(at, left)))
        subtract(parent_of(at), left, stop, &waited);
    if (waited && mode != CHARGE_IN_TURN)
        ms_line_serve(budget);
    if (result < 0) {
        if (drawn == MS_BUDGET_SOFT_PASSED)
            ms_budget_rearm_untold(parent_of(at));
        if (level)
            *level = refuser;
        return result;
    }
    return result | drawn;
}

static inline int charge(ms_budget *budget, int64_t n, ms_budget *stop, enum charge_mode mode, int *level)
{
    ms_budget *levels[MS_BUDGET_DEPTH_MAX];
    int64_t used[MS_BUDGET_DEPTH_MAX];
    int count = 0, refused = 0, refuser = 0;

    /* Look first: a charge that is bound to be refused must not, even for a moment, stand in the way of others. */
    for (ms_budget *at = budget; at != stop; at = parent_of(at)) {
        if (MS_UNLIKELY(at->batched) && parent_of(at) != stop && !refused)
            return charge_batched(budget, at, count, n, stop, mode, level);
        int here = would_take(at, atomic_load(&at->used), n, mode);
        if (MS_UNLIKELY(here)) {
            refused = here;
            refuser = count;
        }
        levels[count++] = at;
    }
    for (int i = count - 1; !refused && i >= 0; i--) {
        refused = take(levels[i], n, mode, &used[i]);
        if (MS_UNLIKELY(refused)) {
            uint32_t waited = 0;
            refuser = i;
            if (i + 1 < count)
                subtract(levels[i + 1], n, stop, &waited);
            if (waited && mode != CHARGE_IN_TURN)
                ms_line_serve(budget); /* for a moment there seemed to be less */
        }
    }
    if (MS_UNLIKELY(refused)) {
        if (level)
            *level = refuser;
        return refused;
    }
    int told = 0;
    for (int i = 0; i < count; i++) {
        raise_peak(levels[i], used[i]);
        told |= note_soft_passed(levels[i], used[i]);
    }
    return told;
}

int ms_budget_charge_by(ms_budget *budget, int64_t n, ms_budget *stop, enum charge_mode mode, int *level)
{
    return charge(budget, n, stop, mode, level);
}

int ms_budget_charge(ms_budget *budget, int64_t n, const ms_budget *stop, int *level)
{
    return charge(budget, n, (ms_budget *)stop, CHARGE_ASKING, level);
}

int ms_budget_charge_overdraft(ms_budget *budget, int64_t n, int *level)
{
    return charge(budget, n, NULL, CHARGE_OVERDRAFT, level);
}

int ms_budget_charge_existing(ms_budget *budget, int64_t n, int *level)
{
    int result = charge(budget, n, NULL, CHARGE_EXISTING, level);
    if (result >= 0)
        atomic_fetch_add(&budget->charged, n);
    return result == -ENOMEM ? -EOVERFLOW : result;
}

void ms_budget_uncharge(ms_budget *budget, int64_t n, const ms_budget *stop)
{
    give_back(budget, n, (ms_budget *)stop);
}

int ms_budget_uncharge_existing(ms_budget *budget, int64_t n)
{
    int64_t charged = atomic_load(&budget->charged);
    do {
        if (n > charged)
            return -ERANGE;
    } while (!atomic_compare_exchange_weak(&budget->charged, &charged, charged - n));
    give_back(budget, n, NULL);
    return 0;
}

static ms_budget *common_ancestor(ms_budget *a, ms_budget *b)
{
    while (a != b) {
        if (!a || !b)
            return NULL;
        if (a->depth >= b->depth)
            a = parent_of(a);
        else
            b = parent_of(b);
    }
    return a;
}

/* A close came in between: it gave n bytes back above its level that are held elsewhere by now. Limits are not asked,
 * because until that moment the bytes were counted there. */
static void count_again(ms_budget *budget, int64_t n)
{
    for (; budget; budget = parent_of(budget))
        if (atomic_fetch_add(&budget->used, (uint64_t)n) & CLOSED)
            break;
}

int ms_budget_move(ms_budget *from, ms_budget *to, int64_t n, int *level)
{
    ms_budget *common = common_ancestor(from, to), *stop = common;
    /* Bytes of a closed budget were given back above it by its closing: they must be asked for all the way. */
    for (const ms_budget *at = from; at != common; at = parent_of(at))
        if (atomic_load(&at->used) & CLOSED)
            stop = NULL;
    int result = charge(to, n, stop, CHARGE_ASKING, level);
    if (result >= 0 && give_back(from, n, stop) != stop && stop)
        count_again(stop, n);
    return result;
}

int64_t ms_budget_close(ms_budget *budget)
{
    uint64_t before = atomic_fetch_or(&budget->used, CLOSED);
    if (before & CLOSED)
        return 0;
    ms_budget *parent = parent_of(budget);
    int64_t drawn = COUNT(before) + (budget->batched ? take_slack(budget, INT64_MAX) : 0);
    if (parent && drawn)
        give_back(parent, drawn, NULL);
    ms_line_weed(budget);
    return COUNT(before);
}

void ms_budget_return_slack(ms_budget *budget)
{
    int64_t slack = budget->batched ? take_slack(budget, INT64_MAX) : 0;
    if (slack && parent_of(budget))
        give_back(parent_of(budget), slack, NULL);
}

int ms_budget_is_closed(const ms_budget *budget)
{
    for (; budget; budget = parent_of(budget))
        if (atomic_load(&budget->used) & CLOSED)
            return 1;
    return 0;
}

int ms_budget_may_lag(const ms_budget *budget)
{
    for (const ms_budget *above;; budget = above) {
        uint64_t word = atomic_load_explicit(&budget->used, memory_order_relaxed);
        if (word & CLOSED || COUNT(word) >= atomic_load_explicit(&budget->gate, memory_order_relaxed) ||
            atomic_load_explicit(&budget->soft_rearm, memory_order_relaxed) >= 0)
            return 0;
        if (!(above = parent_of(budget)))
            return atomic_load_explicit(&budget->in_line, memory_order_relaxed) == 0;
    }
}

void ms_budget_set_soft_limit(ms_budget *budget, int64_t soft_limit)
{
    atomic_store(&budget->soft_rearm, -1);
    atomic_store(&budget->soft_limit, soft_limit);
    atomic_store(&budget->soft_above, soft_limit);
}

int ms_budget_take_soft_passed(ms_budget *budget)
{
    return (int)atomic_exchange(&budget->soft_passed, 0);
}

void ms_budget_rearm_untold(ms_budget *budget)
{
    for (; budget; budget = parent_of(budget))
        if (ms_budget_take_soft_passed(budget))
            ms_budget_set_soft_limit(budget, atomic_load(&budget->soft_limit));
}

int64_t ms_budget_headroom(const ms_budget *budget)
{
    int64_t headroom = INT64_MAX, slack = 0; /* which the levels above count as used */
    for (const ms_budget *at = budget; at; at = parent_of(at)) {
        int64_t limit = atomic_load(&at->aborted) ? 0 : atomic_load(&at->limit);
        int64_t used = COUNT(atomic_load(&at->used)) - slack;
        int64_t left = limit > used ? limit - used : 0;
        if (limit != INT64_MAX && left < headroom)
            headroom = left;
        slack += slack_of(at);
    }
    return headroom;
}

void ms_budget_read(const ms_budget *budget, ms_budget_stats *stats)
{
    uint64_t word = atomic_load(&budget->used);
    *stats = (ms_budget_stats){
        .used_bytes = COUNT(word),
        .peak_bytes = atomic_load(&budget->peak),
        .limit_bytes = atomic_load(&budget->limit),
        .soft_limit_bytes = atomic_load(&budget->soft_limit),
        .charged_bytes = atomic_load(&budget->charged),
        .slack_bytes = slack_of(budget),
        .waiting = atomic_load(&budget->waiting),
        .aborted = atomic_load(&budget->aborted),
        .closed = (word & CLOSED) != 0,
    };
}
