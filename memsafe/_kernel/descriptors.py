"""Open files by their descriptor's number."""

from __future__ import annotations


def descriptor_path(fd: int) -> str:
    """Return a path that stands for this process's open file *fd*, also where the file has no name (O_TMPFILE).

    linkat with AT_SYMLINK_FOLLOW gives such a file a name (open(2), "O_TMPFILE"); the other way, AT_EMPTY_PATH, wants
    CAP_DAC_READ_SEARCH.
    """
    return f"/proc/self/fd/{fd}"
