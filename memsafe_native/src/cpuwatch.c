/* One thread that sleeps on the process's CPU clock: see cpuwatch.h. A timer of that clock would need a signal, which
 * is the process's to use; the sleep needs none. But it cannot be ended early without one either: so there is one
 * thread for all, which nobody joins. */
#include <pthread.h>
#include <time.h>

#include "cpuwatch.h"
#include "native_thread.h"
#include "thread.h"

enum {
    LEAST_NS = 1000 * 1000,    /* the kernel looks at CPU clocks once a tick, 1 to 10 ms */
    MOST_NS = 50 * 1000 * 1000 /* what was added since, or has new gauges, waits no longer */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards what follows */
static ms_cpuwatch *watches;
static int is_running;

/* The thread does not exist in a forked child, and whoever held the lock does not either. */
static void forget(void)
{
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    watches = NULL;
    is_running = 0;
}

static void follow_forks(void)
{
    pthread_atfork(NULL, NULL, forget);
}

/* pre: the lock is held. Returns after how much CPU time to look again. */
static int64_t look_all(void)
{
    int64_t next_ns = MOST_NS;
    for (ms_cpuwatch *watch = watches; watch; watch = watch->next) {
        int64_t one_ns = watch->look(watch->owner);
        if (one_ns < next_ns)
            next_ns = one_ns;
    }
    return next_ns > LEAST_NS ? next_ns : LEAST_NS;
}

static void *run(void *unused)
{
    struct timespec span = {.tv_nsec = LEAST_NS};
    (void)unused;
    pthread_setname_np(pthread_self(), "memsafe-cpu");
    ms_thread_ready();
    for (;;) {
        int error = clock_nanosleep(CLOCK_PROCESS_CPUTIME_ID, 0, &span, NULL);
        pthread_mutex_lock(&lock);
        if (!watches || (error && error != EINTR))
            break;
        span.tv_nsec = (long)look_all();
        pthread_mutex_unlock(&lock);
    }
    is_running = 0;
    pthread_mutex_unlock(&lock);
    return NULL;
}

int ms_cpuwatch_add(ms_cpuwatch *watch)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    const struct timespec past = {.tv_nsec = 1};
    pthread_t thread;
    int error = clock_nanosleep(CLOCK_PROCESS_CPUTIME_ID, TIMER_ABSTIME, &past, NULL);
    if (error)
        return -error;
    pthread_once(&once, follow_forks);
    pthread_mutex_lock(&lock);
    if (!is_running)
        error = ms_native_thread(&thread, run, NULL);
    if (!is_running && !error)
        pthread_detach(thread);
    if (!error) {
        is_running = 1;
        watch->next = watches;
        watches = watch;
    }
    pthread_mutex_unlock(&lock);
    return error;
}

void ms_cpuwatch_remove(ms_cpuwatch *watch)
{
    pthread_mutex_lock(&lock);
    for (ms_cpuwatch **link = &watches; *link; link = &(*link)->next) {
        if (*link == watch) {
            *link = watch->next;
            break;
        }
    }
    pthread_mutex_unlock(&lock);
}
