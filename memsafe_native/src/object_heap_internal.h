/* Knows CPython. What is allocated for Python objects at the moment, by the allocators' own word. */
#ifndef MS_OBJECT_HEAP_INTERNAL_H
#define MS_OBJECT_HEAP_INTERNAL_H
#include "ms.h"

/* pymalloc's arenas; -1 where another allocator serves. Needs the GIL. */
int64_t ms_object_heap_arena_bytes(void);

/* What glibc's malloc has given out of its heaps, not what it maps apart (from 128 KiB on); -1 where another malloc
 * serves, or glibc is older than 2.33. */
int64_t ms_object_heap_malloc_bytes(void);

#endif
