"""The Python half of a snapshot's child. What it does before is in memsafe_native/src/fork.c."""

from __future__ import annotations

import gc
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

from memsafe._kernel import process
from memsafe.errors import KernelError
from memsafe.snapshot.reports import Reporter
from memsafe.snapshot.writer import ImageFile, SnapshotWriter, Written

if TYPE_CHECKING:
    from collections.abc import Callable

# Everything that runs in the child is imported above, in the parent: another thread may hold a module's import lock at
# the fork, and nobody would release it in the child.


class SnapshotChild:
    """Called in the child by the native fork, which ends the process when it returns, or raises."""

    def __init__(self, write: Callable[[SnapshotWriter], object], image: ImageFile, report_fd: int) -> None:
        """Will have *write* fill *image* and report to *report_fd*."""
        self._write = write
        self._image = image
        self._report_fd = report_fd

    def __call__(self, oom_score_adj_errno: int, guard_errno: int, sockets_errno: int) -> None:
        """Take the image and report; the arguments say how the steps before went, as errno or 0."""
        reporter = Reporter(self._report_fd)
        try:
            if guard_errno:
                raise KernelError(guard_errno, "pthread_create", "the child cannot be tied to its parent's life")
            # So that a collection which `write` asks for leaves the parent's objects, and their pages, alone.
            gc.freeze()
            with suppress(ValueError):
                signal.set_wakeup_fd(-1)  # it is the parent's event loop's
            written = self._take_image(reporter)
        except BaseException as error:
            reporter.raised(error)
        else:
            reporter.done(_copy_bytes(), _warnings(oom_score_adj_errno, sockets_errno), written)

    def _take_image(self, reporter: Reporter) -> Written:
        out = SnapshotWriter(self._image, reporter.progress)
        self._write(out)
        return out.finish()  # here, where it can be cancelled; the parent's own sync then has little left to do


def _copy_bytes() -> int | None:
    try:
        return process.smaps_rollup().private_dirty_bytes
    except KernelError:
        return None


def _warnings(oom_score_adj_errno: int, sockets_errno: int) -> list[str]:
    warnings = []
    if oom_score_adj_errno:
        reason = os.strerror(oom_score_adj_errno)
        warnings.append(f"the child could not make itself the OOM killer's first choice: {reason}")
    if sockets_errno:
        warnings.append(f"the child could not release inherited sockets: {os.strerror(sockets_errno)}")
    return warnings
