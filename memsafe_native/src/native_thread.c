#include <signal.h>

#include "native_thread.h"

/* Little is used, but glibc takes every library's static TLS out of it. */
enum { STACK_BYTES = 256 * 1024 };

int ms_native_thread(pthread_t *thread, void *(*run)(void *), void *argument)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    int error = pthread_attr_init(&attributes);
    if (error)
        return -error;
    error = pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigfillset(&all);
    if (!error)
        error = pthread_sigmask(SIG_SETMASK, &all, &before);
    if (!error) {
        error = pthread_create(thread, &attributes, run, argument);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    pthread_attr_destroy(&attributes);
    return -error;
}
