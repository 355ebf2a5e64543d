/* Knows CPython (limited API 3.11). BudgetCore, under memsafe.Budget: the hot path of a charge.
 *
 * Here and in reservation_py.c is only what must be fast: an exact int that a budget takes at once. Everything else
 * (sizes in strings, a refusal, reclaimers, messages) is a method of memsafe.Budget in Python, called by name. */
#include "budget_py.h"
#include "python_types_internal.h"

PyTypeObject *ms_budget_type;

int ms_budget_tell_soft_limit(BudgetCore *budget)
{
    PyObject *result = PyObject_CallMethod((PyObject *)budget, "_soft_limit_passed", NULL);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* One attempt: a Reservation, or an int that says which level refused (0: this budget, 1: its parent, ...). */
static PyObject *attempt(BudgetCore *self, int64_t n)
{
    int level;
    int result = ms_budget_charge(self->node, n, NULL, &level);
    if (MS_UNLIKELY(result < 0))
        return PyLong_FromLong(level);
    PyObject *reservation = ms_reservation_new(self, n);
    if (MS_UNLIKELY(result == MS_BUDGET_SOFT_PASSED) && reservation && ms_budget_tell_soft_limit(self)) {
        ms_reservation_release(reservation);
        Py_DECREF(reservation);
        return NULL;
    }
    return reservation;
}

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
        if (!PyObject_TypeCheck(parent, ms_budget_type))
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

static PyObject *core_obtain(PyObject *self, PyObject *const *args, Py_ssize_t nargs, const char *name,
                             const char *policy)
{
    if (require_one(nargs, name))
        return NULL;
    int64_t n = plain_size(args[0]);
    if (((BudgetCore *)self)->node && MS_LIKELY(n >= 0) && node_of((BudgetCore *)self)) {
        PyObject *result = attempt((BudgetCore *)self, n);
        if (MS_LIKELY(!result || Py_IS_TYPE(result, ms_reservation_type)))
            return result;
        Py_DECREF(result);
    }
    return PyObject_CallMethod(self, policy, "O", args[0]);
}

PyDoc_STRVAR(core_reserve_doc,
             "reserve($self, size, /)\n--\n\n"
             "Promise *size* bytes, in this budget and in every ancestor, before they are allocated.\n\n"
             "Where a limit stands in the way, reclaimers are asked to make room first.\n\n"
             "Args:\n"
             "    size: An int of bytes, or a string such as \"64 MiB\".\n\n"
             "Returns:\n"
             "    A Reservation, which is a context manager; or call its release().\n\n"
             "Raises:\n"
             "    BudgetExceededError: The limit of this budget or of an ancestor would be passed. Nothing was\n"
             "        changed.\n"
             "    BudgetAbortedError: This budget or an ancestor was aborted.\n"
             "    BudgetClosedError: This budget was closed.\n"
             "    ValueError: *size* is not a size.\n");

static PyObject *core_reserve(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    return core_obtain(self, args, nargs, "reserve", "_reserve");
}

PyDoc_STRVAR(core_try_reserve_doc, "try_reserve($self, size, /)\n--\n\n"
                                   "As reserve(), but None where that raises BudgetExceededError.\n");

static PyObject *core_try_reserve(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    return core_obtain(self, args, nargs, "try_reserve", "_try_reserve");
}

PyDoc_STRVAR(core_attempt_doc, "_attempt($self, size_bytes, /)\n--\n\n"
                               "A Reservation, or how many levels up it was refused. Asks nobody for room.\n");

static PyObject *core_attempt(PyObject *self, PyObject *size)
{
    int64_t n = plain_size(size);
    if (n < 0)
        return PyErr_SetString(PyExc_ValueError, "a size in bytes was expected"), NULL;
    return node_of((BudgetCore *)self) ? attempt((BudgetCore *)self, n) : NULL;
}

PyDoc_STRVAR(core_charge_existing_doc,
             "_charge_existing($self, size_bytes, /)\n--\n\n"
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
    if (result == MS_BUDGET_SOFT_PASSED && ms_budget_tell_soft_limit((BudgetCore *)self)) {
        ms_budget_uncharge_existing(((BudgetCore *)self)->node, n);
        return NULL;
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(core_uncharge_existing_doc, "_uncharge_existing($self, size_bytes, /)\n--\n\n"
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
    if (stats.closed && (intptr_t)which == offsetof(ms_budget_stats, used_bytes))
        stats.used_bytes = 0; /* its closing gave them back; what is left in the count awaits its owners' release */
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
    {"used_bytes", core_get, NULL, "Bytes charged to this budget and to those below it; 0 once it was closed.",
     FIELD(used_bytes)},
    {"peak_bytes", core_get, NULL, "The most that used_bytes ever was.", FIELD(peak_bytes)},
    {"charged_bytes", core_get, NULL, "Bytes charged here by charge(), without a reservation.", FIELD(charged_bytes)},
    {"closed", core_get, NULL, "Whether close() was called.", FIELD(closed)},
    {"headroom_bytes", core_headroom, NULL,
     "Bytes until this budget or an ancestor refuses; None where nothing is limited.", NULL},
    {0},
};

static PyMethodDef core_methods[] = {
    {"reserve", (PyCFunction)(void (*)(void))core_reserve, METH_FASTCALL, core_reserve_doc},
    {"try_reserve", (PyCFunction)(void (*)(void))core_try_reserve, METH_FASTCALL, core_try_reserve_doc},
    {"_attempt", core_attempt, METH_O, core_attempt_doc},
    {"_charge_existing", core_charge_existing, METH_O, core_charge_existing_doc},
    {"_uncharge_existing", core_uncharge_existing, METH_O, core_uncharge_existing_doc},
    {"_close", core_close, METH_NOARGS,
     "_close($self, /)\n--\n\nBytes that were still charged, given back to the ancestors."},
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

int ms_budget_py_add(PyObject *dict)
{
    if (!ms_budget_type)
        ms_budget_type = (PyTypeObject *)PyType_FromSpec(&core_spec);
    if (!ms_budget_type || PyDict_SetItemString(dict, "BudgetCore", (PyObject *)ms_budget_type))
        return -1;
    return ms_reservation_py_add(dict);
}
