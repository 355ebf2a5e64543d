"""What is done about a change in the monitor's thread: the budget reclaimed, the callbacks run, memory given back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from memsafe.pressure import journal
from memsafe.pressure.levels import PressureLevel
from memsafe.pressure.responder import Responder

if TYPE_CHECKING:
    from collections.abc import Callable

    from memsafe.budget import Budget
    from memsafe.pressure.deputy import Deputy
    from memsafe.pressure.levels import Judgement, PressureEvent

    Callback: TypeAlias = Callable[[PressureEvent], object]
    # In the order of their registration, each with the level that it wants to hear of.
    Callbacks: TypeAlias = tuple[tuple[PressureLevel, Callback], ...]


class Dispatcher:
    """Tells callbacks of each change, and has a budget reclaimed before.

    Used by the monitor's thread, which has the lead and is away() from it while user code runs; but for *untold*, which
    belongs to whoever has the lead.

    Args:
        budget: What is reclaimed; None: nothing.
        clock: Seconds.
        look: As for Responder.

    Attributes:
        untold: The last change, why it came, and who was registered then; None: there is none that was not told.
        wants_trim: Whether memory is to be given back in a quiet moment.
        has_answered: Whether answer() did anything since this was last set to False.
    """

    def __init__(self, budget: Budget | None, clock: Callable[[], float], look: Callable[[], int]) -> None:
        self._budget = budget
        self._clock = clock
        self._responder = Responder(budget, clock, look)
        self._told = PressureLevel.NORMAL
        self._told_count = 0  # so many callbacks, from the first, know of that level
        self.untold: tuple[PressureEvent, Judgement, Callbacks] | None = None
        self.wants_trim = self.has_answered = False

    def forget(self) -> None:
        """Have told nobody of anything, as a monitor that starts."""
        self.untold, self._told, self._told_count = None, PressureLevel.NORMAL, 0

    def answer(self, deputy: Deputy, judgement: Judgement) -> bool:
        """Do what the judgement asks for, or else give memory back if that is due; whether there was anything."""
        if not (self._answer(deputy, judgement) or self._trim_if_quiet(deputy, judgement)):
            return False
        self.has_answered = True
        return True

    def tell(self, deputy: Deputy) -> bool:
        """Have the budget reclaimed and the callbacks run for what is untold; whether there was anything.

        What came up while callbacks ran is one change: from what they were told last to what is now.
        """
        has_told = False
        while self.untold is not None:
            (event, judgement, callbacks), self.untold = self.untold, None
            previous, self._told = self._told, event.level
            newer, self._told_count = callbacks[self._told_count :], len(callbacks)
            if event.level == previous != PressureLevel.NORMAL:
                # It went and came back. Who was told last need not know, but others have heard of it from nobody.
                self._call_all(deputy, newer, event)
                has_told = has_told or bool(newer)
            elif event.level != previous:
                event = event if event.previous == previous else replace(event, previous=previous)
                self._respond(deputy, event, judgement, callbacks)
                has_told = True
        return has_told

    def tell_late(self, deputy: Deputy, callback: Callback, missed: PressureEvent, place: int) -> None:
        """Call a callback that came late, unless what was told since was told it as well.

        Args:
            deputy: Who has the lead meanwhile.
            callback: It.
            missed: What it has not heard.
            place: How many were registered with it.
        """
        if self._told_count < place:
            self._told_count = place
            self._call(deputy, callback, missed)

    def _respond(self, deputy: Deputy, event: PressureEvent, judgement: Judgement, callbacks: Callbacks) -> None:
        rose = event.level > event.previous
        freed_bytes = self._reclaim(deputy, event.level, judgement, event.at_s) if rose else 0
        self._call_all(deputy, callbacks, event)
        # At CRITICAL always: the callbacks may have freed memory that no budget knows.
        if rose and (freed_bytes > 0 or event.level == PressureLevel.CRITICAL):
            self.wants_trim = True
            if judgement.source is not None:
                self._trim(deputy)  # no headroom tells of a quiet moment

    def _answer(self, deputy: Deputy, judgement: Judgement) -> bool:
        """Tell what there is to tell; where a cause only lasts, have the budget reclaimed again.

        Returns:
            Whether callbacks were called, or something was freed.
        """
        is_due = self._responder.is_due(judgement)
        if self.tell(deputy):
            return True
        if not is_due or self._reclaim(deputy, judgement.raised, judgement, self._clock()) == 0:
            return False
        self.wants_trim = True
        return True

    def _trim_if_quiet(self, deputy: Deputy, judgement: Judgement) -> bool:
        """Trim if that is wanted and nothing was answered in this turn, or nothing else can help; whether it was."""
        if not self.wants_trim or (self.has_answered and judgement.raised < PressureLevel.CRITICAL):
            return False
        self._trim(deputy)
        return True

    def _call_all(self, deputy: Deputy, callbacks: Callbacks, event: PressureEvent) -> None:
        for wanted, callback in callbacks:
            if hears(wanted, event.level):
                self._call(deputy, callback, event)

    def _call(self, deputy: Deputy, callback: Callback, event: PressureEvent) -> None:
        with deputy.away("the callback %r for %s", callback, event.level.name):
            try:
                callback(event)
            except BaseException:
                # SystemExit too: a callback must not end the thread that warns the others.
                journal.exception("the callback %r for %s failed; the others run", callback, event.level.name)

    def _reclaim(self, deputy: Deputy, level: PressureLevel, judgement: Judgement, judged_s: float) -> int:
        if self._budget is None:
            return 0
        with deputy.away("reclaiming the budget %r", self._budget):
            return self._responder.respond(level, judgement, judged_s)

    def _trim(self, deputy: Deputy) -> None:
        self.wants_trim = False
        if self._budget is not None:
            with deputy.away("giving memory back"):
                self._responder.trim()


def hears(wanted: PressureLevel, level: PressureLevel) -> bool:
    """Whether a callback for *wanted* hears of *level*."""
    return level == wanted if wanted == PressureLevel.NORMAL else level >= wanted
