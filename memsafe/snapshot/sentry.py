"""Headroom watched natively while a snapshot runs: where it goes, the child is ended without a thread of Python's."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from memsafe._kernel.descriptors import Owned
from memsafe._native import check, ffi, lib
from memsafe.errors import KernelError
from memsafe.pressure import gauges
from memsafe.pressure.gauges import Gauge
from memsafe.pressure.waiter import Reading, fill_gauges, new_gauges
from memsafe.snapshot.meter import (
    HASTE_SHARE_OF_START,
    NOTICE_S,
    headroom_of,
    is_eaten_by_copies,
    reserve_bytes,
    shortage,
)
from memsafe.status import status_once

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memsafe._kernel.files import Root
    from memsafe.status import Constraint, MemoryStatus

# Several times what could fill memory, so that as many looks come before it has; and the least and the most between
# two of them.
_FILL_BYTES_PER_S = 16 << 30
_LEAST_S = 0.001
_MOST_S = 0.05


class Sentry:
    """A native thread that ends the child by the rules of the meter, milliseconds sooner than that could.

    It reads what a few numbers tell, those of the machine itself. The meter looks at everything, wherever it is, and
    later.
    """

    def __init__(self, root: Root, wake_fd: int) -> None:
        """Get ready to watch over a child.

        Raises:
            KernelError: No thread could be started.
        """
        self._native: Any = None
        self._stat = Owned(-1)
        self._watched: list[tuple[Gauge, Constraint]] = []
        status = status_once(root)
        try:
            self._open_files(root, status)
            readings = new_gauges()
            orders = ffi.new(
                "ms_sentry_orders *",
                {
                    "gauges": readings,
                    "gauge_count": fill_gauges(readings, self._readings(status)),
                    "notice_ns": int(NOTICE_S * 1e9),
                    "pace": (_FILL_BYTES_PER_S, int(_LEAST_S * 1e9), int(_MOST_S * 1e9), 0),
                    "wake_fd": wake_fd,
                },
            )
            made = ffi.new("ms_sentry **")
            check(lib.ms_sentry_open(orders, made), "pthread_create", "no thread for the snapshot, nothing was done")
            self._native = made[0]
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> int:
        """For the native fork, which hands the child over."""
        return int(ffi.cast("uintptr_t", self._native))

    def told(self) -> str | None:
        """Return why it ended the child; None if it did not."""
        report = ffi.new("ms_sentry_report *")
        if not lib.ms_sentry_told(self._native, report):
            return None
        _, constraint = self._watched[report.token - 1]
        return shortage(constraint, report.left_bytes, report.rate_bytes_per_s)

    def count_faults(self, pid: int) -> None:
        """Get ready to count the child's faults; where that cannot be, none are told of, and the meter looks."""
        with suppress(OSError):
            self._stat = Owned(os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC))

    def expect(self, faults: int, not_before_s: float) -> None:
        """Set the eventfd once, when this process and the child have had so many minor faults, but not before then."""
        if self._stat.is_ours():
            lib.ms_sentry_expect(self._native, self._stat.fd, faults, int(not_before_s * 1e9))

    def rest(self) -> None:
        """End no child any longer."""
        lib.ms_sentry_rest(self._native)

    def close(self) -> None:
        """Join the thread and close what it read. Twice is a no-op."""
        native, self._native = self._native, None
        if native is not None:
            lib.ms_sentry_close(native)
        with suppress(OSError):  # the others are to be closed all the same
            self._stat.close()
        while self._watched:
            self._watched.pop()[0].close_files()

    def _open_files(self, root: Root, status: MemoryStatus) -> None:
        if os.fspath(root) != "/":
            return  # a copy of a machine's files may be replaced behind a descriptor's back
        constraints = {
            limit: constraint for limit, constraint in gauges.limits(status) if is_eaten_by_copies(constraint)
        }
        for each in gauges.of(root, status):
            if isinstance(each, Gauge) and each.limit in constraints:
                with suppress(KernelError):  # the meter looks
                    each.open_files()
                    self._watched.append((each, constraints[each.limit]))

    def _readings(self, status: MemoryStatus) -> Iterator[Reading]:
        for token, (gauge, constraint) in enumerate(self._watched, 1):
            start_bytes = headroom_of(constraint)
            yield from gauge.readings_until(
                int(start_bytes * HASTE_SHARE_OF_START),
                reserve_bytes(constraint, start_bytes) - 1,
                constraint,
                status.swap,
                token=token,
                held=True,
            )
