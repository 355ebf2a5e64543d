/* Knows CPython (limited API 3.11) and NumPy's memory handlers (NEP 49), by their layout, which is the same since 1.22:
 * no header of NumPy's is needed to build, nor NumPy to load. A handler charges a budget for the data of every array.
 *
 * NumPy holds the GIL when it calls a handler, but not always: np.fromstring and np.fromfile grow without it. So the
 * path of a charge that is taken at once needs no GIL, and what needs Python takes it. */
#include "budget_py.h"
#include "python_types_internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define CAPSULE "mem_handler"

/* PyDataMemAllocator and PyDataMem_Handler, version 1, of numpy/ndarraytypes.h. */
typedef struct {
    void *context;
    void *(*malloc)(void *context, size_t size);
    void *(*calloc)(void *context, size_t count, size_t size);
    void *(*realloc)(void *context, void *data, size_t size);
    void (*free)(void *context, void *data, size_t size);
} Allocator;

typedef struct {
    char name[127]; /* numpy._core.multiarray.get_handler_name(array) shows it */
    uint8_t version;
    Allocator allocator;
} NumpyHandler;

/* Where the functions that are used stand in the table of NumPy's capsule _ARRAY_API. */
enum { SLOT_FEATURE_VERSION = 211, SLOT_SET_HANDLER = 304 };

/* Before 2.4 NumPy crashed where it was refused the buffer of a sort (a NULL descriptor in _new_sortlike). */
enum { FEATURES_OF_2_4 = 0x15 };

/* Returns a new reference to the handler that it replaces in the current context. */
static PyObject *(*numpy_set_handler)(PyObject *handler);

typedef struct {
    NumpyHandler numpy; /* first: what NumPy finds in the capsule */
    ms_budget *node;    /* of budget */
    PyObject *budget;   /* owned: an array keeps its handler alive, and so its budget, as a reservation does */
    PyObject *refused;  /* owned: memsafe.numpy's, called when a charge is not taken at once */
    int huge_pages;
} Handler;

/* Stands before the data and says what was charged. The size that NumPy gives to free() is a hint only (its own tests
 * print that it is wrong "in some places"), and realloc() gets none. */
typedef struct {
    size_t size;
    size_t unused; /* NumPy counts on malloc's alignment */
} Header;

_Static_assert(sizeof(Header) % _Alignof(max_align_t) == 0, "the data behind the header must be aligned as malloc's");

#define SIZE_MAX_BYTES ((size_t)PTRDIFF_MAX - sizeof(Header))

/* From here on NumPy asks for huge pages where it may (indicate_hugepages in its alloc.c). */
#define HUGE_FROM ((size_t)4 << 20)

static void *data_of(const Handler *self, Header *header, size_t size)
{
    if (MS_UNLIKELY(size >= HUGE_FROM && self->huge_pages)) {
        size_t page = (size_t)sysconf(_SC_PAGESIZE);
        uintptr_t start = ((uintptr_t)header + page - 1) & ~(page - 1);
        madvise((void *)start, (uintptr_t)header + size - start, MADV_HUGEPAGE);
    }
    header->size = size;
    return header + 1;
}

enum { ASK_FOR_ROOM = -1 };

/* A pending exception of somebody else's is put aside while our Python code runs, and the GIL is held. */
typedef struct {
    PyGILState_STATE gil;
    PyObject *type, *value, *traceback;
} Python;

static Python enter_python(void)
{
    Python state = {.gil = PyGILState_Ensure()};
    PyErr_Fetch(&state.type, &state.value, &state.traceback);
    return state;
}

/* An exception that is pending now stays so, unless there was one before. */
static void leave_python(Python state)
{
    if (state.type)
        PyErr_Restore(state.type, state.value, state.traceback);
    PyGILState_Release(state.gil);
}

/* NumPy would overwrite a KeyboardInterrupt with its MemoryError: have it raised again as soon as Python runs. */
static void put_off(PyObject *where)
{
    if (PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) {
        PyErr_Clear();
        PyErr_SetInterrupt();
    } else
        PyErr_WriteUnraisable(where);
}

/* The charge was not taken at once. Room is made for it if it can be; where the level that refused is given (0: the
 * budget, 1: its parent, ...), nobody's code is run, and it stays refused. Returns 0 and has charged, or -1 with a
 * MemoryError pending: NumPy's own takes its place where an array was to be made, but a comparison of structured
 * scalars would take two for equal if nothing told that it failed. */
static int ask(Handler *self, size_t size, int level)
{
    Python state = enter_python();
    PyObject *error = PyObject_CallFunction(self->refused, "Oni", self->budget, (Py_ssize_t)size, level);
    int charged = error == Py_None;
    if (error && !charged)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    else if (!error) {
        put_off(self->refused);
        PyErr_NoMemory();
    }
    Py_XDECREF(error);
    leave_python(state);
    return charged ? 0 : -1;
}

static void tell_soft_limit(Handler *self)
{
    Python state = enter_python();
    if (ms_budget_tell_soft_limit((BudgetCore *)self->budget))
        put_off(self->budget);
    leave_python(state);
}

/* What freed arrays of one budget have yet to give back: mostly the next array of that budget takes it again, and then
 * neither has touched the counters, whose atomic steps cost more than all the rest of a handler. The lag is not to be
 * seen: the pocket is opened only where ms_budget_may_lag(), and closed before a budget is looked at or charged from
 * Python, before an array grows in place or Python's heap is refused, and before another budget's array is charged. (A
 * native thread that charges without the GIL may find so much
 * less.) Never open without a GIL. */
enum { POCKET_BYTES_MAX = 64 << 10 };

ms_budget *ms_pocket_of;
static int64_t pocket_bytes;

void ms_pocket_empty(void)
{
    if (pocket_bytes)
        ms_budget_uncharge(ms_pocket_of, pocket_bytes, NULL);
    pocket_bytes = 0;
    ms_pocket_of = NULL;
}

static int64_t take_from_pocket(ms_budget *node, int64_t size)
{
    if (MS_UNLIKELY(ms_pocket_of != node)) {
        if (ms_pocket_of)
            ms_pocket_empty();
        return 0;
    }
    int64_t taken = size < pocket_bytes ? size : pocket_bytes;
    pocket_bytes -= taken;
    return taken;
}

static int may_open_pocket(const ms_budget *node)
{
#ifdef Py_GIL_DISABLED
    return (void)node, 0;
#else
    return !ms_pocket_of && ms_budget_may_lag(node);
#endif
}

static void give_back(ms_budget *node, int64_t size)
{
    if (size <= POCKET_BYTES_MAX - pocket_bytes && (MS_LIKELY(ms_pocket_of == node) || may_open_pocket(node))) {
        ms_pocket_of = node;
        pocket_bytes += size;
        return;
    }
    ms_budget_uncharge(node, size, NULL);
}

static int charge(Handler *self, size_t size)
{
    if (MS_UNLIKELY(size > SIZE_MAX_BYTES))
        return -1;
    int64_t taken = take_from_pocket(self->node, (int64_t)size), rest = (int64_t)size - taken;
    int result = rest ? ms_budget_charge(self->node, rest, NULL, NULL) : 0;
    if (MS_LIKELY(result == 0))
        return 0;
    if (result < 0) {
        ms_budget_uncharge(self->node, taken, NULL);
        return ask(self, size, ASK_FOR_ROOM);
    }
    tell_soft_limit(self);
    return 0;
}

static void *handler_malloc(void *context, size_t size)
{
    Handler *self = context;
    if (MS_UNLIKELY(charge(self, size)))
        return NULL;
    Header *header = malloc(size + sizeof *header);
    if (MS_LIKELY(header))
        return data_of(self, header, size);
    ms_budget_uncharge(self->node, (int64_t)size, NULL);
    return NULL;
}

static void *handler_calloc(void *context, size_t count, size_t unit)
{
    Handler *self = context;
    size_t size;
    if (__builtin_mul_overflow(count, unit, &size) || MS_UNLIKELY(charge(self, size)))
        return NULL;
    Header *header = calloc(1, size + sizeof *header); /* large ones are not touched: their pages come when written */
    if (MS_LIKELY(header))
        return data_of(self, header, size);
    ms_budget_uncharge(self->node, (int64_t)size, NULL);
    return NULL;
}

static void handler_free(void *context, void *data, size_t Py_UNUSED(hint))
{
    if (!data)
        return;
    Header *header = (Header *)data - 1;
    int64_t size = (int64_t)header->size;
    free(header);
    give_back(((Handler *)context)->node, size);
}

static int soft_limit_call(void *budget)
{
    int failed = ms_budget_tell_soft_limit(budget);
    Py_DECREF((PyObject *)budget);
    return failed;
}

/* While an array is resized no Python may run: NumPy has checked that nobody else refers to it, and has an address of
 * its data that is about to change. So soft limits are told later, by the main thread. */
static void tell_soft_limit_later(Handler *self)
{
    PyGILState_STATE gil = PyGILState_Ensure();
    ms_pocket_empty(); /* which may not lag until the limit is armed again */
    Py_INCREF(self->budget);
    if (Py_AddPendingCall(soft_limit_call, self->budget))
        Py_DECREF(self->budget); /* its queue is full: told at the next crossing */
    PyGILState_Release(gil);
}

/* Whoever grows may not have the GIL, which guards the pocket. */
static void empty_pocket_from_anywhere(void)
{
    if (!__atomic_load_n(&ms_pocket_of, __ATOMIC_RELAXED))
        return;
    PyGILState_STATE gil = PyGILState_Ensure();
    ms_pocket_empty();
    PyGILState_Release(gil);
}

static void *handler_realloc(void *context, void *data, size_t size)
{
    Handler *self = context;
    if (!data)
        return handler_malloc(context, size);
    Header *header = (Header *)data - 1;
    size_t before = header->size, more = size > before ? size - before : 0;
    if (MS_UNLIKELY(size > SIZE_MAX_BYTES))
        return NULL;
    if (more)
        empty_pocket_from_anywhere();
    int level, result = more ? ms_budget_charge(self->node, (int64_t)more, NULL, &level) : 0;
    if (MS_UNLIKELY(result < 0) && ask(self, more, level))
        return NULL;
    header = realloc(header, size + sizeof *header);
    ms_budget_uncharge(self->node, (int64_t)(!header ? more : size < before ? before - size : 0), NULL);
    if (!header)
        return NULL;
    header->size = size;
    if (MS_UNLIKELY(result == MS_BUDGET_SOFT_PASSED))
        tell_soft_limit_later(self);
    return header + 1;
}

static void handler_destroy(PyObject *capsule)
{
    Handler *self = PyCapsule_GetPointer(capsule, CAPSULE);
    PyObject *budget = self->budget, *refused = self->refused;
    if (ms_pocket_of == self->node)
        ms_pocket_empty();
    free(self);
    Py_DECREF(budget);
    Py_DECREF(refused);
}

PyDoc_STRVAR(numpy_connect_doc, "numpy_connect(array_api, /)\n--\n\n"
                                "Find NumPy's functions in its capsule _ARRAY_API. False where it is older than 2.4.");

static PyObject *numpy_connect(PyObject *Py_UNUSED(module), PyObject *array_api)
{
    void **table = PyCapsule_GetPointer(array_api, NULL);
    if (!table)
        return NULL;
    unsigned int (*feature_version)(void) = (unsigned int (*)(void))(uintptr_t)table[SLOT_FEATURE_VERSION];
    if (feature_version() < FEATURES_OF_2_4)
        Py_RETURN_FALSE;
    numpy_set_handler = (PyObject * (*)(PyObject *))(uintptr_t)table[SLOT_SET_HANDLER];
    Py_RETURN_TRUE;
}

PyDoc_STRVAR(numpy_handler_doc, "numpy_handler(budget, name, refused, huge_pages, /)\n--\n\n"
                                "A capsule of NumPy's for arrays that are charged to *budget*.\n\n"
                                "refused(budget, size_bytes, level) charges after all (None), or returns an error.");

static PyObject *numpy_handler(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *budget, *refused;
    const char *name;
    int huge_pages;
    if (!PyArg_ParseTuple(args, "OyOp", &budget, &name, &refused, &huge_pages))
        return NULL;
    if (!PyObject_TypeCheck(budget, ms_budget_type))
        return PyErr_SetString(PyExc_TypeError, "a Budget was expected"), NULL;
    ms_budget *node = node_of((BudgetCore *)budget);
    if (!node)
        return NULL;
    Handler *self = calloc(1, sizeof *self);
    if (!self)
        return PyErr_NoMemory();
    *self = (Handler){
        .numpy = {.version = 1, .allocator = {self, handler_malloc, handler_calloc, handler_realloc, handler_free}},
        .node = node,
        .budget = budget,
        .refused = refused,
        .huge_pages = huge_pages,
    };
    strncpy(self->numpy.name, name, sizeof self->numpy.name - 1);
    PyObject *capsule = PyCapsule_New(self, CAPSULE, handler_destroy);
    if (!capsule)
        return free(self), NULL;
    Py_INCREF(budget);
    Py_INCREF(refused);
    return capsule;
}

PyDoc_STRVAR(numpy_swap_handler_doc, "numpy_swap_handler(capsule, /)\n--\n\n"
                                     "Make this the handler of the current context; return the one before.");

static PyObject *numpy_swap_handler(PyObject *Py_UNUSED(module), PyObject *capsule)
{
    if (!numpy_set_handler)
        return PyErr_SetString(PyExc_RuntimeError, "numpy_connect() was not called"), NULL;
    return numpy_set_handler(capsule);
}

int ms_numpy_handler_py_add(PyObject *dict)
{
    static PyMethodDef methods[] = {
        {"numpy_connect", numpy_connect, METH_O, numpy_connect_doc},
        {"numpy_handler", numpy_handler, METH_VARARGS, numpy_handler_doc},
        {"numpy_swap_handler", numpy_swap_handler, METH_O, numpy_swap_handler_doc},
        {0},
    };
    return ms_py_add_functions(dict, methods);
}
