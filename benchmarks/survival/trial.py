"""A forked child in a cgroup of its own."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from benchmarks.survival.place import Place


class Inmate:
    """Runs *live* in a forked child, which is to enter *place*; both are gone after end().

    Attributes:
        fd: Its pidfd, readable once it has ended.
    """

    def __init__(self, place: Place, live: Callable[[], NoReturn]) -> None:
        self._place = place
        sys.stdout.flush()
        sys.stderr.flush()
        # What the child inherits is not charged to its cgroup; a collection there would copy and charge all of it.
        gc.collect()
        gc.freeze()
        self._pid = os.fork()
        if self._pid == 0:
            live()
        self.fd = os.pidfd_open(self._pid)

    def end(self, *, by_force: bool = False) -> tuple[int, int]:
        """Return the status that it ended with, and how many the OOM killer has taken in its cgroup."""
        if by_force:
            signal.pidfd_send_signal(self.fd, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        os.close(self.fd)
        kills = self._place.oom_kills()
        self._place.remove()
        return status, kills
