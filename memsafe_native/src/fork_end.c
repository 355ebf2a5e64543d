#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "fork_internal.h"

/* Linux 5.15; the same number on every architecture. */
#ifndef SYS_process_mrelease
#define SYS_process_mrelease 448
#endif

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

bool ms_fork_lives(int pidfd)
{
    siginfo_t info = {.si_pid = 0};
    /* P_PIDFD, which is 3, is newer than some libcs. */
    if (waitid((idtype_t)3, (id_t)pidfd, &info, WEXITED | WNOHANG | WNOWAIT) < 0)
        return errno != ECHILD && errno != EBADF;
    return info.si_pid == 0;
}

int ms_fork_kill(int pidfd)
{
    return syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0) && errno != ESRCH ? -errno : 0;
}

void ms_fork_reap_memory(int pidfd)
{
    (void)syscall(SYS_process_mrelease, pidfd, 0);
}

int ms_fork_end(int pidfd, int patience_ms)
{
    int result = ms_fork_kill(pidfd);
    if (result < 0)
        return result;
    ms_fork_reap_memory(pidfd);
    const int64_t until_ms = now_ms() + patience_ms;
    struct pollfd child = {.fd = pidfd, .events = POLLIN};
    int ready;
    do {
        int64_t left_ms = until_ms - now_ms();
        ready = poll(&child, 1, left_ms > 0 ? (int)left_ms : 0);
    } while (ready < 0 && errno == EINTR);
    return 0;
}
