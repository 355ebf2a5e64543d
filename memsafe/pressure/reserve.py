"""Memory for the next look, held beforehand."""

from __future__ import annotations

import sys

# Python's allocator has pools for each multiple of 16 bytes up to 512; what is larger comes from the C library.
_SIZES_BYTES = (*range(48, 513, 16), 1024, 2048, 4096)
_BYTES_PER_SIZE = 4096
_OVERHEAD_BYTES = sys.getsizeof(b"")

RESERVE_BYTES = _BYTES_PER_SIZE * (len(_SIZES_BYTES) + 2)


class BlockReserve:
    """Blocks of every small size, taken while there is memory and given back to the allocators before a look.

    A look allocates some hundred small objects and frees them. Where other threads have used up the free blocks
    meanwhile, the allocator would begin a page that was never written; the kernel charges that to the cgroup, and in
    a full one calls the OOM killer. What is given back here is found first. Used by one thread at a time.
    """

    def __init__(self) -> None:
        self._blocks: list[object] = []

    def take(self) -> None:
        """Hold the blocks; where they are held already, a no-op."""
        if self._blocks:
            return
        self._blocks = [bytes(size - _OVERHEAD_BYTES) for size in _SIZES_BYTES for _ in range(_BYTES_PER_SIZE // size)]
        # An object takes 16 bytes and a complex 32: too small for bytes, and the interpreter recycles neither.
        self._blocks += [object() for _ in range(_BYTES_PER_SIZE // 16)]
        self._blocks += [complex(number) for number in range(_BYTES_PER_SIZE // 32)]

    def give(self) -> None:
        """Give the blocks back; allocates nothing."""
        self._blocks.clear()
