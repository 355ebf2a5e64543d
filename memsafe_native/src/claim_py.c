/* Knows CPython (limited API 3.11). Claim: a request that stands in line, for memsafe.budget's slow path. */
#include "budget_py.h"

typedef struct {
    PyObject_HEAD
    BudgetCore *budget; /* owned */
    ms_claim *claim;    /* NULL once it was taken or left */
    int64_t n;
    uint64_t token;
} Claim;

static PyTypeObject *claim_type;

PyObject *ms_claim_py_new(BudgetCore *budget, int64_t n, ms_mailbox *mailbox, uint64_t token)
{
    Claim *self = PyObject_New(Claim, claim_type);
    if (!self)
        return NULL;
    Py_INCREF((PyObject *)budget);
    self->budget = budget;
    self->n = n;
    self->token = token;
    self->claim = ms_claim_new(budget->node, n, mailbox, token);
    if (!self->claim) {
        Py_DECREF((PyObject *)self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

/* Whether the bytes are ours now. */
static int end(Claim *self, int *soft_passed)
{
    ms_claim *claim;
    MS_LOCK(self);
    claim = self->claim;
    self->claim = NULL;
    MS_UNLOCK();
    return claim && ms_claim_end(claim, soft_passed) == MS_CLAIM_GRANTED;
}

/* Leave the line; give back what was granted and not taken. */
static void leave(Claim *self)
{
    int soft_passed = 0;
    if (!end(self, &soft_passed))
        return;
    ms_budget_uncharge(self->budget->node, self->n, NULL);
    if (soft_passed)
        ms_budget_rearm_untold(self->budget->node);
}

static PyObject *claim_enter(PyObject *object, PyObject *Py_UNUSED(none))
{
    Py_INCREF(object);
    return object;
}

PyDoc_STRVAR(exit_doc, "__exit__($self, /, *ignored)\n--\n\nLeave the line; give back what was granted and not taken.");

static PyObject *claim_exit(PyObject *object, PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(nargs))
{
    leave((Claim *)object);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(take_doc, "take($self, /)\n--\n\nThe Reservation that was granted, or None; the line is left.");

static PyObject *claim_take(PyObject *object, PyObject *Py_UNUSED(none))
{
    Claim *self = (Claim *)object;
    int soft_passed = 0;
    if (!end(self, &soft_passed))
        Py_RETURN_NONE;
    return ms_reservation_of_charge(self->budget, self->n, soft_passed ? MS_BUDGET_SOFT_PASSED : 0);
}

PyDoc_STRVAR(wait_doc, "wait($self, timeout_s, /)\n--\n\n"
                       "Sleep until it is granted, fails or is nudged, or a signal came; at most an hour at a time.");

static PyObject *claim_wait(PyObject *object, PyObject *timeout)
{
    Claim *self = (Claim *)object;
    double timeout_s = PyFloat_AsDouble(timeout);
    int result;
    if (timeout_s == -1.0 && PyErr_Occurred())
        return NULL;
    if (!self->claim)
        Py_RETURN_NONE;
    Py_BEGIN_ALLOW_THREADS result = ms_claim_wait(self->claim, (int64_t)((timeout_s < 3600 ? timeout_s : 3600) * 1e9));
    Py_END_ALLOW_THREADS if (result == -EINTR && PyErr_CheckSignals()) return NULL;
    Py_RETURN_NONE;
}

static PyObject *claim_nudge(PyObject *object, PyObject *Py_UNUSED(none))
{
    MS_LOCK(object);
    if (((Claim *)object)->claim)
        ms_claim_nudge(((Claim *)object)->claim);
    MS_UNLOCK();
    Py_RETURN_NONE;
}

PyDoc_STRVAR(shortfall_doc, "shortfall($self, /)\n--\n\n"
                            "How many levels up it is held up, and the bytes that must be given back there before its\n"
                            "turn comes. (0, 0) where it is in no line.");

static PyObject *claim_shortfall(PyObject *object, PyObject *Py_UNUSED(none))
{
    int level = 0;
    int64_t need = ((Claim *)object)->claim ? ms_claim_shortfall(((Claim *)object)->claim, &level) : 0;
    return Py_BuildValue("iL", level, (long long)need);
}

static PyObject *claim_in_line(PyObject *object, void *Py_UNUSED(closure))
{
    int in_line;
    MS_LOCK(object);
    ms_claim *claim = ((Claim *)object)->claim;
    in_line = claim && ms_claim_state(claim) == MS_CLAIM_IN_LINE;
    MS_UNLOCK();
    return PyBool_FromLong(in_line);
}

static PyObject *claim_budget(PyObject *object, void *Py_UNUSED(closure))
{
    PyObject *budget = (PyObject *)((Claim *)object)->budget;
    Py_INCREF(budget);
    return budget;
}

static PyObject *claim_size(PyObject *object, void *Py_UNUSED(closure))
{
    return PyLong_FromLongLong(((Claim *)object)->n);
}

static PyObject *claim_token(PyObject *object, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(((Claim *)object)->token);
}

static void claim_dealloc(PyObject *object)
{
    Claim *self = (Claim *)object;
    PyTypeObject *type = Py_TYPE(object);
    leave(self);
    Py_DECREF((PyObject *)self->budget);
    PyObject_Free(object);
    Py_DECREF(type);
}

static PyMethodDef claim_methods[] = {
    {"take", claim_take, METH_NOARGS, take_doc},
    {"wait", claim_wait, METH_O, wait_doc},
    {"nudge", claim_nudge, METH_NOARGS, "nudge($self, /)\n--\n\nWake whoever waits for it."},
    {"shortfall", claim_shortfall, METH_NOARGS, shortfall_doc},
    {"__enter__", claim_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))claim_exit, METH_FASTCALL, exit_doc},
    {0},
};

static PyGetSetDef claim_getset[] = {
    {"in_line", claim_in_line, NULL, "Whether it is neither granted nor failed nor left.", NULL},
    {"budget", claim_budget, NULL, "The Budget that was asked.", NULL},
    {"token", claim_token, NULL, "What its mailbox hears.", NULL},
    {"size_bytes", claim_size, NULL, "What was asked for.", NULL},
    {0},
};

static PyType_Slot claim_slots[] = {
    {Py_tp_dealloc, claim_dealloc},
    {Py_tp_methods, claim_methods},
    {Py_tp_getset, claim_getset},
    {Py_tp_doc, "A request that stands in line. It belongs to one thread or task; others may only nudge it."},
    {0},
};

static PyType_Spec claim_spec = {
    .name = "memsafe_native.Claim",
    .basicsize = sizeof(Claim),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = claim_slots,
};

int ms_claim_py_add(PyObject *dict)
{
    if (!claim_type)
        claim_type = (PyTypeObject *)PyType_FromSpec(&claim_spec);
    if (!claim_type)
        return -1;
    return PyDict_SetItemString(dict, "Claim", (PyObject *)claim_type);
}
