"""Snapshots that take themselves: Redis's save points, for whichever engine."""

from __future__ import annotations

import atexit
import inspect
import logging
import math
import os
import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple

from memsafe.errors import SnapshotCancelledError, SnapshotFailedError, SnapshotInProgressError
from memsafe.snapshot.changes import ChangeCount
from memsafe.snapshot.fork import EXIT_WAIT_S, end_at_exit, fork_snapshot
from memsafe.snapshot.job import lock_timeout
from memsafe.snapshot.standing import Standing, is_deferral
from memsafe.snapshot.writer import check_request

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from typing import Self

    from memsafe.snapshot.atomic import StrPath
    from memsafe.snapshot.job import SnapshotJob, SnapshotResult
    from memsafe.snapshot.standing import News, SnapshotForecast
    from memsafe.snapshot.writer import SnapshotWriter

_log = logging.getLogger("memsafe.snapshot")

# How often to look whether there are enough changes, once a point's time has come: a hundredth of that time, within
# bounds. Whoever counts changes must not have to wake anybody.
_LOOK_RATIO = 0.01
_LOOK_S = 0.2
_LOOK_S_MAX = 1.0

_BEGINNING_LOOK_S = 0.005  # how often to look whether a snapshot has begun: a matter of milliseconds


class SavePoint(NamedTuple):
    """When an image is due: so long after the last one, if at least so much was changed since."""

    every_s: float
    after_changes: int


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
        changes: Returns how many changes there were in all, for a program that counts them itself. When it returns
            less than before, it has begun anew from 0, and what it had come to still counts.
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
        TypeError: *path* is no path; *write* cannot be called, or is a coroutine or generator function; *take* cannot
            be called, or not with *arguments*.
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
        _check_call(take, path, write, arguments)
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
        self._changes = ChangeCount(changes)
        now_s = clock()
        self._standing = Standing(saved_changes=self._changes.total(), saved_at_s=now_s, not_before_s=now_s)
        self._attempt: _Attempt | None = None
        self._closed = False
        self._lock = threading.RLock()  # guards what is above; re-entered when a signal handler saves
        self._stopped = threading.Event()  # wakes the thread
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
        return self._settled().job

    @property
    def changes_since(self) -> int:
        """Changes that the last image does not have."""
        standing = self._settled()  # before the count, which is never less than what the last image has
        return self._changes.total() - standing.saved_changes

    @property
    def last_result(self) -> SnapshotResult | None:
        """Of the last snapshot that succeeded, or None."""
        runs = self._settled().runs
        return runs[-1] if runs else None

    @property
    def last_error(self) -> Exception | None:
        """What ended the last snapshot that failed, or kept it from beginning; None after a success."""
        return self._settled().last_error

    @property
    def consecutive_failures(self) -> int:
        """How many failed since the last success."""
        return self._settled().consecutive_failures

    @property
    def deferred_by(self) -> Exception | None:
        """Why the last attempt was put off; None after one that was not."""
        return self._settled().deferred_by

    @property
    def next_attempt_in_s(self) -> float | None:
        """Seconds until the next attempt; 0 where it is due.

        None where no time can be told: one is running, there are too few changes for any save point, or it was closed.
        """
        standing = self._settled()
        if self._is_foreign() or self._closed or standing.job is not None or self._attempt is not None:
            return None
        now_s, changes = self._clock(), self._changes.total() - standing.saved_changes
        due_s = [standing.saved_at_s + point.every_s for point in self._points if changes >= point.after_changes]
        return max(0.0, max(min(due_s), standing.not_before_s) - now_s) if due_s else None

    def forecast(self) -> SnapshotForecast | None:
        """Return what the next snapshot will take, by the last five that succeeded; None before the first.

        fork_snapshot's own assessment goes by the last one alone: ``assess_fork(duration_s=forecast.duration_s)``.
        """
        return self._settled().forecast()

    def as_dict(self) -> dict[str, Any]:
        """Return all of that as plain data; exceptions as their text."""
        standing = self._settled()
        result, forecast = standing.runs[-1] if standing.runs else None, standing.forecast()
        error, deferred_by = standing.last_error, standing.deferred_by
        return {
            "path": os.fsdecode(self.path),
            "points": [list(point) for point in self._points],
            "running": standing.job is not None,
            "changes_since": self._changes.total() - standing.saved_changes,
            "next_attempt_in_s": self.next_attempt_in_s,
            "consecutive_failures": standing.consecutive_failures,
            "last_error": str(error) if error is not None else None,
            "deferred_by": str(deferred_by) if deferred_by is not None else None,
            "last_result": result.as_dict() if result is not None else None,
            "forecast": forecast.as_dict() if forecast is not None else None,
        }

    # What the program tells, and asks for.

    def note_changes(self, count: int = 1) -> None:
        """Tell of *count* changes. Wakes nobody; from any thread, and from signal handlers."""
        self._changes.noted[get_ident()] += count

    def note_saved(self) -> None:
        """Tell that an image as of now was made, or loaded, by other means: that counts as a success."""
        if self._is_foreign():
            return
        changes, now_s = self._changes.total(), self._clock()
        self._update(lambda standing: standing.saved(changes, now_s))

    def save_now(self) -> SnapshotJob:
        """Begin a snapshot now, whatever the save points and earlier failures say, and return its job.

        Raises:
            SnapshotInProgressError: One is running already.
            RuntimeError: The schedule was closed, or is the parent's of this forked child.
            Exception: What *take* raised; it counts as one of the schedule's failures.
        """
        self._check_usable()
        try:
            job = self._begin()
        except Exception:
            self._tell()
            raise
        job.add_done_callback(self._ended)
        return job

    def tick(self) -> float:
        """Begin a snapshot if one is due, and return the seconds after which to look again. Failures are not raised."""
        if self._is_foreign() or self._closed:
            return _LOOK_S_MAX
        if self.next_attempt_in_s == 0:
            with suppress(Exception):  # taken in, and logged
                self.save_now()
        self._tell()  # of what an interrupt has kept back
        standing, now_s = self._standing, self._clock()
        left_s = standing.saved_at_s - now_s
        look_s = [max(left_s + point.every_s, point.every_s * _LOOK_RATIO) for point in self._points]
        return min(max(min(look_s, default=_LOOK_S_MAX), standing.not_before_s - now_s, _LOOK_S), _LOOK_S_MAX)

    # What drives it.

    def start(self) -> None:
        """Have a thread drive it until close().

        Raises:
            RuntimeError: It is driven already, was closed, or is the parent's of this forked child.
        """
        self._check_usable()
        end_at_exit()  # registered before this schedule's own, so that it is called after that: nothing begins then
        thread = threading.Thread(target=self._drive, name="memsafe-schedule", daemon=True)
        try:
            with self._lock:
                self._check_not_driven()
                self._thread = thread
            atexit.register(self._end_at_exit)
            thread.start()
        except BaseException:
            if self._thread is thread:
                self._thread = None  # by which one that runs already ends at its next look
            raise

    def close(self, *, cancel: bool = False, timeout_s: float | None = None) -> None:
        """Begin no more snapshots, and wait for the one that is running. Not to be called with *lock* held.

        Args:
            cancel: End the running one instead; the old file stays.
            timeout_s: Seconds to wait at most.

        Raises:
            TimeoutError: It is still running, and goes on; or a thread that was about to begin one has not ended that:
                it waits for *lock*, say. Call again to wait again.
        """
        if self._is_foreign():
            return
        until_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        self._stop()
        atexit.unregister(self._end_at_exit)
        if not self._nobody_begins(until_s):
            path = os.fsdecode(self.path)
            raise TimeoutError(f"the schedule of snapshots of {path} has not ended after {timeout_s} s")
        if (job := self._standing.job) is not None:
            if cancel:
                job.cancel()
            with suppress(SnapshotFailedError):
                job.wait(max(0.0, until_s - time.monotonic()))

    def _stop(self) -> None:
        """Begin nothing more."""
        with self._lock:  # whoever gets it later to begin one sees this; of who had it before there is an attempt
            is_first, self._closed = not self._closed, True
        if is_first:  # not in a signal handler that has interrupted this call: it would wait for the Event's own lock
            self._stopped.set()

    def _nobody_begins(self, until_s: float) -> bool:
        """Wait until no other thread can begin a snapshot any more; return whether that is so by then."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread() and thread.is_alive():
            thread.join(lock_timeout(max(0.0, until_s - time.monotonic())))
            if thread.is_alive():
                return False
        while self._is_begun_elsewhere():
            if (left_s := until_s - time.monotonic()) <= 0:
                return False
            time.sleep(min(left_s, _BEGINNING_LOOK_S))
        return True

    def _is_begun_elsewhere(self) -> bool:
        """Whether another thread is just beginning a snapshot.

        To be looked at, not waited for: if that thread is interrupted, it wakes nobody.
        """
        attempt = self._attempt
        return attempt is not None and attempt.thread != get_ident()

    def _end_at_exit(self) -> None:
        """Begin nothing more. A snapshot that the thread is just beginning is ended by whoever takes it."""
        if self._is_foreign() or (thread := self._thread) is None:
            return  # a lock that a forked child's copy has may never be released
        self._exiting = True  # which is no failure of anybody's
        self._stop()
        if thread.is_alive():
            thread.join(EXIT_WAIT_S)

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
        with self._lock:
            self._check_not_driven()
            self._task = asyncio.get_running_loop().create_task(self._drive_on_loop(), name="memsafe-schedule")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_foreign():
            return
        import asyncio

        self._stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        while self._is_begun_elsewhere():
            await asyncio.sleep(_BEGINNING_LOOK_S)
        if (job := self._standing.job) is not None:
            with suppress(SnapshotFailedError):
                await job

    def _drive(self) -> None:
        while self._thread is threading.current_thread() and not self._closed:
            self._stopped.wait(self._tick_safely())

    async def _drive_on_loop(self) -> None:
        import asyncio

        await asyncio.sleep(0)  # an eager task is here before __aenter__() has it, with the lock held
        while self._task is asyncio.current_task() and not self._closed:
            await asyncio.sleep(self._tick_safely())

    def _tick_safely(self) -> float:
        try:
            return self.tick()
        except Exception:  # `changes` or `clock` failed
            _log.exception("the schedule of snapshots of %s could not look; it goes on", os.fsdecode(self.path))
            return _LOOK_S_MAX

    # Attempts.

    def _begin(self) -> SnapshotJob:
        attempt = _Attempt()
        try:
            self._claim(attempt)
            return self._take_image()
        finally:  # without a call in it, which could be interrupted
            if self._attempt is attempt:
                self._attempt = None

    def _claim(self, attempt: _Attempt) -> None:
        """Have no other one begin until *attempt* is over.

        Raises:
            SnapshotInProgressError: There is another one, or its snapshot.
        """
        with self._lock:
            self._settled()
            if self._standing.job is None and self._attempt is None:
                self._attempt = attempt
                return
        raise SnapshotInProgressError(
            f"a snapshot of {os.fsdecode(self.path)} was asked for, but the schedule's last is still running"
        )

    def _take_image(self) -> SnapshotJob:
        try:
            with self._state_lock:
                changes = self._changes.total()
                self._check_usable()  # once more: close() has either seen the attempt, or is seen here
                job = self._take(self.path, self._write, **self._arguments)
                self._update(lambda standing: standing.began(job, changes))
        except _ClosedError:
            raise
        except Exception as error:
            self._take_in(error)
            raise
        return job

    def _ended(self, _: SnapshotJob) -> None:
        """Take in how a job ended, and tell; on its thread."""
        self._settled()
        self._tell()

    def _settled(self) -> Standing:
        """Return how it stands, with how the job ended, if it did: who waited for it may be here before its callbacks.

        Whoever is interrupted here leaves it to the next one.
        """
        job = self._standing.job
        if job is not None and job.done() and not self._is_foreign():
            outcome, now_s = _outcome_of(job), self._clock()
            self._update(lambda standing: standing.ended(job, outcome, now_s, self._wait_s))
        return self._standing

    def _update(self, change: Callable[[Standing], Standing]) -> Standing:
        """Change how it stands in one step, and return how it stood. *change* may be called more than once."""
        with self._lock:
            while True:
                before = self._standing
                after = change(before)
                if self._standing is before:  # else a signal handler came in between
                    self._standing = after
                    return before

    def _wait_s(self, failures: int) -> float:
        """Return how long to wait after so many failures in a row."""
        return min(self._retry_s * 2.0 ** min(failures - 1, 64), self._retry_max_s)

    def _take_in(self, error: Exception) -> None:
        """Decide what follows from an attempt that did not begin."""
        now_s = self._clock()
        self._update(lambda standing: standing.failed(error, now_s, self._wait_s))

    def _tell(self) -> None:
        """Tell the owner what he was not told yet, each piece once; no lock is held."""
        while self._standing.untold and not self._is_foreign():
            for news in self._update(Standing.told).untold[:1]:  # none: another thread tells it
                self._tell_of(news)

    def _tell_of(self, news: News) -> None:
        path, outcome = os.fsdecode(self.path), news.outcome
        if isinstance(outcome, SnapshotCancelledError):
            return
        if isinstance(outcome, Exception):
            if is_deferral(outcome) or self._exiting:
                _log.info("the snapshot of %s is put off: %s", path, outcome)
                return
            if news.failures == 1:
                _log.warning("the snapshot of %s failed: %s", path, outcome)
            else:
                _log.warning("%d snapshots of %s failed in a row, the last one: %s", news.failures, path, outcome)
        if self._on_end is not None:
            try:
                self._on_end(outcome)
            except Exception:
                _log.exception("on_end of the schedule of %s failed", path)

    # Small things.

    def _is_foreign(self) -> bool:
        return self._pid != os.getpid()

    def _check_usable(self) -> None:
        if self._is_foreign():
            raise RuntimeError(
                f"this schedule belongs to process {self._pid}: a forked child's copy takes no snapshots"
            )
        if self._closed:
            raise _ClosedError("the schedule is closed")

    def _check_not_driven(self) -> None:
        if self._thread is not None or self._task is not None:
            raise RuntimeError("the schedule is driven already")


class _Attempt:
    """A snapshot that *thread* is just beginning."""

    def __init__(self) -> None:
        self.thread = get_ident()


class _ClosedError(RuntimeError):
    """The schedule begins nothing more, which is no failure."""


def _check_call(take: Callable[..., object], path: StrPath, write: object, arguments: dict[str, Any]) -> None:
    """Raise TypeError where *take* does not take *arguments*: now, and not when the first image is due."""
    try:
        signature = inspect.signature(take)
    except ValueError:  # some functions of C have none
        return
    try:
        signature.bind(path, write, **arguments)
    except TypeError as error:
        raise TypeError(f"{take!r} cannot be called as take(path, write, **arguments): {error}") from None


def _outcome_of(job: SnapshotJob) -> SnapshotResult | Exception:
    """Return the result of a job that is done, or what ended it."""
    try:
        return job.wait(0)
    except Exception as error:
        return error
