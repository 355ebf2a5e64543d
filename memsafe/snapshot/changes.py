"""How many changes there were in all: those that a program tells of, and those that it counts itself."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable


class _Seen(NamedTuple):
    """The program's own count when it was last read, and what it had come to before it began anew."""

    own: int
    before: int


class ChangeCount:
    """A count that never goes back, though the program's own one may begin anew: with a flush of its data, say.

    That was set to 0 if it is lower than when it was last read. What it had counted in between is lost, and all of it
    where it is as high again by the next look.

    Thread-safe. total() may be asked for in a forked child.

    Attributes:
        noted: What the program told of, by thread, so that each adds to its own: with or without the GIL no lock is
            needed.
    """

    def __init__(self, read: Callable[[], int] | None) -> None:
        """Count what is added to *noted*, and what *read* returns, if there is one."""
        self.noted: defaultdict[int, int] = defaultdict(int)
        self._read = read
        self._seen = _Seen(0, 0)
        self._lock = threading.RLock()  # guards _seen; re-entered when a signal handler looks
        self._pid = os.getpid()

    def total(self) -> int:
        """Return how many there were in all."""
        noted = sum(list(self.noted.values()))
        return noted if self._read is None else noted + self._counted(self._read)

    def _counted(self, read: Callable[[], int]) -> int:
        while True:
            seen = self._seen  # first: what is read later is lower only if it began anew
            own = read()
            now = _Seen(own, seen.before + (seen.own if own < seen.own else 0))
            if now == seen or self._keep(now, seen):
                return now.before + now.own

    def _keep(self, now: _Seen, seen: _Seen) -> bool:
        """Keep *now* in the place of *seen*; False where that is another thread's, or a signal handler's, by now."""
        if self._pid != os.getpid():
            return True  # nobody may be left to release the lock
        with self._lock:
            if self._seen is not seen:
                return False
            self._seen = now
            return True
