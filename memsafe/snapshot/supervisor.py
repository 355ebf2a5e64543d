"""The life of a snapshot's child, seen from its parent.

The caller's thread forks. A thread of the job's own, started before, watches the child by its pidfd, hears its reports,
measures its private copies, and puts the finished file in place: a child that outlives its parent can never replace
newer data.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import select
import signal
import threading
import time
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memsafe import _native
from memsafe._kernel import process
from memsafe._kernel.descriptors import Owned
from memsafe._kernel.files import is_missing
from memsafe._kernel.oom import KillWatch
from memsafe.errors import KernelError, SnapshotFailedError
from memsafe.pressure.alarm import alarm
from memsafe.pressure.hurry import hurry as shorter_turns
from memsafe.pressure.monitor import critical_event
from memsafe.sizes import format_size
from memsafe.snapshot.atomic import AtomicFile
from memsafe.snapshot.child import SnapshotChild
from memsafe.snapshot.deadline import Deadline
from memsafe.snapshot.handle import ChildHandle, Handover
from memsafe.snapshot.job import SnapshotResult, SnapshotRun, SnapshotState
from memsafe.snapshot.meter import Meter
from memsafe.snapshot.reports import Done, Progress, Raised, ReportReader
from memsafe.snapshot.sentry import Sentry
from memsafe.snapshot.standstill import STANDSTILL_S, Standstill
from memsafe.snapshot.threads import witnesses
from memsafe.snapshot.verdict import Verdicts, where_it_stood
from memsafe.snapshot.writer import ImageFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from memsafe._kernel.files import Root
    from memsafe.pressure.levels import PressureEvent
    from memsafe.snapshot.atomic import StrPath
    from memsafe.snapshot.child import ChildOptions
    from memsafe.snapshot.writer import SnapshotWriter, WriterOptions

_log = logging.getLogger("memsafe.snapshot")

METHOD = "fork"

_CALLER, _THREAD = "the caller's", "the job's"

# The OOM killer compares resident pages + oom_score_adj/1000 of all the memory there is (oom_badness, mm/oom_kill.c).
# Right after the fork both count the same pages, then the parent may grow: by less than all there is. So a difference
# of 1000 decides for the child whatever happens, and it is asked for relative to the parent. A parent that is above 0
# itself leaves less than that.
_OOM_SCORE_ADJ_ABOVE = 1000
_OOM_SCORE_ADJ_MAX = 1000

# Only for the case that the native fork could not set the eventfd.
_LOOK_FOR_FORK_MS = 1000

# How long until it is noticed at the latest that descriptors which are polled have become strangers'.
_PATIENCE_S = 5.0

# For how long all Python threads may stand still, where memory is short, until a child has given its memory back.
_ALL_WAIT_MS = 1000


@dataclass(frozen=True, slots=True)
class Bounds:
    """What ends a child that would otherwise go on."""

    max_copy_bytes: int | None
    timeout_s: float | None
    end_at_critical: bool
    root: Root


class Supervisor:
    """The life of one child, from before its fork until its file is in place.

    The job's thread owns everything: it opens, watches and closes. The caller's thread only waits for it, and forks. So
    a KeyboardInterrupt, which hits the main thread alone, never comes between a descriptor and its owner.
    """

    def __init__(
        self,
        path: StrPath,
        bounds: Bounds,
        on_progress: Callable[[int, int], object] | None,
        on_end: Callable[[int | None, bool], None],
    ) -> None:
        """Prepare nothing yet.

        *on_end* is called as on_end(peak_copy_bytes, complete) once no child is left, before the job's outcome is
        known. It may be called again, with (None, False).
        """
        self.run = SnapshotRun(path, wake=self._wake, on_progress=on_progress)
        self._bounds = bounds
        self._on_end = on_end
        self._prepared = threading.Event()  # or refused
        self._refusal: BaseException | None = None
        # Who came first: the caller's thread to its fork, or the other to a failure that prevents it. No lock, which an
        # interrupt could leave held: setdefault decides.
        self._first: dict[str, str] = {}
        self._given_up = False  # by the caller's thread, without a child
        self._fork_returned = threading.Event()
        self._handover = Handover()
        self._file: AtomicFile | None = None
        self._verdicts = Verdicts(path, bounds.max_copy_bytes, lambda: self._file is not None and self._file.renamed)
        self._wake_event = Owned(-1)
        self._child = ChildHandle(0, Owned(-1))
        self._deadline = Deadline(bounds.timeout_s)
        self._not_for_others: list[Owned] = []
        self._forked_by = 0
        self._done: Done | None = None
        self._raised: Raised | None = None
        self._warnings: list[str] = []
        self._thread = threading.Thread(target=self._main, name="memsafe-snapshot", daemon=True)

    # The caller's thread.

    def fork(
        self, write: Callable[[SnapshotWriter], object], child_options: ChildOptions, options: WriterOptions
    ) -> None:
        """Have the thread get everything that can be refused, then fork. Whatever is raised, call give_up().

        Raises:
            OSError: No file can be made at the path, or descriptors have run out.
            KernelError: fork failed, or no thread could be started.
            RuntimeError: The interpreter is exiting.
        """
        _start(self._thread)
        self._prepared.wait()
        if self._refusal is not None:
            raise self._refusal
        assert self._file is not None
        self._forked_by = threading.get_ident()
        child = SnapshotChild(write, ImageFile(self._file.fd, options), self._write_end.fd, self._deadline.stack_fd)
        oom_score_adj, warnings = _oom_score_adj_of_child()
        self._warnings += warnings
        self._began_s = time.monotonic()
        self._deadline.begin(self._began_s)
        if self._meter.is_tight:
            shorter_turns.ask(self)
        if self._first.setdefault("", _CALLER) is not _CALLER:
            assert self._refusal is not None  # the thread has failed since
            raise self._refusal
        try:
            _native.fork(
                child,
                self._handover.buffer,
                self._wake_event.fd,
                self._own_pidfd.fd,
                self._write_end.fd,
                self._read_end.fd,
                oom_score_adj,
                child_options.nice,
                child_options.idle_io,
                child_options.keep_fds,
                self._sentry.address,
            )
        except OSError as error:
            code = error.errno or errno.EAGAIN
            raise KernelError(code, "fork", "no child was made, nothing was changed") from None
        finally:
            self._fork_returned.set()

    def give_up(self) -> None:
        """After an exception: end the child if there is one, as nobody will hold the job, and release everything."""
        self._given_up = True
        self._fork_returned.set()
        self.run.cancel()
        if not self._handover.has_child():
            if self._thread.ident is not None:
                self._thread.join()
            self._on_end(None, False)

    def let_go(self) -> None:
        """In a forked child that is not the job's: close what others wait for the end of.

        That is the image, whose room on the disk it would keep, and the lock on it; and the pipe, by whose end the
        guard and its parent hear of each other.
        """
        if self._handover.has_child() or threading.get_ident() != self._forked_by:
            for descriptor in self._not_for_others:
                descriptor.close()

    def _wake(self) -> None:
        if self._wake_event.is_ours():
            with suppress(OSError):  # it refuses only when it is set already
                os.eventfd_write(self._wake_event.fd, 1)

    # The job's thread.

    def _main(self) -> None:
        result: SnapshotResult | None = None
        error: SnapshotFailedError | None = None
        try:
            resources = ExitStack()
            try:
                self._prepare(resources)
                self._wait_for_fork()
                result = self._supervise(resources)
            except BaseException as failure:
                error = self._after(failure, resources)
            finally:
                self._release(resources)
        except BaseException as failure:  # for want of memory, say: it is this thread's own, and told as such
            self._refusal = failure
            raise
        finally:  # whatever came between, nobody waits for ever
            self._prepared.set()
            if result is not None:
                self.run.resolve(result)
            else:
                verdict = self.run.seal()
                self.run.reject(error or verdict or self._verdicts.ended("its thread failed"))

    def _release(self, resources: ExitStack) -> None:
        try:
            shorter_turns.release(self)
        finally:
            try:
                with suppress(OSError):  # what is on disk was synced; what was not committed is not missed
                    resources.close()
            finally:
                self._on_end(self.run.peak_copy_bytes, self._done is not None)

    def _prepare(self, resources: ExitStack) -> None:
        try:
            self._file = resources.enter_context(AtomicFile(self.run.path))
            self._own_pidfd = _own(resources, _pidfd_of_self())
            self._read_end, self._write_end = (_own(resources, fd) for fd in os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
            self._reader = ReportReader(self._read_end)
            self._meter = Meter(self._bounds.root, self._bounds.max_copy_bytes)
            resources.callback(self._meter.close)
            self._deadline.open()
            resources.callback(self._deadline.close)
            self._kill_watch = KillWatch(self._bounds.root)
            resources.callback(self._kill_watch.close)
            self._wake_event = _own(resources, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self._sentry = Sentry(self._bounds.root, self._wake_event.fd)
            resources.callback(self._sentry.close)
            self._not_for_others = [self._file.descriptor, self._read_end, self._write_end]
            resources.callback(self._not_for_others.clear)  # before any is closed: its number may become a stranger's
        except BaseException as refusal:
            self._refusal = refusal
            raise
        finally:
            self._prepared.set()

    def _wait_for_fork(self) -> None:
        """Return when the child is there, or will never be."""
        poller = select.poll()
        poller.register(self._wake_event.fd, select.POLLIN)
        try:
            while not (self._handover.has_child() or self._given_up):
                if poller.poll(_LOOK_FOR_FORK_MS):
                    self._check_descriptors()
                    os.eventfd_read(self._wake_event.fd)
        except OSError:
            # The native fork sets the eventfd before any Python can run; this is set by Python, so an interrupt in the
            # right place could prevent it. It takes both.
            self._fork_returned.wait()

    def _supervise(self, resources: ExitStack) -> SnapshotResult:
        if not self._handover.has_child():
            raise self._verdicts.not_begun()
        pause_ns = self._adopt(resources)
        self._standstill = Standstill(self._child.pid, time.monotonic())
        self.run.begin()
        self._write_end.close()  # so that the pipe ends with the child
        with alarm.heard_by(self._on_critical) if self._bounds.end_at_critical else nullcontext():
            if self._bounds.end_at_critical and (event := critical_event()) is not None:
                self._on_critical(event)
            self._watch()
        status = self._child.reap()
        self._find_reason(status)
        error = self.run.seal() or self._failure(status)
        if error is not None:
            raise error
        assert self._done is not None  # _failure() has found it
        return SnapshotResult(
            path=self.run.path,
            size_bytes=self._commit(),
            pause_s=pause_ns / 1e9,
            duration_s=time.monotonic() - self._began_s,
            peak_copy_bytes=self.run.peak_copy_bytes,
            method=METHOD,
            content_bytes=self._done.written.content_bytes,
            checksum=self._done.written.checksum,
            warnings=tuple(self._warnings),
        )

    def _adopt(self, resources: ExitStack) -> int:
        """Take the child over from the caller's thread, and return for how long that stood still, in nanoseconds."""
        self._child, pause_ns = self._handover.adopt()
        resources.callback(self._child.pidfd.close)
        resources.callback(self._sentry.rest)  # before that
        self._sentry.count_faults(self._child.pid)
        self._meter.expect_cost(pause_ns / 1e9)  # both walk all page tables
        self._expect_faults()  # the program may be writing already
        return pause_ns

    def _expect_faults(self) -> None:
        """Be woken when copies may have passed their bound."""
        if (expected := self._meter.expected_faults()) is not None:
            self._sentry.expect(*expected)

    def _commit(self) -> int:
        assert self._file is not None  # _prepare() has opened it
        try:
            return self._file.commit()
        except OSError as cause:
            raise self._verdicts.not_committed(cause) from cause

    def _after(self, failure: BaseException, resources: ExitStack) -> SnapshotFailedError:
        """Leave no child behind, and return what the owner of the job gets to see."""
        self._refusal = self._refusal or failure
        if self._first.setdefault("", _THREAD) is _CALLER:
            self._fork_returned.wait()  # it may be in the midst of it
        if self._handover.has_child() and not self._child.pid:
            self._adopt(resources)
        self._kill()
        self._child.reap()
        verdict = self.run.seal()
        if verdict is not None:
            return verdict
        if isinstance(failure, SnapshotFailedError):
            return failure
        error = self._verdicts.ended(f"the parent could not see it through: {failure!r}")
        error.__cause__ = failure
        return error

    def _watch(self) -> None:
        """Return when the child has ended and all that it said is heard."""
        poller = select.poll()
        wake_fd, report_fd, pidfd = self._wake_event.fd, self._read_end.fd, self._child.pidfd.fd
        for fd in (wake_fd, report_fd, pidfd):
            if fd >= 0:
                poller.register(fd, select.POLLIN)
        ended = pidfd < 0
        while not ended:
            self._enforce()
            ready = {fd for fd, _ in poller.poll(self._patience_ms())}
            self._check_descriptors()
            ended = pidfd in ready
            if wake_fd in ready:
                os.eventfd_read(wake_fd)
                self._meter.look_now()
            if report_fd in ready:
                self._hear()
                if self._reader.at_end:
                    poller.unregister(report_fd)
        self._hear()

    def _patience_ms(self) -> int:
        wake_at_s = time.monotonic() + _PATIENCE_S
        if self.run.state is not SnapshotState.ENDING:
            wake_at_s = min(wake_at_s, self._meter.next_look_s, self._standstill.next_look_s, self._deadline.at_s)
        return max(0, math.ceil((wake_at_s - time.monotonic()) * 1000))

    def _check_descriptors(self) -> None:
        """Before any event is believed: it may be a stranger's, and our own may never come."""
        if any(each.is_lost() for each in (self._wake_event, self._read_end, self._child.pidfd)):
            raise self._verdicts.ended(
                "another part of the program has closed descriptors that it needs (os.closerange? Becoming a daemon? "
                "Do that first)"
            )

    def _hear(self) -> None:
        for report in self._reader.read():
            match report:
                case Progress(done, total):
                    self.run.report_progress(done, total)
                case Raised():
                    self._raised = report
                case Done(copy_bytes, warnings):
                    self._done = report
                    self._meter.stop()
                    self._sentry.rest()
                    self._warnings += warnings
                    if copy_bytes is not None:
                        self._count_copies(copy_bytes)

    def _enforce(self) -> None:
        """End a child that was cancelled, takes too long, or copies too much."""
        self._heed_sentry()
        if self.run.state is SnapshotState.ENDING:
            self._kill()
            return
        now_s = time.monotonic()
        if now_s >= self._standstill.next_look_s:
            self._look_for_life(now_s)
        if now_s >= self._deadline.at_s:
            if not self._deadline.spares(self._child, now_s):
                self._kill()
        elif now_s >= self._meter.next_look_s:
            self._look()

    def _heed_sentry(self) -> None:
        if self._done is None and self.run.state is SnapshotState.RUNNING:
            short = self._sentry.told()
            if short is not None:
                self._end_for_shortage(short)

    def _look_for_life(self, now_s: float) -> None:
        """Log, once, that the child stands still. It is not ended: its owner gave no time, or more."""
        does = self._standstill.look(now_s, self.run.progress)
        if does is not None:
            timeout_s = self._bounds.timeout_s
            then = "nothing ends it: pass timeout_s" if timeout_s is None else f"it is ended after {timeout_s} s"
            _log.warning(
                "the snapshot of %s stands still: for %g s its child has taken no processor time, and written and "
                "reported nothing. It %s; %s%s",
                os.fsdecode(self.run.path),
                STANDSTILL_S,
                does,
                then,
                where_it_stood("", witnesses(self._forked_by, self._bounds.root)),
            )

    def _find_reason(self, status: os.waitid_result | None) -> None:
        """After the child's end: say why, where nobody could while it lived."""
        if self._deadline.was_missed:
            stack = self._deadline.last_words()
            where = where_it_stood(stack, witnesses(self._forked_by, self._bounds.root))
            what = f"it was still running after {self._bounds.timeout_s} s{where}"
            self.run.end(self._verdicts.ended(what, child_traceback=stack or None))
        elif not self._is_complete(status) and (short := self._sentry.told()) is not None:
            self.run.end(self._verdicts.shortage(short, self._measured_bytes()))

    def _look(self) -> None:
        """Count page faults, and where these say so, or enough time has passed, copies and headroom."""
        short = self._meter.runs_short(self._child.pid)
        if self._meter.is_tight:
            shorter_turns.ask(self)
        if short is not None:
            self._end_for_shortage(short)
        elif self._meter.is_due():
            self._measure()
        self._expect_faults()

    def _measure(self) -> None:
        try:
            measured = self._meter.measure(self._child.pid)
        except OSError as error:
            if self._child.has_ended() or is_missing(error):
                return
            # A child whose process changed its user belongs to root (PR_SET_DUMPABLE, prctl(2)).
            if self._bounds.max_copy_bytes is not None:
                self._meter.stop()
                self._end(self._verdicts.ended(f"max_copy cannot be kept, as copies cannot be measured: {error}"))
            else:
                self._meter.forgo_copies()
                self._warnings.append(f"copies could not be measured, headroom alone was watched: {error}")
            return
        if self._child.has_ended():
            return  # where somebody else reaps, the number may be another process's by now
        if measured.copy_bytes is not None:
            self._count_copies(measured.copy_bytes)
        if measured.short is not None:
            self._end_for_shortage(measured.short)

    def _on_critical(self, event: PressureEvent) -> None:
        """End the child, in a monitor's thread: this one may have to wait for the GIL."""
        if self._done is None:
            self._end_for_shortage(f"memory pressure is CRITICAL ({event.source}: {event.detail})")
            self._wake()

    def _end_for_shortage(self, what: str) -> None:
        """End the child, and let no Python thread go on until its memory is back."""
        self.run.end(self._verdicts.shortage(what, self._measured_bytes()))
        if self.run.state is SnapshotState.ENDING:
            with suppress(OSError):  # the job's thread knows another way
                _native.fork_end(self._child.pidfd.fd if self._child.pidfd.is_ours() else -1, _ALL_WAIT_MS)

    def _measured_bytes(self) -> int | None:
        """Return what the copies took when last measured; None: they never were."""
        return None if self.run.peak_copy_bytes is None else self.run.copy_bytes

    def _count_copies(self, copy_bytes: int) -> None:
        self.run.report_copies(copy_bytes)
        max_copy_bytes = self._bounds.max_copy_bytes
        # Also when the image is complete: otherwise chance would decide, by the instant of the last measurement.
        if max_copy_bytes is not None and copy_bytes > max_copy_bytes:
            copied, bound = format_size(copy_bytes), format_size(max_copy_bytes)
            what = f"{copied} were copied, more than max_copy allows ({bound})"
            self._end(self._verdicts.overrun(what, copy_bytes))

    def _end(self, verdict: SnapshotFailedError) -> None:
        self.run.end(verdict)
        self._kill()

    def _kill(self) -> None:
        if not self._child.signal(signal.SIGKILL):
            self._reader.close()  # its guard ends it when nobody listens

    def _is_complete(self, status: os.waitid_result | None) -> bool:
        """Whether the child said that the image is, and nothing in how it ended speaks against it."""
        if self._done is None:
            return False
        return status is None or (status.si_code == os.CLD_EXITED and status.si_status == 0)

    def _failure(self, status: os.waitid_result | None) -> SnapshotFailedError | None:
        """Return why there is no image; None when there is one: the child said so, and nothing speaks against it."""
        if self._raised is not None:
            return self._verdicts.raised(self._raised)
        if self._is_complete(status):
            return None
        if status is None or (status.si_code != os.CLD_EXITED and status.si_status == signal.SIGKILL):
            evidence = self._kill_watch.evidence(self._child.pid)
            if evidence is not None:
                return self._verdicts.shot(evidence, self._measured_bytes())
        return self._verdicts.died(status)


def _own(resources: ExitStack, fd: int) -> Owned:
    owned = Owned(fd)
    resources.callback(owned.close)
    return owned


def _oom_score_adj_of_child() -> tuple[int, list[str]]:
    """Return what makes the OOM killer prefer the child to this process, and what to say where it may not suffice."""
    own = _own_oom_score_adj()
    child = min(own + _OOM_SCORE_ADJ_ABOVE, _OOM_SCORE_ADJ_MAX)
    if child - own >= _OOM_SCORE_ADJ_ABOVE:
        return child, []
    return child, [
        f"the child's oom_score_adj was only {child - own} above this process's, which is {own} ({_OOM_SCORE_ADJ_MAX} "
        "is the most there is): a process that grew beyond the child by that many thousandths of all memory would have "
        "been the OOM killer's first choice"
    ]


def _own_oom_score_adj() -> int:
    try:
        return process.oom_score_adj() or 0
    except KernelError:
        return 0


def _pidfd_of_self() -> int:
    try:
        return os.pidfd_open(os.getpid())
    except OSError as error:
        raise KernelError(
            error.errno or errno.ENOSYS, "pidfd_open", "fork_snapshot needs it to tie the child to its parent"
        ) from None


def _start(thread: threading.Thread) -> None:
    try:
        thread.start()
    except RuntimeError as error:
        if "shutdown" in str(error):  # as some versions do in exit functions
            raise RuntimeError("the interpreter is exiting: it starts no thread, and so no snapshot") from None
        if "start new thread" not in str(error):  # a subinterpreter, say, has no daemon threads
            raise
        # CPython drops the errno; pthread_create(3) fails with this one alone.
        raise KernelError(errno.EAGAIN, "pthread_create", "no thread for the snapshot, nothing was done") from None
