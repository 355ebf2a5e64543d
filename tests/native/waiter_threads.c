/* The waiter under threads that add, signal, take and remove at once, and across a fork. Exit status 0: as promised. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#include "ms.h"
#include "emergency.h"
#include "gauge.h"
#include "kept.h"
#include "timer.h"
#include "waiter.h"

enum { SOURCES = 8, ROUNDS = 2000, SIGNALS = SOURCES * ROUNDS };

static ms_waiter *waiter;
static int counters[SOURCES];

static void *signal_all(void *argument)
{
    const uint64_t one = 1;
    (void)argument;
    for (int round = 0; round < ROUNDS; round++)
        for (int i = 0; i < SOURCES; i++)
            CHECK(write(counters[i], &one, sizeof one) == sizeof one);
    return NULL;
}

/* A source of its own that comes and goes beside the others; its events may or may not be taken. */
static void *come_and_go(void *argument)
{
    const uint64_t one = 1;
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    (void)argument;
    for (int round = 0; round < ROUNDS; round++) {
        CHECK(ms_waiter_add(waiter, fd, MS_WAITER_COUNTER, 1000) == 0);
        CHECK(write(fd, &one, sizeof one) == sizeof one);
        CHECK(ms_waiter_remove(waiter, 1000) == 0);
    }
    close(fd);
    return NULL;
}

static void take_all(void)
{
    ms_waiter_report reports[3]; /* fewer than sources: what does not fit must come again */
    uint64_t counted[SOURCES] = {0}, total = 0;
    char text[65536];
    ms_kept files[] = {{.path = "/proc/self/stat", .how = MS_KEPT_READ, .fd = -1},
                       {.path = "/proc/self/absent", .how = MS_KEPT_READ, .fd = -1},
                       {.path = "/proc/self/mountinfo", .how = MS_KEPT_WATCH, .fd = -1},
                       {.path = "/", .how = MS_KEPT_STAT, .fd = -1}};
    int64_t answers[8];
    ms_kept_set kept = {files, 4, answers, text, sizeof text, INT64_MAX / 4};
    /* A gauge that has nothing to tell: the timer goes on in the waiter's thread, and is set anew by each look. */
    int timer_fd = ms_timer_open(), meminfo_fd = open("/proc/meminfo", O_RDONLY | O_CLOEXEC);
    ms_gauge gauge = {
        .tell_bytes = -1, .terms = {{meminfo_fd, "MemAvailable", 1024}, {.fd = -1}}, .held = {{.fd = -1}}};
    ms_waiter_look look = {.rest_ns = 1000,
                           .timer_fd = timer_fd,
                           .timer_ns = 3600000000000,
                           .gauges = &gauge,
                           .gauge_count = 1,
                           .pace = {.fill_bytes_per_s = INT64_MAX, .least_ns = 1000, .most_ns = 3600000000000},
                           .kept = &kept,
                           .alarm_fd = ms_timer_open(),
                           .alarm_ns = 1000};
    CHECK(timer_fd >= 0 && meminfo_fd >= 0 && ms_waiter_add(waiter, timer_fd, MS_WAITER_COUNTER, 1001) == 0);
    int round = 0;
    CHECK(ms_kept_read(&kept) == 3 && answers[4] > 0);
    int fd = files[0].fd;
    while (total < SIGNALS) {
        int count = ms_waiter_wait(waiter, round++ % 2 ? &look : NULL, reports, 3);
        CHECK(count >= 0 && count <= 3);
        for (int i = 0; i < count; i++) {
            CHECK(reports[i].lost_errno == 0 && reports[i].first_ns > 0);
            if (reports[i].token == 1000)
                continue;
            counted[reports[i].token] += reports[i].count;
            total += reports[i].count;
        }
    }
    for (int i = 0; i < SOURCES; i++)
        CHECK(counted[i] == ROUNDS);
    look.gauge_count = MS_GAUGES + 1;
    CHECK(ms_waiter_wait(waiter, &look, reports, 3) == -EINVAL);
    CHECK(ms_waiter_drop_gauges(waiter) == 0 && ms_waiter_remove(waiter, 1001) == 0);
    close(meminfo_fd);
    close(look.alarm_fd);
    close(timer_fd);
    CHECK(answers[0] > 0 && answers[2] == -ENOENT && answers[4] == -EAGAIN && answers[6] == -EISDIR);
    CHECK(ms_kept_read(&kept) == 0 && files[0].fd == fd);
    ms_kept_close(&kept);
    CHECK(files[0].fd == -1 && files[2].fd == -1 && ms_kept_read(&kept) == 2 && answers[2] == -ENOENT);
    ms_kept_close(&kept);
}

/* --- two waiters that share a reserve, and a thread that takes it again and again ----------------------------------
 */

enum { TAKES = 300, RESERVE_BYTES = 64 * 1024, TOKEN = 7 };

static ms_emergency *reserve;
static ms_waiter *sharing[2];
static atomic_int given, has_ended;

/* A gauge that is short of memory all the time. */
static void *give(void *argument)
{
    ms_waiter *own = *(ms_waiter **)argument;
    ms_waiter_report report;
    int timer_fd = ms_timer_open(), meminfo_fd = open("/proc/meminfo", O_RDONLY | O_CLOEXEC);
    ms_gauge gauge = {.token = TOKEN,
                      .tell_bytes = INT64_MAX,
                      .give_bytes = INT64_MAX,
                      .terms = {{meminfo_fd, "MemAvailable", 1024}, {.fd = -1}},
                      .held = {{.fd = -1}}};
    ms_waiter_look look = {.timer_fd = timer_fd,
                           .timer_ns = 3600000000000,
                           .gauges = &gauge,
                           .gauge_count = 1,
                           .pace = {.fill_bytes_per_s = 1 << 30, .least_ns = 1000, .most_ns = 1000000}};
    CHECK(timer_fd >= 0 && meminfo_fd >= 0 && ms_waiter_add(own, timer_fd, MS_WAITER_COUNTER, 1) == 0);
    CHECK(ms_waiter_set_reserve(own, reserve) == 0);
    while (!has_ended) {
        CHECK(ms_waiter_wait(own, &look, &report, 1) >= 0);
        CHECK(look.gave_for == 0 || (look.gave_for == TOKEN && look.gave_at_bytes > 0));
        given += look.gave_for == TOKEN;
    }
    CHECK(ms_waiter_drop_gauges(own) == 0 && ms_waiter_remove(own, 1) == 0);
    close(meminfo_fd);
    close(timer_fd);
    return NULL;
}

static void share_a_reserve(void)
{
    const uint64_t one = 1;
    pthread_t threads[2];
    int status;
    CHECK(ms_emergency_open(0, &reserve) == -EINVAL);
    CHECK(ms_emergency_open(RESERVE_BYTES - 1, &reserve) == 0 && ms_emergency_size(reserve) == RESERVE_BYTES);
    for (int i = 0; i < 2; i++) {
        CHECK(ms_waiter_open(1, &sharing[i]) == 0);
        CHECK(pthread_create(&threads[i], NULL, give, &sharing[i]) == 0);
    }
    for (int round = 0; round < TAKES; round++) {
        CHECK(ms_emergency_take(reserve) == RESERVE_BYTES);
        while (ms_emergency_held(reserve) > 0) /* the processor's time passes, too */
            ;
    }
    pid_t child = fork();
    if (child == 0) {
        int empty = ms_emergency_held(reserve) == 0 && ms_emergency_give(reserve) == 0 &&
                    ms_waiter_set_reserve(sharing[0], reserve) == -ECHILD;
        int own = ms_emergency_take(reserve) == RESERVE_BYTES && ms_emergency_give(reserve) == RESERVE_BYTES;
        leave(empty && own ? 0 : 1);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    has_ended = 1;
    for (int i = 0; i < 2; i++) {
        CHECK(write(ms_waiter_fileno(sharing[i]), &one, sizeof one) == sizeof one);
        pthread_join(threads[i], NULL);
        ms_waiter_close(sharing[i]);
    }
    CHECK(given > 0 && given <= TAKES);
    CHECK(ms_emergency_take(reserve) == RESERVE_BYTES && ms_emergency_take(reserve) == 0);
    CHECK(ms_emergency_close(reserve) == RESERVE_BYTES && ms_emergency_take(reserve) == -ESHUTDOWN);
    ms_emergency_unref(reserve);
}

static void fork_beside(void)
{
    ms_waiter_report report;
    int status;
    pid_t child = fork();
    if (child == 0) {
        int refused = ms_waiter_take(waiter, &report, 1) == -ECHILD && ms_waiter_remove(waiter, 0) == -ECHILD &&
                      ms_waiter_drop_gauges(waiter) == -ECHILD &&
                      ms_waiter_add(waiter, counters[0], MS_WAITER_COUNTER, 5) == -ECHILD &&
                      ms_waiter_wait(waiter, NULL, &report, 1) == -ECHILD;
        ms_waiter_close(waiter);
        leave(refused ? 0 : 1);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0);
}

int main(void)
{
    pthread_t threads[2];
    CHECK(ms_waiter_open(0, &waiter) == -EINVAL && waiter == NULL);
    CHECK(ms_waiter_open(SOURCES + 2, &waiter) == 0);
    for (int i = 0; i < SOURCES; i++) {
        counters[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        CHECK(ms_waiter_add(waiter, counters[i], MS_WAITER_COUNTER, (uint64_t)i) == 0);
    }
    pthread_create(&threads[0], NULL, signal_all, NULL);
    pthread_create(&threads[1], NULL, come_and_go, NULL);
    take_all();
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    fork_beside();
    ms_waiter_close(waiter);
    for (int i = 0; i < SOURCES; i++)
        close(counters[i]);
    share_a_reserve();
    for (int i = 0; i < 100; i++) {
        CHECK(ms_waiter_open(1, &waiter) == 0);
        ms_waiter_close(waiter);
    }
    return 0;
}
