"""Memory budgets, low-memory callbacks and snapshots that cannot kill, for Python processes on Linux."""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError(f"memsafe works on Linux only: it stands on cgroups, PSI and /proc, which {sys.platform} lacks")

from importlib import import_module
from typing import Any

# Public names and their homes; __init__.pyi tells type checkers the same, and a test holds the two together.
_MODULES = {
    "memsafe.budget": (
        "Budget", "BudgetReport", "BudgetStats", "Consumer", "Drift", "ProcessBudget", "Reservation", "Waiter",
        "current_budget",
    ),
    "memsafe.commit": ("ForkAssessment", "assess_fork"),
    "memsafe.errors": (
        "BudgetAbortedError", "BudgetClosedError", "BudgetExceededError", "KernelError", "MemsafeError",
        "OOMKilledError", "ReservationClosedError", "SnapshotCancelledError", "SnapshotFailedError",
        "SnapshotInProgressError", "SnapshotOverrunError", "SnapshotRefusedError", "UnsupportedError",
    ),
    "memsafe.forecast": ("DirtyMeter", "DirtyRate", "measure_dirty_rate"),
    "memsafe.heap": ("HeapGuard", "guard_python_heap"),
    "memsafe.limits": ("ProcessLimit", "limit_process"),
    "memsafe.pressure": (
        "EmergencyReserve", "PressureEvent", "PressureLevel", "PressureMonitor", "SourceStatus", "Thresholds",
    ),
    "memsafe.region": ("Region",),
    "memsafe.snapshot": (
        "SnapshotForecast", "SnapshotJob", "SnapshotProgress", "SnapshotResult", "SnapshotSchedule", "SnapshotState",
        "fork_snapshot",
    ),
    "memsafe.sizes": ("format_size", "parse_size"),
    "memsafe.spawn": ("ChildOOMKilledError", "CompletedProcess", "Popen", "run"),
    "memsafe.spawn.coroutine": ("run_async",),
    "memsafe.status": (
        "CommitStatus", "Constraint", "MemoryStatus", "Pressure", "ProcessMemory", "Stall", "SwapLimit",
        "SwapStatus", "memory_status",
    ),
    "memsafe.trimming": ("trim",),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}
_SUBMODULES = frozenset({"numpy", "oom", "testing"})

__version__ = "0.1.0"
__all__ = sorted({*_HOME, *_SUBMODULES} - {"numpy"})  # a star must not hide NumPy behind memsafe.numpy


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for: importing memsafe stays cheap."""
    if name in _SUBMODULES:
        return import_module(f"memsafe.{name}")
    try:
        module = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'memsafe' has no attribute {name!r}") from None
    value = globals()[name] = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_SUBMODULES})
