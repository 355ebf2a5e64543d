/* Which process of a line of forks this is: see cdef/generation.h. */
#include <pthread.h>

#include "ms.h"
#include "generation.h"

static unsigned forks; /* written only in a forked child, while it has one thread */

static void count_fork(void)
{
    forks++;
}

/* Not at the first call: a fork before that would not be counted. */
static __attribute__((constructor)) void follow_forks(void)
{
    pthread_atfork(NULL, NULL, count_fork);
}

unsigned ms_generation(void)
{
    return forks;
}
