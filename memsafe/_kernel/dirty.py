"""Which pages of this process were written since a moment: see memsafe_native/cdef/dirty.h."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

from memsafe._native import check, ffi, lib

if TYPE_CHECKING:
    from typing import Self

METHODS = {"soft-dirty": lib.MS_DIRTY_SOFT, "pagemap-scan": lib.MS_DIRTY_SCAN}
"""By name, the gentler first: it divides no huge pages."""

# This kernel has it not, or somebody (seccomp, a process that is not dumpable) forbids it.
REFUSALS = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENOENT})


class DirtyPages:
    """Counts the private pages that were written since it was made. One at a time in a process.

    Raises:
        KernelError: This kernel cannot, or does not let this process; see REFUSALS.
    """

    def __init__(self, method: str) -> None:
        self._native: Any = ffi.new("ms_dirty *")
        self._sum: Any = ffi.new("uint64_t *")
        self._open = False
        # Two readings share one file position. Reentrant: a signal handler may close what its own thread reads.
        self._lock = threading.RLock()
        check(lib.ms_dirty_open(METHODS[method], self._native), f"count written pages by {method}")
        self._open = True
        _meters.add(self)

    def count_bytes(self) -> int:
        """Return the bytes of the pages that were written since; of memory that is new, all that is there.

        Raises:
            KernelError: The page tables could not be read.
            ValueError: It was closed.
        """
        with self._lock:
            if not self._open:
                raise ValueError("the meter is closed")
            check(lib.ms_dirty_count(self._native, self._sum), "count written pages")
            return int(self._sum[0])

    def close(self) -> None:
        """Stop counting, once nobody counts. Twice is a no-op."""
        if self._open:
            with self._lock:
                self._release()

    def _release(self) -> None:
        if self._open:
            self._open = False
            lib.ms_dirty_close(self._native)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()


_meters: weakref.WeakSet[DirtyPages] = weakref.WeakSet()


def _close_all() -> None:
    """In a forked child: an inherited userfaultfd acts on the parent's memory. A lost thread may hold the lock."""
    for meter in list(_meters):
        meter._release()


os.register_at_fork(after_in_child=_close_all)
