/* Knows CPython (limited API 3.11). RegionCore: the buffer protocol over a mapping, and the count of its views. */
#include <Python.h>

#include "ms.h"
#include "python_types_internal.h"
#include "region.h"

typedef struct {
    PyObject_HEAD
    void *address; /* NULL before attach and after detach; who detaches it unmaps it */
    Py_ssize_t size;
    Py_ssize_t exports;
} RegionCore;

static PyObject *region_attach(PyObject *object, PyObject *args)
{
    RegionCore *self = (RegionCore *)object;
    unsigned long long address;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(args, "Kn", &address, &size))
        return NULL;
    if (self->address)
        return PyErr_SetString(PyExc_RuntimeError, "attached already"), NULL;
    self->address = (void *)(uintptr_t)address;
    self->size = size;
    Py_RETURN_NONE;
}

static PyObject *region_detach(PyObject *object, PyObject *Py_UNUSED(none))
{
    RegionCore *self = (RegionCore *)object;
    if (self->exports)
        return PyErr_Format(PyExc_BufferError, "cannot close a region with %zd views of it in use", self->exports);
    void *address = self->address;
    self->address = NULL;
    return PyLong_FromUnsignedLongLong((uintptr_t)address);
}

static int region_get_buffer(PyObject *object, Py_buffer *view, int flags)
{
    RegionCore *self = (RegionCore *)object;
    if (!self->address) {
        view->obj = NULL;
        PyErr_SetString(PyExc_ValueError, "the region was closed");
        return -1;
    }
    if (PyBuffer_FillInfo(view, object, self->address, self->size, 0, flags))
        return -1;
    self->exports++;
    return 0;
}

static void region_release_buffer(PyObject *object, Py_buffer *Py_UNUSED(view))
{
    ((RegionCore *)object)->exports--;
}

static Py_ssize_t region_length(PyObject *object)
{
    return ((RegionCore *)object)->address ? ((RegionCore *)object)->size : 0;
}

static void region_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    RegionCore *self = (RegionCore *)object;
    if (self->address) /* lost in a cycle with its views, which kept it from being closed and now are gone */
        ms_region_unmap(self->address, (size_t)self->size);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyMethodDef region_methods[] = {
    {"_attach", region_attach, METH_VARARGS, NULL},
    {"_detach", region_detach, METH_NOARGS, NULL},
    {0},
};

static PyType_Slot region_slots[] = {
    {Py_tp_dealloc, region_dealloc},
    {Py_tp_methods, region_methods},
    {Py_bf_getbuffer, region_get_buffer},
    {Py_bf_releasebuffer, region_release_buffer},
    {Py_sq_length, region_length},
    {Py_tp_doc, "A mapping's buffer, in C. Use memsafe.Budget.map()."},
    {0},
};

static PyType_Spec region_spec = {
    .name = "memsafe_native.RegionCore",
    .basicsize = sizeof(RegionCore),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = region_slots,
};

int ms_region_py_add(PyObject *dict)
{
    PyObject *type = PyType_FromSpec(&region_spec);
    if (!type)
        return -1;
    int failed = PyDict_SetItemString(dict, "RegionCore", type);
    Py_DECREF(type);
    return failed;
}
