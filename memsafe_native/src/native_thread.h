/* Threads that run native code only. */
#ifndef MS_NATIVE_THREAD_H
#define MS_NATIVE_THREAD_H

#include <pthread.h>

#include "ms.h"

/* Start a thread with a small stack that blocks all signals. Returns 0, or -errno. Thread-safe. Needs no GIL. */
int ms_native_thread(pthread_t *thread, void *(*run)(void *), void *argument);

#endif
