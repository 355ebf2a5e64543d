"""Reading the same files again and again through descriptors that stay open.

Who asks often keeps the descriptors, and one native call reads them all by pread. That is for three reasons. Opening
and closing costs more than reading, a few microseconds each. Each call gives the GIL away, and beside busy threads may
wait a switch interval (5 ms) to get it back. And opening a file charges kernel memory to the cgroup: in one that is
full it can call the OOM killer, and a monitor must not be the one who does. So a reading that asks for what was asked
for the last time opens nothing at all. What is kept is never trusted blindly:

- a cgroup that is removed answers ENODEV, and its files are opened anew by their paths;
- a process that is moved finds other paths in /proc/self/cgroup, which is read each time;
- mounts that change are told by poll() on /proc/self/mountinfo (proc(5)); another mount namespace or another root
  directory, of which that descriptor would know nothing, by the mount and the inode of /;
- in another cgroup namespace mountinfo shows other roots though no mount changed; but then /proc/self/cgroup shows
  another path too;
- a descriptor that somebody else closed, and whose number is now another file's, is told by its inode;
- a file that is not there is not tried again for some seconds, or until any of the above happens;
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
    from collections.abc import Iterable, Iterator

    from memsafe._kernel.files import Root

DESCRIPTORS_MAX = 128
"""More than sixteen levels of cgroups ask for; what is beyond is opened each time."""

BELIEVE_S = 10.0
"""How long a file that could not be opened is not tried again. cgroup.pressure can bring one back, chmod another."""

_BUFFER_BYTES = 128 * 1024
_BUFFER_BYTES_MAX = 4 * 1024 * 1024  # the mountinfo of twenty thousand mounts
_MOUNTINFO = "/proc/self/mountinfo"
_MEMBERSHIP = "/proc/self/cgroup"
_PLACES = ("/",) if lib.ms_kept_tells_mounts() else ("/", "/proc/self/ns/mnt")


class KeptFiles:
    """While one thread reads by it, files.read() and files.is_directory() of that thread answer from one reading.

    It learns from what was asked for, and keeps descriptors of that alone. A second thread meanwhile reads by itself.

    Args:
        root: The directory that stands for "/".
        believe_s: How long a file that could not be opened is not tried again.

    Attributes:
        native: The ms_kept_set, for native code that reads it before a reading(); see was_read().
    """

    def __init__(self, root: Root, *, believe_s: float = BELIEVE_S) -> None:
        self._mountinfo = (files.under(root, _MOUNTINFO), lib.MS_KEPT_WATCH)
        self._places = [(files.under(root, place), lib.MS_KEPT_STAT) for place in _PLACES]
        self._mountinfo_text: bytes | None = None
        self._membership = (files.under(root, _MEMBERSHIP), lib.MS_KEPT_READ)
        self._membership_text: bytes | None = None
        self._held: tuple[tuple[str, int], ...] = ()
        self._asked: dict[tuple[str, int], None] = {}
        self._lock = threading.Lock()
        self._keep: list[Any] = []
        self._known: dict[tuple[str, int], int] = {}
        self._files: Any = ffi.new("ms_kept[]", 0)
        self._answers: Any = ffi.new("int64_t[]", 0)
        self._found: list[int] = []
        self._read_already = False
        self._buffer: Any = ffi.NULL
        self._bytes: Any = b""
        self._lacks_room = True
        self.native: Any = ffi.new("ms_kept_set *", {"believe_ns": int(believe_s * 1e9)})

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Answer from one reading of all files; where another thread does so now, each file is read by itself."""
        # Not waiting: a signal handler or a finalizer may ask in the midst of it, in the same thread.
        if files.ahead.reader is not None or not self._lock.acquire(blocking=False):
            yield
            return
        try:
            if not self._read_already:
                lib.ms_kept_read(self.native)
            self._read_already = False
            self._take()
            if self._was_moved():
                self.close()
                lib.ms_kept_read(self.native)
                self._take()
            always = dict.fromkeys((*self._places, *self._held))
            self._asked = {**always}
            files.ahead.reader = self
            try:
                yield
            finally:
                files.ahead.reader = None
            # Who asked for nothing this time may ask for the same as before the next time.
            if len(self._asked) > len(always):
                self._learn(self._asked)
        finally:
            self._lock.release()

    def hold(self, paths: Iterable[str]) -> None:
        """Keep *paths* open from now on, asked for or not, instead of those held before; open all that is kept now."""
        with self._lock:
            self._held = tuple((path, lib.MS_KEPT_READ) for path in paths)
            self._learn({**self._known, **dict.fromkeys(self._held)})
            lib.ms_kept_read(self.native)
            self._take()

    def was_read(self) -> None:
        """Note that somebody has just had `native` read: the next reading() reads nothing more."""
        self._read_already = True

    def read(self, path: str, *, again: bool = False) -> bytes | None:
        """Return what was read at *path*, None where nothing was.

        Args:
            path: Which file.
            again: Return what was read a second time, after all that was asked for before.

        Raises:
            KernelError: It could not be read.
        """
        how = lib.MS_KEPT_AGAIN if again else lib.MS_KEPT_READ
        result, offset = self._look_up(path, self._mountinfo[1] if path == self._mountinfo[0] else how)
        if result >= 0:
            return bytes(self._bytes[offset : offset + result])
        if result == -errno.EAGAIN:
            return self._mountinfo_text
        if result in {-errno.ENOBUFS, -errno.EISDIR}:
            return None
        raise KernelError(-result, f"read {path}")

    def renew(self) -> None:
        """Read all anew in the midst of a reading()."""
        lib.ms_kept_read(self.native)
        self._take()

    def is_directory(self, path: str) -> bool | None:
        """Whether *path* is a directory, None where that was not found out."""
        result, _ = self._look_up(path, lib.MS_KEPT_STAT)
        return None if result == -errno.ENOBUFS else result == -errno.EISDIR

    def close(self) -> None:
        """Close every descriptor; the next reading begins anew."""
        lib.ms_kept_close(self.native)

    def _look_up(self, path: str, how: int) -> tuple[int, int]:
        key = (path, how)
        if "\0" not in path:
            self._asked[key] = None
        index = self._known.get(key)
        if index is None:
            return -errno.ENOBUFS, 0
        result, offset = self._found[2 * index], self._found[2 * index + 1]
        self._lacks_room |= result == -errno.ENOBUFS
        return result, offset

    def _take(self) -> None:
        """Take what was just read. The mounts are read but once, until they change."""
        self._found = ffi.unpack(self._answers, len(self._answers))
        self._mountinfo_text = self._text(self._mountinfo) or self._mountinfo_text

    def _was_moved(self) -> bool:
        """Whether this process is in another cgroup, or in another cgroup namespace, than when last asked."""
        before = self._membership_text
        self._membership_text = self._text(self._membership) or before
        return before is not None and self._membership_text != before

    def _text(self, key: tuple[str, int]) -> bytes | None:
        """Return what was just read of what is kept, None where nothing was."""
        index = self._known.get(key)
        if index is None or self._found[2 * index] < 0:
            return None
        result, offset = self._found[2 * index : 2 * index + 2]
        return bytes(self._bytes[offset : offset + result])

    def _learn(self, asked: dict[tuple[str, int], Any]) -> None:
        """Keep what was *asked* for, and nothing else; the next reading opens it."""
        if self._lacks_room:
            self._make_room()
        if asked.keys() == self._known.keys():
            return
        wanted = list(asked)[:DESCRIPTORS_MAX]
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
        self.close()
        # cffi does not keep what a struct points to.
        self._files, self._keep = fresh, keep
        self._answers = ffi.new("int64_t[]", 2 * len(wanted))
        self._known = {key: index for index, key in enumerate(wanted)}
        self.native.files, self.native.count, self.native.answers = fresh, len(wanted), self._answers

    def _make_room(self) -> None:
        self._lacks_room = False
        size_bytes = min(max(_BUFFER_BYTES, 2 * len(self._bytes)), _BUFFER_BYTES_MAX)
        if size_bytes > len(self._bytes):
            self._buffer = ffi.new("char[]", size_bytes)
            self._bytes = ffi.buffer(self._buffer)
            self.native.buffer, self.native.capacity = self._buffer, size_bytes


class OpenedFiles(KeptFiles):
    """Keeps nothing: each file is opened when it is asked for."""

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Let each file be read by itself."""
        yield

    def hold(self, paths: Iterable[str]) -> None:
        """Keep nothing."""


def keep(root: Root) -> KeptFiles:
    """Return the reader for this machine's files, or one that keeps nothing where *root* is another.

    A tree that stands for a machine may be changed in ways that no descriptor tells of: renamed, moved, written anew.
    """
    return KeptFiles(root) if os.fspath(root) == "/" else OpenedFiles(root)


_here: list[KeptFiles] = []


@contextmanager
def reading(root: Root) -> Iterator[None]:
    """Read this machine's files through kept descriptors meanwhile, which all callers share; see keep()."""
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
