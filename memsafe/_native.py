"""The only importer of memsafe_native: checked calls, and the C types that keep the GIL."""

from __future__ import annotations

from typing import Any

from memsafe_native._ext import ffi, lib

from memsafe.errors import KernelError

_types: dict[str, Any] = {}
if lib.ms_python_types_attach(ffi.cast("uintptr_t", id(_types))):
    raise ImportError("memsafe_native could not create its types; the error is printed above")
BudgetCore = _types["BudgetCore"]
Claim = _types["Claim"]
Reservation = _types["Reservation"]
RegionCore = _types["RegionCore"]
close_owned = _types["close_owned"]
current_budget_by = _types["current_budget_by"]
environment = _types["environment"]
fork = _types["fork"]
fork_end = _types["fork_end"]
heap = _types["heap"]
numpy_connect = _types["numpy_connect"]
numpy_handler = _types["numpy_handler"]
numpy_swap_handler = _types["numpy_swap_handler"]
object_heap_bytes = _types["object_heap_bytes"]


def check(result: int, call: str, detail: str = "") -> int:
    """Return *result* of a native call, or raise what its -errno means.

    Raises:
        KernelError: *result* is negative; named after *call*.
    """
    if result < 0:
        raise KernelError(-result, call, detail)
    return result


__all__ = [
    "BudgetCore",
    "Claim",
    "RegionCore",
    "Reservation",
    "check",
    "close_owned",
    "current_budget_by",
    "environment",
    "ffi",
    "fork",
    "fork_end",
    "heap",
    "lib",
    "numpy_connect",
    "numpy_handler",
    "numpy_swap_handler",
    "object_heap_bytes",
]
