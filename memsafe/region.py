"""Regions: anonymous memory in mappings of its own, charged to a budget.

What is kept in a region is off Python's heap: it goes back to the kernel at once when it is closed, and reading it
does not copy pages in a forked child, because no reference counts lie between the data.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any
from warnings import warn

from memsafe._native import RegionCore, check, ffi, lib
from memsafe.sizes import Size, format_size, parse_size

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from memsafe.budget import Budget

PAGE_BYTES = mmap.PAGESIZE
HUGE_PAGE_BYTES = 2 << 20

# MADV_* by the names that madvise(2) has for them; those that a region has a use for.
_ADVICE = {
    name.removeprefix("MADV_").lower(): getattr(mmap, name)
    for name in (
        "MADV_NORMAL", "MADV_RANDOM", "MADV_SEQUENTIAL", "MADV_WILLNEED", "MADV_DONTFORK", "MADV_DOFORK",
        "MADV_DONTDUMP", "MADV_DODUMP", "MADV_HUGEPAGE", "MADV_NOHUGEPAGE", "MADV_MERGEABLE", "MADV_UNMERGEABLE",
    )
    if hasattr(mmap, name)
}  # fmt: skip


class Region(RegionCore):
    """Zeroed memory with the buffer protocol: memoryview(region), numpy.frombuffer(region). See Budget.map().

    A context manager; one that is garbage-collected unclosed warns and is unmapped. It cannot be closed while views
    of it are in use, as mmap.mmap.
    """

    __slots__ = ("_address", "_reservation", "size_bytes")

    def __init__(self, budget: Budget, size: Size, *, huge_pages: bool = False) -> None:
        page_bytes = HUGE_PAGE_BYTES if huge_pages else PAGE_BYTES
        self.size_bytes = -(-parse_size(size, what="the size of a region") // page_bytes) * page_bytes
        if self.size_bytes == 0:
            raise ValueError("a region must have at least one byte")
        self._address: Any = None
        self._reservation = budget.reserve(self.size_bytes)
        address = ffi.new("void **")
        flags = lib.MS_REGION_HUGE if huge_pages else 0
        try:
            check(lib.ms_region_map(self.size_bytes, flags, address), "mmap", f"{format_size(self.size_bytes)} asked")
        except BaseException:
            self._reservation.release()
            raise
        self._address = address[0]
        self._attach(int(ffi.cast("uintptr_t", self._address)), self.size_bytes)

    @property
    def budget(self) -> Budget:
        """The budget that is charged."""
        return self._reservation.budget

    @property
    def closed(self) -> bool:
        """Whether the memory was given back."""
        return self._address is None

    def advise(self, advice: str, offset: int = 0, size: Size | None = None) -> None:
        """Advise the kernel about a range (madvise(2)): "sequential", "dontfork", "hugepage", ...

        Args:
            advice: MADV_ADVICE in small letters, without its prefix.
            offset: Where the range begins; a multiple of the page size.
            size: Its length; None: to the end.

        Raises:
            ValueError: No such advice here, or the range is not within the region.
            KernelError: The kernel refused.
        """
        if advice not in _ADVICE:
            raise ValueError(f"{advice!r} is no advice for a region; there are {', '.join(sorted(_ADVICE))}")
        with memoryview(self):  # so that no other thread can close it, and what is mapped there next be advised
            start, size_bytes = self._range(offset, size)
            check(lib.ms_region_advise(start, size_bytes, _ADVICE[advice]), f"madvise({advice})")

    def decommit(self, offset: int = 0, size: Size | None = None) -> None:
        """Give the pages of a range back to the kernel: they read as zeros, and stay mapped and charged.

        Raises:
            ValueError: The range is not within the region, or not of whole pages.
            KernelError: The kernel refused.
        """
        with memoryview(self):  # as in advise()
            start, size_bytes = self._range(offset, size)
            check(lib.ms_region_decommit(start, size_bytes), "madvise(dontneed)")

    def _range(self, offset: int, size: Size | None) -> tuple[Any, int]:
        size_bytes = self.size_bytes - offset if size is None else parse_size(size, what="the length of a range")
        if offset < 0 or offset % PAGE_BYTES or size_bytes % PAGE_BYTES or offset + size_bytes > self.size_bytes:
            raise ValueError(
                f"a range of {size_bytes} bytes at {offset} is not one of whole pages ({PAGE_BYTES} bytes) "
                f"within a region of {self.size_bytes}"
            )
        return ffi.cast("char *", self._address) + offset, size_bytes

    def close(self) -> None:
        """Give the memory back to the kernel and its bytes to the budget. Closing twice is a no-op.

        Raises:
            BufferError: A view of it is still in use; nothing was changed.
        """
        address = self._detach()  # the address for one thread alone, 0 for all others
        if address == 0:
            return
        self._address = None
        check(lib.ms_region_unmap(ffi.cast("void *", address), self.size_bytes), "munmap")
        self._reservation.release()

    def __enter__(self) -> Self:
        if self.closed:
            raise ValueError("the region was closed")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_address", None) is not None:
            path = self.budget.path
            try:
                self.close()
            except BufferError:  # views that are garbage too; the memory goes when the last of them is gone
                self._reservation.release()
            warn(f"a region of {format_size(self.size_bytes)} from budget {path!r} was never closed; it is now",
                 ResourceWarning, stacklevel=2)  # fmt: skip

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"of {format_size(self.size_bytes)} from {self.budget.path!r}"
        return f"<Region {state}>"

    def __reduce__(self) -> Any:
        raise TypeError("a Region belongs to one process: it cannot be pickled or copied")


__all__ = ["Region"]
