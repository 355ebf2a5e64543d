"""Events for asyncio: a bridge from the monitor's thread into one event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self

    from memsafe.pressure.levels import PressureEvent

# Levels change seldom; whoever lags behind by more than this wants the newest.
_EVENTS_KEPT = 64


class EventStream:
    """Changes of level since it was made, as an async iterator of one event loop; it ends when the monitor closes.

    A consumer that lags keeps the newest 64.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[PressureEvent] = deque(maxlen=_EVENTS_KEPT)
        self._news = asyncio.Event()
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> PressureEvent:
        while not self._events:
            if self._closed:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()

    async def aclose(self) -> None:
        """End it: what was heard already can still be read."""
        self._closed = True
        self._news.set()

    def feed(self, event: PressureEvent | None) -> None:
        """Hand over an event, or None for the end; from any thread. A loop that was closed hears nothing."""
        try:
            self._loop.call_soon_threadsafe(self._deliver, event)
        except RuntimeError:
            self._closed = True

    def _deliver(self, event: PressureEvent | None) -> None:
        if event is None:
            self._closed = True
        elif not self._closed:
            self._events.append(event)
        self._news.set()
