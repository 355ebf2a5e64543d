"""NumPy's arrays, charged to budgets.

NumPy asks a memory handler for the data of each array (NEP 49), and an array remembers its handler: whoever frees it,
wherever and whenever, gives the bytes back to the budget that was charged. Charged are the bytes of the data (nbytes)
and of the buffers that sorting needs. Not charged is what is not NumPy's: the array's object itself (some 100 bytes),
objects in arrays of dtype object, strings of StringDType, numpy.frombuffer and memmap, what BLAS allocates.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, ParamSpec, TypeVar

from memsafe._native import numpy_connect, numpy_handler, numpy_swap_handler
from memsafe.blocks import Blocks
from memsafe.errors import BudgetExceededError, MemsafeError, UnsupportedError
from memsafe.sizes import MAX_SIZE_BYTES, format_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, TracebackType
    from typing import Any, Self

    from memsafe.budget import Budget

P = ParamSpec("P")
T = TypeVar("T")


class _Refusal(NamedTuple):
    """Why an array was not made, and which instruction asked for it."""

    error: MemsafeError
    code: CodeType
    instruction: int


_blocks: Blocks[Handler] = Blocks("memsafe.numpy.blocks")
_base: ContextVar[object] = ContextVar("memsafe.numpy.base")  # what NumPy used outside of all blocks
_refusal: ContextVar[_Refusal | None] = ContextVar("memsafe.numpy.refusal", default=None)


class Handler:
    """Charges the arrays of a block of code to a budget. See Budget.numpy() and handler().

    A context manager, as often and in as many threads and tasks at a time as one likes. NumPy keeps the handler in a
    context variable: asyncio tasks and asyncio.to_thread inherit it; new threads and executors do not, for them there
    are run() and install().

    Attributes:
        budget: What is charged.
        capsule: NumPy's handler, for C code that calls PyDataMem_SetHandler itself.
    """

    __slots__ = ("budget", "capsule")

    def __init__(self, budget: Budget) -> None:
        multiarray = _multiarray()
        name = f"memsafe:{budget.path}".encode()[:126].decode(errors="ignore").encode()
        self.budget = budget
        self.capsule = numpy_handler(budget, name, _refused, multiarray._get_madvise_hugepage())

    def install(self) -> None:
        """Charge every array that is made in this context from now on: for a thread's own start.

        For example ThreadPoolExecutor(initializer=handler.install).

        Raises:
            BudgetAbortedError: The budget or an ancestor was aborted.
            BudgetClosedError: It was closed.
        """
        self.budget._raise_if_unusable()
        replaced = numpy_swap_handler(self.capsule)
        if _blocks.innermost() is None:
            _base.set(replaced)
        _blocks.enter(self)
        _forget_refusal()

    def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call *function* inside a block of this handler: Thread(target=handler.run, args=(function, ...))."""
        with self:
            return function(*args, **kwargs)

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if _blocks.innermost() is not None:
            outer = _blocks.leave(self)
            numpy_swap_handler(outer.capsule if outer else _base.get())
        if error is not None:
            _explain(error)
        _forget_refusal()

    def __repr__(self) -> str:
        return f"<memsafe.numpy.Handler of {self.budget.path!r}>"


def handler(budget: Budget) -> Handler:
    """Return a handler that charges arrays to *budget*, to be entered, installed, or run in.

    Raises:
        ImportError: NumPy is not installed.
        UnsupportedError: NumPy is older than 2.4.
    """
    return Handler(budget)


def last_refusal() -> MemsafeError | None:
    """Return why the last array was refused in this block: NumPy raises a MemoryError of its own, which cannot tell.

    Where that error leaves the block, this is its __cause__. None when nothing was refused since it began.
    """
    refusal = _refusal.get()
    return refusal.error if refusal else None


def _refused(budget: Budget, size_bytes: int, level: int) -> MemoryError | None:
    """Charge what was not taken at once, or say why not. Called from C, in the thread that makes an array.

    A *level* that is not negative has refused for good: the array is being resized, and no reclaimer may run.
    """
    try:
        if level >= 0:
            raise _growth_error(budget, size_bytes, level)
        budget.reserve(size_bytes)._disown()
    except MemsafeError as error:
        asked_by = sys._getframe(1)
        # Without its traceback, whose frames would keep everything alive that is in them.
        _refusal.set(_Refusal(error.with_traceback(None), asked_by.f_code, asked_by.f_lasti))
        told = MemoryError(str(error))
        told.__cause__ = error
        return told
    return None


def _growth_error(budget: Budget, size_bytes: int, level: int) -> BudgetExceededError:
    budget._raise_if_unusable()
    refused_by = budget
    for _ in range(level):
        assert refused_by.parent is not None
        refused_by = refused_by.parent
    limit_bytes = MAX_SIZE_BYTES if refused_by.limit_bytes is None else refused_by.limit_bytes
    available_bytes = max(0, min(limit_bytes - refused_by.used_bytes, size_bytes - 1))
    return BudgetExceededError(
        f"an array of budget {budget.path!r} cannot grow in place by {format_size(size_bytes)}: {refused_by.path!r} "
        f"has {format_size(available_bytes)} of {format_size(limit_bytes)} left, and no reclaimer may run meanwhile. "
        f"To help: make a larger array and copy, or call reclaim() beforehand.",
        requested_bytes=size_bytes,
        budget=budget,
        refused_by=refused_by,
        available_bytes=available_bytes,
        top_consumers=refused_by.top_consumers(),
    )


def _explain(error: BaseException) -> None:
    """Make the refusal the cause of the error that NumPy raised for it: where both came from one instruction."""
    refusal, traceback = _refusal.get(), error.__traceback__
    if refusal is None or traceback is None or not isinstance(error, MemoryError) or error.__cause__ is not None:
        return
    while traceback.tb_next:
        traceback = traceback.tb_next
    if (traceback.tb_frame.f_code, traceback.tb_lasti) == (refusal.code, refusal.instruction):
        error.__cause__ = refusal.error


def _forget_refusal() -> None:
    if _refusal.get() is not None:  # each variable that a context has makes NumPy's own look-ups there slower
        _refusal.set(None)


@cache
def _multiarray() -> Any:
    import_module("numpy")
    multiarray: Any
    try:
        multiarray = import_module("numpy._core._multiarray_umath")
        usable = numpy_connect(multiarray._ARRAY_API)
    except ModuleNotFoundError:  # its name since 2.0
        usable = False
    if not usable:
        raise UnsupportedError(
            "arrays are charged with NumPy 2.4 or later: older ones crash when a sort is refused memory"
        )
    return multiarray


__all__ = ["Handler", "handler", "last_refusal"]
