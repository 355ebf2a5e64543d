#include <dlfcn.h>
#include <malloc.h>
#include <stdbool.h>

#include "ms.h"
#include "trim.h"

typedef int mallctl_function(const char *name, void *old, size_t *old_size, void *value, size_t value_size);
typedef void collect_function(bool force);

int ms_trim(void)
{
    int asked = 0;
    /* Looked up each time: it costs a microsecond beside milliseconds, and a library may be loaded at any time. */
    mallctl_function *jemalloc = (mallctl_function *)(uintptr_t)dlsym(RTLD_DEFAULT, "mallctl");
    collect_function *mimalloc = (collect_function *)(uintptr_t)dlsym(RTLD_DEFAULT, "mi_collect");
    if (jemalloc) {
        jemalloc("thread.tcache.flush", NULL, NULL, NULL, 0); /* the calling thread's; no call reaches the others' */
        /* 4096 is MALLCTL_ARENAS_ALL since 5.0; earlier ones do not know it and change nothing. */
        if (jemalloc("arena.4096.purge", NULL, NULL, NULL, 0) == 0)
            asked |= MS_TRIM_JEMALLOC;
    }
    if (mimalloc) {
        mimalloc(true);
        asked |= MS_TRIM_MIMALLOC;
    }
#ifdef __GLIBC__    /* musl's free() gives back by itself */
    malloc_trim(0); /* also beside another malloc: what was loaded before that one, or by its own dlmopen, uses it */
    asked |= MS_TRIM_GLIBC;
#endif
    return asked;
}
