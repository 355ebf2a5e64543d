#include <pthread.h>

#include "ms.h"
#include "budget.h"
#include "heap.h"

struct account {
    ms_budget *budget; /* referenced; NULL: nobody's */
    uint64_t serial;   /* tells it from those that had its place before */
    uint32_t opened;
    bool shut; /* its budget was closed meanwhile, which gave back all */
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

_Atomic int64_t ms_heap_count_bytes;
_Atomic int64_t ms_heap_ceiling = MS_HEAP_UNBOUNDED;
_Atomic int64_t ms_heap_floor = -MS_HEAP_UNBOUNDED;

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

/* Also in a child, whose thread has another id than the one that the lock knows as its owner. */
static void make_lock(void)
{
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ERRORCHECK);
    pthread_mutex_init(&lock, &attributes);
    pthread_mutexattr_destroy(&attributes);
}

static void start(void)
{
    make_lock();
    pthread_atfork(take_lock, drop_lock, make_lock); /* so that no child finds the accounts half-way */
}

static int64_t count_now(void)
{
    int64_t count = atomic_load_explicit(&ms_heap_count_bytes, memory_order_relaxed);
    return count > 0 ? count : 0; /* what was there before the counting began may be freed */
}

static int64_t whole_quanta(int64_t bytes)
{
    return (bytes + MS_HEAP_QUANTUM - 1) / MS_HEAP_QUANTUM * MS_HEAP_QUANTUM;
}

static void set_bounds(void)
{
    int64_t ceiling = MS_HEAP_UNBOUNDED, floor = -MS_HEAP_UNBOUNDED;
    for (int i = 0; i < MS_HEAP_ACCOUNTS_MAX; i++) {
        const struct account *account = &accounts[i];
        if (!account->budget || account->shut)
            continue;
        if (account->booked < ceiling)
            ceiling = account->booked;
        if (account->booked - MS_HEAP_SLACK > floor)
            floor = account->booked - MS_HEAP_SLACK;
    }
    atomic_store_explicit(&ms_heap_ceiling, injecting ? -MS_HEAP_UNBOUNDED : ceiling, memory_order_relaxed);
    atomic_store_explicit(&ms_heap_floor, floor, memory_order_relaxed);
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

/* Book up to count, a little ahead where the limit allows it. Returns as ms_budget_charge. */
static int book(struct account *account, int64_t count)
{
    int result = charge(account, whole_quanta(count) - account->booked);
    if (result == -ENOMEM)
        result = charge(account, count - account->booked);
    if (result >= 0)
        account->pardoned = 0;
    return result;
}

static int book_whatever_the_limit(struct account *account, int64_t count)
{
    int result = book(account, count);
    if (result != -ENOMEM)
        return result;
    int64_t bytes = count - account->booked;
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
    int64_t count = count_now();
    for (int i = 0; i < MS_HEAP_ACCOUNTS_MAX; i++) {
        struct account *account = &accounts[i];
        if (!account->budget || account->shut)
            continue;
        if (account->booked < count)
            told |= book_whatever_the_limit(account, count) == MS_BUDGET_SOFT_PASSED;
        else if (account->booked - count > MS_HEAP_SLACK)
            give_back(account, account->booked - whole_quanta(count));
        if (account->pardoned > count + MS_HEAP_STEP)
            account->pardoned = count + MS_HEAP_STEP;
    }
    set_bounds();
    return told ? MS_BUDGET_SOFT_PASSED : 0;
}

int ms_heap_settle(void)
{
    if (pthread_mutex_lock(&lock))
        return 0;
    int told = settle();
    drop_lock();
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
    int result = book(account, count + size);
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
