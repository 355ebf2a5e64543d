/* What a waiter waits for: see source.h. */
#include <fcntl.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "ms.h"
#include "emergency.h"
#include "gauge.h"
#include "kept.h"
#include "source.h"
#include "waiter.h"

enum { STREAM_READS = 16 }; /* a writer that never stops must not keep the thread from the other sources */

int ms_source_check(int fd, int how)
{
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0)
        return -errno;
    if (how < MS_WAITER_KERNFS || how > MS_WAITER_STREAM)
        return -EINVAL;
    if ((how == MS_WAITER_COUNTER || how == MS_WAITER_STREAM) && !(flags & O_NONBLOCK))
        return -EINVAL;
    return 0;
}

uint32_t ms_source_events(int how)
{
    return how <= MS_WAITER_TRIGGER ? EPOLLPRI : EPOLLIN;
}

/* kernfs marks an event as seen when the file is read from its start; it reports POLLERR with each event, so only the
 * read tells a removed cgroup (ENODEV) from one in which something happened. */
static int drain_kernfs(int fd, uint64_t *events)
{
    char buffer[512];
    if (pread(fd, buffer, sizeof buffer, 0) < 0)
        return -errno;
    *events = 1;
    return 0;
}

static int drain_counter(int fd, uint64_t *events)
{
    uint64_t value = 0;
    if (read(fd, &value, sizeof value) < 0) {
        if (errno != EAGAIN && errno != EINTR)
            return -errno;
        value = 0;
    }
    *events = value;
    return 0;
}

static int drain_stream(int fd, uint64_t *events)
{
    char buffer[512];
    for (int i = 0; i < STREAM_READS; i++) {
        ssize_t got = read(fd, buffer, sizeof buffer);
        if (got == 0)
            return -EPIPE;
        if (got < 0 && errno != EINTR)
            return errno == EAGAIN ? 0 : -errno;
        *events = 1;
    }
    return 0;
}

int ms_source_begin(int fd, int how)
{
    uint64_t ignored;
    return how == MS_WAITER_KERNFS ? drain_kernfs(fd, &ignored) : 0;
}

int ms_source_drain(int fd, int how, uint32_t ready, uint64_t *events)
{
    switch (how) {
    case MS_WAITER_KERNFS:
        return drain_kernfs(fd, events);
    case MS_WAITER_COUNTER:
        return drain_counter(fd, events);
    case MS_WAITER_STREAM:
        return drain_stream(fd, events);
    default: /* a trigger whose cgroup is gone, or one without a trigger, is in error for good */
        if (ready & (EPOLLERR | EPOLLHUP))
            return -ENODEV;
        *events = 1;
        return 0;
    }
}
