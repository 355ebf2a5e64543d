/* Timers that are descriptors: see cdef/timer.h. */
#include <sys/timerfd.h>

#include "ms.h"
#include "timer.h"

int ms_timer_open(void)
{
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    return fd < 0 ? -errno : fd;
}

static int set(int fd, int64_t delay_ns)
{
    struct itimerspec timer = {.it_value = {.tv_sec = delay_ns / 1000000000, .tv_nsec = delay_ns % 1000000000}};
    return timerfd_settime(fd, 0, &timer, NULL) < 0 ? -errno : 0;
}

int ms_timer_set(int fd, int64_t delay_ns)
{
    return set(fd, delay_ns < 1 ? 1 : delay_ns);
}

int ms_timer_stop(int fd)
{
    return set(fd, 0);
}
