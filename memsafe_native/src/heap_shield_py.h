/* Knows CPython (limited API 3.11). Where a thread that a heap guard refuses must not be refused. */
#ifndef MS_HEAP_SHIELD_PY_H
#define MS_HEAP_SHIELD_PY_H
#include <Python.h>

#include <stdbool.h>

#include "ms.h"

/* PyMemAllocatorEx. */
struct ms_block_allocator {
    void *context;
    void *(*malloc)(void *context, size_t size);
    void *(*calloc)(void *context, size_t count, size_t size);
    void *(*realloc)(void *context, void *block, size_t size);
    void (*free)(void *context, void *block);
};

/* Set *function, a pointer to a function, to what this Python exports under a name; returns whether it does. */
bool ms_heap_find(void *function, const char *name);

/* Prepare, once a process; returns false where this Python is not as we know it. Needs the GIL. */
bool ms_heap_shield_start(void);

/* The functions that memsafe.heap hangs up in the interpreter. 0, or -1 with the exception set. */
int ms_heap_shield_add(PyObject *module);

/* The calling thread enters or leaves a scope that refuses it. Needs the GIL. */
void ms_heap_shield_enter(void);
void ms_heap_shield_leave(void);

/* Whether the calling thread may be refused now, as far as that is told at no cost. Needs no GIL. */
bool ms_heap_is_refusable(void);

/* Whether code runs that must not be left half-way. Runs no Python, costs a microsecond: ask last. It may be asked from
 * inside of pymalloc, and does not enter it. pre: ms_heap_is_refusable(). */
bool ms_heap_machinery_runs(void);

#endif
