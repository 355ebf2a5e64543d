"""Runs cells, each run in a cgroup of its own, and says from outside what became of it."""

from __future__ import annotations

import os
import select
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.snapshot_survival import program, redis
from benchmarks.snapshot_survival.cells import Cell
from benchmarks.snapshot_survival.program import Mark
from benchmarks.survival.journal import Journal
from benchmarks.survival.place import Place
from benchmarks.survival.trial import Inmate


@dataclass(frozen=True)
class Run:
    """What became of one run.

    Attributes:
        outcome: "survived": all snapshots were gone through. "killed": the program was taken by the OOM killer, as its
            cgroup's counter says. "stood still": not done when its time was over. "failed": anything else.
        complete: How many images there were.
        ended: How many snapshots memsafe ended because memory ran short.
        shot: Of how many the child was taken by the OOM killer.
        refused: How many were not begun.
        failed: How many failed in other ways.
        oom_kills: How many processes the OOM killer has taken in the cgroup, by the kernel's count.
    """

    outcome: str
    complete: int
    ended: int
    shot: int
    refused: int
    failed: int
    oom_kills: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(cell: Cell) -> Iterator[Run]:
    """Yield the runs of *cell* as they end, one after another.

    Raises:
        place.UnavailableError: No memory cgroup can be made here.
        servers.UnavailableError: There is no redis-server.
    """
    for _ in range(cell.runs):
        journal = Journal()
        try:
            outcome, oom_kills = _redis(cell, journal) if cell.engine == redis.ENGINE else _forked(cell, journal)
            yield Run(
                outcome,
                complete=journal[Mark.COMPLETE],
                ended=journal[Mark.ENDED],
                shot=journal[Mark.SHOT],
                refused=journal[Mark.REFUSED],
                failed=journal[Mark.FAILED],
                oom_kills=oom_kills,
            )
        finally:
            journal.close()


def _forked(cell: Cell, journal: Journal) -> tuple[str, int]:
    with tempfile.TemporaryDirectory(prefix="memsafe-bench-") as folder:
        place = Place(cell.limit_bytes)
        inmate = Inmate(place, lambda: program.live(cell, place, journal, folder))
        overdue = True
        try:
            poller = select.poll()
            poller.register(inmate.fd, select.POLLIN)
            overdue = not poller.poll(cell.patience_s * 1000)
        finally:
            status, kills = inmate.end(by_force=overdue)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 and journal[Mark.DONE]:
        return "survived", kills
    if overdue:
        return "stood still", kills
    return "killed" if os.WIFSIGNALED(status) and kills else "failed", kills


def _redis(cell: Cell, journal: Journal) -> tuple[str, int]:
    with ExitStack() as cleanup:
        place = Place(cell.limit_bytes)
        cleanup.callback(place.remove)
        redis.live(cell, place, journal)
        kills = place.oom_kills()
        if journal[Mark.DONE]:
            return "survived", kills
        return "killed" if kills else "failed", kills
