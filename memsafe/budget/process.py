"""A budget for the whole process: as large as what binds the process leaves it, and following that."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memsafe._native import BudgetCore
from memsafe.budget.tree import Budget
from memsafe.errors import UnsupportedError
from memsafe.sizes import MAX_SIZE_BYTES, Size, format_size
from memsafe.status import memory_status

if TYPE_CHECKING:
    from memsafe._kernel.files import Root
    from memsafe.status import Constraint, MemoryStatus

# A look costs some 200 us: at most a thousandth of the time, however often the budget refuses.
_LOOK_AGAIN_S = 0.25

# So often somebody who waits has it look: what is waited for may be a larger machine.
_LOOK_WHILE_WAITING_S = 1.0

# It looks too each time that what is charged has grown by this share of the limit.
_GROWTH_RATIO = 1 / 32


@dataclass(frozen=True, slots=True)
class _Sizing:
    """What one look found: the constraint that leaves the process least, and how much that is."""

    constraint: Constraint
    room_bytes: int

    def __str__(self) -> str:
        constraint = self.constraint
        where = f" of {constraint.path}" if constraint.path else ""
        text = f"{format_size(self.room_bytes)} that {constraint.kind}{where} leaves this process"
        others_bytes = constraint.limit_bytes - self.room_bytes
        return f"{text} ({format_size(constraint.limit_bytes)}, {format_size(max(0, others_bytes))} used by others)"


class ProcessBudget(Budget):
    """A root whose limit is a share of what binds this process. Made by Budget.for_process().

    Each limit that memory_status() knows leaves the process what is free of it and what the process has of it already;
    the least of these, times *fraction*, is the budget's limit. It is looked at again when the budget refuses, when it
    is asked for its limit, when what is charged has grown by a 32nd of the limit, and each second that somebody waits;
    at most four times a second, and by no thread of its own. Where the limit has fallen below what is charged,
    reclaimers are asked.
    """

    __slots__ = ("_kernel_root", "_looked_at_s", "_sizing", "_watch", "fraction")

    _kernel_root: Root
    _follow_every_s = _LOOK_WHILE_WAITING_S

    def __init__(self, fraction: float = 0.9, *, name: str = "process", root: Root = "/") -> None:
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1: {fraction!r}")
        self.fraction = fraction
        self._kernel_root = root
        self._looked_at_s = time.monotonic()
        sizing = _size(memory_status(root=root))
        if sizing is None:
            raise UnsupportedError("nothing that binds this process could be read: give Budget() a limit instead")
        self._sizing = sizing
        # A level above the root, which refuses nothing: its soft limit is what tells of growth.
        self._watch = BudgetCore(None, MAX_SIZE_BYTES)
        self._open(None, name, self._share(), None, core_above=self._watch)
        self._watch_growth()

    @property
    def limit_bytes(self) -> int | None:
        """The limit, as the machine is now. It cannot be set: give a child a limit of its own."""
        self._follow()
        return self._limit

    @limit_bytes.setter
    def limit_bytes(self, limit: Size | None) -> None:  # noqa: ARG002
        raise AttributeError(f"the limit of {self.path!r} follows the machine: give a child a limit of its own")

    def explain(self) -> str:
        """Say in a sentence where the limit comes from."""
        return (
            f"{self.path} may hold {format_size(self.limit_bytes)}: {self.fraction:g} of the {self._sizing}; "
            f"looked at {time.monotonic() - self._looked_at_s:.1f} s ago"
        )

    def _share(self) -> int:
        return int(self._sizing.room_bytes * self.fraction)

    def _follow(self) -> bool:
        now_s = time.monotonic()
        if now_s - self._looked_at_s < _LOOK_AGAIN_S:
            return False
        self._looked_at_s = now_s
        sizing = _size(memory_status(root=self._kernel_root))
        if sizing is None:
            return False  # the last limit stands
        before_bytes, self._sizing = self._share(), sizing
        self._set_limit(self._share())
        return self._share() > before_bytes

    def _watch_growth(self) -> None:
        self._watch._set_soft_limit(min(MAX_SIZE_BYTES, self.used_bytes + int(self._share() * _GROWTH_RATIO)))

    def _tell_soft_limit(self) -> None:
        if self._watch._take_soft_passed():
            self._watch_growth()
            self._follow()
            if over_bytes := self.over_bytes:
                self.reclaim(over_bytes)
        super()._tell_soft_limit()

    def _notes(self) -> tuple[str, ...]:
        return (self.explain(), *super()._notes())


def _size(status: MemoryStatus) -> _Sizing | None:
    """Return what the tightest constraint leaves the process: what is free of it and what it has of it already."""
    found = [
        _Sizing(constraint, constraint.headroom_bytes + _own_bytes(constraint, status))
        for constraint in status.constraints
        if constraint.headroom_bytes is not None
    ]
    return min(found, key=lambda sizing: sizing.room_bytes, default=None)


def _own_bytes(constraint: Constraint, status: MemoryStatus) -> int:
    used_bytes = constraint.used_bytes or 0
    if constraint.kind in ("rlimit_data", "rlimit_as"):
        return used_bytes  # nobody else's counts there
    return min(used_bytes, (status.process.anonymous_bytes or 0) + (status.process.swap_bytes or 0))
