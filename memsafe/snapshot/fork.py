"""Snapshots by fork, as Redis's BGSAVE takes them: assessed before, bounded while they run, and never at the price of
the parent.

The caller's thread forks. A thread of the job's own, started before, watches the child by its pidfd, hears its reports,
measures its private copies, and puts the finished file in place: a child that outlives its parent can never replace
newer data.
"""

from __future__ import annotations

import atexit
import errno
import math
import os
import select
import signal
import struct
import sys
import threading
import time
from array import array
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from memsafe import _native
from memsafe._kernel import cgroup, process
from memsafe._kernel.files import is_missing
from memsafe.commit import assess_fork
from memsafe.errors import (
    KernelError,
    OOMKilledError,
    SnapshotCancelledError,
    SnapshotFailedError,
    SnapshotInProgressError,
    SnapshotOverrunError,
    SnapshotRefusedError,
)
from memsafe.sizes import format_size, parse_size
from memsafe.snapshot.atomic import AtomicFile
from memsafe.snapshot.child import SnapshotChild
from memsafe.snapshot.job import SnapshotJob, SnapshotResult, SnapshotRun
from memsafe.snapshot.reports import Done, Progress, Raised, ReportReader
from memsafe.status import memory_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from memsafe._kernel.files import Root
    from memsafe.sizes import Size
    from memsafe.snapshot.atomic import StrPath
    from memsafe.snapshot.writer import SnapshotWriter

    class HasFileno(Protocol):
        """A file, a socket."""

        def fileno(self) -> int:
            """Return the descriptor."""


METHOD = "fork"

_HANDOVER = struct.Struct("=qqq")  # pid, pidfd, pause_ns: struct handover of fork_py.c

# The OOM killer compares resident pages + oom_score_adj/1000 of all the memory there is (oom_badness, mm/oom_kill.c).
# Right after the fork both count the same pages, then the parent may grow: by less than all there is. So a difference
# of 1000 decides for the child whatever happens, and it is asked for relative to the parent.
_OOM_SCORE_ADJ_ABOVE = 1000
_OOM_SCORE_ADJ_MAX = 1000

# Reading smaps_rollup holds the child's page tables; reading it all the time made saves ten times slower.
_MEASURE_DUTY = 100
_MEASURE_EVERY_S_MIN = 0.01

# The child is ended before the last bytes are gone, as a share of the limit, or of what there was when it began.
_RESERVE_SHARE_OF_LIMIT = 64
_RESERVE_SHARE_OF_START = 4

_EXIT_WAIT_S = 10.0


def fork_snapshot(
    path: StrPath,
    write: Callable[[SnapshotWriter], object],
    *,
    max_copy: Size | None = None,
    on_progress: Callable[[int, int], object] | None = None,
    timeout_s: float | None = None,
    keep_fds: Iterable[int | HasFileno] = (),
    root: Root = "/",
) -> SnapshotJob:
    """Begin a point-in-time image of this process, written by a forked child, and return while it is written.

    The child calls ``write(out)`` with the memory as it is now. When it has returned and the file is synced, the
    file replaces the one at *path*, in one step; until then, and whenever anything fails, the old one stays.

    What is safe in *write*: reading what this thread may read now, and writing to *out*. Only this thread exists in
    the child, so a lock that another thread holds now is held for ever: take the locks that guard the state *before*
    the call (an RLock may be taken again in *write*), and use no queue.Queue, no file object and no library with locks
    of its own that other threads use. logging is safe to call (CPython renews its locks), its handlers' streams are not.
    Inherited sockets are closed but for *keep_fds* and 0 to 2; pipes and files are shared with the parent, offsets
    included. print() goes to a copy of the parent's buffer and is lost; flushing it would write the parent's pending
    output twice. No atexit function runs and nothing is finalized. Reading Python objects writes their reference
    counts, and so copies their pages; memory outside of the heap (mmap, arrays) is not copied by reading.

    SIGINT is ignored in the child, other handlers are reset, the OOM killer prefers it to this process, and it ends
    with this process. An interpreter that exits ends a running snapshot; wait for it first if you want it.

    Args:
        path: The file to replace. A symbolic link is followed.
        write: Called in the child. It must return, not exit.
        max_copy: Bound on the bytes of memory that both processes copy by writing; passing it ends the child. Without
            it, the child is ended when the memory left to this process is nearly gone.
        on_progress: Called as ``on_progress(done, total)`` in this process, on the job's thread, for what *write*
            reports by ``out.progress``. While it runs nothing is measured: be quick.
        timeout_s: Seconds after which the child is ended.
        keep_fds: Sockets that *write* needs; descriptors, or objects with fileno().
        root: The directory that stands for "/" in the assessment and the reading of limits.

    Raises:
        SnapshotRefusedError: It would not be safe; the assessment says why. Nothing was done.
        SnapshotInProgressError: This process has one running already.
        KernelError: fork failed.
        OSError: No file can be made at *path*, or descriptors have run out.
        ValueError: *max_copy* or *timeout_s* makes no sense.
    """
    if not callable(write):
        raise TypeError(f"write must be callable, not {type(write).__name__}")
    max_copy_bytes = None if max_copy is None else parse_size(max_copy, what="max_copy")
    if timeout_s is not None and not timeout_s > 0:
        raise ValueError(f"timeout_s must be positive, or None for no limit: {timeout_s!r}")
    kept = array("i", [fd if isinstance(fd, int) else fd.fileno() for fd in keep_fds])
    forecast = _slot.claim(path)
    try:
        assessment = assess_fork(
            dirty_bytes_per_s=forecast.dirty_bytes_per_s,
            duration_s=forecast.duration_s,
            max_copy_bytes=max_copy_bytes,
            root=root,
        )
        if assessment.decision != "admit":
            reasons = "; ".join(assessment.reasons)
            raise SnapshotRefusedError(
                f"the snapshot of {os.fsdecode(path)} was not begun ({assessment.decision}): {reasons}", assessment
            )
        sys.audit("os.fork")
        supervisor = _Supervisor(path, _Bounds(max_copy_bytes, timeout_s, root), on_progress)
    except BaseException:
        _slot.release()
        raise
    supervisor.fork(write, kept)
    return supervisor.job


@dataclass(frozen=True, slots=True)
class _Forecast:
    """What the last snapshot says of the next; None where there was none."""

    dirty_bytes_per_s: float | None = None
    duration_s: float | None = None


class _Slot:
    """One fork snapshot at a time in a process; what the last one measured stays for the next one's forecast."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the rest
        self._path: StrPath | None = None
        self._run: SnapshotRun | None = None
        self._forecast = _Forecast()
        self._hooked = False

    def claim(self, path: StrPath) -> _Forecast:
        with self._lock:
            if self._path is not None:
                running, asked = os.fsdecode(self._path), os.fsdecode(path)
                raise SnapshotInProgressError(
                    f"a snapshot of {asked} was asked for, but one of {running} is still running: wait for it, or "
                    "cancel it; one fork snapshot at a time in a process"
                )
            self._path = path
            if not self._hooked:
                atexit.register(self.end_at_exit)
                os.register_at_fork(after_in_child=self.forget)
                self._hooked = True
            return self._forecast

    def attach(self, run: SnapshotRun) -> None:
        self._run = run

    def release(self, forecast: _Forecast | None = None) -> None:
        with self._lock:
            self._path = self._run = None
            self._forecast = forecast or self._forecast

    def forget(self) -> None:
        """In a forked child: the parent's snapshot is none of its business, and the lock's holder may not exist."""
        self._lock = threading.Lock()
        self._path = self._run = None

    def end_at_exit(self) -> None:
        """The job's thread is a daemon: without this it could be stopped between naming the new file and renaming it."""
        run = self._run
        if run is not None and run.pid == os.getpid():
            run.cancel()
            with suppress(Exception):
                run.future.exception(_EXIT_WAIT_S)


_slot = _Slot()


@dataclass(frozen=True, slots=True)
class _Bounds:
    """What ends a child that would otherwise go on."""

    max_copy_bytes: int | None
    timeout_s: float | None
    root: Root


class _Supervisor:
    """The life of one child, from before its fork until its file is in place. Runs on a thread of its own."""

    def __init__(
        self, path: StrPath, bounds: _Bounds, on_progress: Callable[[int, int], object] | None
    ) -> None:
        """Get all that can be refused, the thread included: after the fork nothing may fail."""
        self._bounds = bounds
        self._reports_done: Done | None = None
        self._raised: Raised | None = None
        self._verdict: SnapshotFailedError | None = None  # why we ended it
        self._warnings: list[str] = []
        self._handover = bytearray(_HANDOVER.size)
        self._began_s = time.monotonic()
        self._pid = 0
        self._pidfd = -1
        with ExitStack() as stack:
            self._file = stack.enter_context(AtomicFile(path))
            self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(os.close, self._wake_fd)
            self._own_pidfd = _pidfd_of_self()
            stack.callback(os.close, self._own_pidfd)
            self._report_fd, self._report_write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            stack.callback(os.close, self._report_fd)
            self._close_write_end = stack.enter_context(ExitStack())
            self._close_write_end.callback(os.close, self._report_write_fd)
            self._reader = ReportReader(self._report_fd)
            self._meter = _Meter(bounds.root)
            self._oom_kills_before = _oom_kills(bounds.root)
            self._run = SnapshotRun(path, wake=self._wake, on_progress=on_progress)
            self.job = SnapshotJob(self._run)
            self._thread = threading.Thread(target=self._main, name="memsafe-snapshot", daemon=True)
            self._resources = stack.pop_all()
        try:
            self._thread.start()
        except BaseException:
            self._resources.close()
            raise

    # The caller's thread.

    def fork(self, write: Callable[[SnapshotWriter], object], keep_fds: array[int]) -> None:
        """Fork; the thread takes over from inside the call, so that an exception here can lose nothing."""
        child = SnapshotChild(write, self._file.fd, self._report_write_fd)
        _slot.attach(self._run)
        self._began_s = time.monotonic()
        try:
            _native.fork(
                child,
                self._handover,
                self._wake_fd,
                self._own_pidfd,
                self._report_write_fd,
                self._report_fd,
                _child_oom_score_adj(),
                keep_fds,
            )
        except BaseException as error:
            if self._was_forked():
                self._run.cancel()  # a KeyboardInterrupt on the way out: nobody will hold the job
                raise
            self._wake()
            self._thread.join()
            if isinstance(error, OSError):
                raise KernelError(error.errno or errno.EAGAIN, "fork", "no child was made, nothing was changed") from None
            raise

    def _was_forked(self) -> bool:
        return any(self._handover)

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    # The job's thread.

    def _main(self) -> None:
        result: SnapshotResult | None = None
        error: BaseException | None = None
        self._wait_for_fork()
        with self._resources:
            if self._was_forked():
                try:
                    result = self._supervise()
                except BaseException as failure:
                    error = failure
                    self._kill()
                    self._reap()
                    self._run.seal()
        _slot.release(self._measured())
        if result is not None:
            self._run.resolve(result)
        elif error is not None:
            self._run.reject(error)

    def _wait_for_fork(self) -> None:
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        poller.poll()

    def _supervise(self) -> SnapshotResult:
        self._pid, self._pidfd, pause_ns = _HANDOVER.unpack(self._handover)
        if self._pidfd >= 0:
            self._resources.callback(os.close, self._pidfd)
        self._close_write_end.close()  # so that the pipe ends with the child
        self._watch()
        status = self._reap()
        cancelled = self._run.seal()
        path = os.fsdecode(self._run.path)
        if cancelled:
            raise SnapshotCancelledError(f"the snapshot of {path} was cancelled; the file there is as it was")
        error = self._verdict or self._failure(status)
        if error is not None:
            raise error
        try:
            size_bytes = self._file.commit()
        except OSError as cause:
            raise SnapshotFailedError(f"the image is complete, but could not be put at {path}: {cause}") from cause
        return SnapshotResult(
            path=self._run.path,
            size_bytes=size_bytes,
            pause_s=pause_ns / 1e9,
            duration_s=time.monotonic() - self._began_s,
            peak_copy_bytes=self._run.peak_copy_bytes,
            method=METHOD,
            warnings=tuple(self._warnings),
        )

    def _watch(self) -> None:
        """Return when the child has ended and all that it said is heard."""
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        poller.register(self._report_fd, select.POLLIN)
        if self._pidfd >= 0:
            poller.register(self._pidfd, select.POLLIN)
        ended = self._pidfd < 0
        while not ended:
            ready = {fd for fd, _ in poller.poll(self._patience_ms())}
            ended = self._pidfd in ready
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            if self._report_fd in ready:
                self._hear()
                if self._reader.at_end:
                    poller.unregister(self._report_fd)
            if not ended and self._verdict is None:
                self._enforce()
        self._hear()

    def _patience_ms(self) -> int | None:
        if self._verdict is not None or self._run.cancelling:
            return None
        wake_at_s = self._meter.next_at_s
        if self._bounds.timeout_s is not None:
            wake_at_s = min(wake_at_s, self._began_s + self._bounds.timeout_s)
        if wake_at_s == math.inf:
            return None
        return min(max(0, math.ceil((wake_at_s - time.monotonic()) * 1000)), 2**31 - 1)

    def _hear(self) -> None:
        for report in self._reader.read():
            match report:
                case Progress(done, total):
                    self._run.report_progress(done, total)
                case Raised():
                    self._raised = report
                case Done(copy_bytes, warnings):
                    self._reports_done = report
                    self._warnings += warnings
                    if copy_bytes is not None:
                        self._count_copies(copy_bytes)

    def _enforce(self) -> None:
        """End a child that was cancelled, takes too long, or copies too much."""
        if self._run.cancelling:
            self._kill()
            return
        now_s = time.monotonic()
        timeout_s = self._bounds.timeout_s
        if timeout_s is not None and now_s >= self._began_s + timeout_s:
            self._end(SnapshotFailedError(self._ended(f"it was still running after {timeout_s} s")))
        elif now_s >= self._meter.next_at_s and self._reports_done is None:
            self._measure()

    def _measure(self) -> None:
        try:
            copy_bytes = self._meter.copy_bytes(self._pid)
        except KernelError as error:
            if self._has_ended() or is_missing(error):
                return
            self._meter.stop()
            self._warnings.append(f"copies could not be measured: {error}")
            if self._bounds.max_copy_bytes is not None:
                self._end(SnapshotFailedError(self._ended(f"max_copy cannot be kept: {error}")))
            return
        if self._has_ended():
            return  # where somebody else reaps, the number may be another process's by now
        self._count_copies(copy_bytes)
        short = None if self._verdict else self._meter.headroom_short()
        if short is not None:
            self._overrun(f"{short}, after {format_size(copy_bytes)} of copies", copy_bytes)

    def _count_copies(self, copy_bytes: int) -> None:
        self._run.report_copies(copy_bytes)
        max_copy_bytes = self._bounds.max_copy_bytes
        # Also when the image is complete: otherwise chance would decide, by the instant of the last measurement.
        if max_copy_bytes is not None and copy_bytes > max_copy_bytes:
            copied, bound = format_size(copy_bytes), format_size(max_copy_bytes)
            self._overrun(f"{copied} were copied, more than max_copy allows ({bound})", copy_bytes)

    def _overrun(self, what: str, copy_bytes: int) -> None:
        error = SnapshotOverrunError(
            self._ended(what), copy_bytes=copy_bytes, max_copy_bytes=self._bounds.max_copy_bytes
        )
        self._end(error)

    def _ended(self, what: str) -> str:
        return f"the snapshot of {os.fsdecode(self._run.path)} was ended, the file there is as it was: {what}"

    def _end(self, verdict: SnapshotFailedError) -> None:
        if self._verdict is None:
            self._verdict = verdict
        self._kill()

    def _kill(self) -> None:
        if self._pidfd >= 0:
            with suppress(OSError):  # it ended by itself
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _has_ended(self) -> bool:
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return bool(poller.poll(0))

    def _reap(self) -> os.waitid_result | None:
        """Return how the child ended, or None where SIGCHLD is ignored or somebody else has waited for it."""
        if self._pidfd < 0:
            return None
        try:
            return os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        except ChildProcessError:
            return None

    def _failure(self, status: os.waitid_result | None) -> SnapshotFailedError | None:
        """Return why there is no image; None when there is one: the child said so, and nothing speaks against it."""
        path = os.fsdecode(self._run.path)
        failed = f"the snapshot of {path} failed, the file there is as it was:"
        if self._raised is not None:
            raised = self._raised
            return SnapshotFailedError(
                f"{failed} write raised {raised.type}: {raised.message}\n\nIn the child:\n{raised.traceback}",
                child_type=raised.type,
                child_message=raised.message,
                child_traceback=raised.traceback,
            )
        exited = status is None or status.si_code == os.CLD_EXITED
        if self._reports_done is not None and exited and (status is None or status.si_status == 0):
            return None
        if status is None or (not exited and status.si_status == signal.SIGKILL):
            killers = _risen(self._oom_kills_before, _oom_kills(self._bounds.root))
            if killers:
                return OOMKilledError(
                    f"{failed} the kernel's OOM killer ended the child (oom_kill of {killers} rose); copies when last "
                    f"measured: {format_size(self._run.copy_bytes)}. Give the group more memory, or pass max_copy"
                )
        return SnapshotFailedError(f"{failed} {_how_it_ended(status)}")

    def _measured(self) -> _Forecast | None:
        """Return what the next forecast should know. Where it was cut short, the rate is known but not the duration."""
        peak_bytes = self._run.peak_copy_bytes
        duration_s = time.monotonic() - self._began_s
        if peak_bytes is None or duration_s <= 0:
            return None
        complete = self._reports_done is not None
        return _Forecast(peak_bytes / duration_s, duration_s if complete else None)


class _Meter:
    """When to measure, and what: private copies of the child, and what memory is left to this process."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self.next_at_s = time.monotonic() + _MEASURE_EVERY_S_MIN
        self._reserves = {
            (kind, path): min(limit // _RESERVE_SHARE_OF_LIMIT, headroom // _RESERVE_SHARE_OF_START)
            for kind, path, limit, headroom in self._headrooms()
        }

    def stop(self) -> None:
        """Measure no more."""
        self.next_at_s = math.inf

    def copy_bytes(self, pid: int) -> int:
        """Return the child's private dirty memory, which is what either side has copied, and plan the next reading.

        A page that either process writes is copied, and each has its own from then on: the child's share of the split
        pages is the number of copies. The cost is counted in processor time: waiting for the GIL is nobody's burden.

        Raises:
            KernelError: It cannot be read.
        """
        began_s = time.thread_time()
        try:
            return process.smaps_rollup(pid).private_dirty_bytes
        finally:
            cost_s = time.thread_time() - began_s
            self.next_at_s = time.monotonic() + max(_MEASURE_EVERY_S_MIN, _MEASURE_DUTY * cost_s)

    def headroom_short(self) -> str | None:
        """Return a sentence when what kills or throttles this process is nearly met, and plan the next look."""
        began_s = time.thread_time()
        short = None
        for kind, path, limit, headroom in self._headrooms():
            reserve = self._reserves.get((kind, path), limit // _RESERVE_SHARE_OF_LIMIT)
            if headroom < reserve:
                where = f"{kind} of {path}" if path else kind
                short = f"only {format_size(headroom)} are left below {where} ({format_size(limit)})"
                break
        self.next_at_s += _MEASURE_DUTY * (time.thread_time() - began_s)
        return short

    def _headrooms(self) -> list[tuple[str, str | None, int, int]]:
        """Return (kind, path, limit, headroom) of what copies count against: a child's are no rlimit's of the parent."""
        return [
            # File cache in use is given back too before anybody is killed.
            (c.kind, c.path, c.limit_bytes, c.headroom_bytes + c.active_file_bytes)
            for c in memory_status(root=self._root).constraints
            if c.consequence != "refuse" and c.headroom_bytes is not None
        ]


def _child_oom_score_adj() -> int:
    try:
        own = process.oom_score_adj()
    except KernelError:
        own = None
    return min((own or 0) + _OOM_SCORE_ADJ_ABOVE, _OOM_SCORE_ADJ_MAX)


def _pidfd_of_self() -> int:
    try:
        return os.pidfd_open(os.getpid())
    except OSError as error:
        raise KernelError(error.errno, "pidfd_open", "fork_snapshot needs it to tie the child to its parent") from None


def _oom_kills(root: Root) -> dict[str, int]:
    """Return the OOM killer's count in each memory cgroup of this process that tells it."""
    kills = {}
    with suppress(KernelError):
        for group in cgroup.memory_cgroups(root):
            with suppress(KernelError):
                count = group.oom_kills()
                if count is not None:
                    kills[group.path] = count
    return kills


def _risen(before: dict[str, int], after: dict[str, int]) -> str:
    return ", ".join(path for path, count in after.items() if count > before.get(path, count))


def _how_it_ended(status: os.waitid_result | None) -> str:
    if status is None:
        return "the child ended without a word, and something else in this process took its exit status"
    if status.si_code == os.CLD_EXITED:
        return f"the child exited with status {status.si_status} before the image was complete (os._exit in write?)"
    with suppress(ValueError):
        return f"the child was ended by {signal.Signals(status.si_status).name}"
    return f"the child was ended by signal {status.si_status}"
