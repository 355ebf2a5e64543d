"""The Python half of a snapshot's child. What it does before is in memsafe_native/src/fork.c."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memsafe._kernel import process
from memsafe.errors import KernelError
from memsafe.snapshot import threads
from memsafe.snapshot.reports import Reporter
from memsafe.snapshot.writer import ImageFile, SnapshotWriter, Written, check_returned

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

# Everything that runs in the child is imported above, in the parent: what another thread imports at the fork has to be
# imported again, and some extension modules refuse that.

# Without the GIL, freezing marks each object, and so copies the pages of all of them; with it, it joins three lists.
_FREEZING_COPIES = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

STACK_SIGNAL = signal.SIGTERM
"""Has a child that waits for ever say where, before it dies of it."""


@dataclass(frozen=True, slots=True)
class ChildOptions:
    """What the caller may decide about a child.

    Attributes:
        keep_fds: Sockets and pipes that it keeps.
        nice: Added to the niceness that it inherits.
        idle_io: Whether the disk serves it only when nobody else wants it.
    """

    keep_fds: array[int]
    nice: int = 0
    idle_io: bool = False


class SnapshotChild:
    """Called in the child by the native fork, which ends the process when it returns, or raises."""

    def __init__(
        self, write: Callable[[SnapshotWriter], object], image: ImageFile, report_fd: int, stack_fd: int
    ) -> None:
        """Will have *write* fill *image* and report to *report_fd*.

        *stack_fd* gets the stacks of all threads when STACK_SIGNAL comes; -1 for none.
        """
        self._write = write
        self._image = image
        self._report_fd = report_fd
        self._stack_fd = stack_fd

    def __call__(self, oom_score_adj: int, guard: int, descriptors: int, nice: int, idle_io: int) -> None:
        """Take the image and report; the arguments say how the steps before went, as errno or 0."""
        reporter = Reporter(self._report_fd)
        try:
            if guard:
                raise KernelError(guard, "pthread_create", "the child cannot be tied to its parent's life")
            self._settle()
            written = self._take_image(reporter)
        except BaseException as error:
            reporter.raised(error)
        else:
            warnings = {
                "make itself the OOM killer's first choice": oom_score_adj,
                "release inherited sockets and pipes": descriptors,
                "lower its priority (nice)": nice,
                "lower its priority at the disk (idle_io)": idle_io,
            }
            reporter.done(_copy_bytes(), [_could_not(what, code) for what, code in warnings.items() if code], written)

    def _settle(self) -> None:
        """What Python has to be told of being a child."""
        if not _FREEZING_COPIES:  # so that a collection that `write` asks for leaves the parent's objects alone
            gc.freeze()
        faulthandler.unregister(STACK_SIGNAL)  # the parent's, which the native half has taken from the system
        with suppress(ValueError):  # a subinterpreter has no handlers
            signal.set_wakeup_fd(-1)  # it is the parent's event loop's
            _forget_handlers()
        if self._stack_fd >= 0:
            faulthandler.register(STACK_SIGNAL, file=self._stack_fd, all_threads=True, chain=True)
        threads.renew()
        os.register_at_fork(after_in_child=self._let_go)

    def _let_go(self) -> None:
        """In a process that `write` forks: the image is not its business, nor what is said of it.

        The numbers are given to what refuses to be written to, and not freed: buffers still believe in them.
        """
        nothing = os.pidfd_open(os.getpid())
        for fd in (self._image.fd, self._report_fd):
            os.dup2(nothing, fd, inheritable=False)
        os.close(nothing)

    def _take_image(self, reporter: Reporter) -> Written:
        out = SnapshotWriter(self._image, reporter.progress)
        check_returned(self._write(out))
        return out.finish()  # here, where it can be cancelled; the parent's own sync then has little left to do


def _copy_bytes() -> int | None:
    try:
        return process.smaps_rollup().private_dirty_bytes
    except KernelError:
        return None


def _could_not(what: str, code: int) -> str:
    return f"the child could not {what}: {os.strerror(code)}"


def _forget_handlers() -> None:
    """Have Python agree with the system, where the native half has reset them."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
