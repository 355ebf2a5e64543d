"""What every snapshot engine shares: the job that its owner holds, the run that the engine drives, and the result."""

from __future__ import annotations

import enum
import logging
import os
import threading
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from memsafe.errors import SnapshotCancelledError, SnapshotFailedError, SnapshotOverrunError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from memsafe.snapshot.atomic import StrPath

_log = logging.getLogger("memsafe.snapshot")


class SnapshotProgress(NamedTuple):
    """How far a snapshot is, in whatever unit its writer counts."""

    done: int
    total: int

    @property
    def ratio(self) -> float:
        """The share that is done; 1.0 when there is nothing to do."""
        return self.done / self.total if self.total else 1.0


@dataclass(frozen=True, slots=True)
class SnapshotResult:
    """A snapshot that is on disk.

    Attributes:
        path: The path as it was given.
        size_bytes: The file's size.
        pause_s: For how long the process stood still when the snapshot began.
        duration_s: From that instant until file and folder were synced.
        peak_copy_bytes: The most memory that private copies took at any measurement; None if it could not be read.
        method: The engine: ``"fork"``.
        warnings: What could not be done, though the image is complete.
        content_bytes: What `write` wrote: more than size_bytes where the file is compressed. None where the engine does
            not say.
        checksum: Of the file, if one was asked for: ``"crc32:…"`` or ``"sha256:…"`` in hexadecimal.
    """

    path: StrPath
    size_bytes: int
    pause_s: float
    duration_s: float
    peak_copy_bytes: int | None
    method: str
    warnings: tuple[str, ...] = ()
    content_bytes: int | None = None
    checksum: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return {**asdict(self), "path": os.fsdecode(self.path), "warnings": list(self.warnings)}


class SnapshotState(enum.Enum):
    """Where a snapshot is in its life, whichever engine takes it."""

    PREPARING = "preparing"
    """What it needs is being got."""
    RUNNING = "running"
    """The image is being written."""
    ENDING = "ending"
    """It was cancelled, or a bound was passed: the engine is being stopped, and there will be no image."""
    SETTLING = "settling"
    """The image is being put in place, or dropped; too late to cancel."""
    DONE = "done"
    """The image is at its path."""
    FAILED = "failed"
    """It ended by itself, without an image."""
    CANCELLED = "cancelled"
    """Its owner ended it."""
    OVERRUN = "overrun"
    """Its copies ended it."""


# Every life goes one way, and passes SETTLING: so there is one outcome, and nothing is put in place after it.
_NEXT = {
    SnapshotState.PREPARING: {SnapshotState.RUNNING, SnapshotState.ENDING, SnapshotState.SETTLING},
    SnapshotState.RUNNING: {SnapshotState.ENDING, SnapshotState.SETTLING},
    SnapshotState.ENDING: {SnapshotState.SETTLING},
    SnapshotState.SETTLING: {
        SnapshotState.DONE,
        SnapshotState.FAILED,
        SnapshotState.CANCELLED,
        SnapshotState.OVERRUN,
    },
    SnapshotState.DONE: set(),
    SnapshotState.FAILED: set(),
    SnapshotState.CANCELLED: set(),
    SnapshotState.OVERRUN: set(),
}


def lock_timeout(timeout_s: float | None) -> float | None:
    """Return *timeout_s* as waiting takes it: for what is longer than a lock can wait, None, which is for ever."""
    return None if timeout_s is None or timeout_s > threading.TIMEOUT_MAX else timeout_s


def _log_failure(future: Future[SnapshotResult]) -> None:
    error = future.exception()
    if error is not None and not isinstance(error, SnapshotCancelledError):
        _log.warning("nobody asked how this ended: %s", error)


def _final_state(error: BaseException) -> SnapshotState:
    match error:
        case SnapshotCancelledError():
            return SnapshotState.CANCELLED
        case SnapshotOverrunError():
            return SnapshotState.OVERRUN
    return SnapshotState.FAILED


class SnapshotRun:
    """The engine's half of a job: its state, what it reports, and its outcome, once.

    An engine calls begin() when the image is being written, report_progress() and report_copies() as it goes, end()
    where a bound is passed, then seal(), then resolve() or reject(). All of it on one thread of its own; cancel() may
    come from anywhere, a signal handler included.

    Attributes:
        path: The path as given.
        state: Where it is in its life.
        progress: The last report, or None.
        copy_bytes: The last count of private copies.
        peak_copy_bytes: The largest, or None before the first.
        future: The outcome.
        pid: The process that the run belongs to.
    """

    def __init__(
        self,
        path: StrPath,
        *,
        wake: Callable[[], None],
        on_progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Begin a run, in PREPARING.

        Args:
            path: Where the image goes.
            wake: Tells the engine that its owner has ended the run. Called under a lock and never after seal(), by any
                thread, maybe more than once; must not block.
            on_progress: The owner's callback, called on the engine's thread.
        """
        self.path = path
        self.state = SnapshotState.PREPARING
        self.progress: SnapshotProgress | None = None
        self.copy_bytes = 0
        self.peak_copy_bytes: int | None = None
        self.future: Future[SnapshotResult] = Future()
        self.future.set_running_or_notify_cancel()  # asyncio's cancellation of one waiter must not cancel the job
        self.pid = os.getpid()
        self._wake = wake
        self._on_progress = on_progress
        self._reporting_thread: int | None = None
        self._verdict: SnapshotFailedError | None = None  # why it was ended
        self._lock = threading.RLock()  # guards state and _verdict; re-entered when a signal handler cancels

    def begin(self) -> None:
        """Enter RUNNING, unless it was ended before it began."""
        with self._lock:
            if self.state is SnapshotState.PREPARING:
                self._enter(SnapshotState.RUNNING)

    def end(self, verdict: SnapshotFailedError) -> None:
        """Enter ENDING: *verdict* will be the outcome, unless another one came first or the run is sealed."""
        with self._lock:
            if self.state in (SnapshotState.PREPARING, SnapshotState.RUNNING):
                self._verdict = verdict
                self._enter(SnapshotState.ENDING)

    def cancel(self) -> bool:
        """Ask for the end; True means that the outcome will be SnapshotCancelledError."""
        if self.pid != os.getpid():
            return False  # nobody may be left to release the lock, and the engine is the parent's
        path = os.fsdecode(self.path)
        with self._lock:
            self.end(SnapshotCancelledError(f"the snapshot of {path} was cancelled; the file there is as it was"))
            if self.state is not SnapshotState.ENDING or not isinstance(self._verdict, SnapshotCancelledError):
                return False
            self._wake()
            return True

    def seal(self) -> SnapshotFailedError | None:
        """Enter SETTLING: nothing can end it any more. Returns why it was ended before, if it was."""
        with self._lock:
            if self.state is not SnapshotState.SETTLING:
                self._enter(SnapshotState.SETTLING)
            return self._verdict

    def resolve(self, result: SnapshotResult) -> None:
        """End the run with an image; it is sealed."""
        assert self._verdict is None
        self._enter(SnapshotState.DONE)
        self.future.set_result(result)

    def reject(self, error: BaseException) -> None:
        """End the run without one; it is sealed."""
        self._enter(_final_state(error))
        self.future.set_exception(error)

    def _enter(self, state: SnapshotState) -> None:
        # A handler that cancels while cancel() is here has done the same already.
        assert state in _NEXT[self.state] or state is self.state is SnapshotState.ENDING, (self.state, state)
        self.state = state

    def report_progress(self, done: int, total: int) -> None:
        """Publish progress. A callback that fails, or exits, is logged: a display must not cost the image."""
        self.progress = SnapshotProgress(done, total)
        if self._on_progress is None:
            return
        self._reporting_thread = threading.get_ident()
        try:
            self._on_progress(done, total)
        except BaseException:
            _log.exception("on_progress of the snapshot of %s failed", os.fsdecode(self.path))
        finally:
            self._reporting_thread = None

    def check_can_wait(self) -> None:
        """Refuse a wait that could never end.

        Raises:
            RuntimeError: A forked child, where the job's thread does not exist, or on_progress, which keeps it busy.
        """
        if self.pid != os.getpid():
            raise RuntimeError(f"this snapshot belongs to process {self.pid}: a forked child cannot wait for it")
        if self._reporting_thread == threading.get_ident():
            raise RuntimeError("on_progress runs on the job's own thread: it cannot wait for the job")

    def abandon(self) -> None:
        """Nobody will ask for the outcome: a failure is logged, now or when it comes."""
        if self.pid == os.getpid():  # in a forked child nobody may be left to release the future's lock
            self.future.add_done_callback(_log_failure)

    def report_copies(self, copy_bytes: int) -> None:
        """Publish a measurement of private copies, in bytes."""
        self.copy_bytes = copy_bytes
        self.peak_copy_bytes = max(copy_bytes, self.peak_copy_bytes or 0)


class SnapshotJob:
    """A snapshot under way, whichever engine takes it. Thread-safe.

    ``job.wait()`` and ``await job`` give the SnapshotResult or raise what ended it, as often as they are asked; a job
    that nobody waits for finishes all the same, and its failure is logged. Cancelling a task that awaits it leaves it
    running.
    """

    __slots__ = ("__weakref__", "_run", "_was_told")

    def __init__(self, run: SnapshotRun) -> None:
        self._run = run
        self._was_told = False  # somebody got the outcome, or will

    @property
    def path(self) -> StrPath:
        """Where the image goes, as given."""
        return self._run.path

    @property
    def state(self) -> SnapshotState:
        """Where it is in its life; SETTLING until wait() would return."""
        return self._run.state

    @property
    def progress(self) -> SnapshotProgress | None:
        """The writer's last report, or None before the first."""
        return self._run.progress

    @property
    def copy_bytes(self) -> int:
        """Extra memory that private copies took when last measured."""
        return self._run.copy_bytes

    @property
    def peak_copy_bytes(self) -> int:
        """The most that copy_bytes was."""
        return self._run.peak_copy_bytes or 0

    def done(self) -> bool:
        """Whether wait() would return, or raise, at once."""
        return self._run.future.done()

    def cancel(self) -> bool:
        """End the snapshot; the old file stays. Returns at once.

        Returns:
            True when wait() will raise SnapshotCancelledError; False when it is too late, because the image is
            complete and being put in place, or the job has ended or is being ended for another reason; in a forked
            child too, whose parent's job it is.
        """
        return self._run.cancel()

    def wait(self, timeout_s: float | None = None) -> SnapshotResult:
        """Wait for the end and return the result.

        Args:
            timeout_s: Seconds to wait at most; None waits for ever.

        Raises:
            TimeoutError: It is still running, and goes on.
            SnapshotFailedError: It ended without an image; SnapshotCancelledError, SnapshotOverrunError and
                OOMKilledError say of what.
        """
        self._run.check_can_wait()
        try:
            return self._run.future.result(lock_timeout(timeout_s))
        except TimeoutError:
            if self.done():
                raise
            path = os.fsdecode(self.path)
            raise TimeoutError(f"the snapshot of {path} is still running after {timeout_s} s; it goes on") from None
        finally:
            self._was_told |= self.done()

    def add_done_callback(self, callback: Callable[[SnapshotJob], object]) -> None:
        """Call *callback* with this job when it has ended: on the job's thread, or here if it has ended already."""
        self._was_told = True
        self._run.future.add_done_callback(lambda _: callback(self))

    def __await__(self) -> Generator[Any, None, SnapshotResult]:
        import asyncio

        self._run.check_can_wait()
        try:
            return (yield from asyncio.wrap_future(self._run.future).__await__())
        finally:
            self._was_told |= self.done()

    def __del__(self) -> None:
        if not self._was_told:
            self._run.abandon()

    def __repr__(self) -> str:
        return f"<SnapshotJob of {os.fsdecode(self.path)!r}, {self.state.value}>"
