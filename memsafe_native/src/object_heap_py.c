/* Knows CPython (limited API 3.11). How much memory may hold Python objects, whose reference counts a forked child
 * writes when it merely reads them. */
#include <Python.h>

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ms.h"
#include "object_heap_internal.h"
#include "python_types_internal.h"

/* struct mallinfo2, which headers before glibc 2.33 and musl lack. */
struct malloc_info {
    size_t arena, ordblks, smblks, hblks, hblkhd, usmblks, fsmblks, uordblks, fordblks, keepcost;
};

typedef int print_stats(FILE *out);
typedef struct malloc_info ask_malloc(void);

/* "7 arenas * 1048576 bytes/arena = 7,340,032": CPython tells the number of pymalloc's arenas in print only
 * (sys._debugmallocstats). Returns their bytes, -1 where there is no such line: another allocator serves. */
static int64_t arenas_of(const char *text)
{
    for (const char *line = text; line; line = strchr(line, '\n')) {
        unsigned long long count, bytes;
        line += *line == '\n';
        if (sscanf(line, "%llu arenas * %llu bytes/arena", &count, &bytes) == 2 && count < INT64_MAX / 4 &&
            bytes < 1 << 30)
            return (int64_t)(count * bytes);
    }
    return -1;
}

int64_t ms_object_heap_arena_bytes(void)
{
    print_stats *print = (print_stats *)(uintptr_t)dlsym(RTLD_DEFAULT, "_PyObject_DebugMallocStats");
    char *text = NULL;
    size_t size = 0;
    FILE *out = print ? open_memstream(&text, &size) : NULL;
    if (!out)
        return -1;
    print(out);
    int64_t bytes = fclose(out) == 0 && text ? arenas_of(text) : -1;
    free(text);
    return bytes;
}

/* Objects larger than pymalloc's 512 bytes are there. */
int64_t ms_object_heap_malloc_bytes(void)
{
    ask_malloc *ask = (ask_malloc *)(uintptr_t)dlsym(RTLD_DEFAULT, "mallinfo2");
    if (!ask || dlsym(RTLD_DEFAULT, "mallctl") || dlsym(RTLD_DEFAULT, "mi_malloc"))
        return -1;
    return (int64_t)ask().uordblks;
}

PyDoc_STRVAR(object_heap_bytes_doc,
             "object_heap_bytes() -> int | None\n\n"
             "Memory that may hold Python objects: pymalloc's arenas, and what malloc has given out of its heaps; not\n"
             "what it maps apart (from 128 KiB on). None where that cannot be told: another allocator serves.\n"
             "It looks at every pool, some 64,000 in a GiB.");

static PyObject *object_heap_bytes(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    int64_t arenas = ms_object_heap_arena_bytes(), blocks = ms_object_heap_malloc_bytes();
    if (arenas < 0 || blocks < 0)
        Py_RETURN_NONE;
    return PyLong_FromLongLong(arenas + blocks);
}

int ms_object_heap_py_add(PyObject *dict)
{
    static PyMethodDef methods[] = {
        {"object_heap_bytes", object_heap_bytes, METH_NOARGS, object_heap_bytes_doc},
        {0},
    };
    return ms_py_add_functions(dict, methods);
}
