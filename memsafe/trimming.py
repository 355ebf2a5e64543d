"""Giving memory that is free inside the process back to the kernel."""

from __future__ import annotations

import gc
import sys
import sysconfig
from contextlib import suppress

from memsafe._kernel import process
from memsafe._native import lib

_ALLOCATES_BY_MIMALLOC = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def trim() -> int:
    """Drop what can be had again, collect garbage, and give the allocators' free memory back to the kernel.

    In this order: compiled patterns that ``re`` keeps and source lines that ``linecache`` can read again from their
    files; the garbage collector, which also empties the interpreter's free lists; the interpreter's own mimalloc,
    where it is built without the GIL; and the malloc that is loaded: glibc's, jemalloc or mimalloc. Caches that are
    the program's own (functools.lru_cache, a budget's reclaimers) are left alone: ask for them by Budget.reclaim().

    Costs milliseconds, more with many objects or a fragmented heap, and stops all threads for the part that is the
    garbage collector's. What it cannot give back: memory that is free within pages which hold one living small
    object (pymalloc, objects of at most 512 bytes), and what other threads' caches in jemalloc or mimalloc hold;
    without the GIL also a part of what gc.collect() has just freed.

    Returns:
        The bytes by which the process's resident anonymous memory fell, 0 if it did not.

    Source: malloc_trim(3); jemalloc(3), arena.<i>.purge; mimalloc's mi_collect, and _mi_malloc_generic, which collects
    when it finds no page.
    """
    before_bytes = _anonymous_bytes()
    give_back()
    return max(0, before_bytes - _anonymous_bytes())


def give_back(*, collects: bool = True) -> None:
    """Do what trim() does, and do not measure it: in a full cgroup, opening a file can call the OOM killer.

    Args:
        collects: Let the garbage collector run, which is what may take long, and drop what can be had again. Without,
            only what was freed already is given back.
    """
    if collects:
        _drop_interpreter_caches()
        gc.collect()
    if _ALLOCATES_BY_MIMALLOC:
        _have_mimalloc_collect()
    lib.ms_trim()


def _have_mimalloc_collect() -> None:
    """Ask the interpreter's own mimalloc, whose functions nobody can call, for what no address space holds.

    Before it gives up, it collects the heap that was asked, by force. It has one for buffers, one for objects and one
    for containers, each of the calling thread.
    """
    for ask in (bytearray, bytes, _tuple) * 2:  # what gc.collect() freed is only seen to be free by the first round
        with suppress(MemoryError):
            ask(1 << 60)


def _tuple(size_bytes: int) -> object:
    return (None,) * (size_bytes // 8)


def _drop_interpreter_caches() -> None:
    if re := sys.modules.get("re"):
        re.purge()
    if linecache := sys.modules.get("linecache"):
        for name, entry in list(linecache.cache.items()):
            if len(entry) == 4 and entry[1] is not None:  # one with a modification time came from a file
                linecache.cache.pop(name, None)


def _anonymous_bytes() -> int:
    return process.status().anonymous_bytes or 0


__all__ = ["trim"]
