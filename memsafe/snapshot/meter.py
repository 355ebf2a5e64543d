"""Measuring a fork snapshot while it runs: private copies, and what memory is left."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from resource import RUSAGE_SELF, getrusage
from typing import TYPE_CHECKING

from memsafe._kernel import kept, process
from memsafe.errors import KernelError
from memsafe.sizes import format_size
from memsafe.snapshot.fresh import MACHINE_LAG_BYTES, FreshMemory, Taken
from memsafe.status import status_once

if TYPE_CHECKING:
    from memsafe._kernel.files import Root
    from memsafe.status import Constraint

# Reading smaps_rollup holds the child's page tables; reading it all the time made saves ten times slower. So there is a
# share of one core for readings, over all of a snapshot's life, and one for all else that the job's thread does; with
# the sentry's it stays below 1 %, but for what comes ahead of its time. Half of the readings come by the clock, the
# others are saved for when faults alone say that a bound may be passed. Where the machine's memory says so as well, so
# many may come before their time: no more can prove right before the bound is passed, as faults are twice the copies at
# the most, and so each time half of what was left is gone at least.
_READINGS_SHARE = 7 / 2000
_READINGS_BY_CLOCK = 1 / 2
_READINGS_AHEAD = 8
_SPACE = 2  # between two readings, in what one costs; half of it where both witnesses say that a bound is passed
# Looks come before their time while headroom goes, each when half of what is left would be gone at this rate. These are
# made up for later by looking half as often, not by a pause in which nobody looks. Copies are waited for by the sentry,
# which counts their faults at a quarter of the cost, and fewer looks come early for them.
_LOOKS_SHARE = 7 / 2000
_LOOKS_AHEAD = 50
_LOOKS_AHEAD_FOR_COPIES = 20
# All that headroom is made of is read now and then, whatever the faults say, in this part of the looks' share.
_HEADROOM_BY_CLOCK = 1 / 5
# Not in the first moments, unless in doubt: a reading may take as long as memory does to fill, and looks come first.
_FIRST_AFTER_S = 0.1
_FIRST_READING_AFTER_S_MAX = 10.0
_LOOK_EVERY_S_MIN = 0.002
_LOOK_EVERY_S_MAX = 0.1
# The nearer a bound at the fastest plausible rate, the sooner the next look.
_FILL_BYTES_PER_S = 4 << 30
_LOOKS_UNTIL_FULL = 4
_TIGHT_S = 0.01

# The child is ended before the last bytes are gone, as a share of the limit, or of what there was when it began.
_RESERVE_SHARE_OF_LIMIT = 64
_RESERVE_SHARE_OF_START = 4
# And earlier, where at the present rate they would be gone before the child has given its memory back, on a machine
# that is busy: but not before an eighth of what there was at the start is gone.
NOTICE_S = 0.05
HASTE_SHARE_OF_START = 7 / 8

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One reading.

    Attributes:
        copy_bytes: The child's private dirty memory, which is what either side has copied: a page that one of the two
            writes is copied, and each has its own from then on. None once they are not counted any more.
        short: A sentence when what kills or throttles this process is nearly met, else None.
    """

    copy_bytes: int | None
    short: str | None


class _Share:
    """A share of one core over all time since the beginning, and what was spent of it."""

    def __init__(self, share: float, now_s: float) -> None:
        self._share = share
        self._began_s = now_s
        self._spent_s = 0.0
        self._times = 0

    @property
    def mean_s(self) -> float:
        """What has been spent at a time."""
        return self._spent_s / self._times if self._times else 0

    def spend(self, cost_s: float) -> None:
        self._spent_s += cost_s
        self._times += 1

    def due_s(self, ahead_s: float = 0, part: float = 1) -> float:
        """Return from when on more may be spent by who may spend a *part*, *ahead_s* of the whole before its time."""
        return self._began_s + (self._spent_s / part - ahead_s) / self._share


class _Headroom:
    """How near its end was when last read, and how soon to read again when page faults say that it may be met."""

    def __init__(self, slack_bytes: float, share: _Share, now_s: float) -> None:
        self.slack_bytes = slack_bytes
        self.due_s = now_s
        self.by_clock_s = now_s + _FIRST_AFTER_S
        self._share = share
        self._faulted_bytes = 0

    def left_bytes(self, faulted_bytes: float) -> float:
        """Return how near it may be by now, after so many bytes of faults, counted from the start."""
        return self.slack_bytes - (faulted_bytes - self._faulted_bytes)

    def is_due(self, now_s: float, faulted_bytes: float) -> bool:
        """Whether so many bytes of faults could have taken all of it, or none for long, and it is time."""
        return now_s >= self.by_clock_s or (now_s >= self.due_s and self.left_bytes(faulted_bytes) <= 0)

    def settle(self, slack_bytes: float, faulted_bytes: int, cost_s: float) -> None:
        """Note what was read, and what that has cost the share."""
        self.slack_bytes, self._faulted_bytes = slack_bytes, faulted_bytes
        now_s = time.monotonic()
        self.due_s = max(now_s + _SPACE * cost_s, self._share.due_s(_READINGS_AHEAD * cost_s))
        self.by_clock_s = now_s + cost_s / (_LOOKS_SHARE * _HEADROOM_BY_CLOCK)


class _Bound:
    """How near max_copy was when last read, and by now may be as two witnesses have it.

    Faults bound the copies from above, whatever happens, and are often something else. What others than this process
    have taken of the machine's memory does too, and is seldom much, but hides copies while others give memory back.
    """

    def __init__(self, max_copy_bytes: float, share: _Share, now_s: float) -> None:
        self._share = share
        self._slack_bytes = max_copy_bytes
        self._base = Taken(0, 0)
        self._base_faulted_bytes = 0
        self._faulted_bytes = 0  # when the witnesses were last heard
        self._surely_left_bytes = self._likely_left_bytes = max_copy_bytes
        self.due_s = self._saved_due_s = now_s

    def hear(self, faulted_bytes: int, taken: Taken) -> None:
        """Note what was taken until now."""
        fresh_bytes = taken.fresh_bytes - self._base.fresh_bytes
        self._surely_left_bytes = self._slack_bytes - (faulted_bytes - self._base_faulted_bytes - fresh_bytes)
        self._likely_left_bytes = self._surely_left_bytes
        if taken.elsewhere_bytes is not None:
            risen_bytes = taken.elsewhere_bytes - (self._base.elsewhere_bytes or 0) + MACHINE_LAG_BYTES
            self._likely_left_bytes = max(self._surely_left_bytes, self._slack_bytes - risen_bytes)
        self._faulted_bytes = faulted_bytes

    def left_bytes(self, faulted_bytes: int) -> float:
        """Return how near it is likely to be by now at the most, if all faults since the last hearing were copies."""
        return self._likely_left_bytes - (faulted_bytes - self._faulted_bytes)

    def is_due(self, now_s: float, faulted_bytes: int) -> bool:
        """Whether the bound may have been passed, and it is time: sooner where both witnesses say so."""
        since_bytes = faulted_bytes - self._faulted_bytes
        return (now_s >= self.due_s and self._likely_left_bytes <= since_bytes) or (
            now_s >= self._saved_due_s and self._surely_left_bytes <= since_bytes
        )

    def settle(self, slack_bytes: float, faulted_bytes: int, taken: Taken, cost_s: float) -> None:
        """Note what was read after so much had been taken, and what that has cost the share."""
        self._slack_bytes, self._base, self._base_faulted_bytes = slack_bytes, taken, faulted_bytes
        self.hear(faulted_bytes, taken)
        now_s = time.monotonic()
        self.due_s = max(now_s + _SPACE / 2 * cost_s, self._share.due_s(_READINGS_AHEAD * cost_s))
        self._saved_due_s = max(now_s + _SPACE * cost_s, self._share.due_s())


class Meter:
    """When to measure, and what: private copies of the child, and what memory is left to this process.

    Each copy takes a page fault, and faults are cheap to count: they say when the next reading cannot wait. Costs are
    counted in processor time: waiting for the GIL is no burden to anybody.
    """

    def __init__(self, root: Root, max_copy_bytes: int | None) -> None:
        """Begin with what is left now; there are no copies yet."""
        self._root = root
        self._max_copy_bytes = max_copy_bytes
        self._counts_copies = True
        # Of their own: what is measured seldom takes long to read, what is counted often does not.
        self._walked, self._counted = kept.keep(root), kept.keep(root)
        self._measured, self._looked = kept.keep(root), kept.keep(root)
        with self._measured.reading():
            self._starts = {(c.kind, c.path): headroom_of(c) for c in self._constraints()}
        with self._looked.reading():
            _, margin_bytes = self._look_around(0)
        now_s = time.monotonic()
        self._readings, self._looks = _Share(_READINGS_SHARE, now_s), _Share(_LOOKS_SHARE, now_s)
        self._looked_at_s = time.thread_time()
        self._headroom = _Headroom(margin_bytes, self._looks, now_s)
        self._bound = _Bound(math.inf if max_copy_bytes is None else max_copy_bytes, self._readings, now_s)
        self._fresh = FreshMemory() if max_copy_bytes is not None else None
        self._rate_bytes_per_s = 0.0
        self._pace_bytes_per_s = 0.0  # it slows down by half from look to look at most: between two there may be a lull
        self._own_faults = getrusage(RUSAGE_SELF).ru_minflt
        self._counted_bytes, self._counted_s = 0, now_s
        self._due_s = now_s + _FIRST_AFTER_S
        self.next_look_s = now_s + self._look_every_s()

    @property
    def is_tight(self) -> bool:
        """Whether memory may be gone within a few of the usual looks."""
        return self._headroom.left_bytes(self._counted_bytes) < _FILL_BYTES_PER_S * _TIGHT_S * _LOOKS_UNTIL_FULL

    def expect_cost(self, reading_s: float) -> None:
        """Put the first reading by the clock off until one that takes so long is affordable, but not for too long."""
        latest_s = time.monotonic() + _FIRST_READING_AFTER_S_MAX
        self._due_s = max(self._due_s, min(self._readings.due_s(-reading_s), latest_s))

    def expected_faults(self) -> tuple[int, float] | None:
        """Return of how many faults of both processes, from their beginnings, it wants to hear, and not before when.

        None where no copies are bounded: of headroom the sentry knows more, and nobody should stand in its way. And
        where there were enough already: then it looks by itself when the reading may come that they are a reason for.
        """
        left_bytes = self._bound.left_bytes(self._counted_bytes)
        if left_bytes <= 0:
            self.next_look_s = min(self.next_look_s, max(self._bound.due_s, self._look_for_copies_due_s()))
        if left_bytes <= 0 or math.isinf(left_bytes):
            return None
        faults = self._own_faults + (self._counted_bytes + int(left_bytes)) // _PAGE_BYTES
        return faults, self._look_for_copies_due_s()

    def _look_for_copies_due_s(self) -> float:
        return self._looks.due_s(_LOOKS_AHEAD_FOR_COPIES * self._looks.mean_s)

    def look_now(self) -> None:
        """Have the next look come at once, unless it is over."""
        self.next_look_s = min(self.next_look_s, time.monotonic()) if self.next_look_s < math.inf else math.inf

    def stop(self) -> None:
        """Measure no more."""
        self.next_look_s = self._due_s = math.inf

    def forgo_copies(self) -> None:
        """Count copies no more, where nothing bounds them. Headroom, told by files of the parent alone, is read on."""
        self._counts_copies = False

    def close(self) -> None:
        """Close what was kept open. Twice is a no-op."""
        for files in (self._walked, self._counted, self._measured, self._looked):
            files.close()
        if self._fresh is not None:
            self._fresh.close()

    def runs_short(self, pid: int) -> str | None:
        """Return a sentence where memory is nearly gone, or will be at this rate; None too where nobody need look.

        Plans the next look. Cheap: unless the faults say that there is reason, nothing but them is read.
        """
        now_s, faulted_bytes = time.monotonic(), self._faulted_bytes(pid)
        self._rate_bytes_per_s = (faulted_bytes - self._counted_bytes) / max(now_s - self._counted_s, 1e-4)
        self._counted_bytes, self._counted_s = faulted_bytes, now_s
        short = None
        soon_bytes = self._soon_bytes()
        if self._headroom.is_due(now_s, faulted_bytes + soon_bytes):
            began_s = time.thread_time()
            with self._looked.reading():
                short, margin_bytes = self._look_around(soon_bytes)
            self._headroom.settle(margin_bytes, faulted_bytes, time.thread_time() - began_s)
        self._plan_look(now_s)
        return short

    def is_due(self) -> bool:
        """Whether measure() should be called now."""
        now_s = time.monotonic()
        if now_s >= self._due_s:
            return True
        if self._fresh is None or self._due_s == math.inf:
            return False
        if self._bound.left_bytes(self._counted_bytes) <= 0:
            self._bound.hear(self._counted_bytes, self._fresh.count())
        return self._bound.is_due(now_s, self._counted_bytes)

    def measure(self, pid: int) -> Measurement:
        """Return what the child has copied and whether memory runs short, and plan the next reading.

        Raises:
            KernelError: The child's memory cannot be read.
        """
        began_s = time.thread_time()
        try:
            # Before the walk: what is copied while that lasts may be missing from it, and is still to come.
            faulted_bytes = self._faulted_bytes(pid)
            taken = self._fresh.count() if self._fresh is not None else Taken(0, None)
            copy_bytes = self._private_dirty_bytes(pid) if self._counts_copies else None
            with self._measured.reading():
                short, _ = self._look_around(self._soon_bytes())
        finally:
            cost_s = time.thread_time() - began_s
            self._looked_at_s += cost_s  # it was no look
            self._readings.spend(cost_s)
            self._due_s = max(time.monotonic() + _LOOK_EVERY_S_MIN, self._readings.due_s(part=_READINGS_BY_CLOCK))
        slack_bytes = math.inf
        if copy_bytes is not None and self._max_copy_bytes is not None:
            slack_bytes = self._max_copy_bytes - copy_bytes
        self._bound.settle(slack_bytes, faulted_bytes, taken, cost_s)
        return Measurement(copy_bytes, short)

    def _soon_bytes(self) -> float:
        """Return what will be gone, at this rate, before anything that is done now helps."""
        return self._rate_bytes_per_s * NOTICE_S

    def _plan_look(self, now_s: float) -> None:
        """Count all that this thread has done since the last look and that was no reading."""
        cpu_s = time.thread_time()
        self._looks.spend(cpu_s - self._looked_at_s)
        self._looked_at_s = cpu_s
        self._pace_bytes_per_s = max(self._rate_bytes_per_s, self._pace_bytes_per_s / 2, 1)
        spaced_s = min(2 * self._looks.mean_s / _LOOKS_SHARE, self._nearest_bytes() / 2 / self._pace_bytes_per_s)
        self.next_look_s = max(
            now_s + self._look_every_s(),
            min(now_s + spaced_s, self._looks.due_s()),
            self._looks.due_s(_LOOKS_AHEAD * self._looks.mean_s),
        )

    def _look_every_s(self) -> float:
        passed_within_s = self._nearest_bytes() / _FILL_BYTES_PER_S
        return min(max(passed_within_s / _LOOKS_UNTIL_FULL, _LOOK_EVERY_S_MIN), _LOOK_EVERY_S_MAX)

    def _nearest_bytes(self) -> float:
        """Return how near the end of the headroom may be by now."""
        return self._headroom.left_bytes(self._counted_bytes)

    def _faulted_bytes(self, pid: int) -> int:
        """Return what both processes can have taken, copies and fresh memory; the child's faults begin at 0."""
        own = getrusage(RUSAGE_SELF).ru_minflt - self._own_faults
        try:
            with self._counted.reading():
                return (own + process.minor_faults(pid)) * _PAGE_BYTES
        except KernelError:
            return self._counted_bytes  # it has ended; the next reading by the clock finds out

    def _private_dirty_bytes(self, pid: int) -> int:
        with self._walked.reading():  # a set of its own: it reads all of itself at once
            return process.smaps_rollup(pid).private_dirty_bytes

    def _look_around(self, soon_bytes: float) -> tuple[str | None, float]:
        """Return a sentence where headroom has run short, and how far the nearest reserve is.

        Args:
            soon_bytes: What will be gone before anything that is done now helps.
        """
        nearest_bytes = math.inf
        for c in self._constraints():
            headroom = headroom_of(c)
            start = self._starts.get((c.kind, c.path), c.limit_bytes)
            reserve = reserve_bytes(c, start)
            if headroom < reserve:
                return shortage(c, headroom), 0
            if headroom < min(soon_bytes, start * HASTE_SHARE_OF_START):
                return shortage(c, headroom, int(self._rate_bytes_per_s)), 0
            nearest_bytes = min(nearest_bytes, headroom - reserve)
        return None, nearest_bytes

    def _constraints(self) -> list[Constraint]:
        return [each for each in status_once(self._root).constraints if is_eaten_by_copies(each)]


def is_eaten_by_copies(constraint: Constraint) -> bool:
    """Whether copies count against it: no rlimit of the parent's does, and no commit."""
    return constraint.consequence != "refuse" and constraint.headroom_bytes is not None


def headroom_of(constraint: Constraint) -> int:
    """Return what copies may take: file cache in use is given back too before anybody is killed."""
    return (constraint.headroom_bytes or 0) + constraint.active_file_bytes


def reserve_bytes(constraint: Constraint, start_bytes: int) -> int:
    """Return how much is to be left when the child is ended, where *start_bytes* were left when it began."""
    return min(constraint.limit_bytes // _RESERVE_SHARE_OF_LIMIT, start_bytes // _RESERVE_SHARE_OF_START)


def shortage(constraint: Constraint, left_bytes: int, rate_bytes_per_s: int = 0) -> str:
    """Say what is short; the rate where that, and not yet what is left, is why."""
    where = f"{constraint.kind} of {constraint.path}" if constraint.path else constraint.kind
    haste = f", and {format_size(rate_bytes_per_s)} more are taken a second" if rate_bytes_per_s else ""
    return f"only {format_size(left_bytes)} are left below {where} ({format_size(constraint.limit_bytes)}){haste}"
