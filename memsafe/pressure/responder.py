"""What a budget is asked to give when memory is short: how much, and until when."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memsafe.budget import reclaim
from memsafe.pressure import journal
from memsafe.pressure.levels import PressureLevel
from memsafe.pressure.sources import WATERMARK
from memsafe.trimming import give_back

if TYPE_CHECKING:
    from collections.abc import Callable

    from memsafe.budget import Budget
    from memsafe.budget.reclaim import ReclaimerEntry
    from memsafe.pressure.levels import Judgement

# Reclaimers that could not end a shortage are asked again while it lasts, but not hounded.
_AGAIN_S = 1.0
_WORSE_RATIO = 1.25
# Until the next response takes effect, as much may be taken so many times as from the judgement to the first look.
_LOOKS_AHEAD = 8
# An older judgement tells no pace: it was left for this thread while a callback kept it.
_FRESH_S = 0.05
# What is freed may be filled again for as long as this goes on, and callbacks wait for the end.
_ROUNDS_MAX = 8


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
        self._unmet_bytes = 0  # what was missing then
        self._again_at_s = 0.0

    def is_due(self, judgement: Judgement) -> bool:
        """Whether a cause that stands is to be answered (again) now."""
        raised = judgement.raised
        if raised == PressureLevel.NORMAL:
            self._unmet = raised
            return False
        # Much less is left than after the last response: somebody fills memory faster than is waited here.
        is_worse = judgement.shortage_bytes > self._unmet_bytes * _WORSE_RATIO
        return raised > self._unmet or is_worse or self._clock() >= self._again_at_s

    def respond(self, level: PressureLevel, judgement: Judgement, judged_s: float) -> int:
        """Reclaim for what was judged at *judged_s*; return the bytes by which the budget's use fell.

        A failure is logged.
        """
        budget = self._budget
        if budget is None:
            return 0
        need = _Need(budget, level, judgement, self._look, is_fresh=self._clock() - judged_s < _FRESH_S)
        before_bytes, self._unmet = budget.used_bytes, level
        try:
            if self._reclaim(budget, need):
                self._unmet = PressureLevel.NORMAL
        except Exception:
            journal.exception("reclaiming the budget %r failed", budget)
        self._unmet_bytes = need.shortage_bytes
        self._again_at_s = self._clock() + _AGAIN_S
        return max(0, before_bytes - budget.used_bytes)

    def _reclaim(self, budget: Budget, need: _Need) -> bool:
        """Ask until the need is met, or what is given no longer shows; whether it is met."""
        for _ in range(_ROUNDS_MAX):
            need.most_bytes = 0
            freed_bytes = reclaim.ask(budget, need, _ask_and_go_on)
            if need() <= 0:
                return True
            # What fills memory may have been faster. Or what was freed does not come back to the kernel: then asking
            # for more would empty the caches, and the shortage be the same.
            if freed_bytes == 0 or need.shortage_bytes >= need.most_bytes:
                break
        return False

    def trim(self) -> None:
        """Give back what was freed. A failure is logged."""
        try:
            give_back()
        except Exception:
            journal.exception("giving memory back failed")


def _ask_and_go_on(entry: ReclaimerEntry, need_bytes: int) -> None:
    try:
        entry.run_alone(need_bytes)
    except BaseException:
        # SystemExit too: a reclaimer must not keep the next one from making room, nor end the thread that warns.
        journal.exception("the reclaimer %r failed; the next one is asked", entry.function)


class _Need:
    """What to ask the next reclaimer for.

    Attributes:
        shortage_bytes: What was missing until every level's cause has passed, when last looked.
        most_bytes: The most that it was since this was set to 0.
    """

    def __init__(
        self,
        budget: Budget,
        level: PressureLevel,
        judgement: Judgement,
        look: Callable[[], int],
        *,
        is_fresh: bool,
    ) -> None:
        self._budget = budget
        self._level = level
        self._is_fresh = is_fresh
        self._follows_headroom = judgement.source is None
        self._ends_watermark = judgement.source == WATERMARK
        self.shortage_bytes = judgement.shortage_bytes
        self.most_bytes = 0
        self._look = look
        self._growth_bytes = 0  # what was taken from the judgement to the first look
        self._seen_bytes: int | None = None  # what the budget used at the last call

    def __call__(self) -> int:
        used_bytes, seen_bytes = self._budget.used_bytes, self._seen_bytes
        self._seen_bytes = used_bytes
        # The figures that raised LOW are some ms old by now: the GIL had to be waited for. At CRITICAL all is asked for
        # whatever they say, and a look takes memory, which may be what nobody has.
        if self._follows_headroom and (seen_bytes is not None or self._level < PressureLevel.CRITICAL):
            before_bytes, self.shortage_bytes = self.shortage_bytes, self._look()
            if seen_bytes is None and self._is_fresh:
                self._growth_bytes = max(0, self.shortage_bytes - before_bytes)
            if self.shortage_bytes > 0 and seen_bytes is not None and used_bytes < seen_bytes:
                give_back(collects=False)  # it may still lie in the allocators, where no headroom tells of it
                self.shortage_bytes = self._look()
        self.most_bytes = max(self.most_bytes, self.shortage_bytes)
        return self._to_ask(used_bytes)

    def _to_ask(self, used_bytes: int) -> int:
        shortage_bytes = self.shortage_bytes
        if self._level == PressureLevel.CRITICAL:
            # A reclaimer may hold more than it has reserved: ask even where nothing is charged.
            return 0 if self._follows_headroom and shortage_bytes <= 0 else max(used_bytes, 1)
        soft_limit_bytes = self._budget.soft_limit_bytes
        if soft_limit_bytes is None:
            ahead_bytes = _LOOKS_AHEAD * self._growth_bytes if shortage_bytes > 0 else 0
            return min(used_bytes, shortage_bytes + ahead_bytes)
        # The soft limit as a cause has passed only there: with less, the level would stay for as long as the use does.
        down_to_bytes = soft_limit_bytes - soft_limit_bytes // 10 if self._ends_watermark else soft_limit_bytes
        over_bytes = used_bytes - down_to_bytes
        return min(over_bytes, shortage_bytes) if self._follows_headroom else over_bytes
