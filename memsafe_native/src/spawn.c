/* Children that share our memory until they run their program, as vfork()'s do: nothing is copied, nothing is
 * charged, at any size of the parent.
 *
 * What runs in the child is async-signal-safe, touches nothing of the parent's but its own stack and struct child,
 * and speaks to the kernel directly where libc would act on all threads of the process (setuid and its kin). */
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ms.h"
#include "spawn.h"

#ifndef SYS_close_range
#define SYS_close_range 436 /* Linux 5.9; the same number everywhere but on alpha */
#endif
#ifdef SYS_setreuid32 /* 32-bit machines: the plain numbers are the calls with 16-bit ids */
#define SET_GROUPS SYS_setgroups32
#define SET_GIDS   SYS_setregid32
#define SET_UIDS   SYS_setreuid32
#else
#define SET_GROUPS SYS_setgroups
#define SET_GIDS   SYS_setregid
#define SET_UIDS   SYS_setreuid
#endif

#define STACK_BYTES    (16 * 1024) /* the child's frames take 5 KiB */
#define SIGSET_BYTES   (_NSIG / 8) /* of the kernel's set, which is smaller than libc's */
#define FIRST_OTHER_FD 3
#define NOT_GIVEN      (-1)

struct child {
    const struct ms_spawn *plan;
    char **paths, **args, **env;
    sigset_t parent_mask;
    int born_in_cgroup, handlers_gone;    /* what the kernel did already, as clone3() was asked to */
    int failed_step, failed_index, error; /* written by the child, read by the parent once it is gone */
};

static int last_error(void)
{
    return -errno;
}

/* ---- In the child ------------------------------------------------------------------------------------------- */

static int write_files(struct child *child)
{
    for (size_t i = child->born_in_cgroup ? 1 : 0; i < child->plan->writes_count; i++) {
        const struct ms_spawn_write *file = &child->plan->writes[i];
        child->failed_index = (int)i;
        int fd = open(file->path, O_WRONLY | O_CLOEXEC);
        if (fd < 0)
            return last_error();
        ssize_t written = write(fd, file->text, strlen(file->text));
        int error = written < 0 ? last_error() : 0;
        close(fd);
        if (error)
            return error;
    }
    return 0;
}

#ifdef __GLIBC__ /* an enum there, an int elsewhere */
#define RESOURCE(number) ((__rlimit_resource_t)(number))
#else
#define RESOURCE(number) (number)
#endif

static int set_rlimits(struct child *child)
{
    for (size_t i = 0; i < child->plan->rlimits_count; i++) {
        const struct ms_spawn_rlimit *limit = &child->plan->rlimits[i];
        struct rlimit value = {.rlim_cur = (rlim_t)limit->soft, .rlim_max = (rlim_t)limit->hard};
        child->failed_index = (int)i;
        if (setrlimit(RESOURCE(limit->resource), &value))
            return last_error();
    }
    return 0;
}

static int set_nice(struct child *child)
{
    if (!child->plan->nice)
        return 0;
    errno = 0;
    return nice(child->plan->nice) == -1 && errno ? last_error() : 0;
}

static int set_inheritable(int fd)
{
    int flags = fcntl(fd, F_GETFD);
    return flags < 0 || fcntl(fd, F_SETFD, flags & ~FD_CLOEXEC) ? last_error() : 0;
}

static int keep_fds(struct child *child)
{
    int error = 0;
    for (size_t i = 0; !error && i < child->plan->keep_fds_count; i++)
        error = set_inheritable(child->plan->keep_fds[i]);
    return error;
}

static int place_stdio(struct child *child)
{
    int fds[3];
    memcpy(fds, child->plan->stdio, sizeof fds);
    for (int target = 1; target < 3; target++) /* move away what an earlier target is about to overwrite */
        if (fds[target] != NOT_GIVEN && fds[target] < target) {
            fds[target] = fcntl(fds[target], F_DUPFD_CLOEXEC, FIRST_OTHER_FD);
            if (fds[target] < 0)
                return last_error();
        }
    for (int target = 0; target < 3; target++) {
        int error = 0;
        if (fds[target] == target)
            error = set_inheritable(target);
        else if (fds[target] != NOT_GIVEN && dup2(fds[target], target) < 0)
            error = last_error();
        if (error)
            return error;
    }
    return 0;
}

static int change_dir(struct child *child)
{
    if (child->plan->cwd && chdir(child->plan->cwd))
        return last_error();
    if (child->plan->umask >= 0)
        umask((mode_t)child->plan->umask);
    return 0;
}

/* Our handlers are code of the parent: gone before the first signal can come. Ignored signals stay ignored. */
static int reset_signals(struct child *child)
{
    struct sigaction by_default = {.sa_handler = SIG_DFL}, now;
    for (int number = 1; number < _NSIG && !child->handlers_gone; number++)
        if (!sigaction(number, NULL, &now) && now.sa_handler != SIG_DFL && now.sa_handler != SIG_IGN)
            sigaction(number, &by_default, NULL);
    if (child->plan->restore_signals) {
        sigaction(SIGPIPE, &by_default, NULL);
        sigaction(SIGXFSZ, &by_default, NULL);
    }
    return syscall(SYS_rt_sigprocmask, SIG_SETMASK, &child->parent_mask, NULL, SIGSET_BYTES) ? last_error() : 0;
}

static int start_session(struct child *child)
{
    return child->plan->new_session && setsid() < 0 ? last_error() : 0;
}

static int join_group(struct child *child)
{
    return child->plan->process_group >= 0 && setpgid(0, child->plan->process_group) ? last_error() : 0;
}

struct directory_entry { /* of getdents64(2) */
    uint64_t inode;
    int64_t offset;
    unsigned short length;
    unsigned char type;
    char name[];
};

/* Before Linux 5.9. Closing while listing is safe: the kernel lists descriptors by number. */
static int close_listed(unsigned first, unsigned last)
{
    _Alignas(struct directory_entry) char buffer[4096];
    int listing = open("/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (listing < 0)
        return last_error();
    long got;
    while ((got = syscall(SYS_getdents64, listing, buffer, sizeof buffer)) > 0)
        for (long at = 0; at < got;) {
            const struct directory_entry *entry = (const void *)(buffer + at);
            unsigned fd = 0;
            at += entry->length;
            if (entry->name[0] == '.')
                continue;
            for (const char *digit = entry->name; *digit; digit++)
                fd = fd * 10 + (unsigned)(*digit - '0');
            if (fd >= first && fd <= last && fd != (unsigned)listing)
                close((int)fd);
        }
    close(listing);
    return 0;
}

static void close_span(unsigned first, unsigned last)
{
    if (first > last || !syscall(SYS_close_range, first, last, 0) || !close_listed(first, last))
        return;
    struct rlimit limit; /* no /proc either */
    if (getrlimit(RLIMIT_NOFILE, &limit))
        return;
    for (unsigned fd = first; fd <= last && fd < limit.rlim_cur; fd++)
        close((int)fd);
}

static int close_others(struct child *child)
{
    unsigned next = FIRST_OTHER_FD;
    if (!child->plan->close_fds)
        return 0;
    for (size_t i = 0; i < child->plan->keep_fds_count; i++) {
        unsigned kept = (unsigned)child->plan->keep_fds[i];
        if (kept < next)
            continue;
        close_span(next, kept - 1);
        next = kept + 1;
    }
    close_span(next, ~0U);
    return 0;
}

/* A process of the new user must not trace this one, whose memory is the parent's. The kernel sees to that by itself
 * unless fs.suid_dumpable says otherwise. */
static int set_ids(struct child *child)
{
    const struct ms_spawn *plan = child->plan;
    if (plan->groups_count >= 0 && syscall(SET_GROUPS, (size_t)plan->groups_count, plan->groups))
        return last_error();
    if ((plan->gid >= 0 || plan->uid >= 0) && prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
        return last_error();
    if (plan->gid >= 0 && syscall(SET_GIDS, (gid_t)plan->gid, (gid_t)plan->gid))
        return last_error();
    if (plan->uid >= 0 && syscall(SET_UIDS, (uid_t)plan->uid, (uid_t)plan->uid))
        return last_error();
    return 0;
}

static int run_program(struct child *child)
{
    int worth_telling = 0;
    for (char **path = child->paths; *path; path++) {
        execve(*path, child->args, child->env);
        if (!worth_telling && errno != ENOENT && errno != ENOTDIR)
            worth_telling = last_error();
    }
    return worth_telling ? worth_telling : last_error();
}

/* What needs the parent's privileges comes before the ids; descriptors are closed before them too, because /proc/self
 * belongs to root from then on, and before the limits, because moving and listing them takes some: RLIMIT_NOFILE. */
static int (*const steps[])(struct child *) = {
    [MS_SPAWN_WRITE] = write_files, [MS_SPAWN_KEEP] = keep_fds,         [MS_SPAWN_STDIO] = place_stdio,
    [MS_SPAWN_CHDIR] = change_dir,  [MS_SPAWN_SIGNALS] = reset_signals, [MS_SPAWN_SESSION] = start_session,
    [MS_SPAWN_GROUP] = join_group,  [MS_SPAWN_CLOSE] = close_others,    [MS_SPAWN_RLIMIT] = set_rlimits,
    [MS_SPAWN_NICE] = set_nice,     [MS_SPAWN_IDS] = set_ids,           [MS_SPAWN_EXEC] = run_program,
};

static int child_main(void *argument)
{
    struct child *child = argument;
    for (int step = MS_SPAWN_WRITE; step <= MS_SPAWN_EXEC; step++) {
        int error = steps[step](child);
        if (error) {
            child->failed_step = step;
            child->error = error;
            break;
        }
    }
    _exit(127);
}

/* ---- In the parent ------------------------------------------------------------------------------------------ */

/* struct clone_args of <linux/sched.h>, which older headers lack. */
struct clone3_arguments {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};

#define FLAG_CLEAR_SIGHAND UINT64_C(0x100000000) /* Linux 5.5 */
#define FLAG_INTO_CGROUP   UINT64_C(0x200000000) /* Linux 5.7 */

/* libc has no clone3() that starts a function on a stack of ours. Returns the pid, or -errno. */
#if defined(__x86_64__) && defined(__LP64__)
static long clone3(struct clone3_arguments *arguments, struct child *child)
{
    long result;
    __asm__ volatile("syscall\n\t"
                     "testq %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "movq %[child], %%rdi\n\t"
                     "callq *%[main]\n\t" /* does not return */
                     "hlt\n"
                     "1:"
                     : "=a"(result)
                     : "a"(435L), "D"(arguments), "S"(sizeof *arguments), [child] "r"(child), [main] "r"(child_main)
                     : "rcx", "r11", "cc", "memory");
    return result;
}
#else
static long clone3(struct clone3_arguments *arguments, struct child *child)
{
    (void)arguments, (void)child;
    return -ENOSYS;
}
#endif

/* By clone3() where that is to be had: the kernel then resets all handlers at once, and the child is born in the
 * cgroup. What clone3() refuses is tried by clone(), whose child does both itself and tells what was refused; but not
 * where the cgroup has no room for another process, or the machine none at all. */
static long start(struct child *child, char *stack)
{
    int cgroup = child->plan->birthplace ? open(child->plan->birthplace, O_PATH | O_DIRECTORY | O_CLOEXEC) : -1;
    struct clone3_arguments arguments = {
        .flags = CLONE_VM | CLONE_VFORK | FLAG_CLEAR_SIGHAND | (cgroup < 0 ? 0 : FLAG_INTO_CGROUP),
        .exit_signal = SIGCHLD,
        .stack = (uintptr_t)stack,
        .stack_size = STACK_BYTES,
        .cgroup = cgroup < 0 ? 0 : (uint64_t)cgroup,
    };
    child->born_in_cgroup = cgroup >= 0;
    child->handlers_gone = 1;
    long started = clone3(&arguments, child);
    if (cgroup >= 0)
        close(cgroup);
    if (started > 0 || started == -EAGAIN || started == -ENOMEM)
        return started;
    child->born_in_cgroup = child->handlers_gone = 0;
    int pid = clone(child_main, stack + STACK_BYTES, CLONE_VM | CLONE_VFORK | SIGCHLD, child);
    return pid < 0 ? last_error() : pid;
}

/* The child's stack lies in our frame, which waits below it: nothing is mapped, so nothing can be refused, and no
 * unmapping has to interrupt the processor that the child ran on. Signals are blocked meanwhile, libc's internal ones
 * too: a handler that ran in the child would run on the parent's data. */
static int run_child(struct child *child, int *pid)
{
    _Alignas(64) char stack[STACK_BYTES];
    sigset_t all;
    memset(&all, 0xff, sizeof all);
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, &child->parent_mask, SIGSET_BYTES);
    long started = start(child, stack);
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &child->parent_mask, NULL, SIGSET_BYTES);
    if (started < 0)
        return (int)started;
    if (!child->error) {
        *pid = (int)started;
        return 0;
    }
    while (waitpid((pid_t)started, NULL, 0) < 0 && errno == EINTR)
        ;
    return child->error;
}

static pthread_mutex_t changing_ids = PTHREAD_MUTEX_INITIALIZER;

static void lock_ids(void)
{
    pthread_mutex_lock(&changing_ids);
}

static void unlock_ids(void)
{
    pthread_mutex_unlock(&changing_ids);
}

/* A fork waits for the spawns under way: its child would inherit the flag as they have it, and a lock held by nobody.
 */
static __attribute__((constructor)) void hold_back_forks(void)
{
    pthread_atfork(lock_ids, unlock_ids, unlock_ids);
}

/* A change of ids clears the memory's dumpable flag, and the memory is ours: put it back, or /proc/self would belong
 * to root from now on. One at a time: another thread would take the cleared flag for the one to put back, or put it
 * back while our child, of the new user, still has our memory. */
static int run_child_as_another(struct child *child, int *pid)
{
    lock_ids();
    int dumpable = prctl(PR_GET_DUMPABLE, 0, 0, 0, 0);
    int result = run_child(child, pid);
    if (dumpable == 1 && prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) != dumpable)
        prctl(PR_SET_DUMPABLE, dumpable, 0, 0, 0);
    unlock_ids();
    return result;
}

static size_t count(const struct ms_spawn_strings *strings)
{
    size_t number = 0;
    const char *at = strings->packed, *end = at + strings->size_bytes;
    for (; at < end; at += strlen(at) + 1)
        number++;
    return number;
}

/* Returns where the next list may begin. */
static char **unpack(const struct ms_spawn_strings *strings, char **into)
{
    const char *at = strings->packed, *end = at + strings->size_bytes;
    for (; at < end; at += strlen(at) + 1)
        *into++ = (char *)(uintptr_t)at; /* exec takes it writable and does not write */
    *into++ = NULL;
    return into;
}

int ms_spawn(const struct ms_spawn *spawn, struct ms_spawn_result *out)
{
    struct child child = {.plan = spawn, .failed_step = MS_SPAWN_START};
    char **lists = calloc(count(&spawn->paths) + count(&spawn->args) + count(&spawn->env) + 3, sizeof *lists);
    int result = -ENOMEM;
    if (lists) {
        child.paths = lists;
        child.args = unpack(&spawn->paths, child.paths);
        child.env = unpack(&spawn->args, child.args);
        unpack(&spawn->env, child.env);
        int other_ids = spawn->uid >= 0 || spawn->gid >= 0;
        result = (other_ids ? run_child_as_another : run_child)(&child, &out->pid);
        free(lists);
    }
    if (result) {
        out->failed_step = child.failed_step;
        out->failed_index = child.failed_index;
    }
    return result;
}
