/* Sentries under threads that open, watch, count, rest, ask and close, over children that end by themselves as well,
 * and across forks. Exit status 0: as promised. */
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

#include "ms.h"
#include "gauge.h"
#include "sentry.h"

enum { ROUNDS = 40, KEEPERS = 3, FORKS = 60, LIMIT_BYTES = 1000000000, TOKEN = 7 };

static int stat_fd;  /* this process's own, in the place of a child's */
static int usage_fd; /* a file of nine digits, which one thread rewrites: nothing is used, or all but a byte */
static atomic_bool has_ended;

static void *rewrite(void *argument)
{
    (void)argument;
    while (!has_ended)
        for (const char *digits = "000000000"; digits; digits = *digits == '0' ? "999999999" : NULL) {
            CHECK(pwrite(usage_fd, digits, 9, 0) == 9);
            usleep(300);
        }
    return NULL;
}

static ms_sentry *open_sentry(int wake_fd)
{
    ms_gauge gauge = {.token = TOKEN,
                      .base_bytes = LIMIT_BYTES,
                      .tell_bytes = LIMIT_BYTES / 2,
                      .give_bytes = 1,
                      .terms = {{usage_fd, "", -1}, {.fd = -1}},
                      .held = {{.fd = -1}}};
    ms_sentry_orders orders = {.gauges = &gauge,
                               .gauge_count = 1,
                               .notice_ns = 1000,
                               .pace = {.fill_bytes_per_s = INT64_MAX, .least_ns = 100000, .most_ns = 1000000},
                               .wake_fd = wake_fd};
    ms_sentry *made = NULL;
    ms_sentry_report report;
    CHECK(ms_sentry_open(&orders, &made) == 0 && ms_sentry_told(made, &report) == 0);
    return made;
}

/* A child that waits for its end, or comes to it at once. */
static int start(bool stays)
{
    pid_t pid = fork();
    if (pid == 0) {
        while (stays)
            pause();
        leave(0);
    }
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    CHECK(pid > 0 && pidfd >= 0);
    return pidfd;
}

/* Returns the signal that the child ended by, or 0. */
static int reap(int pidfd)
{
    siginfo_t info;
    CHECK(waitid((idtype_t)3, (id_t)pidfd, &info, WEXITED) == 0); /* P_PIDFD, newer than some libcs */
    return info.si_code == CLD_EXITED ? 0 : info.si_status;
}

/* A sentry for each child, as a snapshot has. */
static void *keep(void *argument)
{
    (void)argument;
    for (int round = 0; round < ROUNDS; round++) {
        bool stays = round % 2;
        int wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        struct pollfd news = {.fd = wake_fd, .events = POLLIN};
        ms_sentry *sentry = open_sentry(wake_fd);
        ms_sentry_report report = {.token = 0};
        int pidfd = start(stays);
        ms_sentry_watch(sentry, pidfd, 1000);
        ms_sentry_expect(sentry, stat_fd, INT64_MAX - 1, 0); /* so many never come */
        if (stays)
            CHECK(poll(&news, 1, -1) == 1);
        int signo = reap(pidfd);
        ms_sentry_rest(sentry);
        int told = ms_sentry_told(sentry, &report);
        CHECK(report.token == (told ? TOKEN : 0));
        CHECK(signo == SIGKILL ? told : !stays); /* one that comes to its end as it is being ended may be told, too */
        ms_sentry_close(sentry);
        close(pidfd);
        close(wake_fd);
    }
    return NULL;
}

static ms_sentry *shared;
static int shared_pidfd;

static void *bother(void *argument)
{
    (void)argument;
    while (!has_ended) {
        ms_sentry_report report;
        ms_sentry_watch(shared, shared_pidfd, 0);
        ms_sentry_expect(shared, stat_fd, 0, 0);
        CHECK(ms_sentry_told(shared, &report) == 0 || report.token == TOKEN);
        ms_sentry_rest(shared);
    }
    return NULL;
}

/* In a forked child a sentry is there to be closed, whoever held its lock in the parent. */
static void fork_beside(void)
{
    int status;
    pid_t child = fork();
    if (child == 0) {
        ms_sentry_watch(shared, shared_pidfd, 0);
        ms_sentry_expect(shared, stat_fd, 0, 0);
        ms_sentry_rest(shared);
        ms_sentry_close(shared);
        leave(0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
}

int main(void)
{
    char path[] = "/tmp/sentry_threads.XXXXXX";
    pthread_t keepers[KEEPERS], others[3];
    CHECK((usage_fd = mkstemp(path)) >= 0 && unlink(path) == 0);
    CHECK(pwrite(usage_fd, "000000000", 9, 0) == 9);
    CHECK((stat_fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC)) >= 0);
    shared = open_sentry(-1);
    shared_pidfd = start(true);
    for (int i = 0; i < KEEPERS; i++)
        CHECK(pthread_create(&keepers[i], NULL, keep, NULL) == 0);
    for (int i = 0; i < 3; i++)
        CHECK(pthread_create(&others[i], NULL, i ? bother : rewrite, NULL) == 0);
    for (int i = 0; i < FORKS; i++)
        fork_beside();
    for (int i = 0; i < KEEPERS; i++)
        pthread_join(keepers[i], NULL);
    has_ended = true;
    for (int i = 0; i < 3; i++)
        pthread_join(others[i], NULL);
    (void)syscall(SYS_pidfd_send_signal, shared_pidfd, SIGKILL, NULL, 0);
    CHECK(reap(shared_pidfd) == SIGKILL);
    ms_sentry_close(shared);
    close(shared_pidfd);
    close(stat_fd);
    close(usage_fd);
    return 0;
}
