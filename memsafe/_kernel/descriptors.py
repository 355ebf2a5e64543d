"""Open files by their descriptor's number."""

from __future__ import annotations

import os


def descriptor_path(fd: int) -> str:
    """Return a path that stands for this process's open file *fd*, also where the file has no name (O_TMPFILE).

    linkat with AT_SYMLINK_FOLLOW gives such a file a name (open(2), "O_TMPFILE"); the other way, AT_EMPTY_PATH, wants
    CAP_DAC_READ_SEARCH.
    """
    return f"/proc/self/fd/{fd}"


class Owned:
    """A descriptor of ours that may have been closed behind our back, by os.closerange() say.

    Its number may by then be another file's, which is neither to be written to nor closed. Told by device and inode;
    eventfds, timers and epoll sets share theirs, and are not told from each other.
    """

    __slots__ = ("_identity", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._identity = self._look()

    def is_ours(self) -> bool:
        """Whether the number still stands for the file that it stood for."""
        return self._identity is not None and self._look() == self._identity

    def close(self) -> None:
        """Close it if it is ours, and once."""
        if self.is_ours():
            self._identity = None
            os.close(self.fd)

    def _look(self) -> tuple[int, int] | None:
        try:
            found = os.fstat(self.fd)
        except OSError:
            return None
        return found.st_dev, found.st_ino
