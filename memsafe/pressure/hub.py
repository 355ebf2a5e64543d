"""The sources that are open now, on one waiter."""

from __future__ import annotations

import errno
import itertools
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from memsafe._kernel import kept
from memsafe._kernel.descriptors import Owned
from memsafe._native import lib
from memsafe.errors import KernelError
from memsafe.pressure import gauges, journal, sources
from memsafe.pressure.gauges import Gauge
from memsafe.pressure.levels import Cause, PressureLevel
from memsafe.pressure.reserve import RESERVE_BYTES, BlockReserve
from memsafe.pressure.waiter import Look, Waiter, open_timer, set_timer
from memsafe.sizes import format_size
from memsafe.status import status_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

    from memsafe._kernel.files import Root
    from memsafe.budget import Budget
    from memsafe.pressure.emergency import EmergencyReserve
    from memsafe.pressure.gauges import Limit
    from memsafe.pressure.levels import Thresholds
    from memsafe.pressure.sources import Source, SourceStatus
    from memsafe.pressure.waiter import Reading, Report
    from memsafe.status import Constraint, MemoryStatus

# So much must be left for memory to be taken for the next look: it must not be that which fills the cgroup, even if
# others take more meanwhile. A sixteenth of the limit, within bounds.
_PLENTY_BYTES_MIN, _PLENTY_BYTES_MAX = 8 * RESERVE_BYTES, 64 * 1024 * 1024


# In a flood of signals, one look in so long; the native thread reads the gauges meanwhile.
_FLOOD_REST_S = 0.01


class Debounce:
    """How long to let signals gather before the next look: the longer a flood of them goes on, up to a bound.

    A v1 cgroup whose use goes to and fro about a threshold signals a thousand times a second, one that thrashes
    seven thousand times; each look costs the process some 300 us.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._rest_s = 0.0

    def rest_s(self, least_s: float) -> float:
        """Return it, at least *least_s*; with 0 nothing is waited for, and a flood begins anew."""
        self._rest_s = max(least_s, min(2 * self._rest_s, self._most_s)) if least_s else 0.0
        return self._rest_s

    def ended(self) -> None:
        """Nothing was signalled meanwhile: the flood is over."""
        self._rest_s = 0.0


class Hub:
    """Opens the sources that fit the limits of now, and asks those that signalled. Used by one thread at a time.

    Raises:
        KernelError: No thread or no descriptor could be had.
    """

    def __init__(self, root: Root, thresholds: Thresholds, budget: Budget | None = None) -> None:
        self._root = root
        self._thresholds = thresholds
        self._tokens = itertools.count(1)
        self._chosen: list[Source] = []
        self._guarded: frozenset[str] = frozenset()  # the v1 cgroups whose usage thresholds are set
        self._gauges: dict[Limit, Gauge] = {}
        self._limits_seen: object = None
        self._has_lost = False
        self._has_plenty = False
        self._polling = sources.Polling()
        self._watermark = sources.BudgetWatermark(budget) if budget is not None else None
        self._poll_after_s: float | None = None
        self._debounce = Debounce(_FLOOD_REST_S)
        self._files = kept.keep(root)
        self._reserve = BlockReserve()
        self._is_robbed = False
        self._alarm: Owned | None = None
        self._waiter = Waiter()
        self._bell = Owned(self._waiter.fileno())
        try:
            self._alarm = Owned(open_timer())
            os.set_blocking(self._alarm.fd, True)
            self._polling.require(self._waiter, next(self._tokens))  # without it nobody would look again
            if self._watermark is not None:
                self._watermark.open(self._waiter, next(self._tokens))
            self._between = Look(self._polling.timer_fd, self._files, self._reserve, self._alarm.fd)
            self._between.pace(thresholds.fill_bytes_per_s, thresholds.poll_s_min, thresholds.poll_s_max)
        except BaseException:
            self.close()
            raise

    @property
    def _lasting(self) -> tuple[Source, ...]:
        """The sources that do not depend on the limits of now."""
        return (self._polling,) if self._watermark is None else (self._watermark, self._polling)

    @property
    def _reopened(self) -> tuple[Source, ...]:
        """The sources that are tried again when they were lost; without the timer there is no going on."""
        return (*self._chosen, *(each for each in self._lasting if each is not self._polling))

    @property
    def statuses(self) -> tuple[SourceStatus, ...]:
        """What each source is, and why where it is not used."""
        return tuple(source.status for source in (*self._chosen, *self._lasting))

    def guards(self, status: MemoryStatus) -> Callable[[Constraint], bool]:
        """Return what says of a constraint whether the kernel or a gauge tells when its next level begins."""
        unguarded = [
            constraint
            for limit, constraint in gauges.limits(status)
            if limit not in self._gauges and not self._is_told_by_kernel(limit, constraint)
        ]
        return lambda constraint: not any(constraint is each for each in unguarded)

    def poll_after(self, delay_s: float, status: MemoryStatus | None = None) -> None:
        """Let the timer signal *delay_s* after the next wait() begins, or as soon as a gauge tells.

        Args:
            delay_s: Until then, what *status* is about is polled by the native thread.
            status: The last look; None: nothing is polled, it is the timer alone.
        """
        self._poll_after_s = delay_s
        self._between.read(self._readings(status) if status else ())

    def _readings(self, status: MemoryStatus) -> Iterator[Reading]:
        for limit, constraint in gauges.limits(status):
            if (gauge := self._gauges.get(limit)) is not None:
                rests = self._is_told_by_kernel(limit, constraint)
                yield from gauge.readings(constraint, self._thresholds, status.swap, rests=rests)

    def _is_told_by_kernel(self, limit: Limit, constraint: Constraint) -> bool:
        # While a v1 cgroup's usage, which includes the file cache, is below the thresholds that the kernel was given.
        what, path, limit_bytes = limit
        low_bytes = self._thresholds.begins_at(PressureLevel.LOW, limit_bytes)
        return (
            what == "memory.limit_in_bytes"
            and path in self._guarded
            and constraint.used_bytes is not None
            and constraint.used_bytes < limit_bytes - low_bytes
        )

    def ready(self) -> None:
        """Make the calling thread ready to look when memory is short; from any thread, when it begins."""
        lib.ms_thread_ready()
        self._reserve.take_own()

    def rehearse(self) -> None:
        """Look for nothing but practice, in any thread: the first time begins pages of its stacks and of its heap."""
        with suppress(KernelError):
            status_once(self._root)

    def provide(self, status: MemoryStatus | None = None) -> None:
        """Hold memory for the next looks, if there is plenty: by *status*, or without one by the last.

        And by the gauges, now: since the look, however long ago, memory may have filled up.
        """
        if status is not None:
            self._has_plenty = _has_plenty(status)
        if self._has_plenty and not self._between.has_told():
            self._reserve.take()

    def choose(self, status: MemoryStatus) -> bool:
        """Open the sources that fit the limits in *status*, keep those that still do, close the others.

        Returns:
            Whether there was anything to do: a limit is not what it was, or a source was lost.
        """
        for source in self._reopened:
            if source.used and not source.is_intact:
                self._lose(source, KernelError(errno.EBADF, "wait for it", "somebody else has closed its descriptor"))
        limits: list[Limit] = [(each.kind, each.path, each.limit_bytes) for each in status.constraints]
        limits += [(each.kind, each.path, each.limit_bytes) for each in status.swap.limits]
        has_lost, self._has_lost = self._has_lost, False
        if limits == self._limits_seen:
            return has_lost
        before = {source.key: source for source in self._chosen if source.used}
        self._chosen = [
            before.pop(source.key, source)
            for source in (
                *sources.choose(self._root, status, self._thresholds),
                *gauges.choose(self._root, status),
            )
        ]
        for source in before.values():
            source.close(self._waiter)
        used = {source.key for source in self._chosen if source.used}
        for source in self._reopened:
            if source.used:
                continue
            if source.stands_in_for & used:
                source.skip()
                continue
            source.open(self._waiter, next(self._tokens))
            if source.used:
                used.add(source.key)
        self._files.hold(path for source in self._chosen if source.used for path in source.reads)
        self._guarded = frozenset(
            each.group.path for each in self._chosen if isinstance(each, sources.UsageThreshold) and each.used
        )
        self._gauges = {each.limit: each for each in self._chosen if isinstance(each, Gauge) and each.used}
        self._limits_seen = limits
        return True

    def give(self, reserve: EmergencyReserve) -> None:
        """Let *reserve* be given back by the native thread as soon as it sees that CRITICAL begins.

        What it saw is a cause of CRITICAL in the next hear(): with the reserve given back, there may be more again.
        """
        self._waiter.give(reserve)

    def poll_within(self, delay_s: float) -> None:
        """Let the timer signal *delay_s* after the next wait() begins at the latest."""
        self._poll_after_s = delay_s if self._poll_after_s is None else min(delay_s, self._poll_after_s)

    def wait(self, rest_s: float = 0.0, *, alarm_s: float = 0.0) -> list[Report]:
        """Wait for signals, or for wake().

        Args:
            rest_s: How long to let signals gather first; longer in a flood of them.
            alarm_s: Let await_alarm() return when the next wait() does not begin within so long after this one. 0: the
                alarm is left alone.

        Raises:
            KernelError: EBADF: what the waiter needs was closed by somebody else, by os.closerange() say. All that is
                left is to close() it.
        """
        rest_s = self._debounce.rest_s(rest_s)
        rested_ns = time.monotonic_ns() + int(rest_s * 1e9)
        self._between.set(timer_s=self._poll_after_s, rest_s=rest_s, alarm_s=alarm_s)
        self._poll_after_s = None
        try:
            reports = self._waiter.wait(self._between)
        except KernelError:
            self._is_robbed = True
            raise
        if not any(each.first_ns < rested_ns for each in reports if each.token != self._polling.token):
            self._debounce.ended()
        return reports

    def await_alarm(self) -> bool:
        """Block until the alarm fires; in a thread of its own, which must have ended before close().

        Returns:
            False where it will not fire any more: somebody else has closed it.
        """
        assert self._alarm is not None
        try:
            os.read(self._alarm.fd, 8)
        except OSError:
            return False
        return True

    def alarm(self, delay_s: float) -> bool:
        """Let the alarm fire after *delay_s*; from any thread. False where somebody else has closed it."""
        if self._alarm is None or not self._alarm.is_ours():
            return False
        set_timer(self._alarm.fd, delay_s)
        return True

    def reading(self) -> AbstractContextManager[None]:
        """Meanwhile, answer the monitor's thread from one reading of all files; it opens only what is new.

        To be left before user code runs, which may want to look for itself.
        """
        return self._files.reading()

    def draw(self) -> None:
        """Give back some of what is held, for a look that no wait() comes before."""
        self._reserve.give()

    def hear(self, reports: Iterable[Report]) -> tuple[list[str], list[Cause]]:
        """Return the names of the sources that signalled, and what they and the budget say by themselves."""
        by_token = {source.token: source for source in (*self._lasting, *self._chosen) if source.used}
        heard, causes = [], []
        for report in reports:
            source = by_token.get(report.token)
            if source is None:
                continue
            heard.append(source.name)
            try:
                if report.lost_errno:
                    raise KernelError(report.lost_errno, f"wait for {source.path}")
                if (cause := source.hear()) is not None:
                    causes.append(cause)
            except KernelError as error:
                self._lose(source, error)
        if self._watermark is not None and (cause := self._watermark.standing()) is not None:
            causes.append(cause)
        if self._between.gave is not None:
            token, left_bytes = self._between.gave
            name = by_token[token].name if token in by_token else self._polling.name
            detail = f"the emergency reserve was given back when {format_size(left_bytes)} were left"
            causes.append(Cause(PressureLevel.CRITICAL, name, detail))
        return heard, causes

    def wake(self) -> None:
        """End a wait() without a signal; from any thread."""
        if self._bell.is_ours():
            os.eventfd_write(self._bell.fd, 1)

    def close(self, *, forked: bool = False) -> None:
        """Close every descriptor and join the native thread; in a forked child, which has none, only close.

        After a wait() that failed, what is not known to be ours still is left alone.
        """
        reason = "the monitor belongs to the parent process" if forked else "closed"
        native = None if forked or self._is_robbed else self._waiter
        for source in (*self._chosen, *self._lasting):
            source.close(native, reason)
        self._waiter.close()
        self._files.close()
        if self._alarm is not None:
            self._alarm.close()

    def _lose(self, source: Source, error: KernelError) -> None:
        journal.warning("the source %s is lost: %s", source.name, error)
        source.close(self._waiter, f"lost: {error}")
        self._has_lost = True
        if source.reopens:
            # Its cgroup may be there again, or the process may be in another: look for sources anew.
            self._limits_seen = None


def _has_plenty(status: MemoryStatus) -> bool:
    tightest = status.binding
    if tightest is None or tightest.headroom_bytes is None:
        return False
    return tightest.headroom_bytes > min(max(tightest.limit_bytes // 16, _PLENTY_BYTES_MIN), _PLENTY_BYTES_MAX)
