#include <malloc.h>

#include "ms.h"
#include "heap.h"

int ms_heap_trim(void)
{
#ifdef __GLIBC__
    return malloc_trim(0);
#else
    return -ENOSYS; /* musl's free() gives back by itself */
#endif
}
