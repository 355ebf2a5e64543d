"""What of this process's page faults can have been copies, told without reading the child's page tables."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from resource import RUSAGE_SELF, getrusage
from typing import TYPE_CHECKING

from memsafe._kernel import kept, machine, process
from memsafe.errors import KernelError

if TYPE_CHECKING:
    from memsafe._kernel.files import Root

# Linux 6.2 to 6.15 tell what is resident but for what each processor has not yet handed in (percpu_counter_batch,
# lib/percpu_counter.c); those before, but for 64 pages a thread; those after, exactly.
_PROCESSORS = os.sysconf("SC_NPROCESSORS_ONLN")
_LAG_BYTES = _PROCESSORS * max(32, 2 * _PROCESSORS) * machine.PAGE_BYTES
# The machine's sums, but for so many pages a processor (calculate_normal_threshold, mm/vmstat.c).
MACHINE_LAG_BYTES = _LAG_BYTES + _PROCESSORS * 125 * machine.PAGE_BYTES


class _Rises:
    """How far a number has risen, all rises together, but for what it may be late by."""

    def __init__(self, value_bytes: int, lag_bytes: int) -> None:
        # What rises further than the counters lag is a rise; what falls and rises within that is not.
        self._anchor_bytes, self._lag_bytes = value_bytes, lag_bytes

    def note(self, value_bytes: int) -> int:
        """Return what has risen since the last one."""
        risen_bytes = max(0, value_bytes - self._anchor_bytes - self._lag_bytes)
        self._anchor_bytes = min(value_bytes, self._anchor_bytes + risen_bytes)
        return risen_bytes


@dataclass(frozen=True, slots=True)
class Taken:
    """What was taken since the count began.

    Attributes:
        fresh_bytes: By this process, a page a fault, for memory that it had not before.
        elsewhere_bytes: By all others, the child among them, and by copies, but for MACHINE_LAG_BYTES at the most; None
            where that is not told.
    """

    fresh_bytes: int
    elsewhere_bytes: int | None


class FreshMemory:
    """Counts, since it was made, fresh memory of this process, and memory in no file that the machine got besides.

    Fresh memory raises what is resident and in no file. A copy does not: it takes the place of a page that was there.
    What rises without as many faults (huge pages, swapped pages that come back) is taken off for the whole machine, as
    only that is counted. So it is counted low: a copy is never taken for fresh memory, unless within what the kernel's
    counters are late by. Memory that was given back and taken anew between two counts is not seen.

    A copy does raise what the machine has in no file. What this process has of that is taken off: what is left stands
    still, whatever this process takes and gives back, while nothing is copied and nobody else takes anything. It is
    counted high, unless others give back at the same time as is copied.
    """

    def __init__(self, root: Root = "/") -> None:
        """Begin at 0."""
        self._root = root
        self._files = kept.keep(root)
        self._taken = Taken(0, None)
        self._faults = 0
        self._fresh: _Rises | None = None
        self._elsewhere: _Rises | None = None
        with suppress(KernelError), self._files.reading():  # where nothing can be told, nothing is counted
            self._elsewhere = _Rises(self._elsewhere_bytes(), MACHINE_LAG_BYTES)
            self._taken = Taken(0, 0)
            if not machine.may_have_medium_pages(root):
                self._fresh = _Rises(self._small_bytes(), _LAG_BYTES)
                self._faults = getrusage(RUSAGE_SELF).ru_minflt

    def count(self) -> Taken:
        """Return what was taken until now; what it was before where nothing can be read."""
        fresh_bytes, elsewhere_bytes = self._taken.fresh_bytes, self._taken.elsewhere_bytes
        with suppress(KernelError), self._files.reading():
            if self._elsewhere is not None and elsewhere_bytes is not None:
                elsewhere_bytes += self._elsewhere.note(self._elsewhere_bytes())
            if self._fresh is not None:
                small_bytes = self._small_bytes()
                faults = getrusage(RUSAGE_SELF).ru_minflt
                fresh_bytes += min(self._fresh.note(small_bytes), (faults - self._faults) * machine.PAGE_BYTES)
                self._faults = faults
        self._taken = Taken(fresh_bytes, elsewhere_bytes)
        return self._taken

    def close(self) -> None:
        """Close what was kept open. Twice is a no-op."""
        self._files.close()

    def _small_bytes(self) -> int:
        """Return what is resident and in no file, less what any process got by more than a page a fault."""
        return self._own_bytes() - machine.unfaulted_bytes(self._root)

    def _elsewhere_bytes(self) -> int:
        return machine.anonymous_bytes(self._root) - self._own_bytes()

    def _own_bytes(self) -> int:
        return process.status(self._root).anonymous_bytes or 0
