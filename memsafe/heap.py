"""Giving memory that is free inside the process back to the kernel."""

from __future__ import annotations

import gc

from memsafe._kernel import process
from memsafe._native import lib


def trim() -> int:
    """Collect garbage and give the C library's free memory back to the kernel.

    Costs milliseconds, more with many objects or a fragmented heap, and stops all threads for the part that is the
    garbage collector's. What it cannot give back: memory that is free within pages which hold one living small
    object (pymalloc, objects of at most 512 bytes).

    Returns:
        The bytes by which the process's resident anonymous memory fell, 0 if it did not.

    Source: malloc_trim(3); gc.collect.
    """
    before_bytes = _anonymous_bytes()
    give_back()
    return max(0, before_bytes - _anonymous_bytes())


def give_back() -> None:
    """Do what trim() does, and do not measure it: in a full cgroup, opening a file can call the OOM killer."""
    gc.collect()
    lib.ms_heap_trim()  # where the C library has none, its free() gives back by itself


def _anonymous_bytes() -> int:
    return process.status().anonymous_bytes or 0


__all__ = ["trim"]
