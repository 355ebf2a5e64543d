/* Children that share our memory until they run their program, as vfork()'s do: nothing is copied, nothing is
 * charged, at any size of the parent.
 *
 * What runs in the child is async-signal-safe, touches nothing of the parent's but its own stack and struct child,
 * and speaks to the kernel directly where libc would act on all threads of the process (setuid and its kin). */
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
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

/* glibc 2.34; elsewhere children that close descriptors take the other way. */
extern int posix_spawn_file_actions_addclosefrom_np(posix_spawn_file_actions_t *, int) __attribute__((weak));

struct child {
    const struct ms_spawn *plan;
    char **paths, **args, **env;
    sigset_t parent_mask;
    int failed_step, failed_index, error; /* written by the child, read by the parent once it is gone */
};

static int last_error(void)
{
    return -errno;
}

/* ---- In the child ------------------------------------------------------------------------------------------- */

static int write_files(struct child *child)
{
    for (size_t i = 0; i < child->plan->writes_count; i++) {
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
    for (int number = 1; number < _NSIG; number++)
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
 * belongs to root from then on. */
static int (*const steps[])(struct child *) = {
    [MS_SPAWN_WRITE] = write_files,     [MS_SPAWN_RLIMIT] = set_rlimits,    [MS_SPAWN_NICE] = set_nice,
    [MS_SPAWN_KEEP] = keep_fds,         [MS_SPAWN_STDIO] = place_stdio,     [MS_SPAWN_CHDIR] = change_dir,
    [MS_SPAWN_SIGNALS] = reset_signals, [MS_SPAWN_SESSION] = start_session, [MS_SPAWN_GROUP] = join_group,
    [MS_SPAWN_CLOSE] = close_others,    [MS_SPAWN_IDS] = set_ids,           [MS_SPAWN_EXEC] = run_program,
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

/* Only what posix_spawn() can do, and what cannot fail there in a way that needs more words than an errno. */
static int is_plain(const struct ms_spawn *plan)
{
    for (int i = 0; i < 3; i++)
        if (plan->stdio[i] != NOT_GIVEN && plan->stdio[i] < FIRST_OTHER_FD)
            return 0;
    return plan->paths.count == 1 && !plan->cwd && !plan->keep_fds_count && plan->process_group < 0 &&
           plan->umask < 0 && plan->uid < 0 && plan->gid < 0 && plan->groups_count < 0 && !plan->writes_count &&
           !plan->rlimits_count && !plan->nice && (!plan->close_fds || posix_spawn_file_actions_addclosefrom_np);
}

static int describe(const struct ms_spawn *plan, posix_spawn_file_actions_t *actions, posix_spawnattr_t *attributes)
{
    short flags = 0;
    int error = 0;
    for (int target = 0; !error && target < 3; target++)
        if (plan->stdio[target] != NOT_GIVEN)
            error = posix_spawn_file_actions_adddup2(actions, plan->stdio[target], target);
    if (!error && plan->close_fds)
        error = posix_spawn_file_actions_addclosefrom_np(actions, FIRST_OTHER_FD);
    if (plan->new_session)
        flags |= POSIX_SPAWN_SETSID;
    if (plan->restore_signals) {
        sigset_t restored;
        sigemptyset(&restored);
        sigaddset(&restored, SIGPIPE);
        sigaddset(&restored, SIGXFSZ);
        posix_spawnattr_setsigdefault(attributes, &restored);
        flags |= POSIX_SPAWN_SETSIGDEF;
    }
    posix_spawnattr_setflags(attributes, flags);
    return -error;
}

static int by_posix_spawn(struct child *child, int *pid)
{
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    int error = -posix_spawn_file_actions_init(&actions);
    if (error)
        return error;
    error = -posix_spawnattr_init(&attributes);
    if (!error) {
        error = describe(child->plan, &actions, &attributes);
        if (!error)
            error = -posix_spawn(pid, child->paths[0], &actions, &attributes, child->args, child->env);
        posix_spawnattr_destroy(&attributes);
    }
    posix_spawn_file_actions_destroy(&actions);
    return error;
}

/* The child's stack lies in our frame, which waits below it: nothing is mapped, so nothing can be refused, and no
 * unmapping has to interrupt the processor that the child ran on. Signals are blocked meanwhile, libc's internal ones
 * too: a handler that ran in the child would run on the parent's data. */
static int by_clone(struct child *child, int *pid)
{
    _Alignas(64) char stack[STACK_BYTES];
    sigset_t all;
    memset(&all, 0xff, sizeof all);
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, &child->parent_mask, SIGSET_BYTES);
    int started = clone(child_main, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, child);
    int error = started < 0 ? last_error() : 0;
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &child->parent_mask, NULL, SIGSET_BYTES);
    if (!error && child->error) {
        error = child->error;
        while (waitpid(started, NULL, 0) < 0 && errno == EINTR)
            ;
    }
    if (!error)
        *pid = started;
    return error;
}

/* As by_clone. A change of ids clears the memory's dumpable flag, and the memory is ours: put it back, or /proc/self
 * would belong to root from now on. */
static int by_clone_keeping_dumpable(struct child *child, int *pid)
{
    int dumpable = prctl(PR_GET_DUMPABLE, 0, 0, 0, 0);
    int result = by_clone(child, pid);
    if (dumpable == 1 && prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) != dumpable)
        prctl(PR_SET_DUMPABLE, dumpable, 0, 0, 0);
    return result;
}

/* Returns where the next list may begin. */
static char **unpack(const struct ms_spawn_strings *strings, char **into)
{
    const char *at = strings->packed;
    for (size_t i = 0; i < strings->count; i++) {
        *into++ = (char *)(uintptr_t)at; /* exec takes it writable and does not write */
        at += strlen(at) + 1;
    }
    *into++ = NULL;
    return into;
}

int ms_spawn(const struct ms_spawn *spawn, int *pid, int *failed_step, int *failed_index)
{
    struct child child = {.plan = spawn, .failed_step = MS_SPAWN_START};
    char **lists = calloc(spawn->paths.count + spawn->args.count + spawn->env.count + 3, sizeof *lists);
    int result = -ENOMEM;
    if (lists) {
        child.paths = lists;
        child.args = unpack(&spawn->paths, child.paths);
        child.env = unpack(&spawn->args, child.args);
        unpack(&spawn->env, child.env);
        /* posix_spawn() tells an errno and not the step: when it fails, our own child tells. */
        if (is_plain(spawn))
            result = by_posix_spawn(&child, pid);
        if (result)
            result = by_clone_keeping_dumpable(&child, pid);
        free(lists);
    }
    if (result) {
        *failed_step = child.failed_step;
        *failed_index = child.failed_index;
    }
    return result;
}
