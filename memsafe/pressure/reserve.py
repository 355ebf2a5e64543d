"""Memory for the next look, held beforehand."""

from __future__ import annotations

import sys

# Python's allocator has a class for each multiple of 16 bytes up to 512; a bytes object can fill the third and above.
# Of the two below, the interpreter keeps free objects of its own, and their pools last longest.
_CLASSES_BYTES = range(48, 513, 16)
_BYTES_PER_CLASS = 4096
_OVERHEAD_BYTES = sys.getsizeof(b"")

RESERVE_BYTES = _BYTES_PER_CLASS * len(_CLASSES_BYTES)


class BlockReserve:
    """Small blocks of every size, taken while there is memory and given back to Python's allocator before a look.

    A look allocates some hundred small objects and frees them. Where other threads have used up the free blocks
    meanwhile, Python's allocator would begin a page that was never written, which charges it to the cgroup; in a full
    one, that calls the OOM killer. What is given back here is found first. Used by one thread at a time.
    """

    def __init__(self) -> None:
        self._blocks: list[bytes] = []

    def take(self) -> None:
        """Hold the blocks; where they are held already, a no-op."""
        if not self._blocks:
            self._blocks = [
                bytes(size - _OVERHEAD_BYTES) for size in _CLASSES_BYTES for _ in range(_BYTES_PER_CLASS // size)
            ]

    def give(self) -> None:
        """Give the blocks back; allocates nothing."""
        self._blocks.clear()
