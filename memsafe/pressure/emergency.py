"""Memory for those who act when there is none left."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any
from warnings import warn

from memsafe._native import check, ffi, lib
from memsafe.errors import KernelError
from memsafe.pressure.levels import has_room
from memsafe.sizes import format_size, parse_size

if TYPE_CHECKING:
    from typing import Self

    from memsafe.pressure.levels import Thresholds
    from memsafe.sizes import Size
    from memsafe.status import MemoryStatus


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
        """Let it be taken again as far as *owner* goes, who need not have needed it."""
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


class ReserveKeeper:
    """A monitor's hand on a reserve, which others may share; or on none, and then nothing is done.

    Attributes:
        reserve: What is kept, None for nothing: from the start, or since its owner has closed it.
    """

    def __init__(self, reserve: EmergencyReserve | Size | None, thresholds: Thresholds) -> None:
        """Keep *reserve*; a size is made one of the monitor's own."""
        self._is_own = not (reserve is None or isinstance(reserve, EmergencyReserve))
        self._thresholds = thresholds
        self.reserve: EmergencyReserve | None
        if reserve is None or isinstance(reserve, EmergencyReserve):
            self.reserve = reserve
        else:
            self.reserve = EmergencyReserve(reserve, held=False)

    def give(self) -> None:
        """Give it back, and let no keeper take it before this one has been calm."""
        if self.reserve is not None:
            self.reserve._give_for(self)

    def take_if_room(self, status: MemoryStatus) -> KernelError | None:
        """Take it at a calm moment, if there is room for it by *status*; return what the kernel had against it."""
        reserve = self.reserve
        if reserve is None:
            return None
        reserve._no_longer_for(self)
        if reserve.held_bytes or not has_room(status, self._thresholds, reserve.size_bytes):
            return None
        try:
            reserve._take_unless_needed()
        except KernelError as error:
            return error
        except ValueError:
            self.reserve = None  # its owner has closed it
        return None

    def leave(self, *, forked: bool) -> None:
        """Need it no longer; and give it back where it is the monitor's own. A forked child holds none."""
        if self.reserve is not None:
            self.reserve._no_longer_for(self)
            if self._is_own and not forked:
                self.reserve.give()
