"""What every snapshot engine shares: the job that its owner holds, the run that the engine drives, and the result."""

from __future__ import annotations

import enum
import logging
import os
import threading
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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


class _Phase(enum.Enum):
    RUNNING = enum.auto()
    CANCELLING = enum.auto()
    SEALED = enum.auto()  # past cancelling: the outcome is being settled


class SnapshotRun:
    """The engine's half of a job: reports come in here, and the outcome, once.

    An engine calls report_progress() and report_copies() as it goes, then seal(), then resolve() or reject(). All of it
    on one thread of its own; cancel() may come from anywhere, a signal handler included.

    Attributes:
        path: The path as given.
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
        """Begin a run.

        Args:
            path: Where the image goes.
            wake: Tells the engine to look at ``cancelling``; called at most once, must not block.
            on_progress: The owner's callback, called on the engine's thread.
        """
        self.path = path
        self.progress: SnapshotProgress | None = None
        self.copy_bytes = 0
        self.peak_copy_bytes: int | None = None
        self.future: Future[SnapshotResult] = Future()
        self.future.set_running_or_notify_cancel()  # asyncio's cancellation of one waiter must not cancel the job
        self.pid = os.getpid()
        self._wake = wake
        self._on_progress = on_progress
        self._reporting_thread: int | None = None
        self._phase = _Phase.RUNNING
        self._lock = threading.RLock()  # guards _phase; re-entered when a signal handler cancels

    @property
    def cancelling(self) -> bool:
        """Whether the owner wants it ended, and nothing has settled it yet."""
        return self._phase is _Phase.CANCELLING

    def cancel(self) -> bool:
        """Ask for the end; True means that the outcome will be SnapshotCancelledError."""
        with self._lock:
            if self._phase is _Phase.RUNNING:
                self._phase = _Phase.CANCELLING
                self._wake()
            return self._phase is _Phase.CANCELLING

    def seal(self) -> bool:
        """Close the run to cancel() and return whether it was cancelled before; `wake` is not called after this."""
        with self._lock:
            cancelled = self._phase is _Phase.CANCELLING
            self._phase = _Phase.SEALED
            return cancelled

    def report_progress(self, done: int, total: int) -> None:
        """Publish progress. A callback that fails is logged: a display must not cost the image."""
        self.progress = SnapshotProgress(done, total)
        if self._on_progress is None:
            return
        self._reporting_thread = threading.get_ident()
        try:
            self._on_progress(done, total)
        except Exception:
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

    def report_copies(self, copy_bytes: int) -> None:
        """Publish a measurement of private copies, in bytes."""
        self.copy_bytes = copy_bytes
        self.peak_copy_bytes = max(copy_bytes, self.peak_copy_bytes or 0)

    def resolve(self, result: SnapshotResult) -> None:
        """End the run with an image."""
        self.future.set_result(result)

    def reject(self, error: BaseException) -> None:
        """End the run without one."""
        self.future.set_exception(error)


class SnapshotJob:
    """A snapshot under way, whichever engine takes it. Thread-safe.

    ``job.wait()`` and ``await job`` give the SnapshotResult or raise what ended it, as often as they are asked; a job
    that nobody waits for finishes all the same. Cancelling a task that awaits it leaves it running.
    """

    __slots__ = ("_run",)

    def __init__(self, run: SnapshotRun) -> None:
        self._run = run

    @property
    def path(self) -> StrPath:
        """Where the image goes, as given."""
        return self._run.path

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
            complete and being put in place, or the job has ended.
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
            return self._run.future.result(timeout_s)
        except TimeoutError:
            if self.done():
                raise
            path = os.fsdecode(self.path)
            raise TimeoutError(f"the snapshot of {path} is still running after {timeout_s} s; it goes on") from None

    def add_done_callback(self, callback: Callable[[SnapshotJob], object]) -> None:
        """Call *callback* with this job when it has ended: on the job's thread, or here if it has ended already."""
        self._run.future.add_done_callback(lambda _: callback(self))

    def __await__(self) -> Generator[Any, None, SnapshotResult]:
        import asyncio

        self._run.check_can_wait()
        return asyncio.wrap_future(self._run.future).__await__()

    def __repr__(self) -> str:
        state = "done" if self.done() else "running"
        return f"<SnapshotJob of {os.fsdecode(self.path)!r}, {state}>"
