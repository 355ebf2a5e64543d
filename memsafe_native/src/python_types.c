/* Knows CPython (limited API 3.11). Attaches the GIL-keeping types and functions of the other *_py.c files. */
#include <Python.h>

#include "ms.h"
#include "python_types.h"
#include "python_types_internal.h"

int ms_py_add_functions(PyObject *dict, PyMethodDef *methods)
{
    for (PyMethodDef *method = methods; method->ml_name; method++) {
        PyObject *function = PyCFunction_New(method, NULL);
        int failed = !function || PyDict_SetItemString(dict, method->ml_name, function);
        Py_XDECREF(function);
        if (failed)
            return -1;
    }
    return 0;
}

int ms_python_types_attach(uintptr_t dict)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *target = (PyObject *)dict;
    int failed = ms_budget_py_add(target) || ms_fork_py_add(target) || ms_heap_py_add(target) ||
                 ms_numpy_handler_py_add(target) || ms_object_heap_py_add(target) || ms_owned_py_add(target) ||
                 ms_region_py_add(target) || ms_spawn_py_add(target);
    if (failed)
        PyErr_Print();
    PyGILState_Release(gil);
    return failed ? -1 : 0;
}
