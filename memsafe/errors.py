"""Every error that memsafe raises. All derive from MemsafeError."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memsafe.budget import Budget, Consumer, Waiter
    from memsafe.commit import ForkAssessment


class MemsafeError(Exception):
    """The root of all errors that memsafe raises on purpose. All can be pickled, so that they cross processes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, (type(self), self.args, self._state()))

    def _state(self) -> dict[str, Any]:
        return self.__dict__.copy()


def _restore(kind: type[MemsafeError], args: tuple[Any, ...], state: dict[str, Any]) -> MemsafeError:
    error = Exception.__new__(kind, *args)  # not __init__, which may ask for more
    error.__dict__.update(state)
    return error


class BudgetExceededError(MemsafeError, MemoryError):
    """A budget refused a reservation; nothing was changed.

    Attributes:
        requested_bytes: What was asked for.
        budget: The budget that was asked.
        refused_by: The budget whose limit would have been passed: *budget* itself or one of its ancestors. In a copy
            that was pickled both are None: a budget belongs to one process.
        available_bytes: What *refused_by* had left when it refused.
        top_consumers: The largest holders under *refused_by*, largest first.
        waited_s: How long the request waited; None: it did not.
        waiters: Who else waits under *refused_by*, first come first.
    """

    def __init__(
        self,
        message: str,
        *,
        requested_bytes: int,
        budget: Budget,
        refused_by: Budget,
        available_bytes: int,
        top_consumers: Sequence[Consumer] = (),
        waited_s: float | None = None,
        waiters: Sequence[Waiter] = (),
    ) -> None:
        super().__init__(message)
        self.requested_bytes = requested_bytes
        self.budget = budget
        self.refused_by = refused_by
        self.available_bytes = available_bytes
        self.top_consumers = tuple(top_consumers)
        self.waited_s = waited_s
        self.waiters = tuple(waiters)

    def _state(self) -> dict[str, Any]:
        return {**self.__dict__, "budget": None, "refused_by": None}


class BudgetAbortedError(MemsafeError):
    """The budget, or an ancestor of it, was aborted: nothing more can be reserved from it."""


class BudgetClosedError(MemsafeError):
    """The budget was closed before the call."""


class ReservationClosedError(MemsafeError):
    """The reservation was released before the call."""


class SnapshotRefusedError(MemsafeError):
    """A snapshot was not begun because it would not be safe; nothing was done.

    Attributes:
        assessment: The ForkAssessment, with the reasons.
    """

    def __init__(self, message: str, assessment: ForkAssessment) -> None:
        super().__init__(message)
        self.assessment = assessment


class SnapshotInProgressError(MemsafeError):
    """Another fork snapshot of this process is still running; one at a time."""


class SnapshotFailedError(MemsafeError):
    """A snapshot ended without an image; the file at its path is the one that was there before.

    Unless the message says that the new one is there: then the very last step failed, the fsync of its folder.

    Attributes:
        child_type, child_message, child_traceback: What the child raised, where that is what ended it: the class's
            name, its text and its traceback; else None.
    """

    def __init__(
        self,
        message: str,
        *,
        child_type: str | None = None,
        child_message: str | None = None,
        child_traceback: str | None = None,
    ) -> None:
        super().__init__(message)
        self.child_type = child_type
        self.child_message = child_message
        self.child_traceback = child_traceback


class SnapshotOverrunError(SnapshotFailedError):
    """The snapshot was ended because its copies passed the bound, or memory ran short: the message says which.

    Attributes:
        copy_bytes: Copies counted when it was ended.
        max_copy_bytes: The bound; None where there was none.
    """

    def __init__(self, message: str, *, copy_bytes: int, max_copy_bytes: int | None) -> None:
        super().__init__(message)
        self.copy_bytes = copy_bytes
        self.max_copy_bytes = max_copy_bytes


class SnapshotCancelledError(SnapshotFailedError):
    """The snapshot was cancelled by its owner."""


class OOMKilledError(SnapshotFailedError):
    """The kernel's OOM killer ended the child."""


def printable(sentence: str) -> str:
    """Return *sentence* with what is no UTF-8 escaped: a cgroup may have any name, and print() must work."""
    return sentence.encode("utf-8", "backslashreplace").decode()


class UnsupportedError(MemsafeError):
    """This machine cannot do what was asked: says which feature, since which kernel, and what to do instead."""


class KernelError(MemsafeError, OSError):
    """A system call, or a file of the kernel, failed.

    Attributes:
        call: The call's name, with its object where there is one.
        errno, strerror: As of OSError.
    """

    def __init__(self, errno: int, call: str, detail: str = "") -> None:
        text = f"{call}: {os.strerror(errno)}"
        super().__init__(errno, printable(f"{text} ({detail})" if detail else text))
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore_kernel_error, (self.args, self._state()))

    def __str__(self) -> str:
        return str(self.strerror)


def _restore_kernel_error(args: tuple[Any, ...], state: dict[str, Any]) -> KernelError:
    error = KernelError.__new__(KernelError)
    OSError.__init__(error, *args)
    error.__dict__.update(state)
    return error


__all__ = [
    "BudgetAbortedError",
    "BudgetClosedError",
    "BudgetExceededError",
    "KernelError",
    "MemsafeError",
    "OOMKilledError",
    "ReservationClosedError",
    "SnapshotCancelledError",
    "SnapshotFailedError",
    "SnapshotInProgressError",
    "SnapshotOverrunError",
    "SnapshotRefusedError",
    "UnsupportedError",
]
