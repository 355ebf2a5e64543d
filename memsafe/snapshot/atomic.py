"""Atomic replacement: at a path there is the old file or the complete new one, whoever dies when."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from memsafe._kernel.descriptors import Owned, descriptor_path

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

StrPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

# What open says on a file system without O_TMPFILE (open(2)); ENOSYS comes from some FUSE daemons.
_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS})
# What fsync says of a folder on a file system that cannot do it.
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP})
# Room in a name of at most 255 bytes for what stands around the target's own.
_NAME_BYTES_MAX = 180

_NAMES_TRIED = 1000
_numbers = itertools.count()


class AtomicFile:
    """A file that appears at its path whole, or not at all.

    It is written under no name where the file system has O_TMPFILE, so that nothing is left if everybody dies;
    elsewhere as ``.{name}.memsafe-{pid}-{n}.tmp`` in the same folder. Left-overs of processes that died are removed by
    the next AtomicFile for the same path: a lock on the file tells them from files in use, also in another container.

    A symbolic link at the path stays, and what it points to is replaced. The old file's permissions are kept, and its
    owner and group where this process may give them; a new file gets 0666 less the umask. The folder is held open:
    renaming it, or os.chdir(), changes nothing.

    Use it as a context manager: leaving it without commit() leaves the old file alone. One thread at a time.

    Attributes:
        path: The path as given.
        descriptor: What to write to, open for reading and writing.
    """

    def __init__(self, path: StrPath) -> None:
        """Open a new file for *path*.

        Raises:
            OSError: The folder is missing or not writable, or at *path* is something else than a regular file.
        """
        self.path = path
        given = os.fsdecode(path)
        if not given or given.endswith("/"):  # realpath() would make another path of these
            code = errno.EISDIR if given else errno.ENOENT
            raise OSError(code, os.strerror(code), given)
        self._real_path = os.path.realpath(given)
        folder, self._name = os.path.split(self._real_path)
        self._folder = Owned(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
        self._temporary: str | None = None
        self.descriptor = Owned(-1)
        self.renamed = False
        try:
            old = self._old()
            self._remove_leftovers()
            # Where it has a name, it is nobody's to open before it has the old one's owner and permissions.
            self._open(0o666 if old is None else 0o600)
            if old is not None:
                self._take_after(old)
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        """The descriptor's number; -1 after close()."""
        return self.descriptor.fd

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def commit(self) -> int:
        """Put the file at its path for good, and return its size in bytes. The descriptor stays open until close().

        Raises:
            OSError: Something on the way failed. The old file is still there, unless the last step, the folder's own
                fsync, is what failed: then the new one is, but may not survive a power cut.
        """
        if self._folder.is_lost() or self.descriptor.is_lost():  # what is open there by now is no image
            raise OSError(errno.EBADF, "Another part of the program has closed the new file", self._real_path)
        temporary = self._temporary
        if temporary is None:
            os.fsync(self.fd)  # what takes long comes while nothing would be left of a process that dies
            temporary = self._make_temporary(self._link)
        os.fsync(self.fd)  # btrfs keeps an inode without a name out of its log, however often it is synced
        size_bytes = os.fstat(self.fd).st_size
        os.rename(temporary, self._name, src_dir_fd=self._folder.fd, dst_dir_fd=self._folder.fd)
        self._temporary = None
        self.renamed = True
        try:
            os.fsync(self._folder.fd)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise
        return size_bytes

    def close(self) -> None:
        """Close the descriptors, and drop the file if it was not committed. A second call does nothing."""
        self._drop()
        folder, self._folder = self._folder, Owned(-1)
        _close(folder)

    def _drop(self) -> None:
        """Close the file, and remove it if it has a name of ours."""
        if self._temporary is not None and self._folder.is_ours():
            with suppress(OSError):
                os.unlink(self._temporary, dir_fd=self._folder.fd)
        self._temporary = None
        descriptor, self.descriptor = self.descriptor, Owned(-1)
        _close(descriptor)

    def _old(self) -> os.stat_result | None:
        try:
            status = os.stat(self._name, dir_fd=self._folder.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self._real_path)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file, so it is not replaced", self._real_path)
        return status

    def _take_after(self, old: os.stat_result) -> None:
        """Take over owner, group and permissions, as far as this process may; in that order, as chown takes bits away.

        What is not taken over must not let anybody in: set-user-ID and set-group-ID would stand for somebody else, and
        the permissions of one group are not those of another.
        """
        for owner, group in ((old.st_uid, -1), (-1, old.st_gid)):
            with suppress(OSError):  # it wants CAP_CHOWN, or for a group to be a member
                os.fchown(self.fd, owner, group)
        mode, new = stat.S_IMODE(old.st_mode), os.fstat(self.fd)
        if new.st_uid != old.st_uid:
            mode &= ~stat.S_ISUID
        if new.st_gid != old.st_gid:
            mode &= ~(stat.S_ISGID | stat.S_IRWXG) | (mode & stat.S_IRWXO) << 3
        os.fchmod(self.fd, mode)

    def _open(self, mode: int) -> None:
        try:
            fd = os.open(".", os.O_RDWR | os.O_CLOEXEC | os.O_TMPFILE, mode, dir_fd=self._folder.fd)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise OSError(error.errno, error.strerror, self._real_path) from None
            self._create_locked(mode)
        else:
            self.descriptor = Owned(fd)
            self._lock()

    def _create_locked(self, mode: int) -> None:
        """Make a named file that nobody has taken for a left-over in the instant before it was locked."""
        for _ in range(_NAMES_TRIED):
            name = self._make_temporary(partial(self._create, mode))
            if self._lock() and self._is_at(name):
                return
            self._drop()
        raise OSError(errno.EBUSY, "Each temporary file was removed at once by somebody else", self._real_path)

    def _lock(self) -> bool:
        """Return False where somebody else was first: who looks for left-overs, and will remove this one."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: its left-overs stay
            pass
        return True

    def _is_at(self, name: str) -> bool:
        """Whether the file has its name still. Not told by st_nlink, which some FUSE daemons leave at 0."""
        try:
            os.stat(name, dir_fd=self._folder.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _make_temporary(self, make: Callable[[str], None]) -> str:
        """Have *make* make the file under a name that is free: process numbers repeat from container to container."""
        tried = 0
        while True:
            name = self._temporary_name()
            try:
                make(name)
            except FileExistsError:
                tried += 1
                if tried == _NAMES_TRIED:
                    raise
            else:
                self._temporary = name
                return name

    def _create(self, mode: int, name: str) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.descriptor = Owned(os.open(name, flags, mode, dir_fd=self._folder.fd))

    def _link(self, name: str) -> None:
        os.link(descriptor_path(self.fd), name, dst_dir_fd=self._folder.fd, follow_symlinks=True)

    def _prefix(self) -> str:
        return f".{os.fsdecode(os.fsencode(self._name)[:_NAME_BYTES_MAX])}.memsafe-"

    def _temporary_name(self) -> str:
        return f"{self._prefix()}{os.getpid()}-{next(_numbers)}.tmp"

    def _remove_leftovers(self) -> None:
        prefix = self._prefix()
        for name in os.listdir(self._folder.fd):  # noqa: PTH208 - pathlib knows no descriptors
            if name.startswith(prefix) and name.endswith(".tmp"):
                # It has the permissions of the file that it was to replace; NFS locks only what may be written.
                for access in (os.O_RDONLY, os.O_RDWR):
                    with suppress(OSError):
                        self._remove_if_unused(name, access)

    def _remove_if_unused(self, name: str, access: int) -> None:
        fd = os.open(name, access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._folder.fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name, dir_fd=self._folder.fd)
        finally:
            os.close(fd)


def _close(descriptor: Owned) -> None:
    with suppress(OSError):  # it is closed all the same, and what is committed was synced
        descriptor.close()
