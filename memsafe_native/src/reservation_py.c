/* Knows CPython (limited API 3.11). Reservation: bytes that a budget promised. See budget_py.c for what is here. */
#include "budget_py.h"

#include <structmember.h>
#include <stdatomic.h>

#define RELEASED (-1)

typedef struct {
    PyObject_HEAD
    BudgetCore *budget;   /* owned; NULL only after the cycle collector cleared it */
    _Atomic int64_t size; /* RELEASED once given back */
    PyObject *weakrefs;
} Reservation;

PyTypeObject *ms_reservation_type;

PyObject *ms_reservation_new(BudgetCore *budget, int64_t size)
{
    Py_INCREF((PyObject *)budget); /* before the allocation: that may run the collector, and so anybody's code */
    Reservation *self = PyObject_GC_New(Reservation, ms_reservation_type);
    if (!self) {
        ms_budget_uncharge(budget->node, size, NULL);
        Py_DECREF((PyObject *)budget);
        return NULL;
    }
    self->budget = budget;
    self->weakrefs = NULL;
    atomic_init(&self->size, size);
    PyObject_GC_Track(self);
    return (PyObject *)self;
}

/* Give everything back, once. Returns the bytes, RELEASED if that was done before. */
static int64_t give_back(Reservation *self)
{
    int64_t size;
    MS_LOCK(self);
    size = atomic_exchange(&self->size, RELEASED);
    if (size > 0)
        ms_budget_uncharge(self->budget->node, size, NULL);
    MS_UNLOCK();
    return size;
}

void ms_reservation_release(PyObject *reservation)
{
    give_back((Reservation *)reservation);
}

static int closed_error(void)
{
    PyObject *module = PyImport_ImportModule("memsafe.errors");
    PyObject *type = module ? PyObject_GetAttrString(module, "ReservationClosedError") : NULL;
    if (type)
        PyErr_SetString(type, "the reservation was already released");
    Py_XDECREF(type);
    Py_XDECREF(module);
    return -1;
}

PyDoc_STRVAR(reservation_disown_doc, "_disown($self, /)\n--\n\n"
                                     "Release it but leave its bytes charged, to somebody who gives them back in C.\n"
                                     "Returns how many they are.");

static PyObject *reservation_disown(PyObject *object, PyObject *Py_UNUSED(none))
{
    int64_t size = atomic_exchange(&((Reservation *)object)->size, RELEASED);
    return size == RELEASED ? (closed_error(), NULL) : PyLong_FromLongLong(size);
}

/* The net under a reservation that nobody released: the bytes go back, and the owner hears of it. */
static void lose(Reservation *self)
{
    if (!self->budget)
        return;
    int64_t size = give_back(self);
    if (size <= 0 || ms_budget_is_closed(self->budget->node)) /* a budget's close() has already told */
        return;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *path = PyObject_GetAttrString((PyObject *)self->budget, "path");
    if (!path ||
        PyErr_ResourceWarning(NULL, 1, "a reservation of %lld bytes from budget '%U' was never released; it is now",
                              (long long)size, path))
        PyErr_WriteUnraisable((PyObject *)ms_reservation_type);
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

/* A new reference to the budget that is charged, which another thread's move_to() may replace at any time. NULL, with
 * no error set, only after the collector cleared it. */
static BudgetCore *budget_of(Reservation *self)
{
    BudgetCore *budget;
    MS_LOCK(self);
    budget = self->budget;
    Py_XINCREF((PyObject *)budget);
    MS_UNLOCK();
    return budget;
}

/* The functions called _locked are for what has to happen to budget and size together. */
static PyObject *shrink_locked(Reservation *self, int64_t n)
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

/* An exception that ends a call is set: undo what the call did, unless somebody released or shrank it meanwhile. */
static void undo_growth_locked(Reservation *self, int64_t n)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    Py_XDECREF(shrink_locked(self, n));
    PyErr_Restore(type, value, traceback);
}

static PyObject *grow_locked(Reservation *self, int64_t n)
{
    int level;
    int64_t size = atomic_load(&self->size);
    if (size == RELEASED)
        return closed_error(), NULL;
    int result = ms_budget_charge(node_of(self->budget), n, NULL, &level);
    if (result < 0)
        return PyLong_FromLong(level);
    do {
        if (size == RELEASED) { /* by another thread, meanwhile */
            ms_budget_uncharge(self->budget->node, n, NULL);
            return closed_error(), NULL;
        }
    } while (!atomic_compare_exchange_weak(&self->size, &size, size + n));
    if (MS_UNLIKELY(result == MS_BUDGET_SOFT_PASSED) && ms_budget_tell_soft_limit(self->budget)) {
        undo_growth_locked(self, n);
        return NULL;
    }
    Py_RETURN_NONE;
}

/* One attempt to grow: None, or how many levels up it was refused. */
static PyObject *grow_once(Reservation *self, int64_t n)
{
    PyObject *result;
    MS_LOCK(self);
    result = grow_locked(self, n);
    MS_UNLOCK();
    return result;
}

/* Leave it to the method of Budget. timeout: NULL where that takes none. */
static PyObject *reservation_policy(Reservation *self, const char *method, PyObject *size, PyObject *timeout)
{
    PyObject *budget = (PyObject *)budget_of(self);
    if (!budget)
        return closed_error(), NULL;
    PyObject *result = PyObject_CallMethod(budget, method, timeout ? "OOO" : "OO", (PyObject *)self, size, timeout);
    Py_DECREF(budget);
    return result;
}

/* 1: it grew. 0: Python has to look at it. -1: an error is set. */
static int grow_at_once(Reservation *self, PyObject *size)
{
    int64_t n = plain_size(size);
    if (MS_UNLIKELY(n < 0))
        return 0;
    PyObject *refused = grow_once(self, n);
    if (MS_UNLIKELY(!refused))
        return -1;
    Py_DECREF(refused);
    return refused == Py_None;
}

PyDoc_STRVAR(reservation_grow_doc, "grow($self, size, /, *, timeout_s=None)\n--\n\n"
                                   "Reserve *size* bytes more, or change nothing. Arguments and errors as of\n"
                                   "Budget.reserve(), and ReservationClosedError.\n");

static PyObject *reservation_grow(PyObject *object, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    Reservation *self = (Reservation *)object;
    PyObject *timeout;
    if (ms_parse_size_and_timeout(nargs, args, kwnames, "grow", &timeout))
        return NULL;
    int grown = grow_at_once(self, args[0]);
    if (MS_UNLIKELY(grown < 0))
        return NULL;
    if (MS_LIKELY(grown))
        Py_RETURN_NONE;
    return reservation_policy(self, "_grow", args[0], timeout);
}

PyDoc_STRVAR(reservation_try_grow_doc, "try_grow($self, size, /)\n--\n\n"
                                       "Reserve *size* bytes more: True, or False where grow() raises\n"
                                       "BudgetExceededError.\n");

static PyObject *reservation_try_grow(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Reservation *self = (Reservation *)object;
    if (require_one(nargs, "try_grow"))
        return NULL;
    int grown = grow_at_once(self, args[0]);
    if (grown < 0)
        return NULL;
    return grown ? PyBool_FromLong(1) : reservation_policy(self, "_try_grow", args[0], NULL);
}

static PyObject *shrink_by(Reservation *self, int64_t n)
{
    PyObject *result;
    MS_LOCK(self);
    result = shrink_locked(self, n);
    MS_UNLOCK();
    return result;
}

PyDoc_STRVAR(reservation_shrink_doc, "shrink($self, size, /)\n--\n\n"
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
                             : reservation_policy((Reservation *)self, "_shrink", args[0], NULL);
}

static PyObject *resize_locked(Reservation *self, int64_t target)
{
    int64_t size = atomic_load(&self->size);
    if (size == RELEASED)
        return closed_error(), NULL;
    return target <= size ? shrink_locked(self, size - target) : grow_locked(self, target - size);
}

/* One attempt to resize, from the size that it has now: None, or how many levels up it was refused. */
static PyObject *resize_once(Reservation *self, int64_t target)
{
    PyObject *result;
    MS_LOCK(self);
    result = resize_locked(self, target);
    MS_UNLOCK();
    return result;
}

PyDoc_STRVAR(reservation_resize_doc, "resize($self, size, /)\n--\n\n"
                                     "Grow or shrink to *size* bytes. Errors as of grow().\n");

static PyObject *reservation_resize(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    Reservation *self = (Reservation *)object;
    if (require_one(nargs, "resize"))
        return NULL;
    int64_t target = plain_size(args[0]);
    if (MS_LIKELY(target >= 0)) {
        PyObject *refused = resize_once(self, target);
        if (MS_LIKELY(!refused || refused == Py_None))
            return refused;
        Py_DECREF(refused);
    }
    return reservation_policy(self, "_resize", args[0], NULL);
}

PyDoc_STRVAR(reservation_release_doc, "release($self, /)\n--\n\n"
                                      "Give everything back. Releasing twice is a no-op.\n");

static PyObject *reservation_release(PyObject *self, PyObject *Py_UNUSED(none))
{
    give_back((Reservation *)self);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(reservation_split_doc, "split($self, size, /)\n--\n\n"
                                    "Return a Reservation of *size* bytes taken out of this one; the budget sees no\n"
                                    "change. Errors as of shrink().\n");

static PyObject *split_locked(Reservation *self, int64_t n)
{
    int64_t size = atomic_load(&self->size);
    do {
        if (size == RELEASED)
            return closed_error(), NULL;
        if (n > size)
            return PyErr_Format(PyExc_ValueError, "cannot split %lld bytes off a reservation of %lld", (long long)n,
                                (long long)size);
    } while (!atomic_compare_exchange_weak(&self->size, &size, size - n));
    return ms_reservation_new(self->budget, n);
}

static PyObject *reservation_split(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    if (require_one(nargs, "split"))
        return NULL;
    int64_t n = plain_size(args[0]);
    if (n < 0)
        return reservation_policy((Reservation *)object, "_split", args[0], NULL);
    PyObject *result;
    MS_LOCK(object);
    result = split_locked((Reservation *)object, n);
    MS_UNLOCK();
    return result;
}

/* None; an int, how many levels up it was refused; or NULL. */
static PyObject *move_locked(Reservation *self, BudgetCore *to)
{
    BudgetCore *from = self->budget;
    int64_t size = atomic_load(&self->size);
    int level;
    if (size == RELEASED)
        return closed_error(), NULL;
    int result = ms_budget_move(from->node, to->node, size, &level);
    if (result < 0)
        return PyLong_FromLong(level);
    Py_INCREF((PyObject *)to);
    self->budget = to;
    Py_DECREF((PyObject *)from);
    if (result == MS_BUDGET_SOFT_PASSED && ms_budget_tell_soft_limit(to))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *reservation_move_once(PyObject *object, PyObject *target)
{
    if (!PyObject_TypeCheck(target, ms_budget_type))
        return PyErr_SetString(PyExc_TypeError, "move_to() takes a Budget"), NULL;
    if (!node_of((BudgetCore *)target))
        return NULL;
    PyObject *result;
    MS_LOCK(object);
    result = move_locked((Reservation *)object, (BudgetCore *)target);
    MS_UNLOCK();
    return result;
}

/* None; NotImplemented where the two are not charged to one budget; or NULL. */
static PyObject *merge_locked(Reservation *self, Reservation *other)
{
    int64_t more = atomic_load(&other->size), size = atomic_load(&self->size);
    if (more == RELEASED || size == RELEASED)
        return closed_error(), NULL;
    if (self->budget != other->budget) {
        Py_INCREF(Py_NotImplemented);
        return Py_NotImplemented;
    }
    atomic_store(&other->size, RELEASED);
    atomic_fetch_add(&self->size, more);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(reservation_merge_doc, "merge($self, other, /)\n--\n\n"
                                    "Take over what another reservation holds, which is released by it: the way back\n"
                                    "from split(). Where it is charged to another budget, as its move_to() first.\n");

static PyObject *reservation_merge(PyObject *self, PyObject *other)
{
    PyObject *result;
    if (!Py_IS_TYPE(other, ms_reservation_type) || self == other)
        return PyErr_SetString(PyExc_TypeError, "merge() takes another Reservation"), NULL;
    MS_LOCK2(self, other);
    result = merge_locked((Reservation *)self, (Reservation *)other);
    MS_UNLOCK2();
    if (result != Py_NotImplemented)
        return result;
    Py_DECREF(result);
    PyObject *budget = (PyObject *)budget_of((Reservation *)self);
    PyObject *moved = budget ? PyObject_CallMethod(other, "move_to", "O", budget) : (closed_error(), NULL);
    Py_XDECREF(budget);
    if (!moved)
        return NULL;
    Py_DECREF(moved);
    return reservation_merge(self, other);
}

PyDoc_STRVAR(reservation_move_to_doc, "move_to($self, budget, /)\n--\n\n"
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
    PyObject *budget = (PyObject *)budget_of((Reservation *)self);
    if (!budget)
        Py_RETURN_NONE;
    return budget;
}

static PyObject *reservation_repr(PyObject *object)
{
    Reservation *self = (Reservation *)object;
    int64_t size = atomic_load(&self->size);
    PyObject *budget = (PyObject *)budget_of(self);
    PyObject *path = budget ? PyObject_GetAttrString(budget, "path") : PyUnicode_FromString("");
    Py_XDECREF(budget);
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
    {"grow", (PyCFunction)(void (*)(void))reservation_grow, METH_FASTCALL | METH_KEYWORDS, reservation_grow_doc},
    {"try_grow", (PyCFunction)(void (*)(void))reservation_try_grow, METH_FASTCALL, reservation_try_grow_doc},
    {"_move_once", reservation_move_once, METH_O, NULL},
    {"shrink", (PyCFunction)(void (*)(void))reservation_shrink, METH_FASTCALL, reservation_shrink_doc},
    {"resize", (PyCFunction)(void (*)(void))reservation_resize, METH_FASTCALL, reservation_resize_doc},
    {"split", (PyCFunction)(void (*)(void))reservation_split, METH_FASTCALL, reservation_split_doc},
    {"merge", reservation_merge, METH_O, reservation_merge_doc},
    {"move_to", reservation_move_to, METH_O, reservation_move_to_doc},
    {"_disown", reservation_disown, METH_NOARGS, reservation_disown_doc},
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

int ms_reservation_py_add(PyObject *dict)
{
    if (!ms_reservation_type)
        ms_reservation_type = (PyTypeObject *)PyType_FromSpec(&reservation_spec);
    if (!ms_reservation_type)
        return -1;
    return PyDict_SetItemString(dict, "Reservation", (PyObject *)ms_reservation_type);
}
