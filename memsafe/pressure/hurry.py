"""Shorter turns of the GIL while memory is short."""

from __future__ import annotations

import sys
import threading
import weakref

# A turn of 5 ms, the default, is 5 to 10 MiB of a thread that fills memory.
_TURN_S = 0.0005


class Hurry:
    """Holds the interpreter's switch interval down while anybody asks for it. Thread-safe.

    Each time that a monitor's thread, or a reclaimer in it, lets go of the GIL for a system call, it gets the GIL back
    after a switch interval if other threads are busy. With the default of 5 ms, and some ten such calls until room is
    made, that is too late in a small cgroup.

    What was there before comes back with the last release, unless somebody has set another interval meanwhile. One who
    is gone without a release counts no longer, but the interval stays until the next release.
    """

    def __init__(self) -> None:
        self._asking: weakref.WeakSet[object] = weakref.WeakSet()
        self._before_s: float | None = None
        self._lock = threading.Lock()

    def ask(self, asker: object) -> None:
        """Hold it down until release() by the same *asker*."""
        if asker in self._asking:
            return
        with self._lock:
            self._asking.add(asker)
            if self._before_s is None and (interval_s := sys.getswitchinterval()) > _TURN_S:
                self._before_s = interval_s
                sys.setswitchinterval(_TURN_S)

    def release(self, asker: object) -> None:
        """Have *asker* ask no longer; a no-op where it did not."""
        if asker not in self._asking:
            return
        with self._lock:
            self._asking.discard(asker)
            if not self._asking:
                self._put_back()

    def renew(self) -> None:
        """In a forked child, where nobody asks yet: whoever held the lock does not exist there."""
        self._lock = threading.Lock()
        self._asking = weakref.WeakSet()
        self._put_back()

    def _put_back(self) -> None:
        if self._before_s is None:
            return
        if round(sys.getswitchinterval() / _TURN_S, 3) == 1:  # it is told in whole microseconds
            sys.setswitchinterval(self._before_s)
        self._before_s = None  # last: another thread may fork at any point, and the child must know what to put back


hurry = Hurry()
