/* The counters under threads, for ThreadSanitizer and AddressSanitizer: charges, moves, limits and closes that race
 * must end with every byte given back exactly once. Exits non-zero, with a line that says where, if they do not. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>

#include "budget.h"

enum { THREADS = 4, ROUNDS = 20000, LIMIT = 1000 };

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                            \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static ms_budget *root, *middle, *leaves[THREADS];

static ms_budget_stats stats_of(ms_budget *budget)
{
    ms_budget_stats stats;
    ms_budget_read(budget, &stats);
    return stats;
}

static void *charge_and_move(void *argument)
{
    uintptr_t self = (uintptr_t)argument;
    unsigned seed = (unsigned)self + 1;
    for (int i = 0; i < ROUNDS; i++) {
        int64_t n = rand_r(&seed) % 600;
        int level = -1;
        ms_budget *owner = leaves[self];
        if (ms_budget_charge(owner, n, NULL, &level) < 0) {
            CHECK(level >= 0 && level <= 2);
            continue;
        }
        CHECK(stats_of(root).used_bytes <= LIMIT);
        if (i % 3 == 0 && ms_budget_move(owner, leaves[(self + 1) % THREADS], n, NULL) >= 0)
            owner = leaves[(self + 1) % THREADS];
        if (i % 5 == 0)
            ms_budget_take_soft_passed(middle);
        ms_budget_uncharge(owner, n, NULL);
    }
    return NULL;
}

static void *charge_until_closed(void *argument)
{
    ms_budget *leaf = argument;
    int taken = 0;
    while (taken < ROUNDS && ms_budget_charge(leaf, 3, NULL, NULL) >= 0)
        taken++;
    while (taken--)
        ms_budget_uncharge(leaf, 3, NULL);
    ms_budget_unref(leaf);
    return NULL;
}

static void run(void *(*work)(void *), void *const arguments[])
{
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, work, arguments[i]) == 0);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
}

static void race_charges_and_moves(void)
{
    void *numbers[THREADS];
    root = ms_budget_new(NULL, LIMIT);
    middle = ms_budget_new(root, 900);
    ms_budget_set_soft_limit(middle, 400);
    for (uintptr_t i = 0; i < THREADS; i++) {
        leaves[i] = ms_budget_new(middle, 700);
        numbers[i] = (void *)i;
    }
    run(charge_and_move, numbers);
    CHECK(stats_of(root).used_bytes == 0 && stats_of(middle).used_bytes == 0);
    CHECK(stats_of(root).peak_bytes <= LIMIT && stats_of(middle).peak_bytes <= 900);
    for (int i = 0; i < THREADS; i++) {
        CHECK(stats_of(leaves[i]).used_bytes == 0);
        ms_budget_unref(leaves[i]);
    }
    ms_budget_unref(middle);
    ms_budget_unref(root);
}

static void race_charges_with_a_close(void)
{
    for (int round = 0; round < 50; round++) {
        void *same[THREADS];
        ms_budget *parent = ms_budget_new(NULL, INT64_MAX);
        ms_budget *leaf = ms_budget_new(parent, INT64_MAX);
        pthread_t threads[THREADS];
        for (int i = 0; i < THREADS; i++) {
            same[i] = leaf;
            ms_budget_ref(leaf);
            CHECK(pthread_create(&threads[i], NULL, charge_until_closed, same[i]) == 0);
        }
        ms_budget_close(leaf);
        CHECK(ms_budget_close(leaf) == 0);
        ms_budget_unref(leaf);
        for (int i = 0; i < THREADS; i++)
            pthread_join(threads[i], NULL);
        CHECK(stats_of(parent).used_bytes == 0);
        ms_budget_unref(parent);
    }
}

int main(void)
{
    race_charges_and_moves();
    race_charges_with_a_close();
    return 0;
}
