"""The monitor: one native thread that waits, one Python thread that looks, decides and calls back."""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, overload

from memsafe.budget.reclaim import is_coroutine_function
from memsafe.errors import KernelError
from memsafe.pressure import journal, levels
from memsafe.pressure.alarm import alarm
from memsafe.pressure.deputy import Deputy
from memsafe.pressure.dispatch import Dispatcher, hears
from memsafe.pressure.emergency import EmergencyReserve, ReserveKeeper
from memsafe.pressure.hub import Hub
from memsafe.pressure.hurry import hurry as shorter_turns
from memsafe.pressure.levels import Cause, Judgement, Ladder, PressureEvent, PressureLevel, Thresholds
from memsafe.pressure.loops import Loops
from memsafe.pressure.sources import WATERMARK
from memsafe.status import status_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self

    from memsafe._kernel.files import Root
    from memsafe.budget import Budget
    from memsafe.pressure.dispatch import Callback, Callbacks
    from memsafe.pressure.sources import SourceStatus
    from memsafe.pressure.stream import EventStream
    from memsafe.pressure.waiter import Report
    from memsafe.sizes import Size
    from memsafe.status import MemoryStatus

CallbackT = TypeVar("CallbackT", bound="Callback")

_SIMULATE = "simulate"

# A v1 cgroup can signal a thousand times a second; while nothing changes, one look in so long is enough.
_REST_S = 0.002
# What was freed is given back to the kernel in a quiet moment: collecting garbage may take longer than memory to fill.
_QUIET_S = 0.05


class _Request:
    """What another thread wants the monitor's thread to do, and whether it was done.

    A drill has a level; a callback that came late has the event that it missed, and its place among the callbacks; a
    check has neither.
    """

    __slots__ = ("callback", "done", "failure", "is_dropped", "level", "missed", "place")

    def __init__(
        self,
        level: PressureLevel | None = None,
        callback: Callback | None = None,
        missed: PressureEvent | None = None,
        place: int = 0,
    ) -> None:
        self.level = level
        self.callback = callback
        self.missed = missed
        self.place = place
        self.is_dropped = False
        self.failure: Exception | None = None
        self.done = threading.Event()


class PressureMonitor:
    """Hears early that memory runs low, and tells.

    Every source of warnings that this process may use is tried; ``sources`` lists each, with the reason where one is
    not used. What the kernel signals is a wake-up: the level follows from the headroom of every limit on the process
    (see Thresholds), except that stalls and OOMs raise it by themselves.

    When a level rises: first the budget is asked to reclaim, because that is the room which handlers may need; then the
    callbacks run, in the order of their registration; then the machine is looked at again. memsafe.trim() comes last,
    where there is a budget: at CRITICAL always, at LOW when reclaimers freed something; in a quiet moment, because
    collecting garbage may take longer than memory to fill. At CRITICAL the reserve is given back before all that.

    All of it runs on one thread of the monitor's own, never two at once. While that is kept, another thread looks at
    the machine: the level, fileno() and events() go on, the reserve is given back, and what keeps it for a second is
    logged with its stack. Callbacks hear of it afterwards, as one change.

    CRITICAL also ends a snapshot by fork that runs in this process, at once: see fork_snapshot().

    In a forked child the monitor is inert: closed, with its descriptors. Make a new one there.

    Args:
        budget: Passing its soft limit raises LOW. It is reclaimed when a level rises and while the cause lasts: at LOW
            by what is missing, but not below its soft limit; at CRITICAL each reclaimer is asked for all. It stops
            between two reclaimers when the headroom is back; what is not told by headroom (a stall, an OOM, the soft
            limit, a drill) is answered in full: at LOW down to the soft limit, or to nine tenths of it, where the cause
            ends, if that is the cause; at CRITICAL as far as it goes.
        thresholds: What sets the levels; None: the defaults.
        reserve: How much memory to hold so that reclaimers and callbacks have room at CRITICAL, or an EmergencyReserve
            of the caller's. It is taken at the start, and after a CRITICAL at the first look at NORMAL; but only where
            more than LOW begins at is left with it, and while no other monitor that shares it is short of memory. One
            of the monitor's own is given back when it closes; the caller's is left as it is.
        hurry: Lower sys.setswitchinterval() to 0.5 ms while memory is short, and put it back after: busy threads have
            shorter turns then, and reclaimers do not wait 5 ms for the GIL at each of their system calls. Not for a
            budget over its soft limit.
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
        hurry: bool = True,
        root: Root = "/",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = budget
        self._thresholds = thresholds or Thresholds()
        self._keeper = ReserveKeeper(reserve, self._thresholds)
        self._hurries = hurry
        self._root = root
        self._clock = clock
        # Who has the lead (see Deputy) moves the ladder, and leaves with the dispatcher what is to be told in the
        # monitor's thread.
        self._ladder = Ladder(self._thresholds.cooldown_s)
        self._dispatcher = Dispatcher(budget, clock, self._shortage_bytes)
        self._source_statuses: tuple[SourceStatus, ...] = ()
        # Guards what other threads touch: the callbacks, the requests, the last events, and whether the thread still
        # takes requests.
        self._lock = threading.Lock()
        self._callbacks: Callbacks = ()
        self._requests: list[_Request] = []
        self._last_event: PressureEvent | None = None
        self._last_real: PressureEvent | None = None  # that was no drill
        self._stopping = True
        self._thread: threading.Thread | None = None
        self._deputy: Deputy | None = None
        self._loops = Loops()
        self._hub: Hub | None = None  # of the monitor's thread while that runs, but for wake()
        _monitors[id(self)] = self

    # ------------------------------------------------------------------------------------------------ life

    def start(self) -> Self:
        """Open the sources and start the threads. Starting what runs is a no-op; what was closed may start again.

        Where it is being closed, that is waited for, and so for a callback that runs.

        Raises:
            KernelError: No native thread or no descriptor could be had.
            RuntimeError: No Python thread could be had; or this is called in a callback of the monitor's own after
                close(), which cannot end before the callback returns.
        """
        while True:
            with self._lock:
                ending = self._thread
                if ending is None:
                    refusal = self._launch()
                    break
                if not self._stopping:
                    return self
            if self._is_own_thread():
                raise RuntimeError("the monitor is closed, and ends when this callback returns; start it after that")
            ending.join()
        if refusal is not None:
            _say_refused(refusal)
        return self

    def _launch(self) -> KernelError | None:
        """Start, with the lock held; return why there is no reserve, to be logged without it."""
        self._ladder = Ladder(self._thresholds.cooldown_s)
        self._last_event = self._last_real = None
        self._loops = Loops()
        self._dispatcher.forget()
        hub, refusal = self._open()
        self._requests = [_Request()]  # the first look
        hub.wake()
        self._stopping = False
        thread = threading.Thread(target=self._run, args=(hub,), name="memsafe-pressure", daemon=True)
        try:
            self._deputy = Deputy(hub, lambda is_first: self._stand_in(hub, is_first))
            self._deputy.start()
            self._thread = thread
            thread.start()
        except BaseException:
            self._stopping = True
            if thread.ident is not None:  # a signal's handler raised when it ran already: it closes all, and ends
                hub.wake()
                raise
            self._thread = None
            if self._deputy is not None:
                self._deputy.end()
            self._shut(hub)
            raise
        return refusal

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
        if not self._is_own_thread():
            thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> tuple[Hub, KernelError | None]:
        hub = Hub(self._root, self._thresholds, self._budget)
        try:
            self._loops.open()
            with hub.reading():
                status = status_once(self._root)
            hub.choose(status)
            if (reserve := self.reserve) is not None:
                hub.give(reserve)
            refusal = self._keeper.take_if_room(status)
        except BaseException:
            self._shut(hub)
            raise
        self._hub = hub
        self._source_statuses = hub.statuses
        return hub, refusal

    def _shut(self, hub: Hub, *, forked: bool = False) -> None:
        shorter_turns.release(self)
        self._hub = self._deputy = None
        hub.close(forked=forked)
        self._keeper.leave(forked=forked)
        self._source_statuses = hub.statuses
        self._loops.close()

    def _abandon(self) -> None:
        """Become inert in a forked child: the threads do not exist there, and the lock may be held for ever."""
        self._lock = threading.Lock()
        self._stopping = True
        self._thread = None
        self._requests = []
        if self._deputy is not None:
            self._deputy.abandon()
        if self._hub is not None:
            self._shut(self._hub, forked=True)
        self._loops = Loops()

    # ------------------------------------------------------------------------------------------------ the public face

    @property
    def level(self) -> PressureLevel:
        """The level in force; of a monitor that was closed, the last one."""
        return self._ladder.level

    @property
    def reserve(self) -> EmergencyReserve | None:
        """What is given back at CRITICAL."""
        return self._keeper.reserve

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
        hears the last event at once; a drill is not told again, but what was short before it is.

        Raises:
            ValueError: *level* is none.
            TypeError: *function* cannot be called, or is a coroutine function, which a thread cannot run: use events().
        """
        level = PressureLevel(level)
        if function is None:
            return lambda decorated: self.on(level, decorated)
        if not callable(function):
            raise TypeError(f"a callback must be callable: {function!r}")
        if is_coroutine_function(function):
            raise TypeError(f"a callback runs on a thread, where no coroutine does: use events(), not {function!r}")
        with self._lock:
            self._callbacks = (*self._callbacks, (level, function))
            missed = self._last_real
            is_late = missed is not None and level > PressureLevel.NORMAL and hears(level, missed.level)
            if is_late and not self._stopping:
                self._post(_Request(callback=function, missed=missed, place=len(self._callbacks)))
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
            self._loops.add(stream)
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
            return self._loops.fileno()

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
            RuntimeError: The monitor does not run, has ended before it came to that, or could not look at the machine.
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
        if timeout_s is not None and timeout_s > threading.TIMEOUT_MAX:
            timeout_s = None  # math.inf, say
        with self._lock:
            self._require_running()
            self._post(request)
        if not self._is_own_thread() and not request.done.wait(timeout_s):
            raise TimeoutError(f"the monitor's callbacks did not end within {timeout_s} s")
        if request.is_dropped:
            raise RuntimeError("the monitor has ended, and did not do what it was asked for")
        if request.failure is not None:
            raise RuntimeError("the monitor could not look at the machine, and tries again") from request.failure

    def _is_own_thread(self) -> bool:
        """Whether this is called in one of the monitor's threads, which must not wait for themselves."""
        deputy = self._deputy
        return threading.current_thread() is self._thread or (deputy is not None and deputy.is_current)

    def _post(self, request: _Request) -> None:
        self._requests.append(request)
        self._wake()

    def _wake(self) -> None:
        if self._hub is not None:
            self._hub.wake()

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self, hub: Hub) -> None:
        if (deputy := self._deputy) is None:
            return  # start() was interrupted, and has closed all
        has_led, rest_s = False, 0.0
        try:
            hub.ready()
            deputy.begin()
            while not self._stopping:
                reports = deputy.wait(rest_s)
                with self._lock:
                    requests, self._requests = self._requests, []
                deputy.has_led = False
                before = self.level
                self._dispatcher.has_answered = False
                self._turn(hub, deputy, reports, requests, wants_look=has_led)
                # It may have been woken for a request; and what it has seen since may have grown.
                has_led = deputy.has_led
                if has_led and not self._stopping:
                    hub.wake()
                idle = self.level is before and not requests and not self._dispatcher.has_answered
                rest_s = _REST_S if idle else 0.0
        except KernelError:
            journal.exception("the monitor cannot go on, and ends: somebody else has closed descriptors of its own")
        finally:
            if self._hub is hub:  # else this is a forked child
                self._stopping = True
                deputy.end()
                self._end(hub)

    def _end(self, hub: Hub) -> None:
        with self._lock:
            self._stopping = True
            requests, self._requests = self._requests, []
            loops = self._loops
            self._shut(hub)
            self._thread = None
        loops.end()
        for request in requests:
            request.is_dropped = True
            request.done.set()

    def _turn(
        self, hub: Hub, deputy: Deputy, reports: list[Report], requests: list[_Request], *, wants_look: bool
    ) -> None:
        """Do what there is to do. Nothing that fails in it ends the thread, or keeps a caller waiting."""
        wants_look = wants_look or any(request.level is None and request.callback is None for request in requests)
        try:
            with self._surviving(hub, requests):
                has_looked = self._look(hub, reports, wants_look, deputy)
                for request in requests:
                    if request.level is not None:
                        self._drill(hub, request.level, deputy)
                if not has_looked:
                    hub.provide()  # waking up has given it back
            with self._surviving(hub):
                for request in requests:
                    if request.callback is not None and request.missed is not None:
                        self._dispatcher.tell_late(deputy, request.callback, request.missed, request.place)
                self._dispatcher.tell(deputy)  # what came up in the meantime
        finally:
            for request in requests:
                request.done.set()

    def _stand_in(self, hub: Hub, is_first: bool) -> None:
        """Look in the deputy's thread: the level moves, and loops hear of it; the rest is left for the other one."""
        reports = [] if is_first else hub.wait(_REST_S)
        with self._surviving(hub):
            if is_first:
                hub.draw()
            if not self._look(hub, reports, wants_look=is_first):
                hub.provide()

    @contextmanager
    def _surviving(self, hub: Hub, requests: Iterable[_Request] = ()) -> Iterator[None]:
        """Log what fails, and try again later; *requests* that this kept from being done are told."""
        try:
            yield
        except Exception as error:
            for request in requests:
                request.failure = error
            pause_s = self._thresholds.poll_s_max
            journal.exception("the monitor could not look at the machine; it tries again in %s s", pause_s)
            hub.poll_after(pause_s)

    def _look(self, hub: Hub, reports: list[Report], wants_look: bool, deputy: Deputy | None = None) -> bool:
        """Look at the machine if there is reason to, and act on it; whether there was reason.

        Args:
            hub: Where the sources are.
            reports: What it heard.
            wants_look: Even if it heard nothing.
            deputy: Who has the lead while callbacks run; None: this is its thread, which runs none.
        """
        with hub.reading():
            heard, causes = hub.hear(reports)
            status = status_once(self._root) if heard or wants_look else None
        if status is None:
            return False
        judgement = self._decide(status, heard, causes)
        recovers = bool(causes)
        # The figures are as old as the answer took: meanwhile memory may have filled up again.
        while deputy is not None and self._dispatcher.answer(deputy, judgement):
            if deputy.has_led or self._stopping:
                return True  # it has looked since, and has done all that follows
            hub.draw()  # callbacks may have used up what the wake-up gave
            with hub.reading():
                _, causes = hub.hear([])
                status = status_once(self._root)
            judgement = self._decide(status, heard, causes)
        # Last: whoever is to be warned should not wait for it. Setting a v1 threshold takes the kernel some 30 ms.
        if hub.choose(status):
            self._source_statuses = hub.statuses
        within_s = _QUIET_S if self._dispatcher.wants_trim else levels.RECOVERY_S if recovers else None
        self._set_timer(hub, status, within_s)
        hub.provide(status)
        if self.level == PressureLevel.NORMAL and (refusal := self._keeper.take_if_room(status)) is not None:
            _say_refused(refusal)
        return True

    def _decide(self, status: MemoryStatus, heard: list[str], causes: list[Cause]) -> Judgement:
        judgement = levels.judge(status, self._thresholds, causes)
        now_s = self._clock()
        previous = self._ladder.level
        if self._ladder.move(judgement.raised, judgement.held, now_s) != previous:
            woken_by = next((name for name in heard if name != "polling"), "polling")
            self._announce(previous, judgement, judgement.source or woken_by, now_s)
        # A budget that is over its soft limit is none: there is room, maybe for long.
        if self._hurries and judgement.raised > PressureLevel.NORMAL and judgement.source != WATERMARK:
            shorter_turns.ask(self)
        return judgement

    def _shortage_bytes(self) -> int:
        """Look, for the responder, in the midst of its work: what is missing until every cause has passed."""
        hub, deputy = self._hub, self._deputy
        if hub is None or deputy is None:
            return 0  # a reclaimer has forked, and this is the child
        with deputy.back():
            hub.draw()
            with hub.reading():
                return levels.judge(status_once(self._root), self._thresholds).shortage_bytes

    def _drill(self, hub: Hub, level: PressureLevel, deputy: Deputy) -> None:
        previous, now_s = self._ladder.level, self._clock()
        if level == previous:
            return
        with hub.reading():
            status = status_once(self._root)
        judgement = levels.judge(status, self._thresholds)
        self._ladder.force(level, now_s)
        detail = f"simulated; {judgement.detail}"
        drill = replace(judgement, raised=level, held=level, source=_SIMULATE, detail=detail)
        self._announce(previous, drill, _SIMULATE, now_s)
        self._dispatcher.tell(deputy)
        if not deputy.has_led:
            self._set_timer(hub, status)

    def _set_timer(self, hub: Hub, status: MemoryStatus, within_s: float | None = None) -> None:
        """Set when to look again: at the latest *within_s*, a cause that headroom says nothing of may pass."""
        falls_after_s = self._ladder.falls_after_s(self._clock())
        after_s = levels.poll_after_s(status, self._thresholds, hub.guards(status))
        hub.poll_after(min(each for each in (after_s, falls_after_s, within_s) if each is not None), status)

    # ------------------------------------------------------------------------------------------------ telling

    def _announce(self, previous: PressureLevel, judgement: Judgement, source: str, now_s: float) -> None:
        """Tell loops at once, and leave the rest for the dispatcher; in either thread, with the lead."""
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
            if source != _SIMULATE:
                self._last_real = event
            elif self._last_real is not None and event.level < self._last_real.level:
                self._last_real = None  # the next look tells it again, if it still stands
            self._dispatcher.untold = event, judgement, self._callbacks
        if event.level == PressureLevel.CRITICAL:
            self._keeper.give()
            alarm.sound(event)
        elif event.level == PressureLevel.NORMAL:
            shorter_turns.release(self)
        self._loops.tell(event)


def critical_event() -> PressureEvent | None:
    """Return why memory is at CRITICAL by a monitor that runs in this process; None: by none of them."""
    events = [monitor._last_event for monitor in _living() if not monitor._stopping]
    return next((event for event in events if event is not None and event.level == PressureLevel.CRITICAL), None)


# What a fork must reach in the child; a monitor in it owns nothing until it is started.
_monitors: weakref.WeakValueDictionary[int, PressureMonitor] = weakref.WeakValueDictionary()


def _living() -> list[PressureMonitor]:
    # Not by iteration, beside which another thread could not make a monitor; nor with a lock, for a signal's handler.
    return [monitor for reference in _monitors.valuerefs() if (monitor := reference()) is not None]


def _say_refused(error: KernelError) -> None:
    journal.warning("the emergency reserve cannot be taken: %s", error)


def _abandon_all() -> None:
    shorter_turns.renew()
    for monitor in _living():
        monitor._abandon()


os.register_at_fork(after_in_child=_abandon_all)
