/* Knows CPython (limited API 3.11). Where a thread that a heap guard refuses must not be refused. */
#ifndef MS_HEAP_SHIELD_PY_H
#define MS_HEAP_SHIELD_PY_H
#include <Python.h>

#include <stdbool.h>

#include "ms.h"

/* Prepare, once a process; returns false where this Python is not as we know it. Needs the GIL. */
bool ms_heap_shield_start(void);

/* The functions that memsafe.heap hangs up in the interpreter. 0, or -1 with the exception set. */
int ms_heap_shield_add(PyObject *module);

/* The calling thread enters or leaves a scope that refuses it. Needs the GIL. */
void ms_heap_shield_enter(void);
void ms_heap_shield_leave(void);

/* Whether the calling thread may be refused now, as far as that is told at no cost. Needs no GIL. */
bool ms_heap_is_refusable(void);

/* Whether code runs that must not be left half-way. Allocates, runs no Python, costs a microsecond: ask last.
 * pre: ms_heap_is_refusable(). */
bool ms_heap_machinery_runs(void);

#endif
