"""What in this process must act at CRITICAL before any callback runs, whichever monitor says so: a running snapshot."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memsafe.pressure.levels import PressureEvent


class Alarm:
    """Who is to be told of CRITICAL at once, in the monitor's own thread."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[PressureEvent], None]] = []
        self._lock = threading.Lock()

    @contextmanager
    def heard_by(self, listener: Callable[[PressureEvent], None]) -> Iterator[None]:
        """Have *listener* called; when this ends, no call of it is under way. It must neither block nor raise."""
        with self._lock:
            self._listeners.append(listener)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(listener)

    def sound(self, event: PressureEvent) -> None:
        """Tell everybody of *event*."""
        with self._lock:
            for listener in self._listeners:
                listener(event)

    def renew(self) -> None:
        """Forget everybody in a forked child, where the lock may be held for ever."""
        self._listeners = []
        self._lock = threading.Lock()


alarm = Alarm()
os.register_at_fork(after_in_child=alarm.renew)
