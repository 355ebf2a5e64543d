"""Who responds when memory runs short: memsafe, what others do, and nobody.

All but memsafe see what psutil tells of the process, its resident memory, against a limit that they are told. That is
generous: nothing of a cgroup's limit, nor of what the kernel or other processes use there, is seen that way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from benchmarks.survival.journal import Mark
from benchmarks.survival.program import Program
from memsafe import PressureEvent, PressureLevel, PressureMonitor, Thresholds

Responder = Callable[[Program], AbstractContextManager[object]]

# distributed.worker.memory: target, spill, pause; distributed.nanny: terminate.
_DASK_TARGET, _DASK_SPILL, _DASK_PAUSE, _DASK_TERMINATE = 0.60, 0.70, 0.80, 0.95
_DASK_INTERVAL_S = 0.1


@contextmanager
def memsafe(program: Program, **options: Any) -> Iterator[None]:
    """A monitor that has the budget, and a callback that only takes notes."""
    journal = program.journal
    with PressureMonitor(program.budget, **options) as monitor:
        _note_what_is_heard(monitor, program)

        @monitor.on(PressureLevel.LOW)
        def note(event: PressureEvent) -> None:
            journal.called(f"{event.level.name} {event.source}")

        yield


def _note_what_is_heard(monitor: PressureMonitor, program: Program) -> None:
    """Write down when the native thread saw what the first response follows."""
    hub, journal = monitor._hub, program.journal
    assert hub is not None
    hear = hub.hear

    def noting(reports: Any) -> Any:
        if reports and not journal[Mark.ACTED_AT]:
            journal[Mark.HEARD_AT] = reports[0].first_ns
        return hear(reports)

    hub.hear = noting  # type: ignore[method-assign]


@contextmanager
def _in_a_thread(look: Callable[[], None], interval_s: float) -> Iterator[None]:
    def run() -> None:
        while not stop.wait(interval_s):
            look()

    stop = threading.Event()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join()


@contextmanager
def psutil_loop(program: Program, interval_s: float) -> Iterator[None]:
    """Drops the whole cache when no more is left than where memsafe's LOW begins."""
    tight_bytes = program.cell.tight_bytes
    low_bytes = Thresholds().begins_at(PressureLevel.LOW, tight_bytes)

    def look() -> None:
        if tight_bytes - program.resident_bytes() <= low_bytes:
            program.cache.drop(program.cell.cache_bytes)

    with _in_a_thread(look, interval_s):
        yield


@contextmanager
def dask(program: Program) -> Iterator[None]:
    """What the memory monitor of a Dask worker does, and its nanny; spilling takes it no time here."""
    limit_bytes = program.cell.limit_bytes

    def look() -> None:
        share = program.resident_bytes() / limit_bytes
        if share > _DASK_TERMINATE:
            program.give_up()
        if share > _DASK_PAUSE:
            program.journal.acted()
            program.may_go_on.clear()
        else:
            program.may_go_on.set()
        if share > _DASK_SPILL:
            while len(program.cache) and program.resident_bytes() > _DASK_TARGET * limit_bytes:
                program.cache.drop(1)

    with _in_a_thread(look, _DASK_INTERVAL_S):
        yield


RESPONDERS: dict[str, Responder] = {
    "none": lambda _: ExitStack(),
    "memsafe": memsafe,
    "memsafe, reserve 8 MiB": partial(memsafe, reserve="8 MiB"),
    "memsafe, poll 1 ms": partial(memsafe, thresholds=Thresholds(poll_s_min=0.001)),
    "psutil 1 s": partial(psutil_loop, interval_s=1.0),
    "psutil 100 ms": partial(psutil_loop, interval_s=0.1),
    "dask": dask,
}
