/* Knows CPython. Each function adds one concept's types to a dict; 0, or -1 with a Python error set. */
#ifndef MS_PYTHON_TYPES_INTERNAL_H
#define MS_PYTHON_TYPES_INTERNAL_H
#include <Python.h>

int ms_budget_py_add(PyObject *dict);
int ms_fork_py_add(PyObject *dict);
int ms_heap_py_add(PyObject *dict);
int ms_numpy_handler_py_add(PyObject *dict);
int ms_object_heap_py_add(PyObject *dict);
int ms_region_py_add(PyObject *dict);
int ms_spawn_py_add(PyObject *dict);

#endif
