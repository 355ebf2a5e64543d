/* The accounts that Python's heap is charged to, and who of them refuses. They know no Python: heap_py.c counts, asks
 * before it allocates, and knows when a thread must not be refused. Include budget.h before.
 *
 * An account books ahead in steps of MS_HEAP_QUANTUM, so that most allocations cost one addition. All functions may
 * run on any thread and need no GIL; they never allocate. */
#ifndef MS_HEAP_H
#define MS_HEAP_H
#include <stdatomic.h>
#include <stdbool.h>

#include "ms.h"

enum {
    MS_HEAP_ACCOUNTS_MAX = 16,
    MS_HEAP_QUANTUM = 64 << 10, /* what an account books at a time, in bytes */
    MS_HEAP_SLACK = 256 << 10,  /* the most that an account is ahead of the count */
    MS_HEAP_STEP = 2 << 20, /* what a refused thread may take before it is refused again: an arena and as much more */
};

typedef struct {
    int64_t heap_bytes; /* counted, of the whole process */
    int64_t refusals;   /* by this account, since it was opened */
} ms_heap_stats;

/* Charge the heap to budget as long as the account is open; one account a budget, however often it is opened. What
 * is there already may pass the limit.
 * Returns the account's number, MS_BUDGET_SOFT_PASSED in *told where a soft limit was passed (else 0), or -ESHUTDOWN
 * (the budget is closed), -ENOSPC (MS_HEAP_ACCOUNTS_MAX are open). */
int ms_heap_open(ms_budget *budget, int *told);

/* Close as often as opened; the last one gives back all that is charged. */
void ms_heap_close(int account);

/* Have the calling thread refused by the account, until it has left as often as it entered. leave returns 0, or
 * -EPERM where the calling thread is not inside. */
void ms_heap_enter(int account);
int ms_heap_leave(int account);

void ms_heap_read(int account, ms_heap_stats *stats);

/* What follows is called at each allocation. */

/* No bound of the count: half of the range, so that no sum overflows. */
#define MS_HEAP_UNBOUNDED (INT64_MAX / 2)

/* The count, and between which two values of it no account has to do anything. Read without the lock of heap.c, set
 * under it: a reader that is late looks at the accounts a little early or late. */
extern _Atomic int64_t ms_heap_count_bytes, ms_heap_ceiling, ms_heap_floor;

/* Have the accounts follow the count, whatever their limits. Returns MS_BUDGET_SOFT_PASSED or 0. */
int ms_heap_settle(void);

/* Whether an account that the calling thread is inside of would refuse size bytes more, size > 0: its number, or -1.
 * bearable_bytes: by how much the limit may be passed before it does. *told as of ms_heap_open. */
int ms_heap_refuser(int64_t size, int64_t bearable_bytes, int *told);

/* Note that the account has refused: it does not again within MS_HEAP_STEP bytes from here. */
void ms_heap_note_refusal(int account);

/* For tests: have the n-th allocation of the calling thread for which ms_heap_refuser is asked be refused, as if its
 * accounts were full; 0: none. Returns how many were still to come. Until then every allocation of the process asks. */
int64_t ms_heap_inject(int64_t n);

/* Whether size bytes more change nothing that the accounts have to know of. */
static inline bool ms_heap_fits(size_t size)
{
    int64_t count = atomic_load_explicit(&ms_heap_count_bytes, memory_order_relaxed);
    int64_t ceiling = atomic_load_explicit(&ms_heap_ceiling, memory_order_relaxed);
    return size <= INT64_MAX && (int64_t)size <= ceiling - count;
}

/* Count bytes that were allocated or, negative, freed. Returns as ms_heap_settle. */
static inline int ms_heap_count(int64_t bytes)
{
    int64_t count = atomic_fetch_add_explicit(&ms_heap_count_bytes, bytes, memory_order_relaxed) + bytes;
    if (MS_LIKELY(count <= atomic_load_explicit(&ms_heap_ceiling, memory_order_relaxed) &&
                  count >= atomic_load_explicit(&ms_heap_floor, memory_order_relaxed)))
        return 0;
    return ms_heap_settle();
}

#endif
