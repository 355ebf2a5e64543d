"""What happened in a program, written where it outlives it."""

from __future__ import annotations

import mmap
import time
from enum import IntEnum, auto

_SOURCE_AT = 256
_SOURCE_BYTES = 96


class Mark(IntEnum):
    """What is written down: times by time.monotonic_ns(), sizes in bytes. 0: it has not happened."""

    LEFT = 0
    """Bytes left under the tightest limit when the taking began, file cache counted as free."""
    DEMAND = auto()
    """Bytes that it wants to take."""
    TAKEN = auto()
    """Bytes that it has taken, after each chunk."""
    TAKEN_AT = auto()
    PASSED_AT = auto()
    """When it had taken all that was left, so that with the cache kept the limit would have been met."""
    HEARD_AT = auto()
    """When memsafe's native thread saw the signal that the first response followed."""
    ACTED_AT = auto()
    """When the cache was first asked to shrink, or a callback was called, whatever came first."""
    ACTED_TAKEN = auto()
    ROOM_AT = auto()
    """When the first response had ended."""
    CALLED_AT = auto()
    CALLED_TAKEN = auto()
    """Of the first callback, where there are any."""
    DONE = auto()
    """How it ended by itself: a member of Ending."""


class Ending(IntEnum):
    KILLED = 0
    SURVIVED = auto()
    GAVE_UP = auto()


class Journal:
    """A page that a forked child writes and its parent reads, whatever becomes of the child."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, mmap.PAGESIZE)
        self._map[:] = bytes(mmap.PAGESIZE)  # the parent's page, not the cgroup's
        self._marks = memoryview(self._map).cast("q")

    def __getitem__(self, mark: int) -> int:
        return self._marks[mark]

    def __setitem__(self, mark: int, value: int) -> None:
        self._marks[mark] = value

    def once(self, mark: Mark) -> bool:
        """Note the time of *mark*, if it is the first; say whether."""
        if self._marks[mark]:
            return False
        self._marks[mark] = time.monotonic_ns()
        return True

    def took(self, taken_bytes: int) -> None:
        now_ns = time.monotonic_ns()
        self._marks[Mark.TAKEN] = taken_bytes
        self._marks[Mark.TAKEN_AT] = now_ns
        if taken_bytes >= self._marks[Mark.LEFT] and not self._marks[Mark.PASSED_AT]:
            self._marks[Mark.PASSED_AT] = now_ns

    def acted(self) -> None:
        """The response begins."""
        if self.once(Mark.ACTED_AT):
            self._marks[Mark.ACTED_TAKEN] = self._marks[Mark.TAKEN]

    def called(self, source: str) -> None:
        """A callback was called."""
        self.acted()
        if self.once(Mark.CALLED_AT):
            self._marks[Mark.CALLED_TAKEN] = self._marks[Mark.TAKEN]
            self.source = source

    @property
    def source(self) -> str:
        return self._map[_SOURCE_AT : _SOURCE_AT + _SOURCE_BYTES].rstrip(b"\0").decode()

    @source.setter
    def source(self, text: str) -> None:
        self._map[_SOURCE_AT : _SOURCE_AT + _SOURCE_BYTES] = text.encode()[:_SOURCE_BYTES].ljust(_SOURCE_BYTES, b"\0")

    def close(self) -> None:
        self._marks.release()
        self._map.close()
