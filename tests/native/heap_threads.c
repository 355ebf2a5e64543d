/* The accounts of Python's heap under threads, for the sanitizers: threads that count, ask and are refused while others
 * open and close accounts and one forks must leave every budget at zero. Exits non-zero where they do not. */
#include <pthread.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#include "ms.h"

#include "budget.h"
#include "heap.h"

enum { THREADS = 4, ROUNDS = 3000, LIMIT = 8 << 20 };

static ms_budget *budgets[THREADS];
static _Atomic int64_t refusals;

static int64_t used_by(ms_budget *budget)
{
    ms_budget_stats stats;
    ms_budget_read(budget, &stats);
    return stats.used_bytes;
}

/* As the hooks: ask, count, free. */
static void allocate(int64_t *held, int64_t size)
{
    int told;
    int account = ms_heap_fits(&ms_heap_thread, (size_t)size) ? -1 : ms_heap_refuser(size, 0, &told);
    if (account >= 0) {
        ms_heap_note_refusal(account);
        refusals++;
        return;
    }
    ms_heap_count(&ms_heap_thread, size);
    *held += size;
}

static void *allocate_inside_accounts(void *argument)
{
    uintptr_t self = (uintptr_t)argument;
    unsigned seed = (unsigned)self + 1;
    int64_t held = 0;
    for (int i = 0; i < ROUNDS; i++) {
        int told = 0, account = ms_heap_open(budgets[(self + (unsigned)i) % THREADS], &told);
        CHECK(account >= 0);
        ms_heap_enter(account);
        for (int j = 0; j < 10; j++)
            allocate(&held, rand_r(&seed) % 200000);
        CHECK(ms_heap_leave(account) == 0);
        CHECK(ms_heap_leave(account) == -EPERM);
        ms_heap_close(account);
        if (held > LIMIT / 2 || i % 7 == 0) {
            ms_heap_count(&ms_heap_thread, -held);
            held = 0;
        }
    }
    ms_heap_count(&ms_heap_thread, -held);
    return NULL;
}

static void fork_while_they_run(void)
{
    for (int i = 0; i < 20; i++) {
        pid_t child = fork();
        if (child == 0) {
            int told = 0, account = ms_heap_open(budgets[0], &told); /* hangs where the lock was left locked */
            ms_heap_close(account);
            leave(0);
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child && status == 0);
    }
}

static void refuse_in_steps(void)
{
    int64_t held = 0;
    int told = 0, account = ms_heap_open(budgets[0], &told);
    ms_heap_enter(account);
    int64_t before = refusals;
    while (refusals == before)
        allocate(&held, 1000);
    CHECK(held <= LIMIT && held > LIMIT - 1000);
    CHECK(used_by(budgets[0]) == LIMIT);
    int64_t at = held;
    while (refusals == before + 1)
        allocate(&held, 1000);
    CHECK(held - at <= MS_HEAP_STEP && held - at > MS_HEAP_STEP - 1000);
    CHECK(ms_heap_refuser(1000, MS_HEAP_STEP, &told) == -1); /* which can be borne */
    ms_heap_count(&ms_heap_thread, -held);
    held = 0;
    CHECK(used_by(budgets[0]) == 0);
    allocate(&held, LIMIT); /* exactly at the limit is allowed, and the pardon is forgotten */
    CHECK(held == LIMIT && refusals == before + 2);
    allocate(&held, 1);
    CHECK(refusals == before + 3);
    ms_heap_count(&ms_heap_thread, -held);
    ms_budget_close(budgets[0]);
    held = 0;
    allocate(&held, 2 * LIMIT); /* a closed budget is told nothing any more, and refuses nothing */
    CHECK(refusals == before + 3 && held == 2 * LIMIT);
    ms_heap_count(&ms_heap_thread, -held);
    CHECK(ms_heap_leave(account) == 0);
    ms_heap_close(account);
    CHECK(ms_heap_open(budgets[0], &told) == -ESHUTDOWN);
}

static int64_t credit(void)
{
    return atomic_load(&ms_heap_thread.credit_bytes);
}

static void *hold_credit(void *gate)
{
    ms_heap_count(&ms_heap_thread, 1000);
    CHECK(credit() == MS_HEAP_CREDIT);
    pthread_barrier_wait(gate); /* it holds some */
    pthread_barrier_wait(gate); /* it was looked at */
    ms_heap_count(&ms_heap_thread, -1000);
    CHECK(credit() == MS_HEAP_CREDIT + 1000);
    return NULL;
}

/* What a thread is counted for ahead is in the count that the accounts follow, and in no count that is told. */
static void count_ahead(void)
{
    ms_heap_stats stats;
    pthread_barrier_t gate;
    pthread_t thread;
    pthread_barrier_init(&gate, NULL, 2);
    CHECK(pthread_create(&thread, NULL, hold_credit, &gate) == 0);
    pthread_barrier_wait(&gate);
    ms_heap_read(0, &stats);
    CHECK(stats.heap_bytes == 1000 && ms_heap_count_bytes == 1000 + MS_HEAP_CREDIT);
    int told = 0, account = ms_heap_open(budgets[0], &told);
    ms_heap_enter(account);
    int64_t held = 0, before = refusals;
    while (refusals == before)
        allocate(&held, 1000);
    CHECK(held + 1000 > LIMIT - 1000 && held + 1000 <= LIMIT); /* another's credit takes nothing from the limit */
    CHECK(credit() == 0);                                      /* and near it there is none */
    CHECK(ms_heap_leave(account) == 0);
    ms_heap_count(&ms_heap_thread, -held);
    ms_heap_close(account);
    pid_t child = fork();
    if (child == 0) {
        ms_heap_read(0, &stats);
        leave(stats.heap_bytes == 1000 && ms_heap_count_bytes - credit() == 1000 ? 0 : 1);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    pthread_barrier_wait(&gate);
    pthread_join(thread, NULL);
    ms_heap_read(0, &stats);
    CHECK(stats.heap_bytes == 0 && ms_heap_count_bytes == credit());
    pthread_barrier_destroy(&gate);
}

int main(void)
{
    for (int i = 0; i < THREADS; i++)
        budgets[i] = ms_budget_new(NULL, LIMIT);
    int told = 0, all[MS_HEAP_ACCOUNTS_MAX];
    ms_budget *others[MS_HEAP_ACCOUNTS_MAX];
    for (int i = 0; i < MS_HEAP_ACCOUNTS_MAX; i++) {
        others[i] = ms_budget_new(NULL, LIMIT);
        all[i] = ms_heap_open(others[i], &told);
        CHECK(all[i] == i);
    }
    CHECK(ms_heap_open(budgets[0], &told) == -ENOSPC);
    for (int i = 0; i < MS_HEAP_ACCOUNTS_MAX; i++) {
        ms_heap_close(all[i]);
        ms_budget_unref(others[i]);
    }

    pthread_t threads[THREADS];
    for (uintptr_t i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, allocate_inside_accounts, (void *)i) == 0);
    fork_while_they_run();
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    ms_heap_stats stats;
    ms_heap_read(0, &stats);
    CHECK(stats.heap_bytes == 0 && ms_heap_count_bytes == 0); /* ended threads keep no credit */
    count_ahead();
    for (int i = 0; i < THREADS; i++)
        CHECK(used_by(budgets[i]) == 0);
    refuse_in_steps();
    for (int i = 0; i < THREADS; i++)
        ms_budget_unref(budgets[i]);
    return 0;
}
