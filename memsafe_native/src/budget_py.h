/* Knows CPython (limited API 3.11). What budget_py.c, claim_py.c and reservation_py.c share. */
#ifndef MS_BUDGET_PY_H
#define MS_BUDGET_PY_H
#include <Python.h>

#include "ms.h"
#include "budget.h"
#include "claim.h"

typedef struct {
    PyObject_HEAD
    ms_budget *node; /* owned; NULL until __init__ */
} BudgetCore;

/* Created once a process: subinterpreters share them, as they share the counters. */
extern PyTypeObject *ms_budget_type, *ms_reservation_type;

/* What the GIL guards where there is one: which budget a reservation is charged to, together with its size. */
#ifdef Py_GIL_DISABLED
#define MS_LOCK(object)    Py_BEGIN_CRITICAL_SECTION(object)
#define MS_LOCK2(one, two) Py_BEGIN_CRITICAL_SECTION2(one, two)
#define MS_UNLOCK()        Py_END_CRITICAL_SECTION()
#define MS_UNLOCK2()       Py_END_CRITICAL_SECTION2()
#else
#define MS_LOCK(object)
#define MS_LOCK2(one, two)
#define MS_UNLOCK()
#define MS_UNLOCK2()
#endif

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

/* One size, and where allowed timeout_s by keyword: *timeout is borrowed, None where it was not given. */
int ms_parse_size_and_timeout(Py_ssize_t nargs, PyObject *const *args, PyObject *kwnames, const char *name,
                              PyObject **timeout);

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

/* What a charge of size bytes that succeeded with `result` is to its caller: a Reservation, after soft limit callbacks
 * were told. NULL: nothing is held, and the exception is set. */
PyObject *ms_reservation_of_charge(BudgetCore *budget, int64_t size, int result);

/* A Reservation of size bytes that the budget was charged; gives them back where it cannot be made. */
PyObject *ms_reservation_new(BudgetCore *budget, int64_t size);

void ms_reservation_release(PyObject *reservation);

PyObject *ms_claim_py_new(BudgetCore *budget, int64_t n, ms_mailbox *mailbox, uint64_t token);

int ms_claim_py_add(PyObject *dict);
int ms_reservation_py_add(PyObject *dict);

#endif
