/* Put memsafe's C types and functions that keep the GIL into a dict: cffi releases the GIL around every call, and
 * beside busy threads one call in a hundred then waits a switch interval (5 ms), which a hot path cannot afford.
 * dict: id() of a dict that the caller holds. Returns 0, or -1 with a Python error printed. Takes the GIL itself. */
int ms_python_types_attach(uintptr_t dict);
