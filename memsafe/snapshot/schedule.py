"""Snapshots that take themselves: Redis's save points, for whichever engine."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from memsafe.errors import (
    SnapshotCancelledError,
    SnapshotFailedError,
    SnapshotInProgressError,
    SnapshotRefusedError,
)
from memsafe.snapshot.fork import EXIT_WAIT_S, end_at_exit, fork_snapshot
from memsafe.snapshot.job import lock_timeout
from memsafe.snapshot.writer import check_request

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Self

    from memsafe.snapshot.atomic import StrPath
    from memsafe.snapshot.job import SnapshotJob, SnapshotResult
    from memsafe.snapshot.writer import SnapshotWriter

_log = logging.getLogger("memsafe.snapshot")

# How often to look whether there are enough changes, once a point's time has come: a hundredth of that time, within
# bounds. Whoever counts changes must not have to wake anybody.
_LOOK_RATIO = 0.01
_LOOK_S = 0.2
_LOOK_S_MAX = 1.0

_RUNS_REMEMBERED = 5


class SavePoint(NamedTuple):
    """When an image is due: so long after the last one, if at least so much was changed since."""

    every_s: float
    after_changes: int


@dataclass(frozen=True, slots=True)
class SnapshotForecast:
    """What the next snapshot will take, by the last few that succeeded.

    Attributes:
        runs: How many those are.
        duration_s, size_bytes, pause_s: Their medians.
        copy_bytes: The most that any of them copied, as a bound must hold for the worst; None where none was measured.
    """

    runs: int
    duration_s: float
    size_bytes: int
    pause_s: float
    copy_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)


class SnapshotSchedule:
    """Takes a snapshot whenever a save point is reached, one at a time, and goes on after failures.

    A save point is so many seconds since the last image *and* so many changes since; the first one that is reached
    counts. The program tells of its changes by note_changes(), which costs next to nothing.

    Something must drive it: a thread of its own (``with schedule:`` or start()), the running event loop (``async with
    schedule:``), or the program's own loop, which calls tick(). Where threads change the state, give *lock*: it is held
    while a snapshot begins, so that the image is of one moment. On an event loop the state is whole between two awaits.

    After a failure it waits *retry_s*, twice as long after each further one, *retry_max_s* at most. A snapshot that
    would not be safe now (``defer``), or for which another one of this process stands in the way, is put off by
    *retry_s* and is no failure; one that could never be safe (``refuse``) is. One that was cancelled is neither.

    Thread-safe. A forked child's copy does nothing.

    Args:
        path, write: As for fork_snapshot.
        every_s: Seconds since the last image, or since the schedule was made; without *after_changes* an image is due
            then whether anything was changed or not.
        after_changes: Changes since the last image; without *every_s* one is due as soon as there are so many.
        points: Pairs of both, in their place: ``[(3600, 1), (300, 100), (60, 10_000)]`` is Redis's default. None at
            all: only save_now() takes images.
        changes: Returns how many changes there were in all, for a program that counts them itself.
        lock: Held while a snapshot begins.
        retry_s, retry_max_s: Seconds to wait after a failure.
        on_end: Called with the SnapshotResult of each snapshot that succeeded, and the exception of each that failed,
            on the thread where that came to light. No lock is held.
        take: What takes a snapshot: called as ``take(path, write, **arguments)``, returns a SnapshotJob.
        clock: Seconds, never going back: time.monotonic.
        arguments: Further ones for *take*: ``max_copy``, ``compress`` and so on.

    Attributes:
        path: Where the next image goes.

    Raises:
        TypeError: *path* is no path; *write* cannot be called, or is a coroutine or generator function.
        ValueError: Neither *every_s*, *after_changes* nor *points* is given, or they make no sense.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "dump.db")
        >>> schedule = SnapshotSchedule(path, lambda out: out.write(b"state"), every_s=300, after_changes=100)
        >>> with schedule:
        ...     schedule.note_changes(3)
        ...     schedule.changes_since
        ...     schedule.save_now().wait().size_bytes
        3
        5
        >>> schedule.changes_since
        0
    """

    def __init__(
        self,
        path: StrPath,
        write: Callable[[SnapshotWriter], object],
        *,
        every_s: float | None = None,
        after_changes: int | None = None,
        points: Iterable[tuple[float, int]] | None = None,
        changes: Callable[[], int] | None = None,
        lock: AbstractContextManager[Any] | None = None,
        retry_s: float = 5.0,
        retry_max_s: float = 300.0,
        on_end: Callable[[SnapshotResult | Exception], object] | None = None,
        take: Callable[..., SnapshotJob] = fork_snapshot,
        clock: Callable[[], float] = time.monotonic,
        **arguments: Any,
    ) -> None:
        check_request(path, write)
        if (points is None) == (every_s is None and after_changes is None):
            raise ValueError("either every_s, after_changes or both, or points: there must be something to go by")
        if not 0 < retry_s <= retry_max_s:
            raise ValueError(f"retry_s must be above 0, and no more than retry_max_s: {retry_s!r}, {retry_max_s!r}")
        self.points = ((every_s or 0, after_changes or 0),) if points is None else points
        self.path = path
        self._write = write
        self._arguments = arguments
        self._take = take
        self._state_lock = lock or nullcontext()
        self._on_end = on_end
        self._clock = clock
        self._retry_s, self._retry_max_s = retry_s, retry_max_s
        self._runs: tuple[SnapshotResult, ...] = ()
        self._last_error: Exception | None = None
        self._consecutive_failures = 0
        self._deferred_by: Exception | None = None
        # By thread, so that each adds to its own: with or without the GIL no lock is needed.
        self._noted: defaultdict[int, int] = defaultdict(int)
        self._counted = changes
        self._saved_changes = self._job_changes = self._changes()
        self._saved_at_s = clock()
        self._not_before_s = self._saved_at_s
        self._job: SnapshotJob | None = None
        self._beginning = False
        self._lock = threading.RLock()  # guards what is above; re-entered when a signal handler saves
        self._stopped = threading.Event()
        self._exiting = False
        self._thread: threading.Thread | None = None
        self._task: asyncio.Task[None] | None = None
        self._pid = os.getpid()

    # What is going on.

    @property
    def points(self) -> tuple[SavePoint, ...]:
        """The save points; may be set."""
        return self._points

    @points.setter
    def points(self, points: Iterable[tuple[float, int]]) -> None:
        checked = tuple(SavePoint(every_s, after_changes) for every_s, after_changes in points)
        for point in checked:
            if not (0 <= point.every_s < float("inf") and point.after_changes >= 0 and any(point)):
                raise ValueError(f"a save point is seconds and changes, neither negative nor both 0: {tuple(point)}")
        self._points = checked

    @property
    def job(self) -> SnapshotJob | None:
        """The snapshot that is running, or None."""
        self._settle()
        return self._job

    @property
    def changes_since(self) -> int:
        """Changes that the last image does not have."""
        self._settle()
        return self._changes() - self._saved_changes

    @property
    def last_result(self) -> SnapshotResult | None:
        """Of the last snapshot that succeeded, or None."""
        self._settle()
        return self._runs[-1] if self._runs else None

    @property
    def last_error(self) -> Exception | None:
        """What ended the last snapshot that failed, or kept it from beginning; None after a success."""
        self._settle()
        return self._last_error

    @property
    def consecutive_failures(self) -> int:
        """How many failed since the last success."""
        self._settle()
        return self._consecutive_failures

    @property
    def deferred_by(self) -> Exception | None:
        """Why the last attempt was put off; None after one that was not."""
        return self._deferred_by

    @property
    def next_attempt_in_s(self) -> float | None:
        """Seconds until the next attempt; 0 where it is due.

        None where no time can be told: one is running, there are too few changes for any save point, or it was closed.
        """
        if self._is_foreign() or self._stopped.is_set() or self.job is not None or self._beginning:
            return None
        now_s, changes = self._clock(), self.changes_since
        left_s = [self._left_s(point, now_s) for point in self._points if changes >= point.after_changes]
        return max(0.0, min(left_s), self._not_before_s - now_s) if left_s else None

    def forecast(self) -> SnapshotForecast | None:
        """Return what the next snapshot will take, by the last five that succeeded; None before the first.

        fork_snapshot's own assessment goes by the last one alone: ``assess_fork(duration_s=forecast.duration_s)``.
        """
        self._settle()
        runs = self._runs
        if not runs:
            return None
        copies = [run.peak_copy_bytes for run in runs if run.peak_copy_bytes is not None]
        return SnapshotForecast(
            runs=len(runs),
            duration_s=_median([run.duration_s for run in runs]),
            size_bytes=_median([run.size_bytes for run in runs]),
            pause_s=_median([run.pause_s for run in runs]),
            copy_bytes=max(copies, default=None),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all of that as plain data; exceptions as their text."""
        result, error, deferred_by, forecast = self.last_result, self.last_error, self.deferred_by, self.forecast()
        return {
            "path": os.fsdecode(self.path),
            "points": [list(point) for point in self._points],
            "running": self.job is not None,
            "changes_since": self.changes_since,
            "next_attempt_in_s": self.next_attempt_in_s,
            "consecutive_failures": self.consecutive_failures,
            "last_error": str(error) if error is not None else None,
            "deferred_by": str(deferred_by) if deferred_by is not None else None,
            "last_result": result.as_dict() if result is not None else None,
            "forecast": forecast.as_dict() if forecast is not None else None,
        }

    # What the program tells, and asks for.

    def note_changes(self, count: int = 1) -> None:
        """Tell of *count* changes. Wakes nobody; from any thread, and from signal handlers."""
        self._noted[get_ident()] += count

    def note_saved(self) -> None:
        """Tell that an image as of now was made, or loaded, by other means: that counts as a success."""
        if self._is_foreign():
            return
        changes = self._changes()
        with self._lock:
            self._succeeded(changes)

    def save_now(self) -> SnapshotJob:
        """Begin a snapshot now, whatever the save points and earlier failures say, and return its job.

        Raises:
            SnapshotInProgressError: One is running already.
            RuntimeError: The schedule was closed, or is the parent's of this forked child.
            Exception: What *take* raised; it counts as one of the schedule's failures.
        """
        self._check_usable()
        with self._lock:
            if self.job is not None or self._beginning:
                raise SnapshotInProgressError(
                    f"a snapshot of {os.fsdecode(self.path)} was asked for, but the schedule's last is still running"
                )
            self._beginning = True
        try:
            job = self._begin()
        except Exception as error:
            self._take_in(error)
            self._tell(error)
            raise
        job.add_done_callback(self._ended)
        return job

    def tick(self) -> float:
        """Begin a snapshot if one is due, and return the seconds after which to look again. Failures are not raised."""
        if self._is_foreign() or self._stopped.is_set():
            return _LOOK_S_MAX
        if self.next_attempt_in_s == 0:
            with suppress(Exception):  # taken in, and logged
                self.save_now()
        now_s = self._clock()
        look_s = [max(self._left_s(point, now_s), point.every_s * _LOOK_RATIO) for point in self._points]
        return min(max(min(look_s, default=_LOOK_S_MAX), self._not_before_s - now_s, _LOOK_S), _LOOK_S_MAX)

    # What drives it.

    def start(self) -> None:
        """Have a thread drive it until close().

        Raises:
            RuntimeError: It is driven already, was closed, or is the parent's of this forked child.
        """
        self._check_usable()
        end_at_exit()  # registered before this schedule's own, so that it is called after that: nothing begins then
        with self._lock:
            self._check_not_driven()
            thread = threading.Thread(target=self._drive, name="memsafe-schedule", daemon=True)
            thread.start()
            self._thread = thread
        atexit.register(self._end_at_exit)

    def close(self, *, cancel: bool = False, timeout_s: float | None = None) -> None:
        """Begin no more snapshots, and wait for the one that is running. Not to be called with *lock* held.

        Args:
            cancel: End the running one instead; the old file stays.
            timeout_s: Seconds to wait at most.

        Raises:
            TimeoutError: It is still running, and goes on; or the thread has not ended: it waits for *lock*, say, and
                begins its snapshot yet. Call again to wait again.
        """
        if self._is_foreign():
            return
        began_s = time.monotonic()
        self._stopped.set()
        atexit.unregister(self._end_at_exit)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(lock_timeout(timeout_s))
            if self._thread.is_alive():
                path = os.fsdecode(self.path)
                raise TimeoutError(f"the schedule of snapshots of {path} has not ended after {timeout_s} s")
        if (job := self._job) is not None:
            if cancel:
                job.cancel()
            with suppress(SnapshotFailedError):
                job.wait(None if timeout_s is None else max(0.0, began_s + timeout_s - time.monotonic()))

    def _end_at_exit(self) -> None:
        """Begin nothing more. A snapshot that the thread is just beginning is ended by whoever takes it."""
        if self._is_foreign() or self._thread is None:
            return  # a lock that a forked child's copy has may never be released
        self._exiting = True  # which is no failure of anybody's
        self._stopped.set()
        self._thread.join(EXIT_WAIT_S)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        import asyncio

        self._check_usable()
        self._check_not_driven()
        self._task = asyncio.get_running_loop().create_task(self._drive_on_loop(), name="memsafe-schedule")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_foreign():
            return
        import asyncio

        self._stopped.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if (job := self._job) is not None:
            with suppress(SnapshotFailedError):
                await job

    def _drive(self) -> None:
        while not self._stopped.wait(self._tick_safely()):
            pass

    async def _drive_on_loop(self) -> None:
        import asyncio

        while not self._stopped.is_set():
            await asyncio.sleep(self._tick_safely())

    def _tick_safely(self) -> float:
        try:
            return self.tick()
        except Exception:  # `changes` or `clock` failed
            _log.exception("the schedule of snapshots of %s could not look; it goes on", os.fsdecode(self.path))
            return _LOOK_S_MAX

    # Attempts.

    def _begin(self) -> SnapshotJob:
        try:
            with self._state_lock:
                self._job_changes = self._changes()
                job = self._job = self._take(self.path, self._write, **self._arguments)
        finally:
            self._beginning = False
        self._deferred_by = None
        return job

    def _ended(self, job: SnapshotJob) -> None:
        """Take in how *job* ended, and tell; on its thread."""
        self._settle()
        try:
            outcome: SnapshotResult | Exception = job.wait(0)
        except Exception as error:
            outcome = error
        self._tell(outcome)

    def _settle(self) -> None:
        """Take in how the job ended, if it did: whoever waited for it may be here before its callbacks are called."""
        if self._is_foreign():
            return  # nobody may be left to release the lock
        with self._lock:
            job = self._job
            if job is None or not job.done():
                return
            self._job = None
            try:
                self._runs = (*self._runs, job.wait(0))[-_RUNS_REMEMBERED:]
            except Exception as error:
                self._take_in(error)
            else:
                self._succeeded(self._job_changes)

    def _succeeded(self, changes: int) -> None:
        self._last_error = self._deferred_by = None
        self._consecutive_failures = 0
        self._saved_changes = max(changes, self._saved_changes)
        self._saved_at_s = self._not_before_s = self._clock()

    def _take_in(self, error: Exception) -> None:
        """Decide what follows from an attempt without an image."""
        with self._lock:
            wait_s = self._retry_s
            if _is_deferral(error):
                self._deferred_by = error
            elif not isinstance(error, SnapshotCancelledError):
                self._last_error = error
                self._consecutive_failures += 1
                wait_s = min(self._retry_s * 2.0 ** min(self._consecutive_failures - 1, 64), self._retry_max_s)
            self._not_before_s = self._clock() + wait_s

    def _tell(self, outcome: SnapshotResult | Exception) -> None:
        """Log what went wrong, and tell the owner; no lock is held."""
        path = os.fsdecode(self.path)
        if isinstance(outcome, SnapshotCancelledError):
            return
        if isinstance(outcome, Exception):
            if _is_deferral(outcome) or self._exiting:
                _log.info("the snapshot of %s is put off: %s", path, outcome)
                return
            _log.warning("%d snapshots of %s failed in a row, now: %s", self._consecutive_failures, path, outcome)
        if self._on_end is not None:
            try:
                self._on_end(outcome)
            except Exception:
                _log.exception("on_end of the schedule of %s failed", path)

    # Small things.

    def _changes(self) -> int:
        return sum(list(self._noted.values())) + (self._counted() if self._counted is not None else 0)

    def _left_s(self, point: SavePoint, now_s: float) -> float:
        return self._saved_at_s + point.every_s - now_s

    def _is_foreign(self) -> bool:
        return self._pid != os.getpid()

    def _check_usable(self) -> None:
        if self._is_foreign():
            raise RuntimeError(
                f"this schedule belongs to process {self._pid}: a forked child's copy takes no snapshots"
            )
        if self._stopped.is_set():
            raise RuntimeError("the schedule is closed")

    def _check_not_driven(self) -> None:
        if self._thread is not None or self._task is not None:
            raise RuntimeError("the schedule is driven already")


_Number = TypeVar("_Number", int, float)


def _median(numbers: list[_Number]) -> _Number:
    return sorted(numbers)[len(numbers) // 2]  # of an even number the upper one: a forecast errs upwards


def _is_deferral(error: Exception) -> bool:
    """Whether *error* means that another time will do."""
    if isinstance(error, SnapshotRefusedError):
        return error.assessment.decision == "defer"
    return isinstance(error, SnapshotInProgressError)
