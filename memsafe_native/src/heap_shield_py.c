/* Knows CPython (limited API 3.11). Where a thread that a heap guard refuses must not be refused. */
#include "heap_shield_py.h"

#include <dlfcn.h>
#include <stdatomic.h>
#include <string.h>

enum { MEMORY_DOMAIN = 1, OBJECT_DOMAIN = 2 }; /* PYMEM_DOMAIN_MEM, PYMEM_DOMAIN_OBJ: pymalloc's */

static struct {
    void *(*thread_state)(void); /* the current one, NULL where there is none; never an error */
    void *(*raw_malloc)(size_t size);
    void *(*raw_calloc)(size_t count, size_t size);
    void (*get_blocks)(int domain, struct ms_block_allocator *allocator);
    void (*set_blocks)(int domain, const struct ms_block_allocator *allocator);
} python;

static PyObject *f_globals_name, *module_name_name;
static _Atomic int stopped;

static _Thread_local struct {
    void *state;           /* as which Python thread it entered */
    int entered;           /* scopes that refuse it */
    int shielded;          /* calls that must not be refused */
    void *compiling;       /* the frame that called compile(), exec() or eval() */
    const int *collecting; /* its interpreter's word that the garbage collector runs */
} here;

/* ------------------------------------------------------------------------------------------ told by the collector */

/* CPython offers callbacks that tell of a collection, at a microsecond each: 1 to 4 % of a loop that makes containers.
 * So we read what it notes for itself, in the state of an interpreter, just before the lists that the module gc shows
 * as garbage and callbacks, as 3.11 to 3.14 do. memsafe.heap tries out whether it is that. */
enum { STATE_BYTES_MIN = 16 << 10 }; /* an interpreter's state is larger in all of them: its cache of types is */

static size_t collecting_at; /* offset in the state of an interpreter */

static const int *collecting_flag(void)
{
    return (const int *)(const void *)((const char *)PyInterpreterState_Get() + collecting_at);
}

PyDoc_STRVAR(find_collector_doc, "find_collector(garbage, callbacks) -> bool\n\n"
                                 "Find where CPython notes that it collects; the arguments are those of module gc.");

static PyObject *find_collector(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count)
{
    if (count != 2)
        return PyErr_SetString(PyExc_TypeError, "find_collector() takes two arguments"), NULL;
    PyObject *const *state = (PyObject *const *)(void *)PyInterpreterState_Get();
    for (size_t i = 1; i + 1 < STATE_BYTES_MIN / sizeof *state; i++)
        if (state[i] == args[0] && state[i + 1] == args[1]) {
            collecting_at = (i - 1) * sizeof *state;
            Py_RETURN_TRUE;
        }
    Py_RETURN_FALSE;
}

PyDoc_STRVAR(collects_doc, "collects() -> bool\n\nWhether the garbage collector runs. pre: find_collector().");

static PyObject *collects(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyBool_FromLong(*collecting_flag());
}

/* ------------------------------------------------------------------------------------------ told by the thread */

void ms_heap_shield_enter(void)
{
    here.state = python.thread_state();
    here.collecting = collecting_flag();
    here.entered++;
}

void ms_heap_shield_leave(void)
{
    here.entered--;
}

/* Only as the very Python thread that entered, which holds the GIL: not in a subinterpreter, whose making cannot fail
 * well, and not where the GIL was let go. CPython 3.11 answers with whoever holds the GIL, later ones with this
 * thread's own state: it is ours in both cases only if this thread has the GIL. */
bool ms_heap_is_refusable(void)
{
    return here.entered && !here.shielded && !atomic_load_explicit(&stopped, memory_order_relaxed) &&
           python.thread_state() == here.state && !*here.collecting;
}

/* ------------------------------------------------------------------------------------ told by the innermost frame */

/* Code that must not be left half-way: others wait for what it does next (a lock, a task's wake-up), or nobody hears
 * of its errors, or the C code below it does not survive them (pyexpat, of 3.11 at least). */
static const char *const machinery[] = {
    "_weakrefset", "asyncio",   "concurrent",      "contextlib", "importlib", "linecache",
    "logging",     "memsafe",   "multiprocessing", "queue",      "selectors", "socketserver",
    "subprocess",  "threading", "traceback",       "warnings",   "weakref",   "xml",
};

static bool names_machinery(const char *module)
{
    size_t length = strcspn(module, ".");
    for (size_t i = 0; i < sizeof machinery / sizeof *machinery; i++)
        if (strlen(machinery[i]) == length && memcmp(module, machinery[i], length) == 0)
            return true;
    return false;
}

static PyObject *current_frame(void)
{
    here.shielded++; /* it may have to make the object */
    PyObject *frame = (PyObject *)PyThreadState_GetFrame(PyThreadState_Get());
    here.shielded--;
    return frame;
}

static bool frame_is_machinery(PyObject *frame)
{
    if (!frame || frame == here.compiling)
        return true;
    PyObject *globals = PyObject_GetAttr(frame, f_globals_name);
    PyObject *name = globals ? PyDict_GetItemWithError(globals, module_name_name) : NULL;
    const char *module = name && PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, NULL) : NULL;
    bool found = module && names_machinery(module);
    Py_XDECREF(globals);
    return found;
}

/* pymalloc asks us in the middle of making an arena, and must not be entered again from there: it would lose the arena
 * that it makes for the inner call. malloc serves as well: pymalloc
 * frees what is not its own by it. */
static void *raw_malloc(void *Py_UNUSED(context), size_t size)
{
    return python.raw_malloc(size);
}

static void *raw_calloc(void *Py_UNUSED(context), size_t count, size_t size)
{
    return python.raw_calloc(count, size);
}

/* Until it is set back. The context stays: who reads while we write (an interpreter with a GIL of its own) gets what
 * works with the old functions and with the new. */
static struct ms_block_allocator keep_out(int domain)
{
    struct ms_block_allocator before, around;
    python.get_blocks(domain, &before);
    around = before;
    around.malloc = raw_malloc;
    around.calloc = raw_calloc;
    python.set_blocks(domain, &around);
    return before;
}

bool ms_heap_machinery_runs(void)
{
    PyObject *type, *value, *traceback;
    here.shielded++;
    int collects = PyGC_Disable();
    struct ms_block_allocator memory = keep_out(MEMORY_DOMAIN), objects = keep_out(OBJECT_DOMAIN);
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *frame = current_frame();
    bool found = frame_is_machinery(frame);
    Py_XDECREF(frame);
    PyErr_Restore(type, value, traceback);
    python.set_blocks(OBJECT_DOMAIN, &objects);
    python.set_blocks(MEMORY_DOMAIN, &memory);
    if (collects)
        PyGC_Enable();
    here.shielded--;
    return found;
}

/* ------------------------------------------------------------------------------------------------ the compiler */

/* CPython's compiler does not survive refusals: 3.11 crashes in it, or says SyntaxError or SystemError. That it runs is
 * told by its caller alone: as long as the innermost frame is still the one that called compile(), exec() or eval(), it
 * is the compiler, and then it is the code. So these three are wrapped, where CPython finds their C functions; they
 * stay the same objects. */
typedef PyObject *keyword_function(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names);
typedef PyObject *fast_function(PyObject *self, PyObject *const *args, Py_ssize_t count);

enum { COMPILE, EXEC, EVAL, COMPILERS };

static const char *const compiler_names[COMPILERS] = {"compile", "exec", "eval"};
static PyCFunction compilers[COMPILERS]; /* CPython's functions */

struct call {
    PyObject *frame;
    void *outer;
};

static struct call begin(void)
{
    struct call call = {.frame = here.entered ? current_frame() : NULL, .outer = here.compiling};
    here.compiling = call.frame;
    return call;
}

static PyObject *end(struct call call, PyObject *result)
{
    here.compiling = call.outer;
    Py_XDECREF(call.frame);
    return result;
}

static PyObject *with_keywords(int which, PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    struct call call = begin();
    return end(call, ((keyword_function *)(void (*)(void))compilers[which])(self, args, count, names));
}

static PyObject *compile_with_keywords(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    return with_keywords(COMPILE, self, args, count, names);
}

static PyObject *exec_with_keywords(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    return with_keywords(EXEC, self, args, count, names);
}

static PyObject *eval_with_keywords(PyObject *self, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    return with_keywords(EVAL, self, args, count, names);
}

static PyObject *eval_fast(PyObject *self, PyObject *const *args, Py_ssize_t count) /* before 3.13 */
{
    struct call call = begin();
    return end(call, ((fast_function *)(void (*)(void))compilers[EVAL])(self, args, count));
}

/* The function to put into a builtin's place; NULL where CPython calls it in a way that we do not know. */
static PyCFunction wrapper_of(int which, int flags)
{
    static keyword_function *const by_keywords[COMPILERS] = {
        compile_with_keywords,
        exec_with_keywords,
        eval_with_keywords,
    };
    if (flags == (METH_FASTCALL | METH_KEYWORDS))
        return (PyCFunction)(void (*)(void))by_keywords[which];
    return flags == METH_FASTCALL && which == EVAL ? (PyCFunction)(void (*)(void))eval_fast : NULL;
}

/* PyCFunctionObject, as far as it is needed. */
struct builtin {
    PyObject_HEAD
    PyMethodDef *definition;
};

/* Wrap all three or none. */
static bool wrap_compilers(void)
{
    PyMethodDef *definitions[COMPILERS];
    PyObject *builtins = PyEval_GetBuiltins(); /* borrowed */
    for (int i = 0; i < COMPILERS; i++) {
        PyObject *function = PyDict_GetItemString(builtins, compiler_names[i]);
        if (!function || !PyCFunction_CheckExact(function))
            return false;
        definitions[i] = ((struct builtin *)function)->definition;
        if (definitions[i]->ml_meth != PyCFunction_GetFunction(function) || !wrapper_of(i, definitions[i]->ml_flags))
            return false;
    }
    for (int i = 0; i < COMPILERS; i++) {
        compilers[i] = definitions[i]->ml_meth;
        definitions[i]->ml_meth = wrapper_of(i, definitions[i]->ml_flags);
    }
    return true;
}

bool ms_heap_find(void *function, const char *name)
{
    void *address = dlsym(RTLD_DEFAULT, name);
    memcpy(function, &address, sizeof address);
    return address != NULL;
}

bool ms_heap_shield_start(void)
{
    f_globals_name = PyUnicode_InternFromString("f_globals");
    module_name_name = PyUnicode_InternFromString("__name__");
    return f_globals_name && module_name_name &&
           (ms_heap_find(&python.thread_state, "PyThreadState_GetUnchecked") || /* since 3.13 */
            ms_heap_find(&python.thread_state, "_PyThreadState_UncheckedGet")) &&
           ms_heap_find(&python.raw_malloc, "PyMem_RawMalloc") && ms_heap_find(&python.raw_calloc, "PyMem_RawCalloc") &&
           ms_heap_find(&python.get_blocks, "PyMem_GetAllocator") &&
           ms_heap_find(&python.set_blocks, "PyMem_SetAllocator") && wrap_compilers();
}

/* ------------------------------------------------------------------------------- what memsafe.heap hangs up */

PyDoc_STRVAR(shield_doc,
             "shield(function)\n\nReturn *function* such that its calls are not refused. It has no frame of "
             "its own in tracebacks.");

static PyObject *call_shielded(PyObject *function, PyObject *args, PyObject *kwargs)
{
    here.shielded++;
    PyObject *result = PyObject_Call(function, args, kwargs);
    here.shielded--;
    return result;
}

static PyObject *shield(PyObject *Py_UNUSED(module), PyObject *function)
{
    static PyMethodDef method = {
        "shielded",
        (PyCFunction)(void (*)(void))call_shielded,
        METH_VARARGS | METH_KEYWORDS,
        NULL,
    };
    return PyCFunction_New(&method, function);
}

/* Around a fork: what has to be made anew in the child is made by functions whose errors nobody hears of. */
static PyObject *begin_shield(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    here.shielded++;
    Py_RETURN_NONE;
}

static PyObject *end_shield(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    here.shielded--;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(stop_doc, "stop()\n\nRefuse nothing any more: the interpreter ends.");

static PyObject *stop(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    atomic_store(&stopped, 1);
    Py_RETURN_NONE;
}

int ms_heap_shield_add(PyObject *module)
{
    static PyMethodDef methods[] = {
        {"shield", shield, METH_O, shield_doc},
        {"begin_shield", begin_shield, METH_NOARGS, NULL},
        {"end_shield", end_shield, METH_NOARGS, NULL},
        {"find_collector", (PyCFunction)(void (*)(void))find_collector, METH_FASTCALL, find_collector_doc},
        {"collects", collects, METH_NOARGS, collects_doc},
        {"stop", stop, METH_NOARGS, stop_doc},
        {0},
    };
    return PyModule_AddFunctions(module, methods);
}
