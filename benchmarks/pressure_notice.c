/* A thread that does nothing but wait for notifications of the kernel, and notes when they came. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 65536 };

static int64_t came_ns[MOST];
static atomic_int count;
static int epoll_fd = -1;

static void *run(void *unused)
{
    struct epoll_event event;
    (void)unused;
    for (;;) {
        if (epoll_wait(epoll_fd, &event, 1, -1) != 1)
            continue;
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        int at = atomic_load(&count);
        if (at < MOST)
            came_ns[at] = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
        char ignored[512];
        if (event.events & EPOLLPRI)
            (void)!pread(event.data.fd, ignored, sizeof ignored, 0); /* a trigger of PSI has nothing to read */
        else
            (void)!read(event.data.fd, ignored, sizeof(uint64_t));
        if (at < MOST)
            atomic_store(&count, at + 1);
    }
    return NULL;
}

/* Wait for fd, by POLLPRI or else as an eventfd. Returns 0, or -1. */
int notice_start(int fd, int by_priority)
{
    pthread_t thread;
    char ignored[512];
    struct epoll_event event = {.events = by_priority ? EPOLLPRI : EPOLLIN, .data.fd = fd};
    if (by_priority)
        (void)!pread(fd, ignored, sizeof ignored, 0);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    return epoll_fd < 0 || epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) || pthread_create(&thread, NULL, run, NULL) ? -1
                                                                                                                   : 0;
}

/* When the first notification after that came, or 0. */
int64_t notice_first_after(int64_t after_ns)
{
    int end = atomic_load(&count);
    for (int at = 0; at < end; at++)
        if (came_ns[at] > after_ns)
            return came_ns[at];
    return 0;
}
