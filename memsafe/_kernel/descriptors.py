"""Open files by their descriptor's number."""

from __future__ import annotations

import errno
import os

from memsafe._native import close_owned


def descriptor_path(fd: int) -> str:
    """Return a path that stands for this process's open file *fd*, also where the file has no name (O_TMPFILE).

    linkat with AT_SYMLINK_FOLLOW gives such a file a name (open(2), "O_TMPFILE"); the other way, AT_EMPTY_PATH, wants
    CAP_DAC_READ_SEARCH.
    """
    return f"/proc/self/fd/{fd}"


_UNTOLD = ()  # by a network's file system that has lost its server, say


class Owned:
    """A descriptor of ours that may have been closed behind our back, by os.closerange() say.

    Its number may by then be another file's, which is neither to be written to nor closed. Told by device and inode;
    eventfds, timers and epoll sets share theirs, and are not told from each other. -1 is none.
    """

    __slots__ = ("_identity", "fd")

    def __init__(self, fd: int, identity: tuple[int, int] | None = None) -> None:
        """Own what *fd* stands for now; or what has the device and inode of *identity*, got when it was opened."""
        self.fd = fd
        self._identity = identity or self._look()

    def is_ours(self) -> bool:
        """Whether the number still stands for the file that it stood for."""
        then, now = self._identity, self._look()
        return then is not None and now is not None and (_UNTOLD in (then, now) or then == now)

    def is_lost(self) -> bool:
        """Whether somebody else has closed it."""
        return self._identity is not None and not self.is_ours()

    def close(self) -> None:
        """Close it if it is ours, and once: in one step, so that no other thread's file gets the number in between."""
        if self._identity is None:
            return
        device, inode = self._identity or (0, 0)
        try:
            was_ours = close_owned(self.fd, device, inode)
        except OSError:
            self._identity = None
            raise
        if was_ours:
            self._identity = None

    def _look(self) -> tuple[int, ...] | None:
        """Return device and inode, _UNTOLD where something is open that tells neither; None where nothing is."""
        if self.fd < 0:
            return None
        try:
            found = os.fstat(self.fd)
        except OSError as error:
            return None if error.errno == errno.EBADF else _UNTOLD
        return found.st_dev, found.st_ino
