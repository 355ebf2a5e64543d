/* The halves of a supervised fork that need no Python; fork_py.c joins them. */
#ifndef MS_FORK_INTERNAL_H
#define MS_FORK_INTERNAL_H

#include <stdbool.h>

#include "ms.h"

/* Exit status of a child that ended itself because its parent was gone. Nobody is left to read it. */
#define MS_FORK_ORPHANED 121

struct ms_fork_child {
    int parent_pidfd;   /* the parent's own, opened by the parent before the fork */
    int report_fd;      /* write end of the pipe to the parent */
    int report_read_fd; /* its read end: the child's copy is closed, or the pipe would never break */
    int oom_score_adj;
    int nice;            /* added to the inherited niceness */
    int idle_io;         /* whether the disk serves it only when nobody else wants it */
    pid_t parent_tid;    /* the thread that forks; its process's main thread where it equals parent_pid */
    pid_t parent_pid;    /* as seen by the parent */
    const int *keep_fds; /* sockets and pipes that stay open */
    size_t keep_count;
};

/* errno of each step that can fail, 0 where it went well or was not asked for. */
struct ms_fork_steps {
    int oom_score_adj;
    int guard;
    int descriptors;
    int nice;
    int idle_io;
};

/* The first acts of a forked child, before any Python.
 * pre:  just forked, every signal blocked, one thread. On return no signal is blocked and the guard's thread runs.
 * Async-signal-safe but for what glibc and musl allow after fork() all the same: pthread_create, and snprintf and atoi
 * of plain integers, which take no lock and no memory. Touches no Python state. */
void ms_fork_child_begin(const struct ms_fork_child *child, struct ms_fork_steps *steps);

/* Open a pidfd for the child that was just forked.
 * *pidfd is -1 when the child has ended and somebody else has reaped it: its number may be another process's by now.
 * Returns 0, or -errno: then the child was killed and reaped, and *pidfd is untouched. Any thread. */
int ms_fork_adopt(pid_t pid, int *pidfd);

/* Whether this is a child of this process's that has not ended; true as well where the kernel does not say (a sandbox
 * that knows pidfds but does not wait for them). Any thread. */
bool ms_fork_lives(int pidfd);

/* Kill the child. Returns 0, or -errno where it may not be signalled; one that is gone already is no failure. Any
 * thread. */
int ms_fork_kill(int pidfd);

/* Take the memory of a child that was killed back, here and now, with this thread's share of the processors: the child
 * may wait long for its own. Refused where the child is giving it back already, or the kernel has no such call, which
 * does no harm. Takes milliseconds. Any thread. */
void ms_fork_reap_memory(int pidfd);

/* Kill the child, take its memory back, and wait until it is gone, for patience_ms at most.
 * Returns 0, or -errno where it may not be signalled; a child that is gone already is no failure. Blocks. Any thread.
 */
int ms_fork_end(int pidfd, int patience_ms);

#endif
