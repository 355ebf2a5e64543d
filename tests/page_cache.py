"""What of a file is in the page cache."""

import ctypes
import mmap
import os
import tempfile

import pytest


def resident_bytes(fd, size_bytes):
    """How much of the first *size_bytes* of a file is in memory: mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(fd, size_bytes) as mapping:
        pages = (ctypes.c_ubyte * -(-size_bytes // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapping)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size_bytes), pages) == 0
        del start  # the mapping cannot be closed before
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def skip_unless_droppable(folder):
    """Skip on a file system that lives in memory: there is nothing to write back to."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(mmap.PAGESIZE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if resident_bytes(file.fileno(), mmap.PAGESIZE):
            pytest.skip(f"the file system of {folder} keeps its pages in memory")
