"""Memory for the next look, held beforehand."""

from __future__ import annotations

import sys

# Python's allocator has pools for each multiple of 16 bytes up to 512; what is larger comes from the C library.
_SMALL_BYTES = range(48, 513, 16)
_BYTES_PER_SIZE = 4096
_LARGE_BYTES = 64 * 1024
_OVERHEAD_BYTES = sys.getsizeof(b"")

RESERVE_BYTES = _BYTES_PER_SIZE * (len(_SMALL_BYTES) + 2) + _LARGE_BYTES


class BlockReserve:
    """Free blocks of every size, made sure of while there is memory, and given to the allocators before a look.

    A look allocates some hundred small objects, and texts of some kilobytes, and frees them. Where the free blocks were
    used up meanwhile, the allocator would begin a page that was never written; the kernel charges that to the cgroup,
    and in a full one calls the OOM killer. What is given back here is found first. Used by one thread, which is the one
    that looks: the C library has a heap for each.
    """

    def __init__(self) -> None:
        self._pins: list[object] = []
        self._blocks: list[object] = []

    def take(self) -> None:
        """Hold the blocks; where they are held already, a no-op."""
        if self._blocks:
            return
        first = not self._pins
        for size in _SMALL_BYTES:
            # One of each is never given back: a pool that is all free could become another size's, or the kernel's.
            if first:
                self._pins.append(_block(size))
            self._blocks += [_block(size) for _ in range(_BYTES_PER_SIZE // size)]
        # An object takes 16 bytes and a complex 32: too small for bytes, and the interpreter recycles neither.
        self._blocks += [object() for _ in range(_BYTES_PER_SIZE // 16)]
        self._blocks += [complex(number) for number in range(_BYTES_PER_SIZE // 32)]
        # No other thread takes this one, and it stays written: it need not be held.
        _block(_LARGE_BYTES)

    def give(self) -> None:
        """Give the blocks back; allocates nothing."""
        self._blocks.clear()


def _block(size_bytes: int) -> bytes:
    # Written, every page of it: zeroes might be had from calloc(), which leaves new pages as they are.
    return b"x" * (size_bytes - _OVERHEAD_BYTES)
