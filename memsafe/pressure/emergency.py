"""Memory for those who act when there is none left."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING
from warnings import warn

from memsafe.budget import Budget
from memsafe.region import PAGE_BYTES, Region
from memsafe.sizes import format_size

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from memsafe.sizes import Size


class EmergencyReserve:
    """Memory that is held while there is plenty, so that there is some to give back when there is none.

    A cache that is to be spilled needs buffers for that, and a connection that is to be refused an answer. What is held
    is touched: the kernel has found the pages and charged them to the cgroup, and giving them back makes room there at
    once, in the mode of strict overcommit for a promise as well. It is charged to no budget.

    A PressureMonitor gives it back at CRITICAL, before anything else, and takes it again when it is calm; see there.
    Without one, give() and take() do. A context manager. Any number of threads may use it.

    Args:
        size: How much; rounded up to whole pages.
        held: Take it at once.

    Raises:
        KernelError: The kernel refused.

    Example:
        >>> with EmergencyReserve("1 MiB") as reserve:
        ...     reserve.held_bytes, reserve.give(), reserve.held_bytes
        (1048576, 1048576, 0)
    """

    def __init__(self, size: Size, *, held: bool = True) -> None:
        self._lock = threading.Lock()
        self._budget = Budget(name="emergency reserve")
        self._region = Region(self._budget, size, committed=False)
        _reserves.add(self)
        if held:
            try:
                self.take()
            except BaseException:
                self.close()
                raise

    @property
    def size_bytes(self) -> int:
        """How much it is when it is held."""
        return self._region.size_bytes

    @property
    def held_bytes(self) -> int:
        """How much is held: all, or nothing."""
        return self._region.committed_bytes

    def take(self) -> int:
        """Take it, every page. Where it is held already, a no-op.

        The caller makes sure that there is room: in a cgroup that is full, taking it calls the OOM killer.

        Returns:
            The bytes that were taken.

        Raises:
            KernelError: The kernel refused; nothing is held.
            ValueError: It was closed.
        """
        with self._lock:
            if self._region.committed_bytes:
                return 0
            self._region.commit()
            with self._region.view() as view:
                for at in range(0, len(view), PAGE_BYTES):
                    view[at] = 1
            return self._region.size_bytes

    def give(self) -> int:
        """Give it back to the kernel. Where it is not held, or closed, a no-op.

        Returns:
            The bytes that were given back.
        """
        with self._lock:
            given_bytes = self._region.committed_bytes
            if given_bytes:
                self._region.decommit()
            return given_bytes

    def close(self) -> None:
        """Give it back for good. Twice is a no-op."""
        with self._lock:
            self._region.close()
            self._budget.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        region: Region | None = getattr(self, "_region", None)
        if region is None or region.closed:
            return
        if held_bytes := self.held_bytes:
            warn(
                f"an emergency reserve of {format_size(held_bytes)} was never closed; it is now",
                ResourceWarning,
                stacklevel=2,
            )
        self.close()

    def __repr__(self) -> str:
        return f"<EmergencyReserve {self.held_bytes} of {self.size_bytes} bytes held>"


# A forked child has a copy, which another thread may have been taking.
_reserves: weakref.WeakSet[EmergencyReserve] = weakref.WeakSet()


def _renew_locks() -> None:
    for reserve in list(_reserves):
        reserve._lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)
