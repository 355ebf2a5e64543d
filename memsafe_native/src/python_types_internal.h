/* Knows CPython. 0, or -1 with a Python error set; the GIL is held. */
#ifndef MS_PYTHON_TYPES_INTERNAL_H
#define MS_PYTHON_TYPES_INTERNAL_H
#include <Python.h>

/* Add functions, which end with an empty entry and live on, to a dict under their names. */
int ms_py_add_functions(PyObject *dict, PyMethodDef *methods);

/* Each adds the types and functions of one concept to a dict. */
int ms_budget_py_add(PyObject *dict);
int ms_fork_py_add(PyObject *dict);
int ms_heap_py_add(PyObject *dict);
int ms_numpy_handler_py_add(PyObject *dict);
int ms_object_heap_py_add(PyObject *dict);
int ms_owned_py_add(PyObject *dict);
int ms_region_py_add(PyObject *dict);
int ms_spawn_py_add(PyObject *dict);

#endif
