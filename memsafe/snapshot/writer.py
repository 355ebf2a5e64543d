"""What a snapshot's `write` writes to."""

from __future__ import annotations

import io
from collections.abc import Callable
from operator import index

BUFFER_BYTES = 256 * 1024


class SnapshotWriter(io.BufferedWriter):
    """A buffered binary file, seekable, with progress(). Closing it is allowed and ends nothing."""

    def __init__(self, fd: int, report: Callable[[int, int], None]) -> None:
        """Write to *fd*, which stays the caller's; progress goes to *report*."""
        super().__init__(io.FileIO(fd, "wb", closefd=False), BUFFER_BYTES)
        self._report = report

    def progress(self, done: int, total: int) -> None:
        """Tell the job's owner that *done* of *total* is written, in any unit. Cheap: calls in quick succession are
        thinned out, the last one arrives.
        """
        self._report(index(done), index(total))
