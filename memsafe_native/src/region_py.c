/* Knows CPython (limited API 3.11). RegionCore: the buffer protocol over a region, and the count of its users. */
#include "budget_py.h"
#include "generation.h"
#include "python_types_internal.h"
#include "region.h"

#include <stdatomic.h>
#include <unistd.h>

typedef struct {
    PyObject_HEAD
    ms_region *region; /* owned; NULL before open and after detach: who detaches it closes it */
    Py_ssize_t views;
    Py_ssize_t pins; /* calls of the kernel under way */
    Py_ssize_t decommits;
    unsigned generation; /* of the process: in a forked child nobody has a pin, who had was another thread */
    atomic_flag lock;    /* of the fields above, for a Python without GIL; held for a few instructions */
} RegionCore;

/* An exporter of a part: memoryview(window). It is a view of its region as long as it lives. */
typedef struct {
    PyObject_HEAD
    RegionCore *core; /* owned */
    char *address;
    Py_ssize_t size;
} Window;

static PyTypeObject *core_type, *window_type;

static void unlock(RegionCore *self)
{
    atomic_flag_clear_explicit(&self->lock, memory_order_release);
}

static void lock(RegionCore *self)
{
    if (MS_UNLIKELY(self->generation != ms_generation())) {
        self->generation = ms_generation();
        self->pins = self->decommits = 0;
        unlock(self);
    }
    while (atomic_flag_test_and_set_explicit(&self->lock, memory_order_acquire))
        ;
}

static int closed_error(void)
{
    PyErr_SetString(PyExc_ValueError, "the region was closed");
    return -1;
}

/* Of one that is kept from being closed. */
static int require_here(const RegionCore *self)
{
    if (ms_region_is_here(self->region))
        return 0;
    PyErr_SetString(PyExc_ValueError,
                    "the region is not in this process: it was kept out of forked children, by advice");
    return -1;
}

static void drop_view(RegionCore *self)
{
    lock(self);
    self->views--;
    unlock(self);
}

/* Count one more view, of a range that is and then stays committed. */
static int add_view(RegionCore *self, size_t offset, size_t size)
{
    lock(self);
    int open = self->region != NULL, leaving = self->decommits > 0;
    if (open && !leaving)
        self->views++;
    unlock(self);
    if (!open)
        return closed_error();
    if (leaving)
        return PyErr_SetString(PyExc_BufferError, "another thread is decommitting a part of the region"), -1;
    if (!require_here(self)) {
        size_t page = (size_t)sysconf(_SC_PAGESIZE), start = offset / page * page;
        size_t end = (offset + size + page - 1) / page * page;
        if (ms_region_committed(self->region, start, end - start) == end - start)
            return 0;
        PyErr_SetString(PyExc_BufferError, "not all of that is committed: commit it, or use view() for what is");
    }
    drop_view(self);
    return -1;
}

PyDoc_STRVAR(core_open_doc, "_open($self, budget, size_bytes, flags, /)\n--\n\n"
                            "None, or the errno and the name of the call that failed.");

static PyObject *core_open(PyObject *object, PyObject *args)
{
    RegionCore *self = (RegionCore *)object;
    PyObject *budget;
    Py_ssize_t size;
    int flags;
    ms_region_failure failure;
    if (!PyArg_ParseTuple(args, "O!ni", ms_budget_type, &budget, &size, &flags) || !node_of((BudgetCore *)budget))
        return NULL;
    if (self->region)
        return PyErr_SetString(PyExc_RuntimeError, "opened already"), NULL;
    int result = ms_region_open(((BudgetCore *)budget)->node, (size_t)size, flags, &self->region, &failure);
    if (result)
        return Py_BuildValue("is", -result, failure.call);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(core_detach_doc, "_detach($self, /)\n--\n\nThe region, for one caller alone to close; 0 for all others.");

static PyObject *core_detach(PyObject *object, PyObject *Py_UNUSED(none))
{
    RegionCore *self = (RegionCore *)object;
    lock(self);
    Py_ssize_t views = self->views, users = views + self->pins;
    ms_region *region = users ? NULL : self->region;
    if (!users)
        self->region = NULL;
    unlock(self);
    if (users)
        return PyErr_Format(PyExc_BufferError, "cannot close a region with %zd views of it in use%s", views,
                            users > views ? ", and a call under way" : "");
    return PyLong_FromVoidPtr(region);
}

static void drop_pin(RegionCore *self, int decommits)
{
    lock(self);
    if (self->pins) { /* else it was made before this process was forked */
        self->pins--;
        self->decommits -= decommits;
    }
    unlock(self);
}

PyDoc_STRVAR(core_pin_doc, "_pin($self, decommits, /)\n--\n\n"
                           "Keep it from being closed until _unpin(), and from being viewed if it decommits.");

static PyObject *core_pin(PyObject *object, PyObject *decommits)
{
    RegionCore *self = (RegionCore *)object;
    lock(self);
    int open = self->region != NULL, viewed = decommits == Py_True && self->views > 0;
    if (open && !viewed) {
        self->pins++;
        self->decommits += decommits == Py_True;
    }
    unlock(self);
    if (!open)
        return closed_error(), NULL;
    if (viewed)
        return PyErr_SetString(PyExc_BufferError, "cannot decommit a part of a region while views of it are in use"),
               NULL;
    PyObject *address = require_here(self) ? NULL : PyLong_FromVoidPtr(self->region);
    if (!address)
        drop_pin(self, decommits == Py_True);
    return address;
}

static PyObject *core_unpin(PyObject *object, PyObject *decommits)
{
    drop_pin((RegionCore *)object, decommits == Py_True);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(core_window_doc, "_window($self, offset, size, /)\n--\n\n"
                              "A memoryview of a part, which must be committed. pre: it is within the region.");

static PyObject *core_window(PyObject *object, PyObject *args)
{
    RegionCore *self = (RegionCore *)object;
    Py_ssize_t offset, size;
    if (!PyArg_ParseTuple(args, "nn", &offset, &size) || add_view(self, (size_t)offset, (size_t)size))
        return NULL;
    Window *window = PyObject_New(Window, window_type);
    if (!window)
        return drop_view(self), NULL;
    Py_INCREF(object);
    window->core = self;
    window->address = (char *)ms_region_address(self->region) + offset;
    window->size = size;
    PyObject *view = PyMemoryView_FromObject((PyObject *)window);
    Py_DECREF((PyObject *)window);
    return view;
}

static int window_get_buffer(PyObject *object, Py_buffer *view, int flags)
{
    Window *self = (Window *)object;
    return PyBuffer_FillInfo(view, object, self->address, self->size, 0, flags);
}

static void window_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    RegionCore *core = ((Window *)object)->core;
    drop_view(core);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF((PyObject *)core);
    Py_DECREF(type);
}

static int core_get_buffer(PyObject *object, Py_buffer *view, int flags)
{
    RegionCore *self = (RegionCore *)object;
    view->obj = NULL;
    if (!self->region)
        return closed_error();
    size_t size = ms_region_size(self->region);
    if (add_view(self, 0, size))
        return -1;
    if (!PyBuffer_FillInfo(view, object, ms_region_address(self->region), (Py_ssize_t)size, 0, flags))
        return 0;
    drop_view(self);
    return -1;
}

static void core_release_buffer(PyObject *object, Py_buffer *Py_UNUSED(view))
{
    drop_view((RegionCore *)object);
}

static Py_ssize_t core_length(PyObject *object)
{
    RegionCore *self = (RegionCore *)object;
    return self->region ? (Py_ssize_t)ms_region_size(self->region) : 0;
}

static void core_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    RegionCore *self = (RegionCore *)object;
    if (self->region) /* lost in a cycle with its views, which kept it from being closed and now are gone */
        ms_region_close(self->region);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyMethodDef core_methods[] = {
    {"_open", core_open, METH_VARARGS, core_open_doc},
    {"_detach", core_detach, METH_NOARGS, core_detach_doc},
    {"_pin", core_pin, METH_O, core_pin_doc},
    {"_unpin", core_unpin, METH_O, NULL},
    {"_window", core_window, METH_VARARGS, core_window_doc},
    {0},
};

static PyType_Slot core_slots[] = {
    {Py_tp_dealloc, core_dealloc},
    {Py_tp_methods, core_methods},
    {Py_bf_getbuffer, core_get_buffer},
    {Py_bf_releasebuffer, core_release_buffer},
    {Py_sq_length, core_length},
    {Py_tp_doc, "A region's buffer, in C. Use memsafe.Budget.map()."},
    {0},
};

static PyType_Spec core_spec = {
    .name = "memsafe_native.RegionCore",
    .basicsize = sizeof(RegionCore),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = core_slots,
};

static PyType_Slot window_slots[] = {
    {Py_tp_dealloc, window_dealloc},
    {Py_bf_getbuffer, window_get_buffer},
    {0},
};

static PyType_Spec window_spec = {
    .name = "memsafe_native.RegionWindow",
    .basicsize = sizeof(Window),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = window_slots,
};

int ms_region_py_add(PyObject *dict)
{
    if (!core_type)
        core_type = (PyTypeObject *)PyType_FromSpec(&core_spec);
    if (!window_type)
        window_type = (PyTypeObject *)PyType_FromSpec(&window_spec);
    if (!core_type || !window_type)
        return PyErr_Occurred() ? -1 : (PyErr_NoMemory(), -1);
    return PyDict_SetItemString(dict, "RegionCore", (PyObject *)core_type);
}
