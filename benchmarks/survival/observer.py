"""Runs cells, each run in a forked child and a cgroup of its own, and says from outside what became of it."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.survival.cells import Cell
from benchmarks.survival.journal import Ending, Journal, Mark
from benchmarks.survival.place import Place
from benchmarks.survival.program import live
from benchmarks.survival.trial import Inmate

# Of the machine's memory, so much may be taken by runs side by side.
_SIDE_BY_SIDE_RATIO = 0.8
_SIDE_BY_SIDE_MAX = 10


@dataclass(frozen=True)
class Run:
    """What became of one run.

    Attributes:
        outcome: "survived": all that was to be taken was taken. "killed": by the OOM killer, as its cgroup's counter
            says. "stood still": not done when its time was over. "gave up": ended itself. "failed": anything else.
        lead_ms: From the first response until what had been left was taken: when the limit would have been met with
            the cache kept. Less than 0: it came too late for that. None: there was no response, or no such moment.
        lead_bytes: What was left under the tightest limit at the first response, file cache counted as free; to within
            a chunk.
        source: What the first callback was told: level and source.
        heard_ms: From when the native thread saw the signal to the first response.
        room_ms: How long the first response took, until the cache had fallen.
        taken_bytes, took_ms: How much was taken in all, and how long after that the response had begun.
    """

    outcome: str
    lead_ms: float | None
    lead_bytes: int | None
    source: str
    heard_ms: float | None
    room_ms: float | None
    left_bytes: int
    taken_bytes: int
    end_ms: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Trial:
    """One run, from its fork on."""

    def __init__(self, cell: Cell) -> None:
        place = Place(cell.limit_bytes, cell.tight_bytes if cell.has_high else None)
        self._journal = Journal()
        self.until_s = time.monotonic() + cell.patience_s
        self._inmate = Inmate(place, lambda: live(cell, place, self._journal))
        self.fd = self._inmate.fd

    def end(self, *, overdue: bool = False) -> Run:
        """Take what is left of it; where it has not ended, end it."""
        status, kills = self._inmate.end(by_force=overdue)
        run = _told(self._journal, _outcome(self._journal, status, kills, overdue))
        self._journal.close()
        return run


def _outcome(journal: Journal, status: int, oom_kills: int, overdue: bool) -> str:
    if os.WIFSIGNALED(status) and oom_kills:
        return "killed"
    if overdue:
        return "stood still"
    ending = journal[Mark.DONE] if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 else Ending.KILLED
    return {Ending.SURVIVED: "survived", Ending.GAVE_UP: "gave up"}.get(Ending(ending), "failed")


def _told(journal: Journal, outcome: str) -> Run:
    def ms(later: Mark, sooner: Mark) -> float | None:
        if not (journal[later] and journal[sooner]):
            return None
        return round((journal[later] - journal[sooner]) / 1e6, 3)

    left_bytes = journal[Mark.LEFT]
    acted = journal[Mark.ACTED_AT] != 0
    return Run(
        outcome=outcome,
        # Where it died a chunk short of that, its death.
        lead_ms=ms(Mark.PASSED_AT if journal[Mark.PASSED_AT] else Mark.TAKEN_AT, Mark.ACTED_AT),
        lead_bytes=left_bytes - journal[Mark.ACTED_TAKEN] if acted else None,
        source=journal.source,
        heard_ms=ms(Mark.ACTED_AT, Mark.HEARD_AT),
        room_ms=ms(Mark.ROOM_AT, Mark.ACTED_AT),
        left_bytes=left_bytes,
        taken_bytes=journal[Mark.TAKEN],
        end_ms=ms(Mark.TAKEN_AT, Mark.ACTED_AT),
    )


def run(cell: Cell) -> Iterator[Run]:
    """Yield the runs of *cell* as they end: at full speed one after another, at a pace side by side."""
    waiting, side_by_side = cell.runs, _side_by_side(cell)
    trials: dict[int, Trial] = {}
    poller = select.poll()
    try:
        while waiting or trials:
            while waiting and len(trials) < side_by_side:
                trial = Trial(cell)
                waiting -= 1
                trials[trial.fd] = trial
                poller.register(trial.fd, select.POLLIN)
            now_s = time.monotonic()
            soonest_s = min(trial.until_s for trial in trials.values())
            ended = {fd for fd, _ in poller.poll(max(0.0, soonest_s - now_s) * 1000)}
            overdue = {fd for fd, trial in trials.items() if trial.until_s <= time.monotonic()} - ended
            for fd in ended | overdue:
                poller.unregister(fd)
                yield trials.pop(fd).end(overdue=fd in overdue)
    finally:
        for trial in trials.values():
            trial.end(overdue=True)


def _side_by_side(cell: Cell) -> int:
    if cell.rate is None and cell.responder != "none":
        return 1
    room_bytes = int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _SIDE_BY_SIDE_RATIO)
    return max(1, min(_SIDE_BY_SIDE_MAX, room_bytes // cell.limit_bytes))
