"""A limit that the kernel holds the whole process to: RLIMIT_DATA."""

from __future__ import annotations

import mmap
import os
import resource
import threading
from typing import TYPE_CHECKING

from memsafe._kernel import process
from memsafe.errors import UnsupportedError
from memsafe.sizes import Size, format_size, parse_size

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

# More than any address space; so that no sum of it overflows.
_LARGEST_BYTES = 1 << 62


class ProcessLimit:
    """A limit on the process's memory, in force inside its ``with`` block. See limit_process()."""

    __slots__ = ("_data_bytes", "size_bytes")

    def __init__(self, size: Size) -> None:
        self.size_bytes = parse_size(size, what="the limit of a process")
        self._data_bytes: int | None = None

    @property
    def data_bytes(self) -> int | None:
        """What this limit sets RLIMIT_DATA to, in bytes of private writable mappings; None outside of its block."""
        return self._data_bytes

    def __enter__(self) -> Self:
        with _lock:
            if self._data_bytes is not None:
                raise RuntimeError("this limit is in force already: make another with limit_process()")
            data_bytes = _data_limit_bytes(self.size_bytes)
            _stack.enter(data_bytes)
            self._data_bytes = data_bytes
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _lock:
            data_bytes, self._data_bytes = self._data_bytes, None
            if data_bytes is not None:
                _stack.leave(data_bytes)


class _Stack:
    """The limits in force, and what RLIMIT_DATA's soft limit was before the first: the tightest of them holds."""

    def __init__(self) -> None:
        self._inside: list[int] = []
        self._outside: int = resource.RLIM_INFINITY

    def enter(self, data_bytes: int) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
        if not self._inside:
            self._outside = soft
        self._inside.append(data_bytes)
        try:
            self._apply()
            _require_enforcement(data_bytes)
        except BaseException:
            self.leave(data_bytes)
            raise

    def leave(self, data_bytes: int) -> None:
        self._inside.remove(data_bytes)
        self._apply()

    def _apply(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        finite = [limit for limit in (*self._inside, self._outside, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(finite, default=resource.RLIM_INFINITY), hard))


def limit_process(size: Size) -> ProcessLimit:
    """Have the kernel refuse memory to this process once it uses *size*: a context manager.

    Inside the block mmap(2) and brk(2) fail where the process would pass the limit: Python raises MemoryError, numpy
    too, C libraries do as they do. Every thread of the process is held to it. Of several limits, nested or in other
    threads, the tightest holds, also against an RLIMIT_DATA that was there before; they may end in any order, and
    with the last the soft limit is again what it was. The hard limit is never touched. A child inherits the limit.

    What counts: the kernel counts mappings (VmData), touched or not. So that what a process has reserved but never
    touched (8 MiB a thread's stack, the arenas of malloc) does not eat up *size*, the limit is set relative to what
    is used: VmData as it is now, and *size* less what is resident or swapped out now. What is mapped inside the block
    counts in full: a new thread costs its whole stack, and a numpy array that nobody has touched all its bytes.
    Shared and file-backed mappings do not count.

    Args:
        size: What the process may use in all, in bytes or as a string such as "2 GiB".

    Raises:
        ValueError: *size* is not a size; or, on entering, the process uses as much already.
        UnsupportedError: On entering: this kernel does not enforce RLIMIT_DATA, or does not say what is used.

    Source: setrlimit(2); may_expand_vm() in mm/mmap.c, mm/vma.c since 6.12.
    """
    return ProcessLimit(size)


def _data_limit_bytes(size_bytes: int) -> int:
    status = process.status()
    if status.data_vm_bytes is None or status.anonymous_bytes is None:
        raise UnsupportedError(
            "the kernel does not say what this process uses: /proc/self/status has no VmData, RssAnon"
        )
    used_bytes = status.anonymous_bytes + (status.swap_bytes or 0)
    if used_bytes >= size_bytes:
        raise ValueError(
            f"cannot limit this process to {format_size(size_bytes)}: it uses {format_size(used_bytes)} already. "
            f"To help: free memory and call memsafe.trim() first, or allow more."
        )
    return min(status.data_vm_bytes + size_bytes - used_bytes, _LARGEST_BYTES)


def _require_enforcement(data_bytes: int) -> None:
    """Ask for more than the whole limit, which must be refused; nothing of it is touched."""
    try:
        mmap.mmap(-1, data_bytes + mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return
    raise UnsupportedError(
        "this kernel does not enforce RLIMIT_DATA on private mappings: Linux does since 4.7, unless it was started "
        "with ignore_rlimit_data. Use a cgroup's memory.max, or a memsafe.Budget."
    )


# A process has one RLIMIT_DATA, so this is the process's own state. Renewed in a forked child, where the lock may be
# held by a thread that is not there.
_stack = _Stack()
_lock = threading.RLock()


def _renew_lock_after_fork() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock_after_fork)

__all__ = ["ProcessLimit", "limit_process"]
