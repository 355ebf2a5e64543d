/* The counters and the line under threads, for ThreadSanitizer and AddressSanitizer: charges, moves, claims, limits,
 * aborts and closes that race must end with every byte given back exactly once and nobody asleep. Exits non-zero, with
 * a line that says where, if they do not. */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <errno.h>
#include <poll.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#include "budget.h"
#include "claim.h"

enum { THREADS = 4, ROUNDS = 20000, LIMIT = 1000 };

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
        leaves[i] = ms_budget_new_batched(middle, 700, i == 0 ? 64 : 0);
        numbers[i] = (void *)i;
    }
    run(charge_and_move, numbers);
    CHECK(stats_of(leaves[0]).slack_bytes < 128 && stats_of(middle).used_bytes == stats_of(leaves[0]).slack_bytes);
    ms_budget_return_slack(leaves[0]);
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
        ms_budget *leaf = ms_budget_new_batched(parent, INT64_MAX, round % 2 ? 100 : 0);
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

static _Atomic int granted, gave_up;

/* Every third claim is left early, by a timeout or at once; a grant that came just then must not be lost. */
static void *wait_in_line(void *argument)
{
    uintptr_t self = (uintptr_t)argument;
    unsigned seed = (unsigned)self + 100;
    for (int i = 0; i < ROUNDS / 20; i++) {
        int64_t n = 1 + rand_r(&seed) % 700;
        ms_claim *claim = ms_claim_new(leaves[self], n, NULL, 0);
        ms_budget_return_slack(leaves[0]); /* as who waits has to see to */
        int patient = i % 3;
        while (ms_claim_state(claim) == MS_CLAIM_IN_LINE) {
            int up = -1;
            int64_t need = ms_claim_shortfall(claim, &up);
            CHECK(need == 0 || (need <= THREADS * 1000 && up >= 0 && up <= 2));
            if (ms_claim_wait(claim, patient ? 60000000000 : 0) == -ETIMEDOUT) {
                CHECK(!patient);
                break;
            }
        }
        int soft_passed = 0;
        if (ms_claim_end(claim, &soft_passed) != MS_CLAIM_GRANTED) {
            CHECK(!patient);
            gave_up++;
            continue;
        }
        granted++;
        sched_yield(); /* so that others find it full */
        CHECK(stats_of(root).used_bytes <= LIMIT && stats_of(leaves[self]).used_bytes <= 700);
        ms_budget_uncharge(leaves[self], n, NULL);
    }
    return NULL;
}

static void *charge_beside_the_line(void *argument)
{
    uintptr_t self = (uintptr_t)argument;
    unsigned seed = (unsigned)self + 200;
    if (self % 2)
        return wait_in_line(argument);
    for (int i = 0; i < ROUNDS; i++) {
        int64_t n = rand_r(&seed) % 400;
        if (ms_budget_charge(leaves[self], n, NULL, NULL) < 0)
            continue;
        if (i % 7 == 0 && ms_budget_move(leaves[self], leaves[(self + 2) % THREADS], n, NULL) >= 0)
            ms_budget_uncharge(leaves[(self + 2) % THREADS], n, NULL);
        else
            ms_budget_uncharge(leaves[self], n, NULL);
        if (i % 100 == 0)
            ms_budget_set_limit(middle, 700 + rand_r(&seed) % 200);
    }
    return NULL;
}

static void make_tree(void)
{
    root = ms_budget_new(NULL, LIMIT);
    middle = ms_budget_new(root, 900);
    for (int i = 0; i < THREADS; i++)
        leaves[i] = ms_budget_new_batched(middle, 700, i == 0 ? 64 : 0);
}

static void drop_tree(void)
{
    ms_budget_return_slack(leaves[0]);
    for (int i = 0; i < THREADS; i++) {
        ms_budget_stats stats = stats_of(leaves[i]);
        CHECK(stats.used_bytes == 0 && stats.waiting == 0);
        ms_budget_unref(leaves[i]);
    }
    CHECK(stats_of(middle).used_bytes == 0 && stats_of(middle).waiting == 0);
    CHECK(stats_of(root).used_bytes == 0 && stats_of(root).waiting == 0);
    ms_budget_unref(middle);
    ms_budget_unref(root);
}

static void race_claims(void *(*work)(void *))
{
    void *numbers[THREADS];
    for (uintptr_t i = 0; i < THREADS; i++)
        numbers[i] = (void *)i;
    make_tree();
    run(work, numbers);
    CHECK(granted > 0 && stats_of(root).peak_bytes <= LIMIT);
    int up;
    ms_budget_return_slack(leaves[0]);
    CHECK(ms_budget_charge(leaves[0], 700, NULL, &up) == 0); /* every gate is open again */
    ms_budget_uncharge(leaves[0], 700, NULL);
    drop_tree();
}

static _Atomic int round_now;

static void spin(int turns)
{
    for (volatile int i = 0; i < turns; i++)
        ;
}

/* Gives back the only byte of each round, once, a little earlier or later than the claim for it is made. */
static void *release_once_a_round(void *argument)
{
    for (int i = 1; i <= ROUNDS; i++) {
        while (atomic_load(&round_now) < i)
            ;
        spin(i % 200);
        ms_budget_uncharge(argument, 1, NULL);
    }
    return NULL;
}

/* A release that comes between a claim's refusal and its place in line is the last one that there will be. */
static void race_one_claim_with_the_only_release(void)
{
    ms_budget *top = ms_budget_new(NULL, 1), *leaf = ms_budget_new(top, 1);
    pthread_t thread;
    CHECK(ms_budget_charge(leaf, 1, NULL, NULL) == 0);
    CHECK(pthread_create(&thread, NULL, release_once_a_round, leaf) == 0);
    for (int i = 1; i <= ROUNDS; i++) {
        atomic_store(&round_now, i);
        spin(i / 200 % 100);
        ms_claim *claim = ms_claim_new(leaf, 1, NULL, 0);
        while (ms_claim_state(claim) == MS_CLAIM_IN_LINE)
            CHECK(ms_claim_wait(claim, 20000000000) == 0);
        CHECK(ms_claim_end(claim, NULL) == MS_CLAIM_GRANTED);
    }
    pthread_join(thread, NULL);
    ms_budget_uncharge(leaf, 1, NULL);
    ms_budget_unref(leaf);
    ms_budget_unref(top);
}

static void *wait_for_the_end(void *argument)
{
    ms_claim *claim = ms_claim_new(argument, 500, NULL, 0);
    CHECK(claim);
    while (ms_claim_state(claim) == MS_CLAIM_IN_LINE)
        CHECK(ms_claim_wait(claim, 60000000000) == 0);
    return (void *)(intptr_t)ms_claim_end(claim, NULL);
}

/* Those below an aborted or closed budget are woken at once, whatever else they wait for; the others stay. */
static void wake_by(void (*finish)(ms_budget *), int error)
{
    for (int round = 0; round < 50; round++) {
        pthread_t threads[2];
        make_tree();
        ms_budget *subtree = ms_budget_new(middle, INT64_MAX), *inside = ms_budget_new(subtree, INT64_MAX);
        CHECK(ms_budget_charge(leaves[0], 600, NULL, NULL) == 0);
        ms_claim *bystander = ms_claim_new(leaves[1], 500, NULL, 0);
        CHECK(pthread_create(&threads[0], NULL, wait_for_the_end, subtree) == 0);
        CHECK(pthread_create(&threads[1], NULL, wait_for_the_end, inside) == 0);
        finish(subtree);
        for (int i = 0; i < 2; i++) {
            void *state;
            pthread_join(threads[i], &state);
            CHECK((intptr_t)state == error);
        }
        CHECK(ms_claim_state(bystander) == MS_CLAIM_IN_LINE);
        ms_budget_uncharge(leaves[0], 600, NULL);
        CHECK(ms_claim_end(bystander, NULL) == MS_CLAIM_GRANTED);
        ms_budget_uncharge(leaves[1], 500, NULL);
        ms_budget_unref(inside);
        ms_budget_unref(subtree);
        drop_tree();
    }
}

static void close_it(ms_budget *budget)
{
    ms_budget_close(budget);
}

static void *release_one_by_one(void *argument)
{
    for (int i = 0; i < 100; i++)
        ms_budget_uncharge(argument, 1, NULL);
    return NULL;
}

static void hear_by_mail(void)
{
    enum { CLAIMS = 100 };
    ms_claim *claims[CLAIMS];
    ms_mailbox *mailbox = ms_mailbox_new();
    ms_budget *budget = ms_budget_new(NULL, CLAIMS);
    pthread_t thread;
    CHECK(mailbox && ms_budget_charge(budget, CLAIMS, NULL, NULL) == 0);
    for (uint64_t i = 0; i < CLAIMS; i++)
        CHECK((claims[i] = ms_claim_new(budget, 1, mailbox, i)));
    CHECK(pthread_create(&thread, NULL, release_one_by_one, budget) == 0);
    for (uint64_t expected = 0; expected < CLAIMS;) { /* first come, first served */
        uint64_t token;
        struct pollfd file = {.fd = ms_mailbox_fd(mailbox), .events = POLLIN};
        CHECK(poll(&file, 1, 60000) == 1);
        while (ms_mailbox_take(mailbox, &token) == 1)
            CHECK(token == expected++);
    }
    pthread_join(thread, NULL);
    for (int i = 0; i < CLAIMS; i++)
        CHECK(ms_claim_end(claims[i], NULL) == MS_CLAIM_GRANTED);
    ms_budget_uncharge(budget, CLAIMS, NULL);
    ms_mailbox_free(mailbox);
    ms_budget_unref(budget);
}

static void start_with_empty_lines_after_a_fork(void)
{
    ms_budget *top = ms_budget_new(NULL, 10), *leaf = ms_budget_new(top, 10);
    CHECK(ms_budget_charge(leaf, 10, NULL, NULL) == 0);
    ms_claim *claim = ms_claim_new(leaf, 5, NULL, 0);
    pid_t child = fork();
    if (child == 0) {
        ms_budget_uncharge(leaf, 1, NULL);
        int taken = ms_budget_charge(leaf, 1, NULL, NULL);
        leave(taken == 0 && ms_claim_state(claim) == -ECANCELED && ms_claim_end(claim, NULL) == -ECANCELED ? 7 : 1);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 7);
    CHECK(ms_claim_state(claim) == MS_CLAIM_IN_LINE && ms_claim_end(claim, NULL) == 0);
    ms_budget_uncharge(leaf, 10, NULL);
    ms_budget_unref(leaf);
    ms_budget_unref(top);
}

int main(void)
{
    race_charges_and_moves();
    race_charges_with_a_close();
    race_claims(wait_in_line);
    race_claims(charge_beside_the_line);
    CHECK(gave_up > 0);
    race_one_claim_with_the_only_release();
    wake_by(ms_budget_abort, -ECANCELED);
    wake_by(close_it, -ESHUTDOWN);
    hear_by_mail();
    start_with_empty_lines_after_a_fork();
    return 0;
}
