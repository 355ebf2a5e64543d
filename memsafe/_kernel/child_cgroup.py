"""A memory cgroup made for one child, where this process may make one, and the counter that tells of its end.

The folder is locked (flock) while whoever made it may still need it. It cannot be removed while a process lives in it,
a grandchild say; then the lock is let go, and whoever makes the next one beside it removes it, as it does those of
makers that crashed. A lock, and not the maker's pid in the name, because pids differ between namespaces and come again.

Sources: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass

from memsafe._kernel import cgroup, files
from memsafe._kernel.cgroup import MemoryCgroup
from memsafe._kernel.files import Root
from memsafe._kernel.oom import JOIN_FILE
from memsafe.errors import KernelError, UnsupportedError

_PREFIX = "memsafe-child-"
_ATTEMPTS = 8
# What systemd writes on the cgroup of a unit with Delegate=; before version 251 the second alone.
_DELEGATED = ("user.delegate", "trusted.delegate")
# What keeps a process from more than so much, and would not keep one beside it.
_LIMITS = (
    "memory.max",
    "memory.high",
    "memory.swap.max",
    "pids.max",
    "cpu.max",
    "cpuset.cpus",
    "cpuset.mems",
    "io.max",
)
# Somebody who sweeps took it for a left-over between our mkdir and our lock, or it had that name already.
_LOST = frozenset({errno.EEXIST, errno.ENOENT, errno.ENODEV, errno.EWOULDBLOCK})


@dataclass(slots=True)
class ChildCgroup:
    """A cgroup that a process made for a child of its own."""

    cgroup: MemoryCgroup
    lock_fd: int
    maker_pid: int

    def remove(self) -> None:
        """Remove it, or leave it to the next who makes one where a process still lives in it.

        In a forked copy of the maker only the lock is closed: the child is the maker's, and so is its cgroup.
        """
        try:
            if os.getpid() == self.maker_pid:
                _rmdir(self.cgroup.directory)
        finally:
            os.close(self.lock_fd)


def make(limit_bytes: int, root: Root = "/") -> ChildCgroup:
    """Make a cgroup whose processes may use *limit_bytes* of memory and swap together; in v2, of memory, and no swap.

    Raises:
        UnsupportedError: None can be made here, with the reason.
        KernelError: /proc/self/cgroup or mountinfo cannot be read or makes no sense.
    """
    version, parent = _parent(root)
    _sweep(parent)
    for _ in range(_ATTEMPTS):
        group = MemoryCgroup(version, "", f"{parent}/{_PREFIX}{os.getpid()}-{os.urandom(4).hex()}")
        try:
            return _make(group, limit_bytes)
        except OSError as error:
            if error.errno not in _LOST:
                raise UnsupportedError(f"no cgroup can be made in {parent}: {error.strerror}") from None
    raise UnsupportedError(f"no cgroup can be made in {parent}: each was removed by somebody else at once")


def at(directory: str) -> MemoryCgroup:
    """Return the cgroup whose folder is *directory*, of either version."""
    version = 2 if os.path.exists(f"{directory}/cgroup.controllers") else 1  # noqa: PTH110 - a kernel path
    return MemoryCgroup(version, "", directory)


def _parent(root: Root) -> tuple[int, str]:
    """Return the version and the folder of the cgroup in which one may be made that binds a child as we are bound."""
    placement = cgroup.placement(root)
    located = placement.locate("memory")
    if not located.cgroups:
        raise UnsupportedError(located.problem or "this process is in no memory cgroup")
    if located.version == 1:
        folder = located.cgroups[0].directory
        if _forgets_its_children(MemoryCgroup(1, "", folder)):
            raise UnsupportedError(f"{folder}/memory.use_hierarchy is 0: a cgroup in it would be free of its limits")
        return 1, folder
    own = placement.unified_directory() or located.cgroups[0].directory
    folder = own.rpartition("/")[0]
    below = _refusal(own)
    if below is None:
        return 2, own
    beside = _refusal(folder) or _escape(own, folder)
    if beside is None:
        return 2, folder
    raise UnsupportedError(f"{below}; {beside}")


def _forgets_its_children(own: MemoryCgroup) -> bool:
    """Whether the v1 cgroup *own* is limited and does not count what is below it, as may be before Linux 5.11."""
    counts = files.read_optional(own.file("memory.use_hierarchy"))
    if counts is None or counts.strip() != b"0":
        return False
    return any(limit not in (None, files.UNLIMITED) for limit in (own.limit_bytes(), own.memsw_limit_bytes()))


def _refusal(folder: str) -> str | None:
    """Return why no v2 cgroup can be made in *folder* for a child of ours."""
    control = f"{folder}/cgroup.subtree_control"
    try:
        if b"memory" not in files.read(control).split():
            return f"{control} does not pass the memory controller on"
    except KernelError as error:
        return str(error)
    # The child needs the latter to move: the common ancestor's, where it is not the folder itself.
    for path in (folder, f"{folder}/{JOIN_FILE}"):
        if not os.access(path, os.W_OK):
            return f"{path} may not be written"
    return None


def _escape(own: str, folder: str) -> str | None:
    """Return why a child in the v2 cgroup *folder* would escape who set up *own*, which lies in it."""
    if not _is_delegated(folder):
        return (
            f"{folder} is not delegated (systemd's Delegate=): who stops or limits {own} would miss a child beside it"
        )
    try:
        limits = [name for name in _LIMITS if _is_set(f"{own}/{name}")]
    except KernelError as error:
        return str(error)
    if limits:
        return f"a cgroup in {folder} would be free of the limits of {own}: {', '.join(limits)}"
    return None


def _is_delegated(folder: str) -> bool:
    """Whether whoever manages the cgroups has said that what is in *folder* is left to those who live in it."""
    for name in _DELEGATED:
        with suppress(OSError):  # it has none; or not for us: trusted.* needs CAP_SYS_ADMIN; or none are kept at all
            if os.getxattr(folder, name) == b"1":
                return True
    return False


def _is_set(path: str) -> bool:
    """Whether the v2 limit at *path* is there and is one: unset it is empty, or begins with "max"."""
    text = files.read_optional(path)
    return text is not None and text.split()[:1] not in ([], [b"max"])


def _make(group: MemoryCgroup, limit_bytes: int) -> ChildCgroup:
    os.mkdir(group.directory)  # noqa: PTH102 - a kernel path
    try:
        lock_fd = os.open(group.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _limit(group, limit_bytes)
        except BaseException:
            os.close(lock_fd)
            raise
    except BaseException:
        _rmdir(group.directory)
        raise
    return ChildCgroup(group, lock_fd, os.getpid())


def _limit(group: MemoryCgroup, limit_bytes: int) -> None:
    if group.version == 1:
        _write(group.file("memory.limit_in_bytes"), limit_bytes)
        _write_optional(group.file("memory.memsw.limit_in_bytes"), limit_bytes)
        return
    _write(group.file("memory.max"), limit_bytes)
    _write_optional(group.file("memory.swap.max"), 0)
    # Its processes end together: a program that lost one of them at random is no use to who waits for it.
    _write_optional(group.file("memory.oom.group"), 1)


def _write(path: str, number: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"%d" % number)
    finally:
        os.close(fd)


def _write_optional(path: str, number: int) -> None:
    """Write where there is such a file: not without swap accounting, nor before Linux 4.19."""
    try:
        _write(path, number)
    except FileNotFoundError:
        if not os.path.exists(os.path.dirname(path)):  # noqa: PTH110, PTH120 - a kernel path
            raise


def _sweep(parent: str) -> None:
    """Remove what earlier makers left in *parent*: nobody holds its lock, and no process is in it."""
    for name in files.names(parent):
        if not name.startswith(_PREFIX):
            continue
        folder = f"{parent}/{name}"
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue  # gone, or another user's
        try:
            with suppress(OSError):  # in use, or no locks are to be had: then nobody can tell
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _rmdir(folder)
        finally:
            os.close(fd)


def _rmdir(folder: str) -> None:
    """Remove a cgroup unless processes are in it, or it is gone, or not ours to remove."""
    with suppress(OSError):
        os.rmdir(folder)  # noqa: PTH106 - a kernel path


__all__ = ["ChildCgroup", "at", "make"]
