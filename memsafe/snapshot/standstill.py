"""Notices a child that does nothing: what it waits for may never come, and without a timeout nobody would be told."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from memsafe._kernel import process
from memsafe.errors import KernelError

if TYPE_CHECKING:
    from memsafe._kernel.files import Root

# A disk that takes longer for a request is reset by the kernel (SCSI's time limit, /sys/block/*/device/timeout), so who
# waits for one moves within that time; who waits for a lock that nobody holds any more does not.
STANDSTILL_S = 30.0
# Coarse, so that it costs nothing to speak of: two small files are read.
LOOK_EVERY_S = 5.0

_STATES = {
    "D": "waits for a device (state D in ps)",
    "T": "was stopped by a signal (state T in ps)",
    "t": "was stopped by a debugger (state t in ps)",
}


class Standstill:
    """Looks now and then whether a child shows signs of life: processor time, bytes written, reports.

    Attributes:
        next_look_s: When to look again, by time.monotonic(); never, once a standstill was told.
    """

    def __init__(self, pid: int, now_s: float, root: Root = "/") -> None:
        """Begin with *pid*, which lives at *now_s*."""
        self.next_look_s = now_s + LOOK_EVERY_S
        self._pid = pid
        self._root = root
        self._signs: object = None
        self._since_s = now_s

    def look(self, now_s: float, reported: object) -> str | None:
        """Return what the child does, once it has done nothing else for STANDSTILL_S; None before.

        Args:
            now_s: The time.
            reported: What it has reported last.
        """
        self.next_look_s = now_s + LOOK_EVERY_S
        try:
            activity = process.activity(self._pid, self._root)
        except KernelError:  # it has ended, or is not to be seen
            return None
        signs = (activity.cpu_ticks, activity.written_bytes, reported)
        if signs != self._signs:
            self._signs, self._since_s = signs, now_s
        elif now_s - self._since_s >= STANDSTILL_S:
            self.next_look_s = math.inf
            return _STATES.get(activity.state, "waits")
        return None
