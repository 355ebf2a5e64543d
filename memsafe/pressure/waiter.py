"""The native waiter, for Python."""

from __future__ import annotations

import errno
import itertools
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from memsafe._native import check, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterable

    from memsafe._kernel.kept import KeptFiles
    from memsafe.pressure.emergency import EmergencyReserve
    from memsafe.pressure.reserve import BlockReserve

_REPORTS = 64


class How(IntEnum):
    """How a source signals, and what has to be done so that it can signal again; see memsafe_native/cdef/waiter.h."""

    KERNFS = lib.MS_WAITER_KERNFS
    TRIGGER = lib.MS_WAITER_TRIGGER
    COUNTER = lib.MS_WAITER_COUNTER
    STREAM = lib.MS_WAITER_STREAM


@dataclass(frozen=True, slots=True)
class Report:
    """What happened on one source since the last take().

    Attributes:
        token: Which source.
        count: How often; of a COUNTER, the sum of what was read.
        first_ns: When the native thread saw the first of it, by time.monotonic_ns().
        lost_errno: Not 0: the source failed and is no longer waited for.
    """

    token: int
    count: int
    first_ns: int
    lost_errno: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What is left under a limit: *base_bytes* and the sum of all terms.

    Attributes:
        token: A name for it, not 0.
        base_bytes: What is added to the terms.
        tell_bytes: It is told at once, as by the timer, when no more is left than this.
        give_bytes: The emergency reserve is given back at once when no more is left than this.
        added_bytes: What the terms that only add make now.
        terms: A descriptor, what its line begins with (empty: the file is one number), and what to multiply it by;
            at most three, those that only add last.
        rests: The kernel tells by itself when it matters: it is not read as time passes.
        held: Terms of what processes have and is no cache, at most two: told besides, no part of what is left.
    """

    token: int
    base_bytes: int
    tell_bytes: int
    give_bytes: int
    added_bytes: int
    terms: tuple[tuple[int, bytes, int], ...]
    rests: bool = False
    held: tuple[tuple[int, bytes, int], ...] = ()


def new_gauges() -> Any:
    """Return room for as many gauges as native code reads."""
    return ffi.new("ms_gauge[]", lib.MS_GAUGES)


def fill_gauges(gauges: Any, readings: Iterable[Reading]) -> int:
    """Put *readings*, as far as there is room for them, into *gauges* of new_gauges(); return how many."""
    count = 0
    for count, reading in enumerate(itertools.islice(readings, lib.MS_GAUGES), 1):
        gauge = gauges[count - 1]
        gauge.token, gauge.rests, gauge.seen_bytes = reading.token, reading.rests, 0
        gauge.base_bytes, gauge.added_bytes = reading.base_bytes, reading.added_bytes
        gauge.tell_bytes, gauge.give_bytes = reading.tell_bytes, reading.give_bytes
        _fill_terms(gauge.terms, reading.terms)
        _fill_terms(gauge.held, reading.held)
    return count


def _fill_terms(terms: Any, given: tuple[tuple[int, bytes, int], ...]) -> None:
    for index in range(len(terms)):
        terms[index] = given[index] if index < len(given) else (-1, b"", 0)


class Look:
    """What Waiter.wait() does besides: all that lies between two looks at the machine, in one native call.

    Args:
        timer_fd: A timer of open_timer().
        kept: What is read when there is something to tell.
        reserve: What is given back when the wait ends, before anything is allocated.
        alarm_fd: Another timer, which fires when no next wait follows for some time.
    """

    def __init__(self, timer_fd: int, kept: KeptFiles, reserve: BlockReserve, alarm_fd: int = -1) -> None:
        self._kept = kept
        self._reserve = reserve
        # Made now, as all that is needed under memory pressure.
        self._gauges = new_gauges()
        self._once = ffi.new("ms_gauge_pace *", (1, 1, 1, 0))  # when to read again is nobody's question
        self.native: Any = ffi.new(
            "ms_waiter_look *",
            {
                "timer_fd": timer_fd,
                "timer_ns": -1,
                "gauges": self._gauges,
                "kept": kept.native,
                "alarm_fd": alarm_fd,
            },
        )

    def set(self, *, timer_s: float | None = None, rest_s: float = 0.0, alarm_s: float = 0.0) -> None:
        """Before the next wait, set the timer (None: leave it), and let signals gather for *rest_s*.

        The alarm is stopped when the wait begins, and fires *alarm_s* after its end; 0: it is not touched.
        """
        self.native.timer_ns = -1 if timer_s is None else int(timer_s * 1e9)
        self.native.rest_ns = int(rest_s * 1e9)
        self.native.alarm_ns = int(alarm_s * 1e9)

    def pace(self, fill_bytes_per_s: int, least_s: float, most_s: float) -> None:
        """Let gauges be read before so much growth could reach what they tell, within bounds."""
        self.native.pace = (fill_bytes_per_s, int(least_s * 1e9), int(most_s * 1e9), 0)

    def read(self, readings: Iterable[Reading]) -> None:
        """Let these gauges, as far as there is room for them, be read from when the timer is set the next time."""
        self.native.gauge_count = fill_gauges(self._gauges, readings)

    def has_told(self) -> bool:
        """Whether any of these gauges has something to tell by now: read at once, all of them, with the GIL."""
        return bool(lib.ms_gauge_read(self._gauges, self.native.gauge_count, 1, self._once).told)

    @property
    def gave(self) -> tuple[int, int] | None:
        """The reading that the emergency reserve was given back for, and what was left there; None: it was not."""
        return (self.native.gave_for, self.native.gave_at_bytes) if self.native.gave_for else None

    def ended(self, count: int) -> None:
        """The wait is over, and *count* sources had something to tell; less than 0: it failed."""
        self._reserve.give()
        if count > 0:
            self._kept.was_read()


class Waiter:
    """One native thread that waits on many descriptors, never needs the GIL, and tells through one eventfd.

    Args:
        capacity: The most sources at a time; nothing is allocated for them later.

    Raises:
        KernelError: No thread or no descriptor could be had.
    """

    def __init__(self, capacity: int = 128) -> None:
        made = ffi.new("ms_waiter **")
        check(lib.ms_waiter_open(capacity, made), "start the native waiter")
        self._native: Any = made[0]
        # Made now: taking must not allocate under memory pressure.
        self._reports: Any = ffi.new("ms_waiter_report[]", _REPORTS)

    def add(self, fd: int, how: How, token: int) -> None:
        """Wait for *fd*, which stays the caller's, until it is removed.

        Raises:
            KernelError: The file cannot be waited for, the token is taken (EEXIST), or the waiter is full (ENOSPC).
        """
        check(lib.ms_waiter_add(self._open(), fd, how, token), f"wait for descriptor {fd}")

    def remove(self, token: int) -> None:
        """Wait for it no longer; its descriptor is not touched again.

        Raises:
            KernelError: There is no such source (ENOENT).
        """
        check(lib.ms_waiter_remove(self._open(), token), "remove a source")

    def drop_gauges(self) -> None:
        """Read no gauges any longer; their descriptors are not touched again."""
        check(lib.ms_waiter_drop_gauges(self._open()), "drop the gauges")

    def give(self, reserve: EmergencyReserve) -> None:
        """Let it be given back as soon as a gauge asks for it, in the native thread."""
        check(lib.ms_waiter_set_reserve(self._open(), reserve._native), "share the emergency reserve")

    def require_cpu_time(self) -> None:
        """Make sure that gauges are read as the process's CPU time passes, too.

        Raises:
            KernelError: They are not: no thread, or a sandbox does not let one sleep on that clock.
        """
        check(lib.ms_waiter_follows_cpu(self._open()), "clock_nanosleep(CLOCK_PROCESS_CPUTIME_ID)")

    def fileno(self) -> int:
        """Return an eventfd that is readable while there is something to take."""
        return int(lib.ms_waiter_fileno(self._open()))

    def take(self) -> list[Report]:
        """Return what happened since the last call, and make fileno() unreadable where that was all."""
        return self._reported(lib.ms_waiter_take(self._open(), self._reports, _REPORTS))

    def wait(self, look: Look | None = None) -> list[Report]:
        """Wait until fileno() is readable, then take(); nothing, where somebody only wrote to it."""
        native = ffi.NULL if look is None else look.native
        count = lib.ms_waiter_wait(self._open(), native, self._reports, _REPORTS)
        if look is not None:
            look.ended(count)
        return self._reported(count)

    def _reported(self, count: int) -> list[Report]:
        if count == -errno.EINTR:
            return []
        check(count, "take from the native waiter")
        return [Report(each.token, each.count, each.first_ns, each.lost_errno) for each in self._reports[0:count]]

    def close(self) -> None:
        """Join the thread and close the waiter's own descriptors; in a forked child, only those. Twice is a no-op."""
        native, self._native = self._native, None
        if native is not None:
            lib.ms_waiter_close(native)

    def _open(self) -> Any:
        if self._native is None:
            raise ValueError("the waiter is closed")
        return self._native


def open_timer() -> int:
    """Return a timer, as How.COUNTER.

    Raises:
        KernelError: No descriptor could be had.
    """
    return check(lib.ms_timer_open(), "timerfd_create")


def set_timer(fd: int, delay_s: float) -> None:
    """Let a timer fire once, *delay_s* from now."""
    check(lib.ms_timer_set(fd, int(delay_s * 1e9)), "timerfd_settime")
