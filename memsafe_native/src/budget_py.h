/* Knows CPython (limited API 3.11). What budget_py.c and reservation_py.c share. */
#ifndef MS_BUDGET_PY_H
#define MS_BUDGET_PY_H
#include <Python.h>

#include "ms.h"
#include "budget.h"

typedef struct {
    PyObject_HEAD
    ms_budget *node; /* owned; NULL until __init__ */
} BudgetCore;

/* Created once a process: subinterpreters share them, as they share the counters. */
extern PyTypeObject *ms_budget_type, *ms_reservation_type;

/* The size in an exact, non-negative int that fits; -1 for anything that Python has to look at (no error set). */
static inline int64_t plain_size(PyObject *object)
{
    if (!PyLong_CheckExact(object))
        return -1;
    int overflow;
    long long size = PyLong_AsLongLongAndOverflow(object, &overflow);
    return overflow ? -1 : size;
}

/* The budget whose freed arrays may give back a little later (numpy_handler_py.c), or NULL. The GIL guards it. */
extern ms_budget *ms_pocket_of;

void ms_pocket_empty(void);

/* The counters of a budget, up to date: whoever looks at them, or charges them, from Python comes this way. */
static inline ms_budget *node_of(BudgetCore *self)
{
    if (MS_UNLIKELY(ms_pocket_of != NULL))
        ms_pocket_empty();
    if (!self->node)
        PyErr_SetString(PyExc_RuntimeError, "Budget.__init__ was not called");
    return self->node;
}

static inline int require_one(Py_ssize_t nargs, const char *name)
{
    if (nargs == 1)
        return 0;
    PyErr_Format(PyExc_TypeError, "%s() takes exactly one argument (%zd given)", name, nargs);
    return -1;
}

/* Returns -1 with the exception set where a callback let one through that is not an Exception (KeyboardInterrupt and
 * its kind); all others are the budget's own business, a charge that stands must not fail by them. */
int ms_budget_tell_soft_limit(BudgetCore *budget);

/* A Reservation of size bytes that the budget was charged; gives them back where it cannot be made. */
PyObject *ms_reservation_new(BudgetCore *budget, int64_t size);

void ms_reservation_release(PyObject *reservation);

int ms_reservation_py_add(PyObject *dict);

#endif
