#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "ms.h"
#include "budget.h"

/* The top bit of `used` says closed. It shares the word with the count so that one atomic operation both closes and
 * learns what is left: every byte is then given back to the ancestors exactly once, by the closing or by its owner. */
#define CLOSED      (UINT64_C(1) << 63)
#define COUNT(word) ((int64_t)((word) & ~CLOSED))

struct ms_budget {
    _Atomic uint64_t used;
    _Atomic int64_t limit;
    _Atomic int64_t peak;
    _Atomic int64_t soft_above; /* passing it is told; INT64_MAX while disarmed */
    _Atomic int64_t soft_rearm; /* falling to it arms again; -1 while armed */
    _Atomic int64_t soft_limit;
    _Atomic int64_t charged; /* without a reservation, this level only */
    ptrdiff_t parent;        /* bytes from here to the parent, 0 at the root */
    uint32_t depth;          /* 0 at the root */
    _Atomic uint32_t references;
    _Atomic uint32_t soft_passed; /* 1 until somebody takes it */
};

static ms_budget *parent_of(const ms_budget *budget)
{
    return budget->parent ? (ms_budget *)((uintptr_t)budget + (uintptr_t)budget->parent) : NULL;
}

ms_budget *ms_budget_new(ms_budget *parent, int64_t limit)
{
    if (parent && parent->depth + 1 >= MS_BUDGET_DEPTH_MAX) {
        errno = EINVAL;
        return NULL;
    }
    /* Whole cache lines, so that two budgets never share one. */
    ms_budget *budget = aligned_alloc(64, (sizeof *budget + 63) & ~(size_t)63);
    if (!budget)
        return NULL;
    memset(budget, 0, sizeof *budget);
    atomic_init(&budget->limit, limit);
    atomic_init(&budget->soft_above, INT64_MAX);
    atomic_init(&budget->soft_rearm, -1);
    atomic_init(&budget->soft_limit, INT64_MAX);
    atomic_init(&budget->references, 1);
    if (parent) {
        ms_budget_ref(parent);
        budget->parent = (ptrdiff_t)((uintptr_t)parent - (uintptr_t)budget);
        budget->depth = parent->depth + 1;
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

static void give_back(ms_budget *budget, int64_t n, const ms_budget *stop)
{
    for (; budget != stop; budget = parent_of(budget)) {
        uint64_t before = atomic_fetch_sub_explicit(&budget->used, (uint64_t)n, memory_order_acq_rel);
        if (MS_UNLIKELY(before & CLOSED))
            return;
        rearm_if_below(budget, COUNT(before) - n);
    }
}

/* Whether a level that holds `word` would take n more: 0, -ENOMEM or -ESHUTDOWN. */
static inline int would_take(uint64_t word, int64_t limit, int64_t n)
{
    if (MS_UNLIKELY(word & CLOSED))
        return -ESHUTDOWN;
    if (MS_LIKELY(COUNT(word) <= limit - n))
        return 0;
    /* Nothing never passes a limit, though others may have; only an aborted budget (limit < 0) refuses it. */
    return n == 0 && limit >= 0 ? 0 : -ENOMEM;
}

static int take(ms_budget *budget, int64_t n, int ask_limit, int64_t *used)
{
    uint64_t word = atomic_load_explicit(&budget->used, memory_order_relaxed);
    do {
        int64_t limit = ask_limit ? atomic_load_explicit(&budget->limit, memory_order_relaxed) : INT64_MAX;
        int refused = would_take(word, limit, n);
        if (MS_UNLIKELY(refused))
            return refused;
    } while (!atomic_compare_exchange_weak_explicit(&budget->used, &word, word + (uint64_t)n, memory_order_acq_rel,
                                                    memory_order_relaxed));
    *used = COUNT(word) + n;
    return 0;
}

static int charge(ms_budget *budget, int64_t n, const ms_budget *stop, int ask_limit, int *level)
{
    ms_budget *levels[MS_BUDGET_DEPTH_MAX];
    int64_t used[MS_BUDGET_DEPTH_MAX];
    int count = 0, refused = 0, refuser = 0;

    /* Look first: a charge that is bound to be refused must not, even for a moment, stand in the way of others. */
    for (ms_budget *at = budget; at != stop; at = parent_of(at)) {
        int64_t limit = ask_limit ? atomic_load_explicit(&at->limit, memory_order_relaxed) : INT64_MAX;
        int here = would_take(atomic_load_explicit(&at->used, memory_order_relaxed), limit, n);
        if (MS_UNLIKELY(here)) {
            refused = here;
            refuser = count;
        }
        levels[count++] = at;
    }
    for (int i = count - 1; !refused && i >= 0; i--) {
        refused = take(levels[i], n, ask_limit, &used[i]);
        if (MS_UNLIKELY(refused)) {
            refuser = i;
            if (i + 1 < count)
                give_back(levels[i + 1], n, stop);
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

int ms_budget_charge(ms_budget *budget, int64_t n, const ms_budget *stop, int *level)
{
    return charge(budget, n, stop, 1, level);
}

int ms_budget_charge_existing(ms_budget *budget, int64_t n, int *level)
{
    int result = charge(budget, n, NULL, 0, level);
    if (result >= 0)
        atomic_fetch_add(&budget->charged, n);
    return result == -ENOMEM ? -EOVERFLOW : result;
}

void ms_budget_uncharge(ms_budget *budget, int64_t n, const ms_budget *stop)
{
    give_back(budget, n, stop);
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

static const ms_budget *common_ancestor(const ms_budget *a, const ms_budget *b)
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

int ms_budget_move(ms_budget *from, ms_budget *to, int64_t n, int *level)
{
    const ms_budget *stop = common_ancestor(from, to);
    /* Bytes of a closed budget were given back above it by its closing: they must be asked for all the way. */
    for (const ms_budget *at = from; at != stop; at = parent_of(at))
        if (atomic_load(&at->used) & CLOSED)
            stop = NULL;
    int result = charge(to, n, stop, 1, level);
    if (result >= 0)
        give_back(from, n, stop);
    return result;
}

int64_t ms_budget_close(ms_budget *budget)
{
    uint64_t before = atomic_fetch_or(&budget->used, CLOSED);
    if (before & CLOSED)
        return 0;
    ms_budget *parent = parent_of(budget);
    if (parent && COUNT(before))
        give_back(parent, COUNT(before), NULL);
    return COUNT(before);
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
    for (; budget; budget = parent_of(budget)) {
        uint64_t word = atomic_load_explicit(&budget->used, memory_order_relaxed);
        if (word & CLOSED || COUNT(word) >= atomic_load_explicit(&budget->limit, memory_order_relaxed) ||
            atomic_load_explicit(&budget->soft_rearm, memory_order_relaxed) >= 0)
            return 0;
    }
    return 1;
}

void ms_budget_set_limit(ms_budget *budget, int64_t limit)
{
    atomic_store(&budget->limit, limit);
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

int64_t ms_budget_headroom(const ms_budget *budget)
{
    int64_t headroom = INT64_MAX;
    for (const ms_budget *at = budget; at; at = parent_of(at)) {
        int64_t limit = atomic_load(&at->limit);
        int64_t used = COUNT(atomic_load(&at->used));
        int64_t left = limit > used ? limit - used : 0;
        if (limit != INT64_MAX && left < headroom)
            headroom = left;
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
        .closed = (word & CLOSED) != 0,
    };
}
