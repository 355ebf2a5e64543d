/* Knows CPython (limited API 3.11). The types on the hot path: BudgetCore, under memsafe.Budget, and Reservation.
 *
 * Here is only what must be fast: an exact int that a budget takes at once. Everything else (sizes in strings, a
 * refusal, reclaimers, messages) is a method of memsafe.Budget in Python, called by name from here. */
#include <Python.h>
#include <structmember.h>
#include <stdatomic.h>

#include "ms.h"
#include "budget.h"
#include "python_types_internal.h"

#define RELEASED (-1)

typedef struct {
    PyObject_HEAD ms_budget *node; /* owned; NULL until __init__ */
} BudgetCore;

typedef struct {
    PyObject_HEAD BudgetCore *budget; /* owned; NULL only after the cycle collector cleared it */
    _Atomic int64_t size;             /* RELEASED once given back */
    PyObject *weakrefs;
} Reservation;

/* Created once a process: subinterpreters share them, as they share the counters. */
static PyTypeObject *budget_type, *reservation_type;

/* ------------------------------------------------------------------------------------------------ helpers */

/* The size in an exact, non-negative int that fits; -1 for anything that Python has to look at (no error set). */
static int64_t plain_size(PyObject *object)
{
    if (!PyLong_CheckExact(object))
        return -1;
    int overflow;
    long long size = PyLong_AsLongLongAndOverflow(object, &overflow);
    return overflow ? -1 : size;
}

static int raise_error(const char *name, const char *message)
{
    PyObject *module = PyImport_ImportModule("memsafe.errors");
    PyObject *type = module ? PyObject_GetAttrString(module, name) : NULL;
    if (type)
        PyErr_SetString(type, message);
    Py_XDECREF(type);
    Py_XDECREF(module);
    return -1;
}

static ms_budget *node_of(BudgetCore *self)
{
    if (!self->node)
        PyErr_SetString(PyExc_RuntimeError, "Budget.__init__ was not called");
    return self->node;
}

static int require_one(Py_ssize_t nargs, const char *name)
{
    if (nargs == 1)
        return 0;
    PyErr_Format(PyExc_TypeError, "%s() takes exactly one argument (%zd given)", name, nargs);
    return -1;
}

/* Callbacks are the budget's own business; a charge that stands must not fail by them. */
static void tell_soft_limit(BudgetCore *budget)
{
    PyObject *result = PyObject_CallMethod((PyObject *)budget, "_soft_limit_passed", NULL);
    if (!result)
        PyErr_WriteUnraisable((PyObject *)budget);
    Py_XDECREF(result);
}

static PyObject *reservation_new(BudgetCore *budget, int64_t size)
{
    Reservation *self = PyObject_GC_New(Reservation, reservation_type);
    if (!self) {
        ms_budget_uncharge(budget->node, size, NULL);
        return NULL;
    }
    Py_INCREF((PyObject *)budget);
    self->budget = budget;
    self->weakrefs = NULL;
    atomic_init(&self->size, size);
    PyObject_GC_Track(self);
    return (PyObject *)self;
}

/* One attempt: a Reservation, or an int that says which level refused (0: this budget, 1: its parent, ...). */
static PyObject *attempt(BudgetCore *self, int64_t n)
{
    int level;
    int result = ms_budget_charge(self->node, n, NULL, &level);
    if (MS_UNLIKELY(result < 0))
        return PyLong_FromLong(level);
    PyObject *reservation = reservation_new(self, n);
    if (MS_UNLIKELY(result == MS_BUDGET_SOFT_PASSED) && reservation)
        tell_soft_limit(self);
    return reservation;
}

/* ------------------------------------------------------------------------------------------------ BudgetCore */

static int core_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    BudgetCore *self = (BudgetCore *)object;
    PyObject *parent;
    long long limit;
    if (kwargs && PyDict_Size(kwargs))
        return PyErr_SetString(PyExc_TypeError, "BudgetCore takes no keyword arguments"), -1;
    if (!PyArg_ParseTuple(args, "OL", &parent, &limit))
        return -1;
    if (self->node)
        return PyErr_SetString(PyExc_RuntimeError, "a Budget cannot be initialised twice"), -1;
    ms_budget *above = NULL;
    if (parent != Py_None) {
        if (!PyObject_TypeCheck(parent, budget_type))
            return PyErr_SetString(PyExc_TypeError, "the parent must be a Budget"), -1;
        above = node_of((BudgetCore *)parent);
        if (!above)
            return -1;
    }
    self->node = ms_budget_new(above, limit);
    if (self->node)
        return 0;
    if (errno == EINVAL)
        PyErr_Format(PyExc_ValueError, "budgets may be nested %d levels deep", MS_BUDGET_DEPTH_MAX);
    else
        PyErr_NoMemory();
    return -1;
}

static void core_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    BudgetCore *self = (BudgetCore *)object;
    if (self->node) {
        ms_budget_close(self->node);
        ms_budget_unref(self->node);
    }
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyObject *slow(PyObject *self, const char *method, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    PyObject *function = PyObject_GetAttrString(self, method);
    Py_ssize_t named = kwnames ? PyTuple_Size(kwnames) : 0;
    PyObject *positional = function ? PyTuple_New(nargs) : NULL;
    PyObject *keywords = positional && named ? PyDict_New() : NULL;
    PyObject *result = NULL;
    if (!positional || (named && !keywords))
        goto done;
    for (Py_ssize_t i = 0; i < nargs; i++) {
        Py_INCREF(args[i]);
        PyTuple_SetItem(positional, i, args[i]);
    }
    for (Py_ssize_t i = 0; i < named; i++)
        if (PyDict_SetItem(keywords, PyTuple_GetItem(kwnames, i), args[nargs + i]))
            goto done;
    result = PyObject_Call(function, positional, keywords);
done:
    Py_XDECREF(keywords);
    Py_XDECREF(positional);
    Py_XDECREF(function);
    return result;
}

static PyObject *core_obtain(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames,
                             const char *policy)
{
    int64_t n = MS_LIKELY(nargs == 1 && !kwnames) ? plain_size(args[0]) : -1;
    if (MS_LIKELY(n >= 0) && ((BudgetCore *)self)->node) {
        PyObject *result = attempt((BudgetCore *)self, n);
        if (MS_LIKELY(!result || Py_IS_TYPE(result, reservation_type)))
            return result;
        Py_DECREF(result);
    }
    return slow(self, policy, args, nargs, kwnames);
}

PyDoc_STRVAR(core_reserve_doc,
             "reserve(size, /)\n--\n\n"
             "Promise *size* bytes, in this budget and in every ancestor, before they are allocated.\n\n"
             "Where a limit stands in the way, reclaimers are asked to make room first.\n\n"
             "Args:\n"
             "    size: An int of bytes, or a string such as \"64 MiB\".\n\n"
             "Returns:\n"
             "    A Reservation: a context manager, or released by its release().\n\n"
             "Raises:\n"
             "    BudgetExceededError: The limit of this budget or of an ancestor would be passed. Nothing was\n"
             "        changed.\n"
             "    BudgetAbortedError: This budget or an ancestor was aborted.\n"
             "    BudgetClosedError: This budget was closed.\n"
             "    ValueError: *size* is not a size.\n");

static PyObject *core_reserve(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    return core_obtain(self, args, nargs, kwnames, "_reserve");
}

PyDoc_STRVAR(core_try_reserve_doc, "try_reserve(size, /)\n--\n\n"
                                   "As reserve(), but None where that raises BudgetExceededError.\n");

static PyObject *core_try_reserve(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    return core_obtain(self, args, nargs, kwnames, "_try_reserve");
}

PyDoc_STRVAR(core_attempt_doc, "_attempt(size_bytes, /)\n--\n\n"
                               "A Reservation, or how many levels up it was refused. Asks nobody for room.\n");

static PyObject *core_attempt(PyObject *self, PyObject *size)
{
    int64_t n = plain_size(size);
    if (n < 0)
        return PyErr_SetString(PyExc_ValueError, "a size in bytes was expected"), NULL;
    return node_of((BudgetCore *)self) ? attempt((BudgetCore *)self, n) : NULL;
}

PyDoc_STRVAR(core_charge_existing_doc,
             "_charge_existing(size_bytes, /)\n--\n\n"
             "Charge bytes that exist. None, or how many levels up it met a closed budget.\n");

static PyObject *core_charge_existing(PyObject *self, PyObject *size)
{
    int64_t n = plain_size(size);
    int level, result;
    if (n < 0)
        return PyErr_SetString(PyExc_ValueError, "a size in bytes was expected"), NULL;
    if (!node_of((BudgetCore *)self))
        return NULL;
    result = ms_budget_charge_existing(((BudgetCore *)self)->node, n, &level);
    if (result == -EOVERFLOW)
        return PyErr_SetString(PyExc_OverflowError, "a budget cannot hold 8 EiB or more"), NULL;
    if (result < 0)
        return PyLong_FromLong(level);
    if (result == MS_BUDGET_SOFT_PASSED)
        tell_soft_limit((BudgetCore *)self);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(core_uncharge_existing_doc, "_uncharge_existing(size_bytes, /)\n--\n\n"
                                         "Whether so many bytes were charged, and now are not any more.\n");

static PyObject *core_uncharge_existing(PyObject *self, PyObject *size)
{
    int64_t n = plain_size(size);
    if (n < 0)
        return PyErr_SetString(PyExc_ValueError, "a size in bytes was expected"), NULL;
    if (!node_of((BudgetCore *)self))
        return NULL;
    return PyBool_FromLong(ms_budget_uncharge_existing(((BudgetCore *)self)->node, n) == 0);
}

static PyObject *core_close(PyObject *self, PyObject *Py_UNUSED(none))
{
    return node_of((BudgetCore *)self) ? PyLong_FromLongLong(ms_budget_close(((BudgetCore *)self)->node)) : NULL;
}

static PyObject *core_set(PyObject *self, PyObject *size, void (*set)(ms_budget *, int64_t))
{
    long long n = PyLong_AsLongLong(size);
    if ((n == -1 && PyErr_Occurred()) || !node_of((BudgetCore *)self))
        return NULL;
    set(((BudgetCore *)self)->node, n);
    Py_RETURN_NONE;
}

static PyObject *core_set_limit(PyObject *self, PyObject *size)
{
    return core_set(self, size, ms_budget_set_limit);
}

static PyObject *core_set_soft_limit(PyObject *self, PyObject *size)
{
    return core_set(self, size, ms_budget_set_soft_limit);
}

static PyObject *core_take_soft_passed(PyObject *self, PyObject *Py_UNUSED(none))
{
    return node_of((BudgetCore *)self) ? PyBool_FromLong(ms_budget_take_soft_passed(((BudgetCore *)self)->node)) : NULL;
}

static PyObject *core_get(PyObject *self, void *which)
{
    ms_budget_stats stats;
    if (!node_of((BudgetCore *)self))
        return NULL;
    ms_budget_read(((BudgetCore *)self)->node, &stats);
    if ((intptr_t)which == offsetof(ms_budget_stats, closed))
        return PyBool_FromLong(stats.closed);
    return PyLong_FromLongLong(*(int64_t *)((char *)&stats + (intptr_t)which));
}

static PyObject *core_headroom(PyObject *self, void *Py_UNUSED(closure))
{
    if (!node_of((BudgetCore *)self))
        return NULL;
    int64_t headroom = ms_budget_headroom(((BudgetCore *)self)->node);
    if (headroom == INT64_MAX)
        Py_RETURN_NONE;
    return PyLong_FromLongLong(headroom);
}

#define FIELD(name) (void *)offsetof(ms_budget_stats, name)

static PyGetSetDef core_getset[] = {
    {"used_bytes", core_get, NULL, "Bytes charged to this budget and to those below it.", FIELD(used_bytes)},
    {"peak_bytes", core_get, NULL, "The most that used_bytes ever was.", FIELD(peak_bytes)},
    {"charged_bytes", core_get, NULL, "Bytes charged here by charge(), without a reservation.", FIELD(charged_bytes)},
    {"closed", core_get, NULL, "Whether close() was called.", FIELD(closed)},
    {"headroom_bytes", core_headroom, NULL,
     "Bytes until this budget or an ancestor refuses; None where nothing is limited.", NULL},
    {0},
};

static PyMethodDef core_methods[] = {
    {"reserve", (PyCFunction)(void (*)(void))core_reserve, METH_FASTCALL | METH_KEYWORDS, core_reserve_doc},
    {"try_reserve", (PyCFunction)(void (*)(void))core_try_reserve, METH_FASTCALL | METH_KEYWORDS, core_try_reserve_doc},
    {"_attempt", core_attempt, METH_O, core_attempt_doc},
    {"_charge_existing", core_charge_existing, METH_O, core_charge_existing_doc},
    {"_uncharge_existing", core_uncharge_existing, METH_O, core_uncharge_existing_doc},
    {"_close", core_close, METH_NOARGS, "_close()\n--\n\nBytes that were still charged, given back to the ancestors."},
    {"_set_limit", core_set_limit, METH_O, NULL},
    {"_set_soft_limit", core_set_soft_limit, METH_O, NULL},
    {"_take_soft_passed", core_take_soft_passed, METH_NOARGS, NULL},
    {0},
};

static PyType_Slot core_slots[] = {
    {Py_tp_init, core_init},
    {Py_tp_dealloc, core_dealloc},
    {Py_tp_methods, core_methods},
    {Py_tp_getset, core_getset},
    {Py_tp_doc, "The counters of a budget, in C. Use memsafe.Budget."},
    {0},
};

static PyType_Spec core_spec = {
    .name = "memsafe_native.BudgetCore",
    .basicsize = sizeof(BudgetCore),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = core_slots,
};

/* ------------------------------------------------------------------------------------------------ Reservation */

/* Give everything back, once. Returns the bytes, RELEASED if that was done before. */
static int64_t give_back(Reservation *self)
{
    int64_t size = atomic_exchange(&self->size, RELEASED);
    if (size > 0)
        ms_budget_uncharge(self->budget->node, size, NULL);
    return size;
}

static int closed_error(void)
{
    return raise_error("ReservationClosedError", "the reservation was already released");
}

/* The net under a reservation that nobody released: the bytes go back, and the owner hears of it. */
static void lose(Reservation *self)
{
    if (!self->budget)
        return;
    ms_budget_stats stats;
    int64_t size = give_back(self);
    ms_budget_read(self->budget->node, &stats);
    if (size <= 0 || stats.closed) /* a budget's close() has already told */
        return;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *path = PyObject_GetAttrString((PyObject *)self->budget, "path");
    if (!path ||
        PyErr_ResourceWarning(NULL, 1, "a reservation of %lld bytes from budget '%U' was never released; it is now",
                              (long long)size, path))
        PyErr_WriteUnraisable((PyObject *)reservation_type);
    Py_XDECREF(path);
    PyErr_Restore(type, value, traceback);
}

static void reservation_dealloc(PyObject *object)
{
    Reservation *self = (Reservation *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    if (self->weakrefs)
        PyObject_ClearWeakRefs(object);
    if (MS_UNLIKELY(atomic_load_explicit(&self->size, memory_order_relaxed) != RELEASED))
        lose(self);
    Py_XDECREF((PyObject *)self->budget);
    PyObject_GC_Del(object);
    Py_DECREF(type);
}

static int reservation_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((Reservation *)object)->budget);
    return 0;
}

static int reservation_clear(PyObject *object)
{
    lose((Reservation *)object);
    Py_CLEAR(((Reservation *)object)->budget);
    return 0;
}

/* One attempt to grow: None, or how many levels up it was refused. */
static PyObject *grow_once(Reservation *self, int64_t n)
{
    int level;
    int64_t size = atomic_load(&self->size);
    if (size == RELEASED)
        return closed_error(), NULL;
    int result = ms_budget_charge(self->budget->node, n, NULL, &level);
    if (result < 0)
        return PyLong_FromLong(level);
    do {
        if (size == RELEASED) { /* by another thread, meanwhile */
            ms_budget_uncharge(self->budget->node, n, NULL);
            return closed_error(), NULL;
        }
    } while (!atomic_compare_exchange_weak(&self->size, &size, size + n));
    if (MS_UNLIKELY(result == MS_BUDGET_SOFT_PASSED))
        tell_soft_limit(self->budget);
    Py_RETURN_NONE;
}

static PyObject *reservation_policy(Reservation *self, const char *method, PyObject *size)
{
    if (!self->budget)
        return closed_error(), NULL;
    return PyObject_CallMethod((PyObject *)self->budget, method, "OO", (PyObject *)self, size);
}

static PyObject *obtain_more(Reservation *self, PyObject *const *args, Py_ssize_t nargs, const char *name,
                             const char *policy, PyObject *success)
{
    if (require_one(nargs, name))
        return NULL;
    int64_t n = plain_size(args[0]);
    if (MS_LIKELY(n >= 0)) {
        PyObject *refused = grow_once(self, n);
        if (MS_UNLIKELY(!refused))
            return NULL;
        Py_DECREF(refused);
        if (MS_LIKELY(refused == Py_None)) {
            Py_INCREF(success);
            return success;
        }
    }
    return reservation_policy(self, policy, args[0]);
}

PyDoc_STRVAR(reservation_grow_doc, "grow(size, /)\n--\n\n"
                                   "Reserve *size* bytes more, or change nothing. Errors as of Budget.reserve(), and\n"
                                   "ReservationClosedError.\n");

static PyObject *reservation_grow(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    return obtain_more((Reservation *)self, args, nargs, "grow", "_grow", Py_None);
}

PyDoc_STRVAR(reservation_try_grow_doc, "try_grow(size, /)\n--\n\n"
                                       "Reserve *size* bytes more: True, or False where grow() raises\n"
                                       "BudgetExceededError.\n");

static PyObject *reservation_try_grow(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    return obtain_more((Reservation *)self, args, nargs, "try_grow", "_try_grow", Py_True);
}

static PyObject *reservation_grow_once(PyObject *self, PyObject *size)
{
    int64_t n = plain_size(size);
    if (n < 0)
        return PyErr_SetString(PyExc_ValueError, "a size in bytes was expected"), NULL;
    return grow_once((Reservation *)self, n);
}

static PyObject *shrink_by(Reservation *self, int64_t n)
{
    int64_t size = atomic_load(&self->size);
    do {
        if (size == RELEASED)
            return closed_error(), NULL;
        if (n > size)
            return PyErr_Format(PyExc_ValueError, "cannot shrink a reservation of %lld bytes by %lld", (long long)size,
                                (long long)n);
    } while (!atomic_compare_exchange_weak(&self->size, &size, size - n));
    ms_budget_uncharge(self->budget->node, n, NULL);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(reservation_shrink_doc, "shrink(size, /)\n--\n\n"
                                     "Give *size* bytes back.\n\n"
                                     "Raises:\n"
                                     "    ValueError: *size* is more than is reserved, or not a size.\n"
                                     "    ReservationClosedError: It was released.\n");

static PyObject *reservation_shrink(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (require_one(nargs, "shrink"))
        return NULL;
    int64_t n = plain_size(args[0]);
    return MS_LIKELY(n >= 0) ? shrink_by((Reservation *)self, n)
                             : reservation_policy((Reservation *)self, "_shrink", args[0]);
}

PyDoc_STRVAR(reservation_resize_doc, "resize(size, /)\n--\n\n"
                                     "Grow or shrink to *size* bytes. Errors as of grow().\n");

static PyObject *reservation_resize(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Reservation *self = (Reservation *)object;
    if (require_one(nargs, "resize"))
        return NULL;
    int64_t target = plain_size(args[0]);
    int64_t size = atomic_load(&self->size);
    if (size == RELEASED)
        return closed_error(), NULL;
    if (target < 0)
        return reservation_policy(self, "_resize", args[0]);
    if (target <= size)
        return shrink_by(self, size - target);
    PyObject *more = PyLong_FromLongLong(target - size);
    PyObject *result = more ? obtain_more(self, &more, 1, "resize", "_grow", Py_None) : NULL;
    Py_XDECREF(more);
    return result;
}

PyDoc_STRVAR(reservation_release_doc, "release()\n--\n\n"
                                      "Give everything back. Releasing twice is a no-op.\n");

static PyObject *reservation_release(PyObject *self, PyObject *Py_UNUSED(none))
{
    give_back((Reservation *)self);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(reservation_split_doc, "split(size, /)\n--\n\n"
                                    "Return a Reservation of *size* bytes taken out of this one; the budget sees no\n"
                                    "change. Errors as of shrink().\n");

static PyObject *reservation_split(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Reservation *self = (Reservation *)object;
    if (require_one(nargs, "split"))
        return NULL;
    int64_t n = plain_size(args[0]);
    if (n < 0)
        return reservation_policy(self, "_split", args[0]);
    int64_t size = atomic_load(&self->size);
    do {
        if (size == RELEASED)
            return closed_error(), NULL;
        if (n > size)
            return PyErr_Format(PyExc_ValueError, "cannot split %lld bytes off a reservation of %lld", (long long)n,
                                (long long)size);
    } while (!atomic_compare_exchange_weak(&self->size, &size, size - n));
    return reservation_new(self->budget, n);
}

static PyObject *reservation_move_once(PyObject *object, PyObject *target)
{
    Reservation *self = (Reservation *)object;
    if (!PyObject_TypeCheck(target, budget_type))
        return PyErr_SetString(PyExc_TypeError, "move_to() takes a Budget"), NULL;
    BudgetCore *to = (BudgetCore *)target, *from = self->budget;
    int64_t size = atomic_load(&self->size);
    int level;
    if (size == RELEASED)
        return closed_error(), NULL;
    if (!node_of(to))
        return NULL;
    int result = ms_budget_move(from->node, to->node, size, &level);
    if (result < 0)
        return PyLong_FromLong(level);
    Py_INCREF((PyObject *)to);
    self->budget = to;
    Py_DECREF((PyObject *)from);
    if (result == MS_BUDGET_SOFT_PASSED)
        tell_soft_limit(to);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(reservation_move_to_doc, "move_to(budget, /)\n--\n\n"
                                      "Charge these bytes to another budget instead. Ancestors that both have see no\n"
                                      "change. Errors as of *budget*.reserve(); on failure nothing was changed.\n");

static PyObject *reservation_move_to(PyObject *self, PyObject *target)
{
    PyObject *refused = reservation_move_once(self, target);
    if (!refused || refused == Py_None)
        return refused;
    Py_DECREF(refused);
    return PyObject_CallMethod(target, "_receive", "O", self);
}

static PyObject *reservation_enter(PyObject *self, PyObject *Py_UNUSED(none))
{
    if (atomic_load_explicit(&((Reservation *)self)->size, memory_order_relaxed) == RELEASED)
        return closed_error(), NULL;
    Py_INCREF(self);
    return self;
}

static PyObject *reservation_exit(PyObject *self, PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(nargs))
{
    give_back((Reservation *)self);
    Py_RETURN_NONE;
}

static PyObject *reservation_size(PyObject *self, void *Py_UNUSED(closure))
{
    int64_t size = atomic_load(&((Reservation *)self)->size);
    return PyLong_FromLongLong(size == RELEASED ? 0 : size);
}

static PyObject *reservation_released(PyObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(atomic_load(&((Reservation *)self)->size) == RELEASED);
}

static PyObject *reservation_budget(PyObject *self, void *Py_UNUSED(closure))
{
    PyObject *budget = (PyObject *)((Reservation *)self)->budget;
    if (!budget)
        Py_RETURN_NONE;
    Py_INCREF(budget);
    return budget;
}

static PyObject *reservation_repr(PyObject *object)
{
    Reservation *self = (Reservation *)object;
    int64_t size = atomic_load(&self->size);
    PyObject *path = self->budget ? PyObject_GetAttrString((PyObject *)self->budget, "path") : PyUnicode_FromString("");
    if (!path)
        return NULL;
    PyObject *text = size == RELEASED
                         ? PyUnicode_FromFormat("<Reservation from '%U', released>", path)
                         : PyUnicode_FromFormat("<Reservation of %lld bytes from '%U'>", (long long)size, path);
    Py_DECREF(path);
    return text;
}

static PyGetSetDef reservation_getset[] = {
    {"size_bytes", reservation_size, NULL, "Bytes reserved; 0 after release().", NULL},
    {"released", reservation_released, NULL, "Whether release() was called.", NULL},
    {"budget", reservation_budget, NULL, "The Budget that is charged.", NULL},
    {0},
};

static PyMemberDef reservation_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Reservation, weakrefs), READONLY, NULL},
    {0},
};

static PyMethodDef reservation_methods[] = {
    {"grow", (PyCFunction)(void (*)(void))reservation_grow, METH_FASTCALL, reservation_grow_doc},
    {"try_grow", (PyCFunction)(void (*)(void))reservation_try_grow, METH_FASTCALL, reservation_try_grow_doc},
    {"_grow_once", reservation_grow_once, METH_O, NULL},
    {"_move_once", reservation_move_once, METH_O, NULL},
    {"shrink", (PyCFunction)(void (*)(void))reservation_shrink, METH_FASTCALL, reservation_shrink_doc},
    {"resize", (PyCFunction)(void (*)(void))reservation_resize, METH_FASTCALL, reservation_resize_doc},
    {"split", (PyCFunction)(void (*)(void))reservation_split, METH_FASTCALL, reservation_split_doc},
    {"move_to", reservation_move_to, METH_O, reservation_move_to_doc},
    {"release", reservation_release, METH_NOARGS, reservation_release_doc},
    {"__enter__", reservation_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))reservation_exit, METH_FASTCALL, NULL},
    {0},
};

static PyType_Slot reservation_slots[] = {
    {Py_tp_dealloc, reservation_dealloc},
    {Py_tp_traverse, reservation_traverse},
    {Py_tp_clear, reservation_clear},
    {Py_tp_methods, reservation_methods},
    {Py_tp_members, reservation_members},
    {Py_tp_getset, reservation_getset},
    {Py_tp_repr, reservation_repr},
    {Py_tp_doc, "Bytes promised by a budget before they are allocated. Made by Budget.reserve(); a context manager.\n\n"
                "One that is garbage-collected unreleased warns (ResourceWarning) and gives its bytes back."},
    {0},
};

static PyType_Spec reservation_spec = {
    .name = "memsafe.Reservation",
    .basicsize = sizeof(Reservation),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = reservation_slots,
};

int ms_budget_py_add(PyObject *dict)
{
    if (!budget_type)
        budget_type = (PyTypeObject *)PyType_FromSpec(&core_spec);
    if (!reservation_type)
        reservation_type = (PyTypeObject *)PyType_FromSpec(&reservation_spec);
    if (!budget_type || !reservation_type)
        return -1;
    return PyDict_SetItemString(dict, "BudgetCore", (PyObject *)budget_type) ||
                   PyDict_SetItemString(dict, "Reservation", (PyObject *)reservation_type)
               ? -1
               : 0;
}
