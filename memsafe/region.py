"""Regions: memory in mappings of its own, charged to a budget as it is mapped or as it is committed in steps.

What is kept in a region is off Python's heap: it goes back to the kernel at once when it is closed, and reading it
does not copy pages in a forked child, because no reference counts lie between the data.
"""

from __future__ import annotations

import fcntl
import mmap
import resource
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from importlib import import_module
from math import prod
from operator import index
from typing import TYPE_CHECKING, Any, TypedDict
from warnings import warn

from memsafe._native import RegionCore, ffi, lib
from memsafe.errors import KernelError
from memsafe.sizes import Size, format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
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

# Of <linux/fcntl.h>; the fcntl module has not all of them.
_F_ADD_SEALS, _F_SEAL_SEAL, _F_SEAL_FUTURE_WRITE = 1033, 0x1, 0x10


class RegionOptions(TypedDict, total=False):
    """What Budget.map() takes besides a size; see Region."""

    committed: bool
    huge_pages: bool
    guard_pages: bool
    locked: bool
    shared: bool
    zero_on_close: bool


class Region(RegionCore):
    """Zeroed memory with the buffer protocol: memoryview(region), region.as_array(). See Budget.map().

    A context manager; one that is garbage-collected unclosed warns and is unmapped. It cannot be closed while views
    of it are in use, as mmap.mmap. Any number of threads may use it. A forked child has a copy of a private region,
    and the same memory where it is shared.

    Args:
        budget: What to charge.
        size: Rounded up to whole pages, of 2 MiB with *huge_pages*.
        committed: Usable and charged at once. Else it is address space only, which costs nothing and cannot be touched,
            until commit() makes parts of it usable and charges those.
        huge_pages: Ask for transparent huge pages, and align to one. Only advice: the kernel gives what it has.
        guard_pages: A page before and one behind that nobody can touch, uncharged: running over the end is a SIGSEGV
            rather than a write into something else's memory.
        locked: Keep what is committed in RAM (mlock(2)): allocated at once, never swapped. Bounded by RLIMIT_MEMLOCK.
        shared: In a memfd, see fileno(): other processes may map it, and forked children share it. It cannot be
            resized by anybody.
        zero_on_close: Overwrite with zeros what is given back to the kernel, before. Not with *shared*.

    Attributes:
        budget: The budget that is charged.
        size_bytes: Its size, in whole pages; not all of it need be committed.
    """

    __slots__ = ("_committed_at_once", "_is_open", "budget", "size_bytes")

    def __init__(
        self,
        budget: Budget,
        size: Size,
        *,
        committed: bool = True,
        huge_pages: bool = False,
        guard_pages: bool = False,
        locked: bool = False,
        shared: bool = False,
        zero_on_close: bool = False,
    ) -> None:
        page_bytes = HUGE_PAGE_BYTES if huge_pages else PAGE_BYTES
        self._is_open = False
        self._committed_at_once = committed
        self.budget = budget
        what = "the size of a region"
        self.size_bytes = parse_size(-(-parse_size(size, what=what) // page_bytes) * page_bytes, what=what)
        if self.size_bytes == 0:
            raise ValueError("a region must have at least one byte")
        if shared and zero_on_close:
            raise ValueError("a shared region is not zeroed when it is closed: others may still use it")
        budget._raise_if_unusable()
        asked = {
            lib.MS_REGION_HUGE: huge_pages,
            lib.MS_REGION_GUARDS: guard_pages,
            lib.MS_REGION_LOCKED: locked,
            lib.MS_REGION_SHARED: shared,
            lib.MS_REGION_WIPED: zero_on_close,
        }
        failure = self._open(budget, self.size_bytes, sum(flag for flag, wanted in asked.items() if wanted))
        if failure:
            raise self._error(*failure)
        self._is_open = True
        if committed:
            try:
                self.commit()
            except BaseException:
                self.close()
                raise

    # ------------------------------------------------------------------------------------------------ committing

    @property
    def committed_bytes(self) -> int:
        """What is usable and charged: size_bytes where it was mapped committed, 0 once closed."""
        try:
            with self._pinned() as region:
                return int(lib.ms_region_committed(region, 0, self.size_bytes))
        except ValueError:
            return 0

    def commit(self, offset: int = 0, size: Size | None = None) -> None:
        """Make a range usable and charge it; what of it is committed already stays as it is. Else it is zeroed.

        Args:
            offset: Where the range begins; a multiple of the page size.
            size: Its length, likewise; None: to the end.

        Raises:
            BudgetExceededError: As Budget.reserve(). Nothing was changed.
            KernelError: The kernel refused, mprotect(2) or mlock(2). Nothing was changed.
            ValueError: The range is not within the region or not of whole pages, or the region was closed.
        """
        size_bytes = self._range(offset, size)
        with self._pinned() as region:
            refused = True
            while refused:  # where another thread has decommitted meanwhile, and so more was missing than reserved
                missing_bytes = size_bytes - lib.ms_region_committed(region, offset, size_bytes)
                charged_bytes = self.budget.reserve(missing_bytes)._disown()
                refused = self._call(lib.ms_region_commit, region, offset, size_bytes, charged_bytes)

    def decommit(self, offset: int = 0, size: Size | None = None) -> None:
        """Give the pages of a range back to the kernel.

        In a region that is committed in steps they are given back to the budget too, and cannot be touched until they
        are committed again. In one that was mapped committed they stay charged, and read as zeros.

        Raises:
            BufferError: It is committed in steps, and views of it are in use.
            KernelError: The kernel refused.
            ValueError: As commit().
        """
        size_bytes = self._range(offset, size)
        with self._pinned(decommits=not self._committed_at_once) as region:
            give_back = lib.ms_region_discard if self._committed_at_once else lib.ms_region_decommit
            self._call(give_back, region, offset, size_bytes)

    def advise(self, advice: str, offset: int = 0, size: Size | None = None) -> None:
        """Advise the kernel about a range (madvise(2)): "sequential", "dontfork", "hugepage", ...

        Advice about the whole region holds for what is committed later, too; other advice is forgotten with the pages
        that are decommitted. Forked children get a region whole or, after "dontfork", not at all: there all that is
        left to do with it is to close it, and anything else is a ValueError.

        Args:
            advice: MADV_ADVICE in small letters, without its prefix.
            offset: Where the range begins; a multiple of the page size.
            size: Its length; None: to the end.

        Raises:
            KernelError: The kernel refused.
            ValueError: No such advice here, advice about forks for a part, or as commit().
        """
        if advice not in _ADVICE:
            raise ValueError(f"{advice!r} is no advice for a region; there are {', '.join(sorted(_ADVICE))}")
        size_bytes = self._range(offset, size)
        if advice in ("dontfork", "dofork") and size_bytes < self.size_bytes:
            raise ValueError(f"a forked child gets a region whole or not at all: {advice!r} is no advice for a part")
        with self._pinned() as region:
            self._call(lib.ms_region_advise, region, offset, size_bytes, _ADVICE[advice])

    def _range(self, offset: int, size: Size | None) -> int:
        size_bytes = self.size_bytes - offset if size is None else parse_size(size, what="the length of a range")
        if offset % PAGE_BYTES or size_bytes % PAGE_BYTES or not 0 <= offset <= offset + size_bytes <= self.size_bytes:
            raise ValueError(
                f"a range of {size_bytes} bytes at {offset} is not one of whole pages ({PAGE_BYTES} bytes) "
                f"within a region of {self.size_bytes}"
            )
        return size_bytes

    @contextmanager
    def _pinned(self, *, decommits: bool = False) -> Iterator[Any]:
        """Keep other threads from closing it, or what is mapped there next would be changed."""
        region = ffi.cast("ms_region *", self._pin(decommits))
        try:
            yield region
        finally:
            self._unpin(decommits)

    # ------------------------------------------------------------------------------------------------ using

    def view(self, offset: int = 0, size: Size | None = None) -> memoryview:
        """Return a writable view of a range that is committed; any bytes of it, not only whole pages.

        Raises:
            BufferError: Not all of it is committed.
            ValueError: It is not within the region, or the region was closed.
        """
        size_bytes = self.size_bytes - offset if size is None else parse_size(size, what="the length of a view")
        if not 0 <= offset <= offset + size_bytes <= self.size_bytes:
            raise ValueError(f"{size_bytes} bytes at {offset} are not within a region of {self.size_bytes}")
        return self._window(offset, size_bytes)

    def as_array(self, dtype: Any = "u1", shape: int | Sequence[int] | None = None, offset: int = 0) -> Any:
        """Return a NumPy array of the memory itself.

        Args:
            dtype: What NumPy takes for one.
            shape: Of the array; None: one dimension, to the end.
            offset: Where it begins, in bytes.

        Raises:
            BufferError: Not all of it is committed.
            ImportError: NumPy is not installed.
            ValueError: It is not within the region, or the region was closed.
        """
        numpy = import_module("numpy")
        kind = numpy.dtype(dtype)
        if shape is None:
            shape = (self.size_bytes - offset) // max(kind.itemsize, 1)
        sides = tuple(shape) if isinstance(shape, Iterable) else (index(shape),)
        return numpy.frombuffer(self.view(offset, kind.itemsize * prod(sides)), kind).reshape(sides)

    def fileno(self) -> int:
        """Return the memfd of a shared region, for other processes: they mmap() it. It is closed with the region.

        Raises:
            ValueError: The region is private, or was closed.
        """
        with self._pinned() as region:
            fd = int(lib.ms_region_fd(region))
        if fd < 0:
            raise ValueError("the region is private; map it with shared=True")
        return fd

    def seal(self) -> None:
        """From now on nobody can write to a shared region but through the mapping of this process and its children.

        Nobody else can map it writable, nor write(2) to it, nor take the seal away. Pages cannot be decommitted then.

        Raises:
            KernelError: Others have mapped it writable, or it was sealed before.
            ValueError: As fileno().

        Source: fcntl(2), F_SEAL_FUTURE_WRITE.
        """
        try:
            fcntl.fcntl(self.fileno(), _F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | _F_SEAL_SEAL)
        except OSError as error:
            raise KernelError(error.errno or 0, "fcntl(add_seals)") from None

    # ------------------------------------------------------------------------------------------------ the end

    @property
    def closed(self) -> bool:
        """Whether the memory was given back."""
        return not self._is_open

    def close(self) -> None:
        """Give the memory back to the kernel and its bytes to the budget. Closing twice is a no-op.

        Raises:
            BufferError: A view of it is still in use; nothing was changed.
        """
        region = self._detach()  # for one thread alone, 0 for all others
        if region:
            self._is_open = False
            lib.ms_region_close(ffi.cast("ms_region *", region))

    def __enter__(self) -> Self:
        if self.closed:
            raise ValueError("the region was closed")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_is_open", False):
            return
        with suppress(BufferError):  # views that are garbage too; the memory goes when the last of them is gone
            self.close()
        warn(
            f"a region of {format_size(self.size_bytes)} from budget {self.budget.path!r} was never closed; it is now",
            ResourceWarning,
            stacklevel=2,
        )

    def __repr__(self) -> str:
        if self.closed:
            return "<Region closed>"
        part = "" if self._committed_at_once else f"{format_size(self.committed_bytes)} committed "
        return f"<Region {part}of {format_size(self.size_bytes)} from {self.budget.path!r}>"

    def __reduce__(self) -> Any:
        raise TypeError("a Region belongs to one process: it cannot be pickled or copied")

    def _call(self, function: Any, *args: Any) -> bool:
        """Return whether the budget refused."""
        failure = ffi.new("ms_region_failure *")
        result = function(*args, failure)
        if result == lib.MS_BUDGET_SOFT_PASSED:
            self.budget._soft_limit_passed()
        if result < 0 and failure.call != ffi.NULL:
            raise self._error(-result, ffi.string(failure.call).decode())
        return bool(result < 0)

    def _error(self, number: int, call: str) -> KernelError:
        detail = f"a region of {format_size(self.size_bytes)}"
        if call == "mlock":
            soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
            detail += f"; RLIMIT_MEMLOCK is {'unlimited' if soft == resource.RLIM_INFINITY else format_size(soft)}"
        return KernelError(number, call, detail)


__all__ = ["Region"]
