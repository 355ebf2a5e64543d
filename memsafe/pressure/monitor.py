"""The monitor: one native thread that waits, one Python thread that looks, decides and calls back."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, overload

from memsafe.errors import KernelError
from memsafe.pressure import levels
from memsafe.pressure.emergency import EmergencyReserve
from memsafe.pressure.hub import Hub
from memsafe.pressure.levels import Cause, Judgement, Ladder, PressureEvent, PressureLevel, Thresholds
from memsafe.status import status_once
from memsafe.trimming import give_back

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from memsafe._kernel.files import Root
    from memsafe.budget import Budget
    from memsafe.pressure.sources import SourceStatus
    from memsafe.pressure.stream import EventStream
    from memsafe.pressure.waiter import Report
    from memsafe.sizes import Size
    from memsafe.status import MemoryStatus

    Callback = Callable[[PressureEvent], object]

CallbackT = TypeVar("CallbackT", bound="Callback")

_log = logging.getLogger("memsafe.pressure")

# A v1 cgroup can signal a thousand times a second; while nothing changes, one look in so long is enough.
_REST_S = 0.002
# A budget is asked again while the cause lasts, but its reclaimers are not hounded.
_RESPOND_AGAIN_S = 1.0
_SLOW_CALLBACK_S = 1.0


class _Request:
    """What another thread wants the monitor's thread to do, and whether it was done.

    A drill has a level; a callback that came late has the event that it missed; a check has neither.
    """

    __slots__ = ("callback", "done", "level", "missed")

    def __init__(
        self,
        level: PressureLevel | None = None,
        callback: Callback | None = None,
        missed: PressureEvent | None = None,
    ) -> None:
        self.level = level
        self.callback = callback
        self.missed = missed
        self.done = threading.Event()


class PressureMonitor:
    """Hears early that memory runs low, and tells.

    Every source of warnings that this process may use is tried; ``sources`` lists each, with the reason where one is
    not used. What the kernel signals is a wake-up: the level follows from the headroom of every limit on the process
    (see Thresholds), except that stalls and OOMs raise it by themselves.

    Callbacks, reclaimers and event streams are served by one thread of the monitor's own, never two at once. When a
    level rises: first the budget is asked to reclaim, because that is the room which handlers may need; then the
    callbacks run, in the order of their registration; memsafe.trim() comes last, where there is
    a budget: at CRITICAL always, at LOW when reclaimers freed something, to give back to the kernel what was freed.
    At CRITICAL the reserve is given back before all that.

    In a forked child the monitor is inert: closed, with its descriptors. Make a new one there.

    Args:
        budget: Passing its soft limit raises LOW. It is reclaimed when a level rises, and again each second while the
            cause lasts: at LOW down to its soft limit (without one, by what is missing), at CRITICAL as far as it goes.
        thresholds: What sets the levels; None: the defaults.
        reserve: How much memory to hold so that reclaimers and callbacks have room at CRITICAL, or an EmergencyReserve
            of the caller's. It is taken at the start, and after a CRITICAL at the first look at NORMAL; but only where
            more than LOW begins at is left with it. Given back when the monitor closes.
        root: The directory that stands for "/": a tree of proc and sys files. Only polling works on a copy.
        clock: Seconds, never going back: time.monotonic.

    Example:
        >>> with PressureMonitor() as monitor:
        ...     @monitor.on(PressureLevel.LOW)
        ...     def shed(event):
        ...         print(event.level.name, event.source)
        ...     monitor.simulate(PressureLevel.LOW)
        LOW simulate
    """

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        thresholds: Thresholds | None = None,
        reserve: EmergencyReserve | Size | None = None,
        root: Root = "/",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = budget
        self._thresholds = thresholds or Thresholds()
        if reserve is not None and not isinstance(reserve, EmergencyReserve):
            reserve = EmergencyReserve(reserve, held=False)
        self._reserve = reserve
        self._root = root
        self._clock = clock
        self._ladder = Ladder(self._thresholds.cooldown_s)
        self._responded_at_s = 0.0
        self._source_statuses: tuple[SourceStatus, ...] = ()
        # Guards what other threads touch: the callbacks, the requests, the streams, the last event, the changes and
        # whether they are wanted, and whether the thread still takes requests.
        self._lock = threading.Lock()
        self._callbacks: tuple[tuple[PressureLevel, Callback], ...] = ()
        self._requests: list[_Request] = []
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._last_event: PressureEvent | None = None
        self._stopping = True
        self._thread: threading.Thread | None = None
        self._changed_fd = -1
        self._changes = 0
        self._changes_wanted = False
        self._hub: Hub | None = None  # of the monitor's thread while that runs, but for wake()
        _monitors.add(self)

    # ------------------------------------------------------------------------------------------------ life

    def start(self) -> Self:
        """Open the sources and start the threads. Starting what runs is a no-op; what was closed may start again.

        Raises:
            KernelError: No native thread or no descriptor could be had.
            RuntimeError: No Python thread could be had.
        """
        with self._lock:
            if self._thread is not None:
                return self
            self._ladder = Ladder(self._thresholds.cooldown_s)
            self._last_event = None
            self._changes, self._changes_wanted = 0, False
            hub = self._open()
            self._requests = [_Request()]  # the first look
            hub.wake()
            self._stopping = False
            self._thread = threading.Thread(target=self._run, args=(hub,), name="memsafe-pressure", daemon=True)
            try:
                self._thread.start()
            except BaseException:
                self._stopping, self._thread = True, None
                self._shut(hub)
                raise
        return self

    def close(self) -> None:
        """Stop the threads and close every descriptor. Waits for a callback that runs, unless called from it.

        Twice is a no-op. Event streams end.
        """
        with self._lock:
            thread = self._thread
            if thread is None:
                return
            if not self._stopping:
                self._stopping = True
                self._wake()
        if thread is not threading.current_thread():
            thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Hub:
        hub = Hub(self._root, self._thresholds, self._budget)
        try:
            self._changed_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            with hub.reading():
                status = status_once(self._root)
            hub.choose(status)
            if self._reserve is not None:
                hub.give(self._reserve)
            self._take_reserve(status)
        except BaseException:
            self._shut(hub)
            raise
        self._hub = hub
        self._source_statuses = hub.statuses
        return hub

    def _shut(self, hub: Hub, *, forked: bool = False) -> None:
        self._hub = None
        hub.close(forked=forked)
        if not forked:
            self._give_reserve()
        self._source_statuses = hub.statuses
        changed_fd, self._changed_fd = self._changed_fd, -1
        if changed_fd >= 0:
            os.close(changed_fd)

    def _abandon(self) -> None:
        """Become inert in a forked child: the threads do not exist there, and the lock may be held for ever."""
        self._lock = threading.Lock()
        self._stopping = True
        self._thread = None
        self._requests = []
        self._streams = weakref.WeakSet()
        if self._hub is not None:
            self._shut(self._hub, forked=True)

    # ------------------------------------------------------------------------------------------------ the public face

    @property
    def level(self) -> PressureLevel:
        """The level in force."""
        return self._ladder.level

    @property
    def reserve(self) -> EmergencyReserve | None:
        """What is given back at CRITICAL."""
        return self._reserve

    @property
    def sources(self) -> list[SourceStatus]:
        """Every source of warnings, and why where one is not used."""
        return list(self._source_statuses)

    @overload
    def on(self, level: PressureLevel, function: CallbackT) -> CallbackT: ...
    @overload
    def on(self, level: PressureLevel, function: None = None) -> Callable[[CallbackT], CallbackT]: ...

    def on(
        self, level: PressureLevel, function: CallbackT | None = None
    ) -> CallbackT | Callable[[CallbackT], CallbackT]:
        """Register a callback: ``fn(event)``. Usable as a decorator; returns the function.

        One for LOW hears LOW and CRITICAL, one for CRITICAL only that, one for NORMAL the all-clear. It runs on the
        monitor's thread; a failure is logged, and the others run. A callback that comes while memory is short already
        hears the last event at once; a drill is not told again.
        """
        level = PressureLevel(level)
        if function is None:
            return lambda decorated: self.on(level, decorated)
        if not callable(function):
            raise TypeError(f"a callback must be callable: {function!r}")
        with self._lock:
            self._callbacks = (*self._callbacks, (level, function))
            last = self._last_event
            late = last is not None and last.source != "simulate" and level > PressureLevel.NORMAL
            if late and last is not None and _hears(level, last.level) and not self._stopping:
                self._post(_Request(callback=function, missed=last))
        return function

    def events(self) -> EventStream:
        """Return an async iterator of the changes from now on, until the monitor is closed.

        To be called in a coroutine of the event loop that will read it; asyncio and uvloop.

        Raises:
            RuntimeError: No event loop runs here, or the monitor does not.
        """
        from memsafe.pressure.stream import EventStream

        stream = EventStream()
        with self._lock:
            self._require_running()
            self._streams.add(stream)
        return stream

    def fileno(self) -> int:
        """Return an eventfd that becomes readable when the level changes, for a loop that polls by itself.

        It stays readable until it is read: ``os.eventfd_read(monitor.fileno())`` clears it and returns the number of
        changes since the last time; then look at ``level``. It is non-blocking, belongs to the monitor, and is closed
        with it.

        Raises:
            RuntimeError: The monitor does not run.
        """
        with self._lock:
            self._require_running()
            if not self._changes_wanted:
                self._changes_wanted = True
                os.eventfd_write(self._changed_fd, self._changes)
            return self._changed_fd

    def simulate(self, level: PressureLevel, *, timeout_s: float | None = None) -> None:
        """Hold a drill: go to *level* as if memory were so short, or as if it were well again.

        It takes the way of a real change: budgets are reclaimed, callbacks and streams hear it, and the level falls
        again after the cooldown. The next look at the machine goes up from there if there is a real cause. Going to
        the level in force changes nothing.

        Returns when the callbacks have run, except when called from one of them: then they run after it.

        Args:
            level: Where to go.
            timeout_s: How long to wait for the callbacks; None: as long as they take.

        Raises:
            RuntimeError: The monitor does not run.
            TimeoutError: The callbacks did not end in time; they go on.
        """
        self._request(_Request(level=PressureLevel(level)), timeout_s)

    def check(self, *, timeout_s: float | None = None) -> PressureLevel:
        """Look at the machine now instead of at the next wake-up, and return the level.

        Returns, and raises, as simulate().
        """
        self._request(_Request(), timeout_s)
        return self.level

    def _require_running(self) -> None:
        if self._stopping:
            raise RuntimeError("the monitor does not run: use it as a context manager, or call start()")

    def _request(self, request: _Request, timeout_s: float | None) -> None:
        with self._lock:
            self._require_running()
            self._post(request)
            thread = self._thread
        if thread is not threading.current_thread() and not request.done.wait(timeout_s):
            raise TimeoutError(f"the monitor's callbacks did not end within {timeout_s} s")

    def _post(self, request: _Request) -> None:
        self._requests.append(request)
        self._wake()

    def _wake(self) -> None:
        if self._hub is not None:
            self._hub.wake()

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self, hub: Hub) -> None:
        requests: list[_Request] = []
        rest_s = 0.0
        try:
            while not self._stopping:
                reports = hub.wait(rest_s)
                with self._lock:
                    requests, self._requests = self._requests, []
                before = self.level
                self._turn(hub, reports, requests)
                rest_s = _REST_S if self.level is before and not requests else 0.0
        finally:
            self._end(hub, requests)

    def _end(self, hub: Hub, requests: list[_Request]) -> None:
        with self._lock:
            self._stopping = True
            requests = [*requests, *self._requests]
            self._requests = []
            streams, self._streams = list(self._streams), weakref.WeakSet()
            if self._hub is not None:
                self._shut(hub)
            self._thread = None
        for stream in streams:
            stream.feed(None)
        for request in requests:
            request.done.set()

    def _turn(self, hub: Hub, reports: list[Report], requests: list[_Request]) -> None:
        """Do what there is to do. Nothing that fails in it ends the thread, or keeps a caller waiting."""
        wants_look = any(request.level is None and request.callback is None for request in requests)
        try:
            with hub.reading():
                heard, causes = hub.hear(reports)
                status = status_once(self._root) if heard or wants_look else None
            if status is not None:
                self._decide(hub, status, heard, causes)
            for request in requests:
                if request.level is not None:
                    self._drill(hub, request.level)
            if status is None:
                hub.provide()  # waking up has given it back
        except Exception:
            pause_s = self._thresholds.poll_s_max
            _log.exception("the monitor could not look at the machine; it tries again in %s s", pause_s)
            hub.poll_after(pause_s)
        for request in requests:
            # Unless an announcement came in between, which the callback has heard.
            if request.callback and request.missed and request.missed is self._last_event:
                self._call(request.callback, request.missed)
        for request in requests:
            request.done.set()

    def _decide(self, hub: Hub, status: MemoryStatus, heard: list[str], causes: list[Cause]) -> None:
        judgement = levels.judge(status, self._thresholds, causes)
        now_s = self._clock()
        previous = self._ladder.level
        level = self._ladder.move(judgement.raised, judgement.held, now_s)
        if level != previous:
            woken_by = next((name for name in heard if name != "polling"), "polling")
            self._announce(previous, judgement, judgement.source or woken_by, now_s)
        elif judgement.raised > PressureLevel.NORMAL and now_s - self._responded_at_s >= _RESPOND_AGAIN_S:
            self._respond_again(judgement)
        # Last: whoever is to be warned should not wait for it. Setting a v1 threshold takes the kernel some 30 ms.
        if hub.choose(status):
            self._source_statuses = hub.statuses
        self._set_timer(hub, status, within_s=levels.RECOVERY_S if causes else None)
        hub.provide(status)
        if level == PressureLevel.NORMAL:
            self._take_reserve(status)

    def _drill(self, hub: Hub, level: PressureLevel) -> None:
        previous, now_s = self._ladder.level, self._clock()
        if level == previous:
            return
        with hub.reading():
            status = status_once(self._root)
        judgement = levels.judge(status, self._thresholds)
        self._ladder.force(level, now_s)
        drill = replace(judgement, raised=level, held=level, detail=f"simulated; {judgement.detail}")
        self._announce(previous, drill, "simulate", now_s)
        self._set_timer(hub, status)

    def _set_timer(self, hub: Hub, status: MemoryStatus, within_s: float | None = None) -> None:
        """Set when to look again: at the latest *within_s*, a cause that headroom says nothing of may pass."""
        falls_after_s = self._ladder.falls_after_s(self._clock())
        after_s = levels.poll_after_s(status, self._thresholds, hub.guards)
        hub.poll_after(min(each for each in (after_s, falls_after_s, within_s) if each is not None), status)

    def _take_reserve(self, status: MemoryStatus) -> None:
        reserve = self._reserve
        if reserve is None or reserve.held_bytes or not levels.has_room(status, self._thresholds, reserve.size_bytes):
            return
        try:
            reserve.take()
        except KernelError as error:
            _log.warning("the emergency reserve cannot be taken: %s", error)
        except ValueError:
            self._reserve = None  # its owner has closed it

    def _give_reserve(self) -> None:
        if self._reserve is None:
            return
        try:
            self._reserve.give()
        except KernelError as error:
            _log.warning("the emergency reserve cannot be given back: %s", error)

    # ------------------------------------------------------------------------------------------------ telling

    def _announce(self, previous: PressureLevel, judgement: Judgement, source: str, now_s: float) -> None:
        event = PressureEvent(
            level=self.level,
            previous=previous,
            source=source,
            available_bytes=judgement.available_bytes,
            limit_bytes=judgement.limit_bytes,
            at_s=now_s,
            detail=judgement.detail,
        )
        with self._lock:
            self._last_event = event
            self._changes += 1
            callbacks, streams = self._callbacks, list(self._streams)
            # Not for nobody: beside busy threads, a system call may have to wait for the GIL.
            if self._changes_wanted:
                os.eventfd_write(self._changed_fd, 1)
        rose = event.level > previous
        if rose and event.level == PressureLevel.CRITICAL:
            self._give_reserve()
        for stream in streams:
            stream.feed(event)
        freed_bytes = self._reclaim(event.level, judgement.shortage_bytes) if rose else 0
        for wanted, callback in callbacks:
            if _hears(wanted, event.level):
                self._call(callback, event)
        # At CRITICAL always: the callbacks may have freed memory that no budget knows.
        if rose and self._budget is not None and (freed_bytes > 0 or event.level == PressureLevel.CRITICAL):
            self._trim()

    def _respond_again(self, judgement: Judgement) -> None:
        freed_bytes = self._reclaim(judgement.raised, judgement.shortage_bytes)
        if freed_bytes > 0:
            self._trim()

    def _call(self, callback: Callback, event: PressureEvent) -> None:
        began_s = time.monotonic()
        try:
            callback(event)
        except BaseException:
            # SystemExit too: a callback must not end the thread that warns the others.
            _log.exception("the callback %r for %s failed; the others run", callback, event.level.name)
        took_s = time.monotonic() - began_s
        if took_s > _SLOW_CALLBACK_S:
            _log.warning("the callback %r for %s took %.1f s; the next ones waited", callback, event.level.name, took_s)

    def _reclaim(self, level: PressureLevel, shortage_bytes: int) -> int:
        """Ask the budget to make room; the bytes by which it fell."""
        self._responded_at_s = self._clock()
        if self._budget is None:
            return 0
        try:
            need_bytes = _to_reclaim(self._budget, level, shortage_bytes)
            return self._budget.reclaim(need_bytes) if need_bytes > 0 else 0
        except Exception:
            _log.exception("reclaiming the budget %r failed", self._budget)
            return 0

    def _trim(self) -> None:
        try:
            give_back()
        except Exception:
            _log.exception("giving memory back failed")


def _hears(wanted: PressureLevel, level: PressureLevel) -> bool:
    """Whether a callback for *wanted* hears of *level*."""
    return level == wanted if wanted == PressureLevel.NORMAL else level >= wanted


def _to_reclaim(budget: Budget, level: PressureLevel, shortage_bytes: int) -> int:
    used_bytes = budget.used_bytes
    if level == PressureLevel.CRITICAL:
        # A reclaimer may hold more than it has reserved: ask even where nothing is charged.
        return max(used_bytes, 1)
    soft_limit_bytes = budget.soft_limit_bytes
    return min(used_bytes, shortage_bytes) if soft_limit_bytes is None else used_bytes - soft_limit_bytes


# What a fork must reach in the child; a monitor in it owns nothing until it is started.
_monitors: weakref.WeakSet[PressureMonitor] = weakref.WeakSet()


def _abandon_all() -> None:
    for monitor in list(_monitors):
        monitor._abandon()


os.register_at_fork(after_in_child=_abandon_all)
