/* Knows CPython (limited API 3.11). The environment of this process as the C library holds it. */
#include <Python.h>

#include <string.h>
#include <unistd.h>

#include "ms.h"
#include "python_types_internal.h"

static const char environment_doc[] =
    "environment() -> bytes\n\n"
    "What an exec without an environment would pass on: NAME=VALUE, each ended by NUL, os.putenv's changes included.\n"
    "A copy, made with the GIL held, as os.putenv is called with: ms_spawn() runs without it.";

static PyObject *environment(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    size_t size = 0;
    for (char **entry = environ; entry && *entry; entry++)
        size += strlen(*entry) + 1;
    PyObject *packed = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)size);
    if (!packed)
        return NULL;
    char *at = PyBytes_AsString(packed);
    for (char **entry = environ; entry && *entry; entry++) {
        size_t length = strlen(*entry) + 1;
        memcpy(at, *entry, length);
        at += length;
    }
    return packed;
}

int ms_spawn_py_add(PyObject *dict)
{
    static PyMethodDef method = {"environment", environment, METH_NOARGS, environment_doc};
    PyObject *function = PyCFunction_New(&method, NULL);
    if (!function)
        return -1;
    int failed = PyDict_SetItemString(dict, method.ml_name, function);
    Py_DECREF(function);
    return failed;
}
