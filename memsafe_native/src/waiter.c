/* The native waiter: see cdef/waiter.h for the contract. */
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "ms.h"
#include "cpuwatch.h"
#include "emergency.h"
#include "gauge.h"
#include "generation.h"
#include "kept.h"
#include "native_thread.h"
#include "owned.h"
#include "source.h"
#include "thread.h"
#include "timer.h"
#include "waiter.h"
#include "watch.h"

enum {
    CAPACITY_MAX = 4096,
    EVENTS_PER_WAIT = 32,
    GRACE_MS = 1000 /* a timer that is so late was not heard */
};

#define STOP   UINT64_MAX
#define GAUGES (UINT64_MAX - 1)

typedef struct slot {
    uint64_t token;
    uint64_t count;
    int64_t first_ns;
    ms_owned file; /* none: free */
    int how;
    int lost_errno;
    uint32_t generation; /* tells an event that was on its way when the slot changed hands */
} slot;

/* Its own descriptors: what its thread waits on, two eventfds, and a timer for when to read the gauges. */
enum { EPOLL, NOTIFY, STOPPER, TIMER, OWN_FDS };

struct ms_waiter {
    pthread_mutex_t lock; /* guards slots, signalled, robbed, watch and reserve; never taken in a forked child */
    pthread_t thread;
    unsigned generation; /* of the process whose it is */
    ms_owned own[OWN_FDS];
    int signalled; /* NOTIFY was written and nothing was taken since */
    int robbed;    /* a descriptor was closed by somebody else: the thread ends */
    int capacity;
    int follows_cpu; /* 0, or -errno */
    ms_cpuwatch cpuwatch;
    ms_emergency *reserve; /* a reference, or NULL */
    ms_watch watch;
    slot slots[];
};

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int is_foreign(const ms_waiter *waiter)
{
    return waiter->generation != ms_generation();
}

static bool has(const ms_waiter *waiter, int which)
{
    return ms_is_ours(&waiter->own[which]);
}

static bool has_all(const ms_waiter *waiter)
{
    return has(waiter, EPOLL) && has(waiter, NOTIFY) && has(waiter, STOPPER) && has(waiter, TIMER);
}

/* Returns 0, or -errno. */
static int drain(const ms_waiter *waiter, int which)
{
    uint64_t ignored;
    return ms_source_drain(waiter->own[which].fd, MS_WAITER_COUNTER, 0, &ignored);
}

/* --- the thread --------------------------------------------------------------------------------------------------- */

static void record(slot *source, uint64_t events, int lost_errno, int64_t at_ns)
{
    if (source->count == 0)
        source->first_ns = at_ns;
    if (__builtin_add_overflow(source->count, events, &source->count))
        source->count = UINT64_MAX;
    source->lost_errno = lost_errno;
}

/* pre: the lock is held. Returns whether there is something new to take. */
static int handle(ms_waiter *waiter, const struct epoll_event *event, int64_t at_ns)
{
    slot *source = &waiter->slots[event->data.u64 & UINT32_MAX];
    if (source->file.fd < 0 || source->lost_errno || source->generation != event->data.u64 >> 32)
        return 0;
    uint64_t events = 0;
    int result = -EBADF, fd = source->file.fd;
    if (ms_is_ours(&source->file))
        result = ms_source_drain(fd, source->how, event->events, &events);
    if (result < 0 && epoll_ctl(waiter->own[EPOLL].fd, EPOLL_CTL_DEL, fd, NULL) < 0)
        waiter->robbed = 1; /* its file is open elsewhere, but no longer here: it would signal for ever */
    if (result == 0 && events == 0)
        return 0;
    record(source, events, -result, at_ns);
    return 1;
}

/* pre: the lock is held. */
static void signal_reader(ms_waiter *waiter)
{
    const uint64_t one = 1;
    if (waiter->signalled)
        return;
    if (!has(waiter, NOTIFY)) {
        waiter->robbed = 1;
        return;
    }
    /* The write can fail only when the counter is full, and then the descriptor is readable already. */
    waiter->signalled = write(waiter->own[NOTIFY].fd, &one, sizeof one) == (ssize_t)sizeof one || errno == EAGAIN;
}

/* pre: the lock is held. */
static void tell(ms_waiter *waiter, int64_t at_ns)
{
    for (int i = 0; i < waiter->capacity; i++)
        if (waiter->slots[i].file.fd >= 0 && waiter->slots[i].file.fd == waiter->watch.timer_fd)
            record(&waiter->slots[i], 1, 0, at_ns);
    signal_reader(waiter);
}

/* pre: the lock is held. */
static void read_after(ms_waiter *waiter, int64_t delay_ns)
{
    if (has(waiter, TIMER))
        (void)ms_timer_set(waiter->own[TIMER].fd, delay_ns);
    else
        waiter->robbed = 1;
}

static bool holds_reserve(const ms_waiter *waiter)
{
    return waiter->reserve && ms_emergency_held(waiter->reserve) > 0;
}

/* Read the gauges, all or those that do not rest, and do what they ask for. pre: the lock is held. Returns after how
 * much CPU time they could have something more to tell. */
static int64_t read_gauges(ms_waiter *waiter, bool all)
{
    ms_watch *watch = &waiter->watch;
    int64_t at_ns = now_ns();
    if (watch->count == 0 || waiter->robbed)
        return INT64_MAX;
    ms_verdict verdict = ms_watch_read(watch, all, at_ns);
    if (verdict.is_news)
        tell(waiter, at_ns); /* first: giving back may have to wait for a fork to end */
    if (verdict.short_of >= 0 && holds_reserve(waiter) && ms_emergency_give(waiter->reserve) > 0) {
        ms_watch_gave(watch, &verdict);
        tell(waiter, at_ns);
    }
    if (watch->has_told && !holds_reserve(waiter)) {
        watch->count = 0; /* until Python has looked */
        return INT64_MAX;
    }
    if (verdict.delay_ns > 0)
        read_after(waiter, verdict.delay_ns);
    return verdict.soonest_ns;
}

static int64_t look_as_cpu_time_passes(void *owner)
{
    ms_waiter *waiter = owner;
    pthread_mutex_lock(&waiter->lock);
    const ms_watch *watch = &waiter->watch;
    bool is_early = now_ns() - watch->read_at_ns < watch->pace.least_ns;
    int64_t next_ns = is_early ? watch->pace.least_ns : read_gauges(waiter, true);
    pthread_mutex_unlock(&waiter->lock);
    return next_ns;
}

/* pre: the lock is held. */
static void handle_all(ms_waiter *waiter, const struct epoll_event *events, int count)
{
    int64_t at_ns = now_ns();
    bool is_time = false;
    int fresh = 0;
    for (int i = 0; i < count; i++) {
        if (events[i].data.u64 != GAUGES)
            fresh |= handle(waiter, &events[i], at_ns);
        else if (has(waiter, TIMER))
            is_time = drain(waiter, TIMER) == 0;
        else
            waiter->robbed = 1;
    }
    if (fresh)
        signal_reader(waiter);
    /* Whatever happened: if it happened because there is nothing left, Python may come too late. */
    if (is_time || fresh)
        read_gauges(waiter, fresh);
}

static void *run(void *argument)
{
    ms_waiter *waiter = argument;
    struct epoll_event events[EVENTS_PER_WAIT];
    pthread_setname_np(pthread_self(), "memsafe-waiter");
    ms_thread_ready();
    for (;;) {
        int ready = epoll_wait(waiter->own[EPOLL].fd, events, EVENTS_PER_WAIT, -1);
        if (ready < 0 && errno != EINTR)
            return NULL;
        for (int i = 0; i < ready; i++)
            if (events[i].data.u64 == STOP)
                return NULL;
        pthread_mutex_lock(&waiter->lock);
        handle_all(waiter, events, ready);
        int robbed = waiter->robbed;
        pthread_mutex_unlock(&waiter->lock);
        if (robbed)
            return NULL;
    }
}

/* --- open and close ----------------------------------------------------------------------------------------------- */

static void close_fds(const ms_waiter *waiter)
{
    for (int i = 0; i < OWN_FDS; i++)
        if (has(waiter, i))
            close(waiter->own[i].fd);
}

/* pre: nobody else uses the waiter. */
static void free_waiter(ms_waiter *waiter)
{
    close_fds(waiter);
    if (waiter->reserve)
        ms_emergency_unref(waiter->reserve);
    free(waiter);
}

/* Take a new descriptor as one of our own. */
static int own(ms_waiter *waiter, int which, int fd)
{
    return fd < 0 ? -errno : ms_own(fd, &waiter->own[which]);
}

static int wait_for(const ms_waiter *waiter, int which, uint64_t token)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = token};
    return epoll_ctl(waiter->own[EPOLL].fd, EPOLL_CTL_ADD, waiter->own[which].fd, &event) < 0 ? -errno : 0;
}

static int open_fds(ms_waiter *waiter)
{
    int result = own(waiter, EPOLL, epoll_create1(EPOLL_CLOEXEC));
    if (result == 0)
        result = own(waiter, NOTIFY, eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (result == 0)
        result = own(waiter, STOPPER, eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (result == 0)
        result = own(waiter, TIMER, ms_timer_open());
    if (result == 0)
        result = wait_for(waiter, STOPPER, STOP);
    return result < 0 ? result : wait_for(waiter, TIMER, GAUGES);
}

int ms_waiter_open(int capacity, ms_waiter **waiter)
{
    if (capacity < 1 || capacity > CAPACITY_MAX)
        return -EINVAL;
    ms_waiter *made = calloc(1, sizeof *made + (size_t)capacity * sizeof made->slots[0]);
    if (!made)
        return -ENOMEM;
    made->generation = ms_generation();
    made->capacity = capacity;
    made->watch.timer_fd = -1;
    made->cpuwatch = (ms_cpuwatch){.look = look_as_cpu_time_passes, .owner = made};
    for (int i = 0; i < OWN_FDS; i++)
        made->own[i].fd = -1;
    for (int i = 0; i < capacity; i++)
        made->slots[i].file.fd = -1;
    pthread_mutex_init(&made->lock, NULL);
    int result = open_fds(made);
    if (result == 0)
        result = ms_native_thread(&made->thread, run, made);
    if (result < 0) {
        free_waiter(made);
        return result;
    }
    made->follows_cpu = ms_cpuwatch_add(&made->cpuwatch); /* without, it does with time that passes */
    *waiter = made;
    return 0;
}

/* Give up a waiter whose thread perhaps cannot be told to end: it may wait for ever on a set that nothing is in any
 * longer. What it may still touch stays; a few KiB and a sleeping thread. */
static void leave(ms_waiter *waiter)
{
    const uint64_t one = 1;
    pthread_mutex_lock(&waiter->lock);
    waiter->robbed = 1;
    for (int i = 0; i < waiter->capacity; i++)
        waiter->slots[i].file.fd = -1;
    waiter->watch.count = 0;
    if (waiter->reserve)
        ms_emergency_unref(waiter->reserve);
    waiter->reserve = NULL;
    if (has(waiter, STOPPER))
        (void)!write(waiter->own[STOPPER].fd, &one, sizeof one);
    pthread_mutex_unlock(&waiter->lock);
    pthread_detach(waiter->thread);
    close_fds(waiter);
}

void ms_waiter_close(ms_waiter *waiter)
{
    const uint64_t one = 1;
    /* A forked child has no such thread, its copy of the lock may be held for ever, and its epoll set is the parent's:
     * all that it may do is close its own descriptors. */
    if (!is_foreign(waiter)) {
        ms_cpuwatch_remove(&waiter->cpuwatch);
        if (!has_all(waiter)) {
            leave(waiter);
            return;
        }
        while (write(waiter->own[STOPPER].fd, &one, sizeof one) < 0 && errno == EINTR)
            ;
        pthread_join(waiter->thread, NULL);
        pthread_mutex_destroy(&waiter->lock);
    }
    free_waiter(waiter);
}

/* --- sources ------------------------------------------------------------------------------------------------------ */

/* pre: the lock is held. Returns an index, or -1. */
static int find(const ms_waiter *waiter, uint64_t token)
{
    for (int i = 0; i < waiter->capacity; i++)
        if (waiter->slots[i].file.fd >= 0 && waiter->slots[i].token == token)
            return i;
    return -1;
}

static int find_free(const ms_waiter *waiter)
{
    for (int i = 0; i < waiter->capacity; i++)
        if (waiter->slots[i].file.fd < 0)
            return i;
    return -1;
}

/* pre: the lock is held. */
static int add_locked(ms_waiter *waiter, int fd, int how, uint64_t token)
{
    if (find(waiter, token) >= 0)
        return -EEXIST;
    int index = find_free(waiter);
    if (index < 0)
        return -ENOSPC;
    slot *source = &waiter->slots[index];
    uint32_t generation = source->generation + 1;
    ms_owned file;
    int result = ms_own(fd, &file);
    if (result == 0)
        result = ms_source_begin(fd, how);
    if (result < 0)
        return result;
    struct epoll_event event = {.events = ms_source_events(how),
                                .data.u64 = (uint64_t)generation << 32 | (uint32_t)index};
    if (epoll_ctl(waiter->own[EPOLL].fd, EPOLL_CTL_ADD, fd, &event) < 0)
        return errno == EEXIST ? -EINVAL : -errno; /* -EEXIST means the token */
    *source = (slot){.token = token, .file = file, .how = how, .generation = generation};
    return 0;
}

int ms_waiter_add(ms_waiter *waiter, int fd, int how, uint64_t token)
{
    if (is_foreign(waiter))
        return -ECHILD;
    int result = ms_source_check(fd, how);
    if (result < 0)
        return result;
    pthread_mutex_lock(&waiter->lock);
    result = add_locked(waiter, fd, how, token);
    pthread_mutex_unlock(&waiter->lock);
    return result;
}

int ms_waiter_remove(ms_waiter *waiter, uint64_t token)
{
    if (is_foreign(waiter))
        return -ECHILD;
    pthread_mutex_lock(&waiter->lock);
    int index = find(waiter, token);
    if (index >= 0) {
        slot *source = &waiter->slots[index];
        if (!source->lost_errno)
            epoll_ctl(waiter->own[EPOLL].fd, EPOLL_CTL_DEL, source->file.fd, NULL);
        source->file.fd = -1;
    }
    pthread_mutex_unlock(&waiter->lock);
    return index < 0 ? -ENOENT : 0;
}

int ms_waiter_fileno(const ms_waiter *waiter)
{
    return waiter->own[NOTIFY].fd;
}

static int has_news(const slot *source)
{
    return source->file.fd >= 0 && (source->count > 0 || source->lost_errno > 0);
}

/* pre: the lock is held. A loss is told once; the slot stays taken until it is removed. */
static ms_waiter_report take_slot(slot *source)
{
    ms_waiter_report report = {source->token, source->count, source->first_ns, source->lost_errno};
    source->count = 0;
    if (source->lost_errno > 0)
        source->lost_errno = -1;
    return report;
}

/* pre: the lock is held. Returns how many were taken. */
static int take_locked(ms_waiter *waiter, ms_waiter_report *reports, int capacity)
{
    int taken = 0, left = 0;
    (void)drain(waiter, NOTIFY);
    waiter->signalled = 0;
    for (int i = 0; i < waiter->capacity; i++) {
        if (!has_news(&waiter->slots[i]))
            continue;
        if (taken < capacity)
            reports[taken++] = take_slot(&waiter->slots[i]);
        else
            left = 1;
    }
    if (left)
        signal_reader(waiter);
    return taken;
}

static int take(ms_waiter *waiter, ms_waiter_look *look, ms_waiter_report *reports, int capacity)
{
    if (is_foreign(waiter))
        return -ECHILD;
    if (capacity < 1)
        return -EINVAL;
    pthread_mutex_lock(&waiter->lock);
    int taken = take_locked(waiter, reports, capacity);
    if (look)
        ms_watch_report(&waiter->watch, look);
    pthread_mutex_unlock(&waiter->lock);
    return taken;
}

int ms_waiter_take(ms_waiter *waiter, ms_waiter_report *reports, int capacity)
{
    return take(waiter, NULL, reports, capacity);
}

/* --- waiting ------------------------------------------------------------------------------------------------------ */

static void rest(int64_t rest_ns)
{
    struct timespec span = {.tv_sec = rest_ns / 1000000000, .tv_nsec = rest_ns % 1000000000};
    if (rest_ns > 0)
        nanosleep(&span, NULL);
}

static int set_look(ms_waiter *waiter, const ms_waiter_look *wanted)
{
    if (wanted->timer_fd < 0 || wanted->timer_ns < 0)
        return 0;
    pthread_mutex_lock(&waiter->lock);
    int result = ms_watch_begin(&waiter->watch, wanted, now_ns());
    if (result == 0) {
        if (waiter->watch.count > 0)
            read_after(waiter, waiter->watch.pace.least_ns);
        result = ms_timer_set(wanted->timer_fd, wanted->timer_ns);
    }
    pthread_mutex_unlock(&waiter->lock);
    return result;
}

int ms_waiter_set_reserve(ms_waiter *waiter, ms_emergency *reserve)
{
    if (is_foreign(waiter))
        return -ECHILD;
    ms_emergency_ref(reserve);
    pthread_mutex_lock(&waiter->lock);
    ms_emergency *before = waiter->reserve;
    waiter->reserve = reserve;
    pthread_mutex_unlock(&waiter->lock);
    if (before)
        ms_emergency_unref(before);
    return 0;
}

int ms_waiter_follows_cpu(const ms_waiter *waiter)
{
    return waiter->follows_cpu;
}

int ms_waiter_drop_gauges(ms_waiter *waiter)
{
    if (is_foreign(waiter))
        return -ECHILD;
    pthread_mutex_lock(&waiter->lock);
    waiter->watch.count = 0;
    pthread_mutex_unlock(&waiter->lock);
    return 0;
}

static int is_robbed(ms_waiter *waiter)
{
    pthread_mutex_lock(&waiter->lock);
    int robbed = waiter->robbed;
    pthread_mutex_unlock(&waiter->lock);
    return robbed || !has_all(waiter);
}

/* How long it may take until the timer makes the thread signal, in ms for poll(); -1: nobody knows. */
static int patience_ms(const ms_waiter *waiter)
{
    int64_t until_ns = waiter->watch.until_ns;
    if (until_ns == 0)
        return -1;
    int64_t left_ns = until_ns - now_ns();
    int64_t left_ms = GRACE_MS + (left_ns > 0 ? left_ns / 1000000 : 0);
    return left_ms < INT_MAX ? (int)left_ms : INT_MAX;
}

static int wait_and_take(ms_waiter *waiter, ms_waiter_look *look, ms_waiter_report *reports, int capacity)
{
    struct pollfd news = {.fd = waiter->own[NOTIFY].fd, .events = POLLIN};
    if (look) {
        int result = set_look(waiter, look);
        if (result < 0)
            return result;
        rest(look->rest_ns);
    }
    int ready = poll(&news, 1, patience_ms(waiter));
    if (ready < 0)
        return -errno;
    if (ready == 0 || (news.revents & POLLNVAL))
        return is_robbed(waiter) ? -EBADF : 0;
    int taken = take(waiter, look, reports, capacity);
    if (taken > 0 && look && look->kept)
        ms_kept_read(look->kept);
    return taken;
}

int ms_waiter_wait(ms_waiter *waiter, ms_waiter_look *look, ms_waiter_report *reports, int capacity)
{
    int watched = look && look->alarm_ns > 0;
    if (is_foreign(waiter))
        return -ECHILD;
    if (is_robbed(waiter))
        return -EBADF;
    /* Should setting it fail, only a warning of what is slow is lost. */
    if (watched)
        ms_timer_stop(look->alarm_fd);
    int taken = wait_and_take(waiter, look, reports, capacity);
    if (watched && taken != -EBADF)
        ms_timer_set(look->alarm_fd, look->alarm_ns);
    return taken;
}
