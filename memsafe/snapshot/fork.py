"""Snapshots by fork, as Redis's BGSAVE takes them: assessed before, bounded while they run, and never at the price of
the parent.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import threading
import time
from array import array
from contextlib import suppress
from dataclasses import replace
from operator import index
from typing import TYPE_CHECKING, Literal, Protocol

from memsafe.commit import assess
from memsafe.errors import SnapshotInProgressError, SnapshotRefusedError
from memsafe.forecast import LastSnapshot, observations
from memsafe.pressure.monitor import critical_event
from memsafe.sizes import parse_size
from memsafe.snapshot.child import ChildOptions
from memsafe.snapshot.job import SnapshotJob
from memsafe.snapshot.supervisor import Bounds, Supervisor
from memsafe.snapshot.writer import WriterOptions, check_request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from memsafe._kernel.files import Root
    from memsafe.commit import Decision, ForkAssessment
    from memsafe.pressure.levels import PressureEvent
    from memsafe.sizes import Size
    from memsafe.snapshot.atomic import StrPath
    from memsafe.snapshot.writer import ChecksumName, SnapshotWriter, Zstd

    class HasFileno(Protocol):
        """A file, a socket."""

        def fileno(self) -> int:
            """Return the descriptor."""


_FD_MAX = 2**31 - 1

EXIT_WAIT_S = 10.0
"""For how long an interpreter that exits waits for what is being ended, at most."""


def fork_snapshot(
    path: StrPath,
    write: Callable[[SnapshotWriter], object],
    *,
    max_copy: Size | None = None,
    on_progress: Callable[[int, int], object] | None = None,
    timeout_s: float | None = None,
    keep_fds: Iterable[int | HasFileno] = (),
    nice: int = 0,
    idle_io: bool = False,
    end_at_critical: bool = True,
    checksum: ChecksumName | None = None,
    compress: Literal["zstd"] | Zstd | None = None,
    max_bytes_per_s: Size | None = None,
    root: Root = "/",
) -> SnapshotJob:
    """Begin a point-in-time image of this process, written by a forked child, and return while it is written.

    The child calls ``write(out)`` with the memory as it is now. When it has returned and the file is synced, the
    file replaces the one at *path*, in one step; until then, and whenever anything fails, the old one stays.

    What is safe in *write*: reading what this thread may read now, and writing to *out*. Only this thread exists in
    the child, so a lock that another thread holds now is held for ever: take the locks that guard the state *before*
    the call (an RLock may be taken again in *write*), and use no queue.Queue, no file object and no library with locks
    of its own that other threads use. Imports, logging, malloc and memsafe are safe; docs/snapshots.md goes through
    the rest. With *timeout_s*, a *write* that waits for ever is reported with the stack on which it does.

    Inherited sockets and pipes are closed but for *keep_fds* and 0 to 2; files are shared with the parent, offsets
    included. print() goes to a copy of the parent's buffer and is lost, unless stdout is a terminal or unbuffered;
    flushing it would write the parent's pending output twice. No atexit function runs and nothing is finalized. Reading
    Python objects writes their reference counts, and so copies their pages; memory outside of the heap (mmap, arrays)
    is not copied by reading.

    SIGINT is ignored in the child, other handlers are reset, the OOM killer prefers it to this process, and it ends
    with this process. In ps it is called memsafe-snap. An interpreter that exits ends a running snapshot; wait for it
    first if you want it.

    Args:
        path: The file to replace. A symbolic link is followed.
        write: Called in the child. It must return when all is written, not exit. One that returns an awaitable or a
            generator has written nothing yet, and so has failed.
        max_copy: Bound on the bytes of memory that both processes copy by writing; passing it ends the child. The
            child's interpreter needs 2 to 4 MiB of it. With or without a bound, the child is ended when the memory
            left to this process is nearly gone. A bound may be passed by what is written between two measurements, the
            further the more memory is mapped: docs/snapshots.md says by how much, and what measuring takes.
        on_progress: Called as ``on_progress(done, total)`` in this process, on the job's thread, for what *write*
            reports by ``out.progress``. While it runs nothing is measured: be quick.
        timeout_s: Seconds after which the child is ended.
        keep_fds: Sockets and pipes that *write* needs; descriptors, or objects with fileno(). One that is not open
            means nothing.
        nice: Added to this process's niceness in the child: 1 to 19 leave the processor to others, below 0 needs
            CAP_SYS_NICE. A refusal is in the result's warnings.
        idle_io: Whether the disk is to serve the child only when nobody else wants it (ioprio_set(2)); only some I/O
            schedulers listen. A refusal is in the result's warnings. Either makes the snapshot take longer, and so
            copy more.
        end_at_critical: End the child when a PressureMonitor of this process goes to CRITICAL, in a drill too, and
            do not begin while one is there.
        checksum: ``"crc32"`` or ``"sha256"`` of the file, for the result. *write* cannot seek then.
        compress: ``"zstd"``, or a memsafe.snapshot.Zstd for its level and threads. *write* cannot seek then.
        max_bytes_per_s: How fast the file is written at most, after compression.
        root: The directory that stands for "/" in the assessment and the reading of limits.

    Raises:
        SnapshotRefusedError: It would not be safe; the assessment says why. Nothing was done.
        SnapshotInProgressError: This process has one running already.
        KernelError: fork failed.
        OSError: No file can be made at *path*, or descriptors have run out.
        RuntimeError: The interpreter is exiting, and the call is in a thread that ends with it; or in any thread, where
            the interpreter starts none any more. Or it is a subinterpreter, which has no daemon threads.
        TypeError: *path* is no path; *write* cannot be called, or would only be begun by a call (a coroutine or
            generator function); *on_progress* cannot be called.
        UnsupportedError: No library for *compress* is installed.
        ValueError: An argument makes no sense.
    """
    check_request(path, write)
    if on_progress is not None and not callable(on_progress):
        raise TypeError(f"on_progress must be callable, not {type(on_progress).__name__}")
    max_copy_bytes = None if max_copy is None else parse_size(max_copy, what="max_copy")
    if timeout_s is not None and not timeout_s > 0:
        raise ValueError(f"timeout_s must be positive, or None for no limit: {timeout_s!r}")
    child_options = ChildOptions(_descriptors(keep_fds), index(nice), bool(idle_io))
    options = WriterOptions.of(checksum, compress, max_bytes_per_s)
    claim = _Claim(path)
    supervisor: Supervisor | None = None
    try:
        _slot.take(claim)
        claim.private_bytes = _admitted(path, max_copy_bytes, root, end_at_critical=end_at_critical).private_bytes
        sys.audit("os.fork")
        supervisor = Supervisor(
            path,
            Bounds(max_copy_bytes, timeout_s, end_at_critical, root),
            on_progress,
            functools.partial(_slot.release, claim),
        )
        claim.supervisor = supervisor
        _slot.check_may_begin()  # once more: end_at_exit() has either seen the supervisor, or is seen here
        supervisor.fork(write, child_options, options)
        return SnapshotJob(supervisor.run)
    except BaseException:
        if supervisor is None:
            _slot.release(claim)
        else:
            supervisor.give_up()
        raise


def end_at_exit() -> None:
    """Have a snapshot that is running when the interpreter exits ended, after whatever is registered after this."""
    _slot.hook()


def _descriptors(keep_fds: Iterable[int | HasFileno]) -> array[int]:
    numbers = [index(fd) if isinstance(fd, int) else fd.fileno() for fd in keep_fds]
    if not all(0 <= number <= _FD_MAX for number in numbers):
        raise ValueError(f"keep_fds must be descriptors, 0 to {_FD_MAX}: {numbers}")
    return array("i", numbers)


def _admitted(path: StrPath, max_copy_bytes: int | None, root: Root, *, end_at_critical: bool) -> ForkAssessment:
    """Return the assessment of a snapshot that may begin now.

    Raises:
        SnapshotRefusedError: It may not.
    """
    assessment = assess(None, None, root, max_copy_bytes, 0, observations)
    if end_at_critical and (event := critical_event()) is not None:
        assessment = _deferred(assessment, event)
    if assessment.decision != "admit":
        reasons = "; ".join(assessment.reasons)
        raise SnapshotRefusedError(
            f"the snapshot of {os.fsdecode(path)} was not begun ({assessment.decision}): {reasons}", assessment
        )
    return assessment


def _deferred(assessment: ForkAssessment, event: PressureEvent) -> ForkAssessment:
    """Return the assessment of a moment in which there is something more urgent."""
    decision: Decision = "refuse" if assessment.decision == "refuse" else "defer"
    reason = f"memory pressure is CRITICAL ({event.source}: {event.detail}): wait until it has passed"
    return replace(assessment, decision=decision, reasons=(*assessment.reasons, reason))


class _Claim:
    """The right to run the one snapshot."""

    def __init__(self, path: StrPath) -> None:
        self.path = path
        self.supervisor: Supervisor | None = None
        self.private_bytes: int | None = None
        self.began_s = time.monotonic()

    def saw(self, copy_bytes: int, complete: bool) -> None:
        """Leave to the next forecast what was measured."""
        if complete:
            now_s = time.monotonic()
            observations.note_snapshot(LastSnapshot(copy_bytes, now_s - self.began_s, self.private_bytes, now_s))
        else:
            observations.note_cut_short(copy_bytes)


class _Slot:
    """One fork snapshot at a time in a process.

    No lock: a signal handler may take a snapshot while the thread that it interrupts is in here. setdefault decides.
    """

    def __init__(self) -> None:
        self._holder: dict[str, _Claim] = {}
        self._hooked = False
        self._exiting_in: int | None = None  # the thread in which the interpreter exits

    def take(self, claim: _Claim) -> None:
        holder = self._holder.setdefault("", claim)
        if holder is not claim:
            running, asked = os.fsdecode(holder.path), os.fsdecode(claim.path)
            raise SnapshotInProgressError(
                f"a snapshot of {asked} was asked for, but one of {running} is still running: wait for it, or "
                "cancel it; one fork snapshot at a time in a process"
            )
        self.check_may_begin()
        self.hook()

    def hook(self) -> None:
        """Be told of the exit and of forks. What is registered after this is called before it at the exit."""
        if not self._hooked:
            atexit.register(self.end_at_exit)
            os.register_at_fork(after_in_child=self._forget)
            self._hooked = True

    def check_may_begin(self) -> None:
        """Raise RuntimeError in a thread that the exit of the interpreter may stop at any moment."""
        if self._exiting_in not in (None, threading.get_ident()):
            raise RuntimeError("the interpreter is exiting: a thread that ends with it can begin no snapshot")

    def release(self, claim: _Claim, copy_bytes: int | None = None, complete: bool = False) -> None:
        """Let the next one begin. Does nothing where *claim* does not hold the slot, or no longer."""
        if self._holder.get("") is claim:
            try:
                if copy_bytes is not None:
                    claim.saw(copy_bytes, complete)
            finally:
                self._holder.clear()

    def _forget(self) -> None:
        """In a forked child: the parent's snapshot is none of its business."""
        claim = self._holder.get("")
        self._holder.clear()
        self._exiting_in = None
        if claim is not None and claim.supervisor is not None:
            claim.supervisor.let_go()

    def end_at_exit(self) -> None:
        """The job's thread is a daemon: it must not be stopped between naming the new file and renaming it."""
        self._exiting_in = threading.get_ident()
        claim = self._holder.get("")
        if claim is not None and claim.supervisor is not None:
            run = claim.supervisor.run
            run.cancel()
            with suppress(Exception):
                run.future.exception(EXIT_WAIT_S)


_slot = _Slot()
