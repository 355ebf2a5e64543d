"""A second thread that looks at the machine while user code keeps the monitor's own."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from memsafe.errors import KernelError
from memsafe.pressure import journal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from memsafe.pressure.hub import Hub
    from memsafe.pressure.waiter import Report

# So long may the monitor's thread be kept before another one looks; most callbacks are over by then.
STAND_IN_S = 0.02
SLOW_S = 1.0
_FRAMES_MAX = 20


class _Errand:
    """User code that the monitor's thread is in.

    Attributes:
        what, args: What it is, as logging takes it.
    """

    __slots__ = ("args", "began_s", "is_reported", "what")

    def __init__(self, what: str, args: tuple[object, ...]) -> None:
        self.what = what
        self.args = args
        self.began_s = time.monotonic()
        self.is_reported = False

    @property
    def took_s(self) -> float:
        return time.monotonic() - self.began_s


class Deputy:
    """Has the lead while the monitor's thread is away for long, and says what keeps it.

    The lead is the right to use the hub and to move the level. The monitor's thread has it from begin() on, but while
    it is away(). Where that takes longer than *STAND_IN_S*, which the hub's alarm tells, the deputy takes the lead
    until the other is back. It calls no user code but the handlers of the log, and those without the lead.

    Args:
        hub: What the lead is over.
        look: Called by the deputy with the lead: look at the machine, wait, look again. True: the first time, do not
            wait. A KernelError says that there is nothing to wait on any more, and ends the deputy.

    Attributes:
        has_led: Whether the deputy looked since this was last set to False, with the lead.
    """

    def __init__(self, hub: Hub, look: Callable[[bool], None]) -> None:
        self._hub = hub
        self._look = look
        self._lead = threading.Lock()
        self._leader_id = 0
        self._is_wanted_back = False
        self._is_waiting = True
        self._has_missed = False
        self._has_ended = False
        self._errand: _Errand | None = None
        self.has_led = False
        self._is_ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memsafe-pressure-deputy", daemon=True)

    def start(self) -> None:
        """Start the thread, and wait until it has opened its files: later there may be no room for that."""
        self._thread.start()
        self._is_ready.wait()

    @property
    def is_current(self) -> bool:
        """Whether this is called in the deputy's thread."""
        return threading.current_thread() is self._thread

    def begin(self) -> None:
        """Take the lead, in the monitor's thread."""
        self._leader_id = threading.get_ident()
        self._lead.acquire()

    def wait(self, rest_s: float) -> list[Report]:
        """Wait as Hub.wait(), in the monitor's thread: from its end on, that is watched."""
        self._is_waiting, self._has_missed = True, False
        reports = self._hub.wait(rest_s, alarm_s=STAND_IN_S)
        self._is_waiting = False
        # The alarm may have come before this thread had the GIL back.
        if self._has_missed:
            self._hub.alarm(STAND_IN_S)
        return reports

    @contextmanager
    def away(self, what: str, *args: object) -> Iterator[None]:
        """Give the lead away in the monitor's thread, for user code. What takes longer than *SLOW_S* is logged.

        Args:
            what: What it is, as logging takes it.
            *args: What fills its places.
        """
        errand = self._errand = _Errand(what, args)
        self._lead.release()
        try:
            yield
        finally:
            self._errand = None
            if not self._has_ended and (took_s := errand.took_s) >= SLOW_S:
                journal.warning(f"{what} took %.1f s; the next ones waited", *args, took_s)
            self._return()
            if self._has_ended:
                raise SystemExit  # user code has forked, and this is the child, where the monitor is inert

    @contextmanager
    def back(self) -> Iterator[None]:
        """Have the lead for a look, in the midst of away()."""
        self._return()
        try:
            yield
        finally:
            self._lead.release()

    def abandon(self) -> None:
        """Forget the thread in a forked child, which has none; it may have had the lead."""
        self._has_ended = True
        self._lead = threading.Lock()

    def end(self) -> None:
        """Join the thread, if it was started. Twice is a no-op."""
        if self._has_ended:
            return
        self._has_ended = True
        if self._hub.alarm(0) and self._thread.ident is not None:  # else nothing wakes it
            self._thread.join()

    def _return(self) -> None:
        if not self._lead.acquire(blocking=False):
            self._is_wanted_back = True
            self._hub.wake()
            self._lead.acquire()
            self._is_wanted_back = False

    def _run(self) -> None:
        try:
            self._hub.ready()
            self._hub.rehearse()
        except Exception:
            journal.exception("the first look failed; the machine is watched all the same")
        finally:
            self._is_ready.set()
        while self._hub.await_alarm() and not self._has_ended:
            is_first = True
            while not self._has_ended and self._lead.acquire(blocking=False):
                try:
                    self._lead_once(is_first)
                except KernelError:
                    return  # its descriptors were closed; the monitor's thread meets the same, and says so
                finally:
                    self._lead.release()
                if self._is_wanted_back:
                    break
                self._report()
                is_first = False
            if self._has_ended:
                return
            # It is back, and may go away again in this turn; or it was only slow in looking. In this order: one of the
            # two sees what the other has set.
            self._has_missed = True
            if not self._is_waiting:
                self._hub.alarm(STAND_IN_S)

    def _lead_once(self, is_first: bool) -> None:
        self.has_led = True
        errand = self._errand
        if errand is not None and not errand.is_reported:
            self._hub.poll_within(max(0.0, SLOW_S - errand.took_s))
        self._look(is_first)

    def _report(self) -> None:
        errand = self._errand
        if errand is None or errand.is_reported or (took_s := errand.took_s) < SLOW_S:
            return
        errand.is_reported = True
        where = _where(sys._current_frames().get(self._leader_id))
        journal.warning(
            f"{errand.what} has run for %.1f s and goes on; the level is still watched, but no callback can run. It is"
            " at\n%s",
            *errand.args,
            took_s,
            where,
        )


def _where(frame: FrameType | None) -> str:
    """Return the stack, the innermost last; without source lines, for which files would be opened."""
    lines: list[str] = []
    while frame is not None and len(lines) < _FRAMES_MAX:
        code = frame.f_code
        lines.append(f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}')
        frame = frame.f_back
    return "\n".join(reversed(lines))
