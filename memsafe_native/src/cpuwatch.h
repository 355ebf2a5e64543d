/* Looks that follow the process's CPU time: a process that does nothing fills nothing, and costs nothing here. */
#ifndef MS_CPUWATCH_H
#define MS_CPUWATCH_H

#include "ms.h"

/* One look; the owner's memory. */
typedef struct ms_cpuwatch {
    /* Called in the thread that follows, never two at once; must not add or remove. Returns after how many nanoseconds
     * of CPU time, of all threads together, to call it again; more than a bound is cut to that. */
    int64_t (*look)(void *owner);
    void *owner;
    struct ms_cpuwatch *next; /* private */
} ms_cpuwatch;

/* Call watch->look as CPU time passes. One thread of the process, "memsafe-cpu", does it for all; it ends by itself
 * when there is none left and CPU time has passed. In a forked child there are none.
 * Returns 0, or -errno: no thread, or a sandbox without clock_nanosleep on this clock. Thread-safe. Needs no GIL. */
int ms_cpuwatch_add(ms_cpuwatch *watch);

/* Do not call it again; waits for a look that runs. One that was not added is a no-op. Thread-safe. Needs no GIL. */
void ms_cpuwatch_remove(ms_cpuwatch *watch);

#endif
