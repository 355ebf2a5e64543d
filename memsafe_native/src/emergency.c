/* The emergency reserve: see cdef/emergency.h. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ms.h"
#include "emergency.h"
#include "generation.h"

struct ms_emergency {
    atomic_int references;
    atomic_uint holder; /* the generation that holds it, counted from 1; 0: nobody. Written with the lock held */
    int is_closed;      /* guarded by the lock */
    char *address;      /* guarded by the lock */
    size_t size;
    size_t page;
};

/* One for all: they are changed a few times in a process's life. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Whoever held the lock is not in a forked child; what it was changing is not either. */
static void forget(void)
{
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
}

static void follow_forks(void)
{
    pthread_atfork(NULL, NULL, forget);
}

int ms_emergency_open(size_t size, ms_emergency **emergency)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (size == 0)
        return -EINVAL;
    if (size > PTRDIFF_MAX - page)
        return -ENOMEM;
    ms_emergency *made = calloc(1, sizeof *made);
    if (!made)
        return -ENOMEM;
    pthread_once(&once, follow_forks);
    atomic_init(&made->references, 1);
    made->size = (size + page - 1) / page * page;
    made->page = page;
    *emergency = made;
    return 0;
}

ms_emergency *ms_emergency_ref(ms_emergency *emergency)
{
    atomic_fetch_add_explicit(&emergency->references, 1, memory_order_relaxed);
    return emergency;
}

void ms_emergency_unref(ms_emergency *emergency)
{
    if (atomic_fetch_sub_explicit(&emergency->references, 1, memory_order_acq_rel) > 1)
        return;
    ms_emergency_give(emergency);
    free(emergency);
}

static int is_held(const ms_emergency *emergency)
{
    return atomic_load_explicit(&emergency->holder, memory_order_acquire) == 1 + ms_generation();
}

/* Returns 0, or -errno. A mapping of its own, which nothing is joined to: taking it away splits none. */
static int map(ms_emergency *emergency)
{
    char *address = mmap(NULL, emergency->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED)
        return -errno;
    if (madvise(address, emergency->size, MADV_DONTFORK)) {
        int error = errno;
        munmap(address, emergency->size);
        return -error;
    }
    for (volatile char *at = address, *end = address + emergency->size; at < end; at += emergency->page)
        *at = 1;
    emergency->address = address;
    return 0;
}

int64_t ms_emergency_take(ms_emergency *emergency)
{
    int64_t taken = 0;
    pthread_mutex_lock(&lock);
    if (emergency->is_closed)
        taken = -ESHUTDOWN;
    else if (!is_held(emergency)) {
        taken = map(emergency);
        if (taken == 0) {
            taken = (int64_t)emergency->size;
            atomic_store_explicit(&emergency->holder, 1 + ms_generation(), memory_order_release);
        }
    }
    pthread_mutex_unlock(&lock);
    return taken;
}

/* pre: the lock is held. Neither call can fail but where the pages are locked, and then the other gives them back. */
static int64_t give_locked(ms_emergency *emergency)
{
    if (!is_held(emergency))
        return 0;
    madvise(emergency->address, emergency->size, MADV_DONTNEED);
    munmap(emergency->address, emergency->size);
    atomic_store_explicit(&emergency->holder, 0, memory_order_release);
    return (int64_t)emergency->size;
}

int64_t ms_emergency_give(ms_emergency *emergency)
{
    pthread_mutex_lock(&lock);
    int64_t given = give_locked(emergency);
    pthread_mutex_unlock(&lock);
    return given;
}

int64_t ms_emergency_close(ms_emergency *emergency)
{
    pthread_mutex_lock(&lock);
    emergency->is_closed = 1;
    int64_t given = give_locked(emergency);
    pthread_mutex_unlock(&lock);
    return given;
}

size_t ms_emergency_held(const ms_emergency *emergency)
{
    return is_held(emergency) ? emergency->size : 0;
}

size_t ms_emergency_size(const ms_emergency *emergency)
{
    return emergency->size;
}
