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

PyObject *ms_reservation_of_charge(BudgetCore *self, int64_t n, int result)
{
    PyObject *reservation = ms_reservation_new(self, n);
    if (MS_UNLIKELY(result == MS_BUDGET_SOFT_PASSED) && reservation && ms_budget_tell_soft_limit(self)) {
        ms_reservation_release(reservation);
        Py_DECREF(reservation);
        return NULL;
    }
    return reservation;
}

/* One attempt: a Reservation, or an int that says which level refused (0: this budget, 1: its parent, ...). */
static PyObject *attempt(BudgetCore *self, int64_t n)
{
    int level;
    int result = ms_budget_charge(self->node, n, NULL, &level);
    if (MS_UNLIKELY(result < 0))
        return PyLong_FromLong(level);
    return ms_reservation_of_charge(self, n, result);
}

int ms_parse_size_and_timeout(Py_ssize_t nargs, PyObject *const *args, PyObject *kwnames, const char *name,
                              PyObject **timeout)
{
    Py_ssize_t keywords = kwnames ? PyTuple_Size(kwnames) : 0;
    *timeout = Py_None;
    if (MS_LIKELY(nargs == 1 && keywords == 0))
        return 0;
    if (nargs == 1 && keywords == 1 &&
        PyUnicode_CompareWithASCIIString(PyTuple_GetItem(kwnames, 0), "timeout_s") == 0) {
        *timeout = args[1];
        return 0;
    }
    PyErr_Format(PyExc_TypeError, "%s() takes one size and, by keyword, timeout_s", name);
    return -1;
}

static int core_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    BudgetCore *self = (BudgetCore *)object;
    PyObject *parent;
    long long limit, quantum = 0;
    if (kwargs && PyDict_Size(kwargs))
        return PyErr_SetString(PyExc_TypeError, "BudgetCore takes no keyword arguments"), -1;
    if (!PyArg_ParseTuple(args, "OL|L", &parent, &limit, &quantum))
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
    self->node = ms_budget_new_batched(above, limit, quantum);
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

/* What the budget took at once, or NULL: an error is set, or Python has to look at it. */
static PyObject *obtain_at_once(PyObject *self, PyObject *size)
{
    int64_t n = plain_size(size);
    if (MS_UNLIKELY(!node_of((BudgetCore *)self) || n < 0))
        return NULL;
    PyObject *result = attempt((BudgetCore *)self, n);
    if (MS_LIKELY(!result || Py_IS_TYPE(result, ms_reservation_type)))
        return result;
    Py_DECREF(result);
    return NULL;
}

PyDoc_STRVAR(core_reserve_doc,
             "reserve($self, size, /, *, timeout_s=None)\n--\n\n"
             "Promise *size* bytes, in this budget and in every ancestor, before they are allocated.\n\n"
             "Where a limit stands in the way, reclaimers are asked to make room first.\n\n"
             "Args:\n"
             "    size: An int of bytes, or a string such as \"64 MiB\".\n"
             "    timeout_s: How long to wait for what others release, where reclaimers do not do; None: not at all.\n"
             "        First come, first served: while somebody waits at a level, nobody who comes later is served\n"
             "        there.\n\n"
             "Returns:\n"
             "    A Reservation, which is a context manager; or call its release().\n\n"
             "Raises:\n"
             "    BudgetExceededError: The limit of this budget or of an ancestor would be passed. Nothing was\n"
             "        changed.\n"
             "    BudgetAbortedError: This budget or an ancestor was aborted.\n"
             "    BudgetClosedError: This budget was closed.\n"
             "    ValueError: *size* is not a size, or *timeout_s* is negative or no number.\n");

static PyObject *core_reserve(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    PyObject *timeout;
    if (ms_parse_size_and_timeout(nargs, args, kwnames, "reserve", &timeout))
        return NULL;
    PyObject *reservation = obtain_at_once(self, args[0]);
    if (MS_LIKELY(reservation != NULL) || PyErr_Occurred())
        return reservation;
    return PyObject_CallMethod(self, "_reserve", "OO", args[0], timeout);
}

PyDoc_STRVAR(core_try_reserve_doc, "try_reserve($self, size, /)\n--\n\n"
                                   "As reserve(), but None where that raises BudgetExceededError.\n");

static PyObject *core_try_reserve(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (require_one(nargs, "try_reserve"))
        return NULL;
    PyObject *reservation = obtain_at_once(self, args[0]);
    if (MS_LIKELY(reservation != NULL) || PyErr_Occurred())
        return reservation;
    return PyObject_CallMethod(self, "_try_reserve", "O", args[0]);
}

/* Python has looked at it before: what is no plain size is an error here. */
static int64_t checked_size(PyObject *object)
{
    int64_t n = plain_size(object);
    if (n < 0)
        PyErr_SetString(PyExc_ValueError, "a size in bytes was expected");
    return n;
}

PyDoc_STRVAR(core_attempt_doc, "_attempt($self, size_bytes, /)\n--\n\n"
                               "A Reservation, or how many levels up it was refused. Asks nobody for room.\n");

static PyObject *core_attempt(PyObject *self, PyObject *size)
{
    int64_t n = checked_size(size);
    return n >= 0 && node_of((BudgetCore *)self) ? attempt((BudgetCore *)self, n) : NULL;
}

PyDoc_STRVAR(core_overdraw_doc, "_overdraw($self, size_bytes, /)\n--\n\n"
                                "As _attempt, a bounded part beyond the limits, and past those who wait.\n");

static PyObject *core_overdraw(PyObject *object, PyObject *size)
{
    BudgetCore *self = (BudgetCore *)object;
    int64_t n = checked_size(size);
    int level;
    if (n < 0 || !node_of(self))
        return NULL;
    int result = ms_budget_charge_overdraft(self->node, n, &level);
    return result < 0 ? PyLong_FromLong(level) : ms_reservation_of_charge(self, n, result);
}

PyDoc_STRVAR(core_stand_in_line_doc, "_stand_in_line($self, size_bytes, mailbox, token, /)\n--\n\n"
                                     "A Claim. mailbox: the address of an ms_mailbox, which the caller keeps, or 0.\n");

static PyObject *core_stand_in_line(PyObject *self, PyObject *args)
{
    long long n;
    unsigned long long mailbox, token;
    if (!PyArg_ParseTuple(args, "LKK", &n, &mailbox, &token) || !node_of((BudgetCore *)self))
        return NULL;
    return ms_claim_py_new((BudgetCore *)self, n, (ms_mailbox *)(uintptr_t)mailbox, token);
}

PyDoc_STRVAR(core_charge_existing_doc,
             "_charge_existing($self, size_bytes, /)\n--\n\n"
             "Charge bytes that exist. None, or how many levels up it met a closed budget.\n");

static PyObject *core_charge_existing(PyObject *self, PyObject *size)
{
    int64_t n = checked_size(size);
    int level, result;
    if (n < 0 || !node_of((BudgetCore *)self))
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
    int64_t n = checked_size(size);
    if (n < 0 || !node_of((BudgetCore *)self))
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

static PyObject *core_abort(PyObject *self, PyObject *Py_UNUSED(none))
{
    if (!node_of((BudgetCore *)self))
        return NULL;
    ms_budget_abort(((BudgetCore *)self)->node);
    Py_RETURN_NONE;
}

static PyObject *core_return_slack(PyObject *self, PyObject *Py_UNUSED(none))
{
    if (!node_of((BudgetCore *)self))
        return NULL;
    ms_budget_return_slack(((BudgetCore *)self)->node);
    Py_RETURN_NONE;
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
    if (stats.closed)
        stats.used_bytes = 0; /* its closing gave them back; what is left in the count awaits its owners' release */
    return PyLong_FromLongLong(*(int64_t *)((char *)&stats + (intptr_t)which));
}

static PyObject *size_or_none(int64_t size)
{
    if (size == INT64_MAX)
        Py_RETURN_NONE;
    return PyLong_FromLongLong(size);
}

static PyObject *core_get_optional(PyObject *self, void *which)
{
    ms_budget_stats stats;
    if (!node_of((BudgetCore *)self))
        return NULL;
    ms_budget_read(((BudgetCore *)self)->node, &stats);
    return size_or_none(*(int64_t *)((char *)&stats + (intptr_t)which));
}

static PyObject *core_is(PyObject *self, void *which)
{
    ms_budget_stats stats;
    if (!node_of((BudgetCore *)self))
        return NULL;
    ms_budget_read(((BudgetCore *)self)->node, &stats);
    return PyBool_FromLong(*(int *)((char *)&stats + (intptr_t)which));
}

static PyObject *core_headroom(PyObject *self, void *Py_UNUSED(closure))
{
    return node_of((BudgetCore *)self) ? size_or_none(ms_budget_headroom(((BudgetCore *)self)->node)) : NULL;
}

static PyObject *core_waiting(PyObject *self, void *Py_UNUSED(closure))
{
    ms_budget_stats stats;
    if (!node_of((BudgetCore *)self))
        return NULL;
    ms_budget_read(((BudgetCore *)self)->node, &stats);
    return PyLong_FromUnsignedLong(stats.waiting);
}

#define FIELD(name) (void *)offsetof(ms_budget_stats, name)

static PyGetSetDef core_getset[] = {
    {"used_bytes", core_get, NULL, "Bytes charged to this budget and to those below it; 0 once it was closed.",
     FIELD(used_bytes)},
    {"peak_bytes", core_get, NULL, "The most that used_bytes ever was.", FIELD(peak_bytes)},
    {"charged_bytes", core_get, NULL, "Bytes charged here by charge(), without a reservation.", FIELD(charged_bytes)},
    {"slack_bytes", core_get, NULL,
     "Bytes that the ancestors were charged for later use here: below two quanta, 0 without a quantum.",
     FIELD(slack_bytes)},
    {"closed", core_is, NULL, "Whether close() was called.", FIELD(closed)},
    {"aborted", core_is, NULL, "Whether abort() was called.", FIELD(aborted)},
    {"_limit", core_get_optional, NULL, NULL, FIELD(limit_bytes)},
    {"_soft_limit", core_get_optional, NULL, NULL, FIELD(soft_limit_bytes)},
    {"waiting", core_waiting, NULL, "Requests that this budget's limit holds up now.", NULL},
    {"headroom_bytes", core_headroom, NULL,
     "Bytes until this budget or an ancestor refuses; None where nothing is limited.", NULL},
    {0},
};

static PyMethodDef core_methods[] = {
    {"reserve", (PyCFunction)(void (*)(void))core_reserve, METH_FASTCALL | METH_KEYWORDS, core_reserve_doc},
    {"try_reserve", (PyCFunction)(void (*)(void))core_try_reserve, METH_FASTCALL, core_try_reserve_doc},
    {"_attempt", core_attempt, METH_O, core_attempt_doc},
    {"_overdraw", core_overdraw, METH_O, core_overdraw_doc},
    {"_stand_in_line", core_stand_in_line, METH_VARARGS, core_stand_in_line_doc},
    {"_charge_existing", core_charge_existing, METH_O, core_charge_existing_doc},
    {"_uncharge_existing", core_uncharge_existing, METH_O, core_uncharge_existing_doc},
    {"_close", core_close, METH_NOARGS,
     "_close($self, /)\n--\n\nBytes that were still charged, given back to the ancestors."},
    {"_return_slack", core_return_slack, METH_NOARGS, NULL},
    {"_abort", core_abort, METH_NOARGS, NULL},
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

PyDoc_STRVAR(current_budget_doc,
             "current_budget()\n--\n\n"
             "Return the budget whose ``with`` block this code runs in, None outside of any.\n\n"
             "Context-local: asyncio tasks and asyncio.to_thread inherit it, new threads do not.\n");

/* self is the bound get() of the context variable: the limited API has none of those. */
static PyObject *current_budget(PyObject *get, PyObject *Py_UNUSED(none))
{
    return PyObject_CallNoArgs(get);
}

PyDoc_STRVAR(current_budget_by_doc, "current_budget_by(get, /)\n--\n\n"
                                    "memsafe.current_budget() on a context variable's get(): half the price of one\n"
                                    "in Python.\n");

static PyObject *current_budget_by(PyObject *Py_UNUSED(module), PyObject *get)
{
    static PyMethodDef method = {"current_budget", current_budget, METH_NOARGS, current_budget_doc};
    return PyCFunction_New(&method, get);
}

int ms_budget_py_add(PyObject *dict)
{
    static PyMethodDef functions[] = {
        {"current_budget_by", current_budget_by, METH_O, current_budget_by_doc},
        {0},
    };
    if (!ms_budget_type)
        ms_budget_type = (PyTypeObject *)PyType_FromSpec(&core_spec);
    if (!ms_budget_type || PyDict_SetItemString(dict, "BudgetCore", (PyObject *)ms_budget_type))
        return -1;
    return ms_reservation_py_add(dict) || ms_claim_py_add(dict) || ms_py_add_functions(dict, functions) ? -1 : 0;
}
