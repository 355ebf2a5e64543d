"""Memory for the next look, held beforehand."""

from __future__ import annotations

import sys
import threading

# Python's allocator has pools for each multiple of 16 bytes up to 512; what is larger comes from the C library.
_SMALL_BYTES = range(48, 513, 16)
_BYTES_PER_SIZE = 2048
_PORTIONS = 2
_LARGE_BYTES = 64 * 1024
_OVERHEAD_BYTES = sys.getsizeof(b"")

RESERVE_BYTES = _PORTIONS * _BYTES_PER_SIZE * (len(_SMALL_BYTES) + 2) + 2 * _LARGE_BYTES


class BlockReserve:
    """Free blocks of every size, made sure of while there is memory, and given to the allocators before a look.

    A look allocates some hundred small objects, and texts of some kilobytes, and frees them. Where the free blocks were
    used up meanwhile, the allocator would begin a page that was never written; the kernel charges that to the cgroup,
    and in a full one calls the OOM killer. What is given back here is found first.

    There are two portions, because the look after a wake-up may be followed by another one, after callbacks that have
    used up the first. The C library has a heap for each thread, so each thread that looks has a large block of its own.
    Used by one thread at a time.
    """

    def __init__(self) -> None:
        self._pins: list[object] = []
        self._portions: list[list[object]] = [[] for _ in range(_PORTIONS)]
        self._own = threading.local()

    def take(self) -> None:
        """Hold all portions; what is held already is left alone."""
        if not self._pins:
            # One of each is never given back: a pool that is all free could become another size's, or the kernel's.
            self._pins += map(_block, _SMALL_BYTES)
        for portion in self._portions:
            if not portion:
                _fill(portion)
        self.take_own()

    def take_own(self) -> None:
        """Hold what is this thread's alone; also while another thread uses the rest."""
        # Held, though no other thread takes it: a trim would give free memory of every heap back to the kernel.
        if getattr(self._own, "block", None) is None:
            self._own.block = _block(_LARGE_BYTES)

    def give(self) -> None:
        """Give back a portion, if there is one left, and what is this thread's own; allocates nothing."""
        self._own.block = None
        for portion in self._portions:
            if portion:
                portion.clear()
                return


def _fill(portion: list[object]) -> None:
    for size in _SMALL_BYTES:
        portion += [_block(size) for _ in range(_BYTES_PER_SIZE // size)]
    # An object takes 16 bytes and a complex 32: too small for bytes, and the interpreter recycles neither.
    portion += [object() for _ in range(_BYTES_PER_SIZE // 16)]
    portion += [complex(number) for number in range(_BYTES_PER_SIZE // 32)]


def _block(size_bytes: int) -> bytes:
    # Written, every page of it: zeroes might be had from calloc(), which leaves new pages as they are.
    return b"x" * (size_bytes - _OVERHEAD_BYTES)
