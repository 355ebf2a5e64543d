/* Knows CPython (limited API 3.11). Closes a descriptor that may be a stranger's by now. */
#include <Python.h>

#include <unistd.h>

#include "owned.h"
#include "python_types_internal.h"

static const char close_doc[] =
    "close_owned(fd, device, inode) -> bool\n\n"
    "Close a descriptor if it stands for the file with that device and inode, 0 and 0 for any; whether it did.\n"
    "The GIL is kept: between the look and the closing no other thread can give the number to another file.\n"
    "Raises OSError where closing failed; the number is free all the same (close(2)).";

static PyObject *close_owned(PyObject *Py_UNUSED(module), PyObject *args)
{
    int fd;
    unsigned long long device, inode;
    if (!PyArg_ParseTuple(args, "iKK:close_owned", &fd, &device, &inode))
        return NULL;
    ms_owned now;
    int failed = ms_own(fd, &now);
    bool is_other = !failed && (device || inode) && (now.device != device || now.inode != inode);
    if (failed == -EBADF || is_other)
        Py_RETURN_FALSE;
    if (close(fd) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_TRUE;
}

int ms_owned_py_add(PyObject *dict)
{
    static PyMethodDef methods[] = {{"close_owned", close_owned, METH_VARARGS, close_doc}, {0}};
    return ms_py_add_functions(dict, methods);
}
