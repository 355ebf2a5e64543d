"""What a budget is asked to give when memory is short: how much, and until when."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from memsafe.budget import reclaim
from memsafe.pressure.levels import PressureLevel
from memsafe.trimming import give_back

if TYPE_CHECKING:
    from collections.abc import Callable

    from memsafe.budget import Budget
    from memsafe.pressure.levels import Judgement

_log = logging.getLogger("memsafe.pressure")

# Reclaimers that could not end a shortage are asked again while it lasts, but not hounded.
_AGAIN_S = 1.0


class Responder:
    """Has a budget reclaimed. Used by one thread.

    Where the headroom is what is short, it stops as soon as that is back: reclaimers are asked by priority, and between
    them the machine is looked at. What raises a level by itself (a stall, an OOM, the soft limit, a drill) is answered
    in full, because no headroom tells when it is over.

    Args:
        budget: Whose reclaimers are asked; None: nobody's.
        clock: Seconds.
        look: Returns what is missing now until every level's cause has passed.
    """

    def __init__(self, budget: Budget | None, clock: Callable[[], float], look: Callable[[], int]) -> None:
        self._budget = budget
        self._clock = clock
        self._look = look
        self._unmet = PressureLevel.NORMAL  # the level whose cause was not ended by the last response
        self._again_at_s = 0.0

    def is_due(self, raised: PressureLevel) -> bool:
        """Whether a cause that stands is to be answered (again) now."""
        if raised == PressureLevel.NORMAL:
            self._unmet = raised
            return False
        return raised > self._unmet or self._clock() >= self._again_at_s

    def respond(self, level: PressureLevel, judgement: Judgement) -> int:
        """Reclaim; return the bytes by which the budget's use fell. A failure is logged."""
        budget = self._budget
        if budget is None:
            return 0
        need = _Need(budget, level, judgement, self._look)
        freed_bytes, self._unmet = 0, PressureLevel.NORMAL
        try:
            if need.is_there:
                freed_bytes = reclaim.ask(budget, need)
                self._unmet = level if need() > 0 else PressureLevel.NORMAL
        except BaseException:
            # SystemExit too: a reclaimer must not end the thread that warns.
            _log.exception("reclaiming the budget %r failed", budget)
            self._unmet = level
        self._again_at_s = self._clock() + _AGAIN_S
        return freed_bytes

    def trim(self) -> None:
        """Give back what was freed. A failure is logged."""
        try:
            give_back()
        except Exception:
            _log.exception("giving memory back failed")


class _Need:
    """What to ask the next reclaimer for."""

    def __init__(self, budget: Budget, level: PressureLevel, judgement: Judgement, look: Callable[[], int]) -> None:
        self._budget = budget
        self._level = level
        self._follows_headroom = judgement.source is None
        self._shortage_bytes = judgement.shortage_bytes
        self._look = look
        self._seen_bytes: int | None = None  # what the budget used at the last call

    @property
    def is_there(self) -> bool:
        """Whether there is anything to ask for, as far as is known."""
        return self._asked_bytes(self._budget.used_bytes) > 0

    def __call__(self) -> int:
        used_bytes, seen_bytes = self._budget.used_bytes, self._seen_bytes
        self._seen_bytes = used_bytes
        if self._follows_headroom and seen_bytes is not None:
            self._shortage_bytes = self._look()
            if self._shortage_bytes > 0 and used_bytes < seen_bytes:
                give_back(collects=False)  # it may still lie in the allocators, where no headroom tells of it
                self._shortage_bytes = self._look()
        return self._asked_bytes(used_bytes)

    def _asked_bytes(self, used_bytes: int) -> int:
        shortage_bytes = self._shortage_bytes
        if self._level == PressureLevel.CRITICAL:
            # A reclaimer may hold more than it has reserved: ask even where nothing is charged.
            return 0 if self._follows_headroom and shortage_bytes <= 0 else max(used_bytes, 1)
        soft_limit_bytes = self._budget.soft_limit_bytes
        if soft_limit_bytes is None:
            return min(used_bytes, shortage_bytes)
        over_bytes = used_bytes - soft_limit_bytes
        return min(over_bytes, shortage_bytes) if self._follows_headroom else over_bytes
