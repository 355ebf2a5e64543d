"""What of this process's page faults is fresh memory, and so no copy."""

from __future__ import annotations

import os
from contextlib import suppress
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


class FreshMemory:
    """Counts, since it was made, the bytes of faults that this process took for memory that it had not before.

    Fresh memory raises what is resident and in no file. A copy does not: it takes the place of a page that was there.
    What rises without as many faults (huge pages, swapped pages that come back) is taken off for the whole machine, as
    only that is counted. So it is counted low: a copy is never taken for fresh memory, unless within what the kernel's
    counters are late by. Memory that was given back and taken anew between two counts is not seen.
    """

    def __init__(self, root: Root = "/") -> None:
        """Begin at 0."""
        self._root = root
        self._files = kept.keep(root)
        self._bytes = 0
        self._faults = 0
        # What rises further than the counters lag is a rise; what falls and rises within that is not.
        self._anchor_bytes: int | None = None
        with suppress(KernelError):  # where nothing can be told apart, nothing is counted
            if not machine.may_have_medium_pages(root):
                self._anchor_bytes = self._small_bytes()
                self._faults = getrusage(RUSAGE_SELF).ru_minflt

    def count_bytes(self) -> int:
        """Return how much there was until now; what it was before where nothing can be read."""
        if self._anchor_bytes is None:
            return 0
        try:
            small_bytes = self._small_bytes()
        except KernelError:
            return self._bytes
        faults = getrusage(RUSAGE_SELF).ru_minflt
        risen_bytes = max(0, small_bytes - self._anchor_bytes - _LAG_BYTES)
        self._anchor_bytes = min(small_bytes, self._anchor_bytes + risen_bytes)
        self._bytes += min(risen_bytes, (faults - self._faults) * machine.PAGE_BYTES)
        self._faults = faults
        return self._bytes

    def close(self) -> None:
        """Close what was kept open. Twice is a no-op."""
        self._files.close()

    def _small_bytes(self) -> int:
        """Return what is resident and in no file, less what any process got by more than a page a fault."""
        with self._files.reading():
            return (process.status(self._root).anonymous_bytes or 0) - machine.unfaulted_bytes(self._root)
