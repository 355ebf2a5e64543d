/* The accounts that Python's heap is charged to, and who of them refuses. They know no Python: heap_py.c counts, asks
 * before it allocates, and knows when a thread must not be refused. Include budget.h before.
 *
 * A thread counts ahead in steps of MS_HEAP_CREDIT and an account books ahead in steps of MS_HEAP_QUANTUM, so that most
 * allocations cost one addition to what is the thread's own. All functions may run on any thread and need no GIL; they
 * never allocate. */
#ifndef MS_HEAP_H
#define MS_HEAP_H
#include <stdatomic.h>
#include <stdbool.h>

#include "ms.h"

enum {
    MS_HEAP_ACCOUNTS_MAX = 16,
    MS_HEAP_CREDIT = 16 << 10,  /* what a thread counts at a time, in bytes; it holds twice as much at most */
    MS_HEAP_QUANTUM = 64 << 10, /* what an account books at a time */
    MS_HEAP_SLACK = 256 << 10,  /* the most that an account is ahead of what the threads have counted */
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

/* What a thread was counted for and has not allocated; 0 near a limit, where the count is to the byte. Only its own
 * thread writes it. */
struct ms_heap_thread {
    _Atomic int64_t credit_bytes;
    struct ms_heap_thread *next; /* that has credit, under the lock of heap.c, as listed is */
    bool listed;
    bool ended; /* its destructors run: it gets no more credit, which nobody would give back */
};

extern _Thread_local struct ms_heap_thread ms_heap_thread;

/* The count, the threads' credit included, and from which value on an account has to do something. Read without the
 * lock of heap.c, the ceiling is set under it: a reader that is late looks at the accounts a little early or late. */
extern _Atomic int64_t ms_heap_count_bytes, ms_heap_ceiling;

/* Whether an account that the calling thread is inside of would refuse size bytes more, size > 0: its number, or -1.
 * bearable_bytes: by how much the limit may be passed before it does. *told as of ms_heap_open. */
int ms_heap_refuser(int64_t size, int64_t bearable_bytes, int *told);

/* Note that the account has refused: it does not again within MS_HEAP_STEP bytes from here. */
void ms_heap_note_refusal(int account);

/* For tests: have the n-th allocation of the calling thread for which ms_heap_refuser is asked be refused, as if its
 * accounts were full; 0: none. Returns how many were still to come. Until then every allocation of the process asks. */
int64_t ms_heap_inject(int64_t n);

/* ms_heap_count() where the credit does not suffice or becomes too much: credit_bytes is what it would be. */
int ms_heap_count_shared(struct ms_heap_thread *thread, int64_t credit_bytes);

/* Whether size bytes more change nothing that the accounts have to know of. pre: thread is the calling one. */
static inline bool ms_heap_fits(const struct ms_heap_thread *thread, size_t size)
{
    if (MS_LIKELY(size <= (size_t)atomic_load_explicit(&thread->credit_bytes, memory_order_relaxed)))
        return true;
    int64_t count = atomic_load_explicit(&ms_heap_count_bytes, memory_order_relaxed);
    int64_t ceiling = atomic_load_explicit(&ms_heap_ceiling, memory_order_relaxed);
    return size <= INT64_MAX && (int64_t)size <= ceiling - count;
}

/* Count bytes that were allocated or, negative, freed. pre: thread is the calling one.
 * Returns MS_BUDGET_SOFT_PASSED or 0. */
static inline int ms_heap_count(struct ms_heap_thread *thread, int64_t bytes)
{
    int64_t credit = atomic_load_explicit(&thread->credit_bytes, memory_order_relaxed) - bytes;
    if (MS_UNLIKELY((uint64_t)credit > 2 * MS_HEAP_CREDIT))
        return ms_heap_count_shared(thread, credit);
    atomic_store_explicit(&thread->credit_bytes, credit, memory_order_relaxed);
    return 0;
}

#endif
