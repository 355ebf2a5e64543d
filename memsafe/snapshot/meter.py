"""Measuring a fork snapshot while it runs: private copies, what memory is left, and whom the OOM killer took."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from memsafe._kernel import cgroup, process
from memsafe.errors import KernelError
from memsafe.sizes import format_size
from memsafe.status import memory_status

if TYPE_CHECKING:
    from memsafe._kernel.files import Root

# Reading smaps_rollup holds the child's page tables; reading it all the time made saves ten times slower.
_MEASURE_DUTY = 100
_MEASURE_EVERY_S_MIN = 0.01

# The child is ended before the last bytes are gone, as a share of the limit, or of what there was when it began.
_RESERVE_SHARE_OF_LIMIT = 64
_RESERVE_SHARE_OF_START = 4


class Meter:
    """When to measure, and what: private copies of the child, and what memory is left to this process."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self.next_at_s = time.monotonic() + _MEASURE_EVERY_S_MIN
        self._reserves = {
            (kind, path): min(limit // _RESERVE_SHARE_OF_LIMIT, headroom // _RESERVE_SHARE_OF_START)
            for kind, path, limit, headroom in self._headrooms()
        }

    def stop(self) -> None:
        """Measure no more."""
        self.next_at_s = math.inf

    def copy_bytes(self, pid: int) -> int:
        """Return the child's private dirty memory, which is what either side has copied, and plan the next reading.

        A page that either process writes is copied, and each has its own from then on: the child's share of the split
        pages is the number of copies. The cost is counted in processor time: waiting for the GIL is nobody's burden.

        Raises:
            KernelError: It cannot be read.
        """
        began_s = time.thread_time()
        try:
            return process.smaps_rollup(pid).private_dirty_bytes
        finally:
            cost_s = time.thread_time() - began_s
            self.next_at_s = time.monotonic() + max(_MEASURE_EVERY_S_MIN, _MEASURE_DUTY * cost_s)

    def headroom_short(self) -> str | None:
        """Return a sentence when what kills or throttles this process is nearly met, and plan the next look."""
        began_s = time.thread_time()
        short = None
        for kind, path, limit, headroom in self._headrooms():
            reserve = self._reserves.get((kind, path), limit // _RESERVE_SHARE_OF_LIMIT)
            if headroom < reserve:
                where = f"{kind} of {path}" if path else kind
                short = f"only {format_size(headroom)} are left below {where} ({format_size(limit)})"
                break
        self.next_at_s += _MEASURE_DUTY * (time.thread_time() - began_s)
        return short

    def _headrooms(self) -> list[tuple[str, str | None, int, int]]:
        """Return (kind, path, limit, headroom) of what copies count against: no rlimit of the parent."""
        return [
            # File cache in use is given back too before anybody is killed.
            (c.kind, c.path, c.limit_bytes, c.headroom_bytes + c.active_file_bytes)
            for c in memory_status(root=self._root).constraints
            if c.consequence != "refuse" and c.headroom_bytes is not None
        ]


def oom_kills(root: Root) -> dict[str, int]:
    """Return the OOM killer's count in each memory cgroup of this process that tells it."""
    kills = {}
    with suppress(KernelError):
        for group in cgroup.memory_cgroups(root):
            with suppress(KernelError):
                count = group.oom_kills()
                if count is not None:
                    kills[group.path] = count
    return kills


def risen(before: dict[str, int], after: dict[str, int]) -> str:
    return ", ".join(path for path, count in after.items() if count > before.get(path, count))
