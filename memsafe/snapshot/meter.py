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
from memsafe.status import status_once

if TYPE_CHECKING:
    from memsafe._kernel.files import Root
    from memsafe.status import Constraint

# Reading smaps_rollup holds the child's page tables; reading it all the time made saves ten times slower. Where the
# page faults say that a bound may have been passed since, it is read sooner; but each time that this proves wrong, half
# as soon, until there is no difference. It can prove right only some twenty times before the bound is passed, as what
# is left is halved then. So the cost stays at 1 % for as long as a snapshot takes.
_MEASURE_DUTY = 100
_MEASURE_DUTY_IN_DOUBT = 10
_LOOK_EVERY_S = 0.01

# The child is ended before the last bytes are gone, as a share of the limit, or of what there was when it began.
_RESERVE_SHARE_OF_LIMIT = 64
_RESERVE_SHARE_OF_START = 4

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One reading.

    Attributes:
        copy_bytes: The child's private dirty memory, which is what either side has copied: a page that one of the two
            writes is copied, and each has its own from then on.
        short: A sentence when what kills or throttles this process is nearly met, else None.
    """

    copy_bytes: int
    short: str | None


class Meter:
    """When to measure, and what: private copies of the child, and what memory is left to this process.

    Each copy takes a page fault, and faults are cheap to count: they say when the next reading cannot wait. Costs are
    counted in processor time: waiting for the GIL is no burden to anybody.
    """

    def __init__(self, root: Root, max_copy_bytes: int | None) -> None:
        """Begin with what is left now; there are no copies yet."""
        self._root = root
        self._max_copy_bytes = max_copy_bytes
        # Of their own: what is measured seldom takes long to read, what is counted often does not.
        self._measured, self._counted = kept.keep(root), kept.keep(root)
        now_s = time.monotonic()
        self.next_look_s = self._due_s = self._in_doubt_due_s = now_s + _LOOK_EVERY_S
        with self._measured.reading():
            self._reserves = {
                (c.kind, c.path): min(c.limit_bytes // _RESERVE_SHARE_OF_LIMIT, headroom // _RESERVE_SHARE_OF_START)
                for c, headroom in self._headrooms()
            }
        self._faults = 0  # when last measured; the child's begin at 0
        self._slack_bytes: float = math.inf  # copies until a bound, when last measured
        self._duty_in_doubt = _MEASURE_DUTY_IN_DOUBT

    def stop(self) -> None:
        """Measure no more."""
        self.next_look_s = self._due_s = self._in_doubt_due_s = math.inf

    def close(self) -> None:
        """Close what was kept open. Twice is a no-op."""
        self._measured.close()
        self._counted.close()

    def is_due(self, pid: int) -> bool:
        """Whether measure() should be called now; plans the next look."""
        now_s = time.monotonic()
        self.next_look_s = now_s + _LOOK_EVERY_S
        if now_s >= self._due_s:
            return True
        return now_s >= self._in_doubt_due_s and self._count_faults(pid, self._faults) >= self._slack_bytes

    def measure(self, pid: int) -> Measurement:
        """Return what the child has copied and whether memory runs short, and plan the next reading.

        Raises:
            KernelError: The child's memory cannot be read.
        """
        began_s = time.thread_time()
        try:
            with self._measured.reading():
                faults = self._count_faults(pid, 0) // _PAGE_BYTES
                copy_bytes = process.smaps_rollup(pid).private_dirty_bytes
                short, margin_bytes = self._look_around()
            bound_bytes = math.inf if self._max_copy_bytes is None else self._max_copy_bytes - copy_bytes
            self._weigh((faults - self._faults) * _PAGE_BYTES, min(margin_bytes, bound_bytes))
            self._faults = faults
        finally:
            cost_s = time.thread_time() - began_s
            now_s = time.monotonic()
            self._due_s = now_s + max(_LOOK_EVERY_S, _MEASURE_DUTY * cost_s)
            self._in_doubt_due_s = now_s + self._duty_in_doubt * cost_s
        return Measurement(copy_bytes, short)

    def _weigh(self, faulted_bytes: int, slack_bytes: float) -> None:
        """Believe the faults as far as they foretold that a bound came nearer."""
        foretold = self._slack_bytes - slack_bytes >= faulted_bytes / 2
        self._duty_in_doubt = _MEASURE_DUTY_IN_DOUBT if foretold else min(2 * self._duty_in_doubt, _MEASURE_DUTY)
        self._slack_bytes = slack_bytes

    def _count_faults(self, pid: int, since: int) -> int:
        """Return the most that both processes can have copied since they had taken *since* faults, in bytes."""
        own = getrusage(RUSAGE_SELF).ru_minflt
        try:
            with self._counted.reading():
                return (own + process.minor_faults(pid) - since) * _PAGE_BYTES
        except KernelError:
            return 0  # it has ended; the next reading by the clock finds out

    def _look_around(self) -> tuple[str | None, float]:
        """Return a sentence where headroom has run short, and how far the nearest reserve is."""
        margin_bytes = math.inf
        for c, headroom in self._headrooms():
            reserve = self._reserves.get((c.kind, c.path), c.limit_bytes // _RESERVE_SHARE_OF_LIMIT)
            if headroom < reserve:
                where = f"{c.kind} of {c.path}" if c.path else c.kind
                return f"only {format_size(headroom)} are left below {where} ({format_size(c.limit_bytes)})", 0
            margin_bytes = min(margin_bytes, headroom - reserve)
        return None, margin_bytes

    def _headrooms(self) -> list[tuple[Constraint, int]]:
        """Return what copies count against, with its headroom: no rlimit of the parent, and no commit."""
        return [
            # File cache in use is given back too before anybody is killed.
            (c, c.headroom_bytes + c.active_file_bytes)
            for c in status_once(self._root).constraints
            if c.consequence != "refuse" and c.headroom_bytes is not None
        ]
