"""Reading the same files again and again through descriptors that stay open.

Opening and closing costs more than reading: a few microseconds each, and the GIL each time. So whoever asks often keeps
the descriptors, and one native call reads them all by pread. What is kept is never trusted blindly:

- a cgroup that is removed answers ENODEV, and its files are opened anew by their paths;
- a process that is moved finds other paths in /proc/self/cgroup, which is read each time;
- mounts that change are told by poll() on /proc/self/mountinfo (proc(5)); another mount namespace or another root
  directory, of which that descriptor would know nothing, by a stat of /proc/self/ns/mnt and of /;
- a descriptor that somebody else closed, and whose number is now another file's, is told by its inode;
- a forked child forgets them all: /proc/self is bound to the process that opened it.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from memsafe._kernel import files
from memsafe._native import ffi, lib
from memsafe.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memsafe._kernel.files import Root

DESCRIPTORS_MAX = 96
"""More than sixteen levels of cgroups ask for; what is beyond is opened each time."""

_BUFFER_BYTES = 128 * 1024
_MOUNTINFO = "/proc/self/mountinfo"
_PLACES = ("/", "/proc/self/ns/mnt")


class KeptFiles:
    """While one thread reads by it, files.read() and files.is_directory() of that thread answer from one reading.

    It learns from what was asked for, and keeps descriptors of that alone. A second thread meanwhile reads by itself.
    """

    def __init__(self, root: Root) -> None:
        self._buffer: Any = ffi.new("char[]", _BUFFER_BYTES)
        self._bytes = ffi.buffer(self._buffer)
        self._mountinfo = files.under(root, _MOUNTINFO)
        self._places = [(files.under(root, place), lib.MS_KEPT_STAT) for place in _PLACES]
        self._mountinfo_text: bytes | None = None
        self._asked: dict[tuple[str, int], None] = {}
        self._lock = threading.Lock()
        self._keep: list[Any] = []
        self._known: dict[tuple[str, int], int] = {}
        self._files: Any = ffi.new("ms_kept[]", 0)
        self._answers: Any = ffi.new("int64_t[]", 0)
        self._found: list[int] = []

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Answer from one reading of all files; where another thread does so now, each file is read by itself."""
        # Not waiting: a signal handler or a finalizer may ask in the midst of it, in the same thread.
        if files.ahead.reader is not None or not self._lock.acquire(blocking=False):
            yield
            return
        try:
            lib.ms_kept_read(self._files, len(self._files), self._answers, self._buffer, _BUFFER_BYTES)
            self._found = ffi.unpack(self._answers, len(self._answers))
            self._asked = dict.fromkeys(self._places)
            files.ahead.reader = self
            try:
                yield
            finally:
                files.ahead.reader = None
            self._learn()
        finally:
            self._lock.release()

    def read(self, path: str) -> bytes | None:
        """Return what was read at *path*, None where nothing was.

        Raises:
            KernelError: It could not be read.
        """
        result, offset = self._look_up(path, lib.MS_KEPT_WATCH if path == self._mountinfo else lib.MS_KEPT_READ)
        if result >= 0:
            text = bytes(self._bytes[offset : offset + result])
            if path == self._mountinfo:
                self._mountinfo_text = text
            return text
        if result == -errno.EAGAIN:
            return self._mountinfo_text
        if result in {-errno.ENOBUFS, -errno.EISDIR}:
            return None
        raise KernelError(-result, f"read {path}")

    def is_directory(self, path: str) -> bool | None:
        """Whether *path* is a directory, None where that was not found out."""
        result, _ = self._look_up(path, lib.MS_KEPT_STAT)
        return None if result == -errno.ENOBUFS else result == -errno.EISDIR

    def close(self) -> None:
        """Close every descriptor; the next reading begins anew."""
        lib.ms_kept_close(self._files, len(self._files))

    def _look_up(self, path: str, how: int) -> tuple[int, int]:
        key = (path, how)
        if "\0" not in path:
            self._asked[key] = None
        index = self._known.get(key)
        if index is None:
            return -errno.ENOBUFS, 0
        return self._found[2 * index], self._found[2 * index + 1]

    def _learn(self) -> None:
        """Keep what was asked for this time, and nothing else."""
        if self._asked.keys() == self._known.keys():
            return
        wanted = list(self._asked)[:DESCRIPTORS_MAX]
        if wanted == list(self._known):
            return
        fresh = ffi.new("ms_kept[]", len(wanted))
        keep = [ffi.new("char[]", os.fsencode(path)) for path, _ in wanted]
        for index, key in enumerate(wanted):
            known = self._known.pop(key, None)
            if known is None:
                fresh[index].fd, fresh[index].how = -1, key[1]
            else:
                fresh[index] = self._files[known]
                self._files[known].fd = -1
            fresh[index].path = keep[index]
        lib.ms_kept_close(self._files, len(self._files))
        # cffi does not keep what a struct points to.
        self._files, self._keep = fresh, keep
        self._answers = ffi.new("int64_t[]", 2 * len(wanted))
        self._known = {key: index for index, key in enumerate(wanted)}


_here: list[KeptFiles] = []


@contextmanager
def reading(root: Root) -> Iterator[None]:
    """Read this machine's files through kept descriptors meanwhile; those of any other *root* are opened each time.

    A tree that stands for a machine may be changed in ways that no descriptor tells of: renamed, moved, written anew.
    """
    if os.fspath(root) != "/":
        yield
        return
    if not _here:
        _here.append(KeptFiles(root))
        os.register_at_fork(after_in_child=_forget)
    with _here[0].reading():
        yield


def _forget() -> None:
    """In a forked child: close its copies. Another thread may have held the lock, so the object is not used again."""
    _here[0].close()
    _here[0] = KeptFiles("/")
