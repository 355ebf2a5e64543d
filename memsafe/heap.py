"""Python's own heap as a budget's business: counted, and refused where that is safe."""

from __future__ import annotations

import atexit
import errno
import gc
import os
from importlib import _bootstrap
from types import FunctionType
from typing import TYPE_CHECKING

from memsafe._native import heap
from memsafe.budget import Budget
from memsafe.errors import BudgetClosedError, UnsupportedError
from memsafe.sizes import Size, parse_size

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

# The budgets that the heap is charged to, one entry a guard. Hooks are the process's own, and so is this.
_charged: list[Budget] = []
_shielded = False
_sound_dicts: bool | None = None


class HeapGuard:
    """A ``with`` block in which Python's heap is charged to a budget. See guard_python_heap().

    Attributes:
        budget: What is charged.
        enforce: Whether the thread that enters the block is refused.
    """

    __slots__ = ("_account", "_owns_budget", "_used", "budget", "enforce")

    def __init__(self, limit_or_budget: Size | Budget, enforce: bool) -> None:
        self._owns_budget = not isinstance(limit_or_budget, Budget)
        self.budget = (
            limit_or_budget
            if isinstance(limit_or_budget, Budget)
            else Budget(parse_size(limit_or_budget, what="the limit of Python's heap"), name="python heap")
        )
        self.enforce = enforce
        self._account: int | None = None
        self._used = False

    @property
    def heap_bytes(self) -> int:
        """Python's heap at the moment, of the whole process; 0 outside of the block."""
        return 0 if self._account is None else heap.read(self._account)[0]

    @property
    def refusals(self) -> int:
        """How many allocations this guard's budget has refused, in all its guards that are open; 0 outside."""
        return 0 if self._account is None else heap.read(self._account)[1]

    def __enter__(self) -> Self:
        if self._used:
            raise RuntimeError("a heap guard can be entered once: make another with guard_python_heap()")
        _install()
        if self.enforce:
            _shield()
            _require_sound_dicts()
        _require_one_budget_a_tree(self.budget)
        account = heap.open(self.budget)
        if account == -errno.ESHUTDOWN:
            raise BudgetClosedError(f"budget {self.budget.path!r} was closed")
        if account == -errno.ENOSPC:
            raise RuntimeError("Python's heap is charged to too many budgets already: 16 at once")
        _charged.append(self.budget)
        self._account = account
        self._used = True
        if self.enforce:
            heap.enter(account)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        account, self._account = self._account, None
        if account is None:
            return
        elsewhere = self.enforce and not heap.leave(account)
        heap.close(account)
        _charged.remove(self.budget)
        if self._owns_budget:
            self.budget.close()
        if elsewhere:
            raise RuntimeError("a heap guard that enforces must be left by the thread that entered it")


def guard_python_heap(limit_or_budget: Size | Budget, enforce: bool = True) -> HeapGuard:
    """Charge Python's own heap to a budget, and refuse this thread what would pass its limit: a context manager.

    Python's heap is what CPython's allocators hold for the whole process: pymalloc's arenas, in which objects of up
    to 512 bytes live, and larger blocks by their size in malloc. It is charged inside the block, in steps of 64 KiB,
    whichever thread allocates; what was there before is charged on entering, even past the limit. A soft limit's
    callbacks run in the main thread, soon after; reclaimers are not asked, but such a callback can call
    Budget.reclaim().

    With *enforce* the thread that enters the block gets a MemoryError where the limit would be passed: one, and then
    2 MiB until the next, so that ``except`` blocks and clean-up have room. It is a brake: who goes on after each
    MemoryError gets on, step by step. Never refused are other threads, imports, the garbage collector, what surrounds
    a fork, subinterpreters, the interpreter's end, and blocks that shrink.

    Args:
        limit_or_budget: The most that Python's heap may hold, as a size; or a budget to charge. Several blocks may
            charge the same budget, which is then charged once, but not two of one tree.
        enforce: Refuse this thread; else charge only.

    Raises:
        UnsupportedError: On entering: the allocators of this Python cannot be hooked safely, and why.
        ValueError: *limit_or_budget* is neither; or, on entering, the heap is charged to another budget of its tree.
        BudgetClosedError: On entering: the budget was closed.

    Source: PyObject_SetArenaAllocator, PyMem_SetAllocator in CPython's "Memory Management".
    """
    return HeapGuard(limit_or_budget, enforce)


def _install() -> None:
    reason = heap.install(_soft_limit_passed)
    if reason is not None:
        raise UnsupportedError(f"Python's heap cannot be guarded: {reason}. Budgets, regions and limit_process() can.")


def _shield() -> None:
    """See to what must not be refused, once."""
    global _shielded
    if _shielded:
        return
    _require_known_collector()
    _shielded = True
    # Where a module is made: those that are there are found without. CPython looks both up at each import.
    for name in ("_find_and_load", "_exec"):
        setattr(_bootstrap, name, heap.shield(getattr(_bootstrap, name)))
    os.register_at_fork(before=heap.begin_shield, after_in_parent=heap.end_shield, after_in_child=heap.end_shield)
    atexit.register(heap.stop)


def _require_known_collector() -> None:
    """See whether C finds where CPython notes that its garbage collector runs, which must not be refused."""
    answers = []

    def ask(_phase: str, _info: dict[str, int]) -> None:
        answers.append(heap.collects())

    found = heap.find_collector(gc.garbage, gc.callbacks)
    if found:
        gc.callbacks.append(ask)
        gc.collect(0)
        gc.callbacks.remove(ask)
    if set(answers) != {True} or heap.collects():
        raise UnsupportedError(
            "Python's heap can be counted and not refused: this CPython does not tell when its garbage collector runs, "
            "or it runs now. Use enforce=False."
        )


def _require_sound_dicts() -> None:
    """See whether a dict is sound after a refusal: in CPython 3.13.0 one that setdefault() could not grow is not."""
    global _sound_dicts
    if _sound_dicts is None:
        budget = Budget(name="probe")
        account = heap.open(budget)
        heap.enter(account)
        try:
            # As of a module of its own, because memsafe itself is never refused.
            _sound_dicts = FunctionType(_probe.__code__, {"__name__": "probe", "heap": heap})()
        finally:
            heap.leave(account)
            heap.close(account)
    if not _sound_dicts:
        raise UnsupportedError(
            "this CPython has a defect that makes every MemoryError dangerous: a dict which setdefault() cannot grow "
            "loses count of itself, and crashes later. Use enforce=False, which counts and tells, or another release."
        )


def _probe() -> bool:
    return heap.dicts_are_sound()


def _require_one_budget_a_tree(budget: Budget) -> None:
    root = _root(budget)
    for other in _charged:
        if other is not budget and _root(other) is root:
            raise ValueError(
                f"Python's heap is charged to {other.path!r} already: "
                f"charging {budget.path!r} too would count it twice in {root.path!r}"
            )


def _root(budget: Budget) -> Budget:
    while budget.parent is not None:
        budget = budget.parent
    return budget


def _soft_limit_passed() -> None:
    """Called from C, in the main thread, after a charge of the heap passed a soft limit."""
    for budget in set(_charged):
        budget._soft_limit_passed()


__all__ = ["HeapGuard", "guard_python_heap"]
