#include "fork_internal.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* The guard only polls; what it touches of this is a page or two. Room for the static TLS of whatever is loaded. */
#define GUARD_STACK_BYTES (256 * 1024)

/* ioprio_set(2): linux/ioprio.h came to userspace with 5.15 only. */
#define IOPRIO_WHO_PROCESS 1
#define IOPRIO_IDLE        (3 << 13)

/* What getdents64(2) fills in; glibc declares it since 2.30 only. */
struct entry {
    uint64_t ino;
    int64_t off;
    uint16_t length;
    uint8_t type;
    char name[];
};

/* Before everything else: from here on the OOM killer takes this process before its parent. */
static int raise_oom_score_adj(int value)
{
    char text[16];
    int length = snprintf(text, sizeof text, "%d", value);
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return errno;
    ssize_t written = write(fd, text, (size_t)length);
    int error = written < 0 ? errno : 0;
    close(fd);
    return error;
}

/* Handlers are the parent's answers to the outside: Python's also write to the parent's wake-up descriptor. What the
 * parent ignores stays ignored (SIGPIPE, SIGXFSZ: Python wants EPIPE and EFBIG). Faults of this process's own doing
 * keep their handlers: faulthandler's traceback, a write barrier's SIGBUS. */
static void reset_signal_handlers(void)
{
    for (int signo = 1; signo < NSIG; signo++) {
        struct sigaction action;
        if (signo == SIGSEGV || signo == SIGBUS || signo == SIGFPE || signo == SIGILL || signo == SIGABRT)
            continue;
        if (sigaction(signo, NULL, &action) || action.sa_handler == SIG_IGN || action.sa_handler == SIG_DFL)
            continue;
        memset(&action, 0, sizeof action);
        action.sa_handler = SIG_DFL;
        sigaction(signo, &action, NULL);
    }
    /* Ctrl-C reaches the whole foreground group but is meant for the parent; when it ends, the guard ends us. */
    signal(SIGINT, SIG_IGN);
}

static struct pollfd guard_watch[2]; /* written once in a child before the guard starts, then the guard's own */

static void *guard_main(void *unused)
{
    (void)unused;
    /* Readable when the last thread of the parent has ended; POLLERR when it no longer listens (it called execve). */
    while (poll(guard_watch, 2, -1) < 0 && errno == EINTR)
        ;
    _exit(MS_FORK_ORPHANED);
    return NULL;
}

/* The truth about the parent's end, from the first poll on. */
static int start_guard(int parent_pidfd, int report_fd)
{
    pthread_attr_t attributes;
    pthread_t thread;
    guard_watch[0] = (struct pollfd){.fd = parent_pidfd, .events = POLLIN};
    guard_watch[1] = (struct pollfd){.fd = report_fd, .events = 0};
    int error = pthread_attr_init(&attributes);
    if (error)
        return error;
    error = pthread_attr_setstacksize(&attributes, GUARD_STACK_BYTES);
    if (!error)
        error = pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    if (!error)
        error = pthread_create(&thread, &attributes, guard_main, NULL);
    pthread_attr_destroy(&attributes);
    return error;
}

/* A help for the guard, which a stopped process's thread is not: SIGKILL reaches that too. It follows the thread that
 * forked, which may end long before its process, so only the main thread may give it. A parent that is gone by now is
 * the guard's to notice. */
static void die_with_main_thread(const struct ms_fork_child *child)
{
    if (child->parent_tid == child->parent_pid)
        prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
}

static int lower_priority(int nice_by)
{
    if (!nice_by)
        return 0;
    errno = 0;
    return nice(nice_by) == -1 ? errno : 0;
}

static int lower_io_priority(int idle_io)
{
    if (!idle_io)
        return 0;
    return syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_IDLE) ? errno : 0;
}

static int is_kept(const struct ms_fork_child *child, int fd)
{
    for (size_t i = 0; i < child->keep_count; i++)
        if (child->keep_fds[i] == fd)
            return 1;
    return 0;
}

static int is_anonymous(int fd, const char *kind)
{
    char link[64], target[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (length < 0)
        return 0;
    target[length] = '\0';
    return strcmp(target, kind) == 0;
}

/* What goes on for others as long as any process has it open. A connection, or a pipe, that the parent closes would
 * stay half open: its reader waits for an end that does not come, subprocess.Popen among them, whose own pipe may have
 * been caught by the fork. An epoll and an io_uring are the parent's loop itself: taking a descriptor out here would
 * take it out there. */
static int is_shared_with_others(int fd)
{
    struct stat status;
    if (fstat(fd, &status))
        return 0;
    if (S_ISSOCK(status.st_mode) || S_ISFIFO(status.st_mode))
        return 1;
    return !(status.st_mode & S_IFMT) &&
           (is_anonymous(fd, "anon_inode:[eventpoll]") || is_anonymous(fd, "anon_inode:[io_uring]"));
}

/* The number is not freed but given to a pidfd, which is no use to anybody: a Python object that still believes in it
 * and is finalized here must not close a file that got the number since. */
static int release_descriptors(const struct ms_fork_child *child)
{
    _Alignas(struct entry) char buffer[4096];
    int error = 0;
    int folder = open("/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0)
        return errno;
    for (;;) {
        long filled = syscall(SYS_getdents64, folder, buffer, sizeof buffer);
        if (filled <= 0) {
            if (filled < 0)
                error = errno;
            break;
        }
        for (long at = 0; at < filled;) {
            const struct entry *entry = (const struct entry *)(buffer + at);
            at += entry->length;
            int fd = atoi(entry->name); /* "." and ".." give 0, which stays open */
            if (fd <= 2 || fd == child->report_fd || is_kept(child, fd) || !is_shared_with_others(fd))
                continue;
            if (dup3(child->parent_pidfd, fd, O_CLOEXEC) < 0)
                error = errno;
        }
    }
    close(folder);
    return error;
}

void ms_fork_child_begin(const struct ms_fork_child *child, struct ms_fork_steps *steps)
{
    steps->oom_score_adj = raise_oom_score_adj(child->oom_score_adj);
    die_with_main_thread(child);
    reset_signal_handlers();
    close(child->report_read_fd);
    prctl(PR_SET_NAME, "memsafe-guard", 0, 0, 0);                      /* which the thread inherits */
    steps->guard = start_guard(child->parent_pidfd, child->report_fd); /* before the mask opens: it takes no signals */
    prctl(PR_SET_NAME, "memsafe-snap", 0, 0, 0);
    steps->nice = lower_priority(child->nice); /* after the guard, which is quick where there is something to do */
    steps->idle_io = lower_io_priority(child->idle_io);
    steps->descriptors = release_descriptors(child);
    sigset_t none;
    sigemptyset(&none);
    pthread_sigmask(SIG_SETMASK, &none, NULL);
}

int ms_fork_adopt(pid_t pid, int *pidfd)
{
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (fd < 0 && errno != ESRCH) {
        int error = errno;
        kill(pid, SIGKILL);
        while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
            ;
        return -error;
    }
    if (fd >= 0) {
        /* Where SIGCHLD is ignored or another thread waits for any child, the number may have changed hands between
         * fork() and pidfd_open(): only our own child can be waited for. P_PIDFD, which is 3, is newer than some libcs.
         */
        siginfo_t info;
        if (waitid((idtype_t)3, (id_t)fd, &info, WEXITED | WNOHANG | WNOWAIT) < 0 && errno == ECHILD) {
            close(fd);
            fd = -1;
        }
    }
    *pidfd = fd;
    return 0;
}
