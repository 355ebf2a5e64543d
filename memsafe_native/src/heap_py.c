/* Knows CPython (limited API 3.11, and the allocator calls beside it, looked up at run time: their structs are as in
 * 3.5). Hooks below pymalloc and the raw allocator, which count Python's heap and refuse what heap.c refuses.
 *
 * Hooked are the arenas, in which pymalloc keeps objects of at most 512 bytes, and the raw domain, which larger ones
 * come from. The hooks are installed once and never removed: a block may be freed long after the last guard. */
#include <Python.h>

#include <malloc.h>
#include <string.h>

#include "budget_py.h"
#include "heap.h"
#include "heap_shield_py.h"
#include "object_heap_internal.h"
#include "python_types_internal.h"

enum {
    RAW_DOMAIN = 0,                 /* PYMEM_DOMAIN_RAW */
    PYMALLOC_ARENA_BYTES = 1 << 20, /* other sizes that are asked as arenas are pieces of a thread's stack of frames */
    PYMALLOC_MAX_BYTES = 512,       /* larger requests go to the raw domain */
    LARGE_BYTES = 4096,             /* smaller ones are mostly the structs of C code, which is often careless; so */
    BEARABLE_BYTES = 8 << 20,       /* they are refused only once the limit was passed by this much */
};

/* PyObjectArenaAllocator. */
struct arena_allocator {
    void *context;
    void *(*alloc)(void *context, size_t size);
    void (*free)(void *context, void *arena, size_t size);
};

static struct {
    const char *(*name)(void); /* of the allocator that serves; NULL: none of CPython's own */
    void *(*raw_malloc)(size_t size);
    void (*raw_free)(void *block);
    void (*get_blocks)(int domain, struct ms_block_allocator *allocator);
    void (*set_blocks)(int domain, const struct ms_block_allocator *allocator);
    void (*get_arenas)(struct arena_allocator *allocator);
    void (*set_arenas)(const struct arena_allocator *allocator);
} python;

/* What served before; written once, before the hooks can be called. */
static struct ms_block_allocator blocks;
static struct arena_allocator arenas;
static bool installed;

static PyObject *soft_limit_passed; /* called without arguments, in the main thread */
static _Atomic int pending;

static _Thread_local struct {
    bool arena_refused; /* pymalloc comes back at once, to have the object itself from the raw domain */
    unsigned probes;    /* small requests that came by */
} here;

/* ---------------------------------------------------------------------------------------------------- refusing */

static int call_soft_limit_passed(void *Py_UNUSED(nothing))
{
    atomic_store(&pending, 0);
    PyObject *result = PyObject_CallNoArgs(soft_limit_passed);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* From inside an allocation no Python may run: the main thread does it when it gets to it. */
static void call_soon(void)
{
    if (!atomic_exchange(&pending, 1) && Py_AddPendingCall(call_soft_limit_passed, NULL))
        atomic_store(&pending, 0); /* the queue is full; the next crossing tells */
}

static inline void tell(int told)
{
    if (MS_UNLIKELY(told))
        call_soon();
}

static bool is_refused(size_t size, int64_t bearable_bytes)
{
    if (!ms_heap_is_refusable() || size > INT64_MAX)
        return false;
    ms_pocket_empty(); /* the GIL is held: it is refusable */
    int told, account = ms_heap_refuser((int64_t)size, bearable_bytes, &told);
    tell(told);
    if (account < 0 || ms_heap_machinery_runs())
        return false;
    ms_heap_note_refusal(account);
    return true;
}

static inline bool refused(const struct ms_heap_thread *thread, size_t size, int64_t bearable_bytes)
{
    return MS_UNLIKELY(!ms_heap_fits(thread, size)) && is_refused(size, bearable_bytes);
}

static int64_t bearable(size_t size)
{
    return size < LARGE_BYTES ? BEARABLE_BYTES : 0;
}

/* Small blocks of the raw domain are locks, thread states and the like, which CPython cannot do without; they are
 * refused only where they stand in for an arena that was. */
static inline bool block_refused(const struct ms_heap_thread *thread, size_t size)
{
    if (MS_LIKELY(size > PYMALLOC_MAX_BYTES))
        return refused(thread, size, bearable(size));
    bool stands_in = here.arena_refused;
    here.arena_refused = false;
    here.probes++;
    return stands_in;
}

/* ---------------------------------------------------------------------------------------------------- the hooks */

/* Each asks once for what is the thread's own: a call, in a library that was loaded late. */

static inline void *counted(struct ms_heap_thread *thread, void *block)
{
    if (MS_LIKELY(block != NULL))
        tell(ms_heap_count(thread, (int64_t)malloc_usable_size(block)));
    return block;
}

static void *block_malloc(void *Py_UNUSED(context), size_t size)
{
    struct ms_heap_thread *thread = &ms_heap_thread;
    if (MS_UNLIKELY(block_refused(thread, size)))
        return NULL;
    return counted(thread, blocks.malloc(blocks.context, size));
}

static void *block_calloc(void *Py_UNUSED(context), size_t count, size_t size)
{
    struct ms_heap_thread *thread = &ms_heap_thread;
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes) || MS_UNLIKELY(block_refused(thread, bytes)))
        return NULL;
    return counted(thread, blocks.calloc(blocks.context, count, size));
}

static void *block_realloc(void *Py_UNUSED(context), void *block, size_t size)
{
    if (!block)
        return block_malloc(NULL, size);
    struct ms_heap_thread *thread = &ms_heap_thread;
    size_t before = malloc_usable_size(block);
    /* One that shrinks is never refused: its owner would not expect it. */
    if (size > before && size > PYMALLOC_MAX_BYTES && MS_UNLIKELY(refused(thread, size - before, bearable(size))))
        return NULL;
    void *moved = blocks.realloc(blocks.context, block, size);
    if (MS_LIKELY(moved != NULL))
        tell(ms_heap_count(thread, (int64_t)malloc_usable_size(moved) - (int64_t)before));
    return moved;
}

static void block_free(void *Py_UNUSED(context), void *block)
{
    if (!block)
        return;
    ms_heap_count(&ms_heap_thread, -(int64_t)malloc_usable_size(block));
    blocks.free(blocks.context, block);
}

static void *arena_alloc(void *Py_UNUSED(context), size_t size)
{
    struct ms_heap_thread *thread = &ms_heap_thread;
    /* What is not a whole arena is a piece of a stack of frames: 3.11 answers with a SystemError. */
    if (size == PYMALLOC_ARENA_BYTES && MS_UNLIKELY(refused(thread, size, 0))) {
        here.arena_refused = true;
        return NULL;
    }
    void *arena = arenas.alloc(arenas.context, size);
    if (arena)
        tell(ms_heap_count(thread, (int64_t)size));
    return arena;
}

static void arena_free(void *Py_UNUSED(context), void *arena, size_t size)
{
    arenas.free(arenas.context, arena, size);
    ms_heap_count(&ms_heap_thread, -(int64_t)size);
}

/* ------------------------------------------------------------------------------------------------ installing them */

static bool find_all(void)
{
    return ms_heap_find(&python.name, "_PyMem_GetCurrentAllocatorName") &&
           ms_heap_find(&python.raw_malloc, "PyMem_RawMalloc") && ms_heap_find(&python.raw_free, "PyMem_RawFree") &&
           ms_heap_find(&python.get_blocks, "PyMem_GetAllocator") &&
           ms_heap_find(&python.set_blocks, "PyMem_SetAllocator") &&
           ms_heap_find(&python.get_arenas, "PyObject_GetArenaAllocator") &&
           ms_heap_find(&python.set_arenas, "PyObject_SetArenaAllocator");
}

static void install_hooks(void)
{
    int64_t in_arenas = ms_object_heap_arena_bytes(), in_malloc = ms_object_heap_malloc_bytes();
    ms_heap_count(&ms_heap_thread, (in_arenas > 0 ? in_arenas : 0) + (in_malloc > 0 ? in_malloc : 0));
    python.get_arenas(&arenas);
    python.set_arenas(&(struct arena_allocator){.alloc = arena_alloc, .free = arena_free});
    python.get_blocks(RAW_DOMAIN, &blocks);
    python.set_blocks(RAW_DOMAIN, &(struct ms_block_allocator){
                                      .malloc = block_malloc,
                                      .calloc = block_calloc,
                                      .realloc = block_realloc,
                                      .free = block_free,
                                  });
    installed = true;
}

/* Another's hooks above ours pass our calls on; a tool that began before us and ended after has put ours away. */
static bool hooks_are_called(void)
{
    unsigned before = here.probes;
    void *block = python.raw_malloc(1);
    python.raw_free(block);
    return here.probes != before;
}

PyDoc_STRVAR(install_doc,
             "install(soft_limit_passed) -> str | None\n\n"
             "Install the hooks, once a process; later calls see whether they are still called. Returns None, or why\n"
             "they cannot be. *soft_limit_passed* is called in the main thread after a charge passed a soft limit.");

static PyObject *install(PyObject *Py_UNUSED(module), PyObject *function)
{
#ifdef Py_GIL_DISABLED
    return PyUnicode_FromString("this CPython is built without the GIL and allocates by mimalloc, which has no hooks");
#endif
    if (!installed) {
        if (!find_all())
            return PyUnicode_FromString("this Python does not offer CPython's allocator hooks");
        const char *name = python.name();
        if (!name)
            return PyUnicode_FromString("another tool has hooked the allocators, tracemalloc perhaps: end it, guard, "
                                        "and then begin it again");
        if (strcmp(name, "pymalloc"))
            return PyUnicode_FromFormat("the allocator is %s, not pymalloc (PYTHONMALLOC, -X dev, a debug build)",
                                        name);
        if (!ms_heap_shield_start())
            return PyUnicode_FromString("it is not CPython as we know it: its frames, or compile(), exec() and eval()");
        Py_INCREF(function);
        soft_limit_passed = function;
        install_hooks();
    }
    if (!hooks_are_called())
        return PyUnicode_FromString("another tool that hooked the allocators before has put memsafe's hooks away");
    Py_RETURN_NONE;
}

/* ------------------------------------------------------------------------------------------------ for memsafe.heap */

PyDoc_STRVAR(open_doc, "open(budget) -> int\n\nCharge the heap to *budget*; -errno as ms_heap_open().");

static PyObject *open_account(PyObject *Py_UNUSED(module), PyObject *budget)
{
    if (!PyObject_TypeCheck(budget, ms_budget_type))
        return PyErr_SetString(PyExc_TypeError, "not a Budget"), NULL;
    ms_budget *node = node_of((BudgetCore *)budget);
    if (!node)
        return NULL;
    int told = 0, account = ms_heap_open(node, &told);
    tell(told);
    return PyLong_FromLong(account);
}

/* The account that an int names, or -1 with the exception set. */
static int account_of(PyObject *number)
{
    long account = PyLong_AsLong(number);
    if (account >= 0 && account < MS_HEAP_ACCOUNTS_MAX)
        return (int)account;
    if (!PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "no such account");
    return -1;
}

static PyObject *close_account(PyObject *Py_UNUSED(module), PyObject *number)
{
    int account = account_of(number);
    if (account < 0)
        return NULL;
    ms_heap_close(account);
    Py_RETURN_NONE;
}

static PyObject *enter(PyObject *Py_UNUSED(module), PyObject *number)
{
    int account = account_of(number);
    if (account < 0)
        return NULL;
    ms_heap_enter(account);
    ms_heap_shield_enter();
    Py_RETURN_NONE;
}

PyDoc_STRVAR(leave_doc, "leave(account) -> bool\n\nFalse where this thread is not inside.");

static PyObject *leave(PyObject *Py_UNUSED(module), PyObject *number)
{
    int account = account_of(number);
    if (account < 0)
        return NULL;
    if (ms_heap_leave(account))
        Py_RETURN_FALSE;
    ms_heap_shield_leave();
    Py_RETURN_TRUE;
}

PyDoc_STRVAR(read_doc, "read(account) -> (heap_bytes, refusals)");

static PyObject *read_account(PyObject *Py_UNUSED(module), PyObject *number)
{
    int account = account_of(number);
    if (account < 0)
        return NULL;
    ms_heap_stats stats;
    ms_heap_read(account, &stats);
    return Py_BuildValue("LL", (long long)stats.heap_bytes, (long long)stats.refusals);
}

PyDoc_STRVAR(inject_doc,
             "inject(n) -> int\n\nFor tests: have the n-th question of this thread answered by a refusal, 0: "
             "none. Returns how many were still to come.");

static PyObject *inject(PyObject *Py_UNUSED(module), PyObject *number)
{
    long long n = PyLong_AsLongLong(number);
    if (n == -1 && PyErr_Occurred())
        return NULL;
    return PyLong_FromLongLong(ms_heap_inject(n));
}

PyDoc_STRVAR(dicts_are_sound_doc,
             "dicts_are_sound() -> bool\n\nWhether a dict is as before when it could not grow. To be "
             "called inside of an account, by code that is refused.");

static PyObject *dicts_are_sound(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    PyObject *dict = PyDict_New(), *last = dict;
    Py_ssize_t before = 0;
    if (!dict)
        return NULL;
    ms_heap_inject(1);
    for (int i = 0; i < 1000 && last; i++) {
        before = PyDict_Size(dict);
        last = PyObject_CallMethod(dict, "setdefault", "iO", i, Py_None);
        Py_XDECREF(last);
    }
    ms_heap_inject(0);
    bool sound = !last && PyErr_ExceptionMatches(PyExc_MemoryError) && PyDict_Size(dict) == before;
    PyErr_Clear();
    if (sound)
        Py_DECREF(dict); /* else even freeing it would crash */
    return PyBool_FromLong(sound);
}

int ms_heap_py_add(PyObject *dict)
{
    static PyMethodDef methods[] = {
        {"install", install, METH_O, install_doc},
        {"open", open_account, METH_O, open_doc},
        {"close", close_account, METH_O, NULL},
        {"enter", enter, METH_O, NULL},
        {"leave", leave, METH_O, leave_doc},
        {"read", read_account, METH_O, read_doc},
        {"inject", inject, METH_O, inject_doc},
        {"dicts_are_sound", dicts_are_sound, METH_NOARGS, dicts_are_sound_doc},
        {0},
    };
    PyObject *module = PyModule_New("memsafe_native.heap");
    int failed = !module || PyModule_AddFunctions(module, methods) || ms_heap_shield_add(module) ||
                 PyDict_SetItemString(dict, "heap", module);
    Py_XDECREF(module);
    return failed ? -1 : 0;
}
