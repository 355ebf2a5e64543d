"""Memory for those who act when there is none left."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any
from warnings import warn

from memsafe._native import check, ffi, lib
from memsafe.sizes import format_size, parse_size

if TYPE_CHECKING:
    from typing import Self

    from memsafe.sizes import Size


class EmergencyReserve:
    """Memory that is held while there is plenty, so that there is some to give back when there is none.

    A cache that is to be spilled needs buffers for that, and a connection that is to be refused an answer. What is held
    is touched: the kernel has found the pages and charged them to the cgroup, and giving them back makes room there at
    once, in the mode of strict overcommit for a promise as well. It is charged to no budget.

    A PressureMonitor gives it back at CRITICAL, before anything else, and takes it again when it is calm; see there.
    Where it polls what is left by itself, its native thread does so, without waiting for the GIL. Without a monitor,
    give() and take() do. A context manager. Any number of threads and monitors may use it: none of these takes it
    while another one is short of memory, or gives it back when it closes. A forked child holds nothing, so that what
    the parent gives back is room; it may take its own.

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
        made = ffi.new("ms_emergency **")
        size_bytes = parse_size(size, what="the size of an emergency reserve")
        if size_bytes == 0:
            raise ValueError("the size of an emergency reserve must be at least one byte")
        check(lib.ms_emergency_open(size_bytes, made), "hold memory in reserve")
        # The waiters of monitors have references of their own.
        self._native: Any = ffi.gc(made[0], lib.ms_emergency_unref)
        self._needy: set[object] = set()
        if held:
            self.take()

    @property
    def size_bytes(self) -> int:
        """How much it is when it is held."""
        return int(lib.ms_emergency_size(self._native))

    @property
    def held_bytes(self) -> int:
        """How much is held: all, or nothing."""
        return int(lib.ms_emergency_held(self._native))

    def take(self) -> int:
        """Take it, every page. Where it is held already, a no-op.

        The caller makes sure that there is room: in a cgroup that is full, taking it calls the OOM killer.

        Returns:
            The bytes that were taken.

        Raises:
            KernelError: The kernel refused; nothing is held.
            ValueError: It was closed.
        """
        taken_bytes = lib.ms_emergency_take(self._native)
        if taken_bytes == -errno.ESHUTDOWN:
            raise ValueError("the emergency reserve is closed")
        return check(taken_bytes, "mmap")

    def give(self) -> int:
        """Give it back to the kernel. Where it is not held, or closed, a no-op.

        Returns:
            The bytes that were given back.
        """
        return int(lib.ms_emergency_give(self._native))

    def _give_for(self, owner: object) -> None:
        """Give it back, and let nobody take it by _take_unless_needed() until *owner* needs it no longer."""
        self._needy.add(owner)
        self.give()

    def _no_longer_for(self, owner: object) -> None:
        """*owner* needs it given no longer; one that did not is none."""
        self._needy.discard(owner)

    def _take_unless_needed(self) -> None:
        """Take it, unless somebody needs it given.

        Raises:
            KernelError, ValueError: As take().
        """
        if self._needy:
            return
        self.take()
        # Without a lock, which a fork could leave held: who came in between is seen here, or gives after this.
        if self._needy:
            self.give()

    def close(self) -> None:
        """Give it back for good. Twice is a no-op."""
        lib.ms_emergency_close(self._native)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_native", None) is None:
            return
        if held_bytes := lib.ms_emergency_close(self._native):
            warn(
                f"an emergency reserve of {format_size(held_bytes)} was never closed; it is now",
                ResourceWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return f"<EmergencyReserve {self.held_bytes} of {self.size_bytes} bytes held>"
