"""Changes of level as event loops hear of them: by a descriptor, and by streams."""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

from memsafe._kernel import notify
from memsafe._kernel.descriptors import Owned

if TYPE_CHECKING:
    from memsafe.pressure.levels import PressureEvent
    from memsafe.pressure.stream import EventStream


class Loops:
    """Tells event loops of each change at once, whatever callbacks do meanwhile; during one life of a monitor.

    Thread-safe, but for open() and close().
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the streams, the changes, and whether they are wanted
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._changes = 0
        self._changes_wanted = False
        self._changed = Owned(-1)

    def open(self) -> None:
        """Get the descriptor.

        Raises:
            KernelError: There is none to be had.
        """
        self._changed = Owned(notify.open_eventfd())

    def fileno(self) -> int:
        """Return an eventfd that counts the changes; at first those that were before anybody asked for it."""
        with self._lock:
            if not self._changes_wanted:
                self._changes_wanted = True
                self._signal(self._changes)
            return self._changed.fd

    def add(self, stream: EventStream) -> None:
        """Tell *stream* too, for as long as somebody reads it."""
        with self._lock:
            self._streams.add(stream)

    def tell(self, event: PressureEvent) -> None:
        """Tell every loop of a change."""
        with self._lock:
            self._changes += 1
            streams = list(self._streams)
            is_wanted = self._changes_wanted
        for stream in streams:
            stream.feed(event)
        # Not for nobody: beside busy threads, a system call may have to wait for the GIL.
        if is_wanted:
            self._signal(1)

    def end(self) -> None:
        """End the streams."""
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.feed(None)

    def close(self) -> None:
        """Close the descriptor; in a forked child too, where the lock may be held for ever."""
        self._changed.close()

    def _signal(self, changes: int) -> None:
        """Count on the descriptor, unless somebody has closed it: the number may be another file's."""
        if self._changed.is_ours():
            with suppress(OSError):
                os.eventfd_write(self._changed.fd, changes)
