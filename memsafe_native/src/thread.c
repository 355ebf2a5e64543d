/* A thread that has to act when memory and processors are short: see cdef/thread.h. */
#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "ms.h"
#include "thread.h"

enum {
    STACK_NEED_BYTES = 32 * 1024, /* a look in Python takes less than half of it, a gauge a quarter */
    SLICE_NS = 100 * 1000,        /* the least that the kernel takes */
    RESET_ON_FORK = 1
};

/* As of Linux 3.14; not every C library's headers have it. */
typedef struct attributes {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_ns, deadline_ns, period_ns;
} attributes;

/* At least 1. Half at the most of what is left of it: a program may have asked for small stacks, and there is a guard
 * page. */
static size_t stack_bytes(void)
{
    pthread_attr_t stack;
    void *lowest;
    size_t size;
    if (pthread_getattr_np(pthread_self(), &stack))
        return 1;
    int error = pthread_attr_getstack(&stack, &lowest, &size);
    pthread_attr_destroy(&stack);
    if (error)
        return 1;
    size_t half = (size_t)((char *)&stack - (char *)lowest) / 2;
    return half < STACK_NEED_BYTES ? half : STACK_NEED_BYTES;
}

static __attribute__((noinline)) void begin_stack(size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char stack[bytes];
    for (volatile char *at = stack; at < stack + bytes; at += page)
        *at = 0;
}

static void ask_for_short_slices(void)
{
    attributes wanted = {0};
    if (prctl(PR_GET_SECCOMP) != 0) /* a filter without this call may kill the process */
        return;
    if (syscall(SYS_sched_getattr, 0, &wanted, sizeof wanted, 0) || wanted.policy != SCHED_OTHER || wanted.nice < 0)
        return;
    wanted.size = sizeof wanted;
    wanted.flags |= RESET_ON_FORK;
    wanted.runtime_ns = SLICE_NS;
    (void)syscall(SYS_sched_setattr, 0, &wanted, 0);
}

void ms_thread_ready(void)
{
    begin_stack(stack_bytes());
    ask_for_short_slices();
}
