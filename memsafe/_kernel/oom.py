"""What steers the OOM killer, joining a cgroup, and whom the killer took: by its counters and by the kernel's log.

Sources: Documentation/filesystems/proc.rst, 3.1; Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/cgroups.rst;
Documentation/ABI/testing/dev-kmsg; mm/oom_kill.c, __oom_kill_process().
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from operator import index
from typing import TYPE_CHECKING

from memsafe._kernel import cgroup, files
from memsafe._kernel.descriptors import Owned
from memsafe.errors import KernelError

if TYPE_CHECKING:
    from memsafe._kernel.files import Root

SCORE_ADJ_MIN = -1000
"""Never chosen."""
SCORE_ADJ_MAX = 1000
"""Chosen first."""

JOIN_FILE = "cgroup.procs"
JOIN_TEXT = b"0"
"""Written to a cgroup's JOIN_FILE it moves the writer, whatever its pid, v1 and v2 alike."""


# A record is "level+facility,number,time,flags;text", then lines that begin with a space; the time is in microseconds.
# Facility 0 is the kernel's own: what others write to the log has another. The name that somebody gave his cgroup
# stands further behind.
_HEAD = re.compile(rb"\d+,(\d+),(\d+),")
_KILLED = re.compile(
    rb"^[0-7],\d+,(\d+),[^;]*;(?:Memory cgroup o|O)ut of memory[^:]*: Killed process (\d+) \(", re.MULTILINE
)
_RECORD_BYTES_MAX = 16 * 1024  # CONSOLE_EXT_LOG_MAX is 8192: a shorter buffer would be refused
# The log knows the pids of this namespace only, whose inode has always this number (include/linux/proc_ns.h).
_FIRST_PID_NAMESPACE = "pid:[4026531836]"
# Nor is the log's clock that of another time namespace (fs/proc/, PROC_TIME_INIT_INO). Before Linux 5.6 there is one.
_FIRST_TIME_NAMESPACE = "time:[4026531834]"
# The log's clock (local_clock()) began with CLOCK_MONOTONIC and stands still in suspend with it, but is not disciplined
# by NTP, which bends CLOCK_MONOTONIC by at most 500 ppm, and by as much again in adjtime() (MAXFREQ, MAX_TICKADJ).
_CLOCKS_DIFFER_AT_FIRST_S = 1.0
_CLOCKS_DIFFER_BY = 1e-3
# The kernel counts a kill, then sends the signal, then logs it: a victim may be reaped before it is named.
_LOG_LAG_S = 0.1


def check_score_adj(score_adj: int) -> None:
    """Raise ValueError unless *score_adj* is one that the kernel takes, TypeError if it is no int."""
    if not SCORE_ADJ_MIN <= index(score_adj) <= SCORE_ADJ_MAX:
        raise ValueError(f"oom_score_adj must be from {SCORE_ADJ_MIN} to {SCORE_ADJ_MAX}: {score_adj!r}")


def score_adj_path(root: Root = "/") -> str:
    """Return the file by which a process sets its own oom_score_adj."""
    return files.under(root, "/proc/self/oom_score_adj")


def write_score_adj(score_adj: int, root: Root = "/") -> None:
    """Set the oom_score_adj of this process.

    Raises:
        KernelError: The kernel refused; EACCES when it is lower than the process may go.
    """
    path = score_adj_path(root)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)  # a tree of files needs it, as does a shell's echo
        try:
            os.write(fd, b"%d" % score_adj)
        finally:
            os.close(fd)
    except OSError as error:
        raise files.failed(error, path, f"write {score_adj} to") from None


def join_path(cgroup: str | os.PathLike[str]) -> str:
    """Return the file that moves a process into the cgroup at *cgroup*."""
    return os.path.join(os.fspath(cgroup), JOIN_FILE)  # noqa: PTH118 - as the child will open it


def machine_kills(root: Root = "/") -> int | None:
    """Return how many processes the OOM killer has ended on the whole machine (since Linux 4.13)."""
    path = files.under(root, "/proc/vmstat")
    text = files.read_optional(path)
    return None if text is None else files.Flat(text, path).get(b"oom_kill")


class KillLog:
    """Whom the kernel's log names as killed for want of memory, since some moment. One thread at a time.

    Reading it may be forbidden (kernel.dmesg_restrict), it may be missing, as in most containers, and in a pid
    namespace of its own a process cannot tell which of the pids there is whose. Then nothing is known.
    """

    def __init__(self, root: Root = "/", since_s: float | None = None) -> None:
        """Begin behind what is logged so far, or with what was logged at *since_s* of time.monotonic().

        The log's clock is another, so that what came somewhat earlier is taken too: a second, and a thousandth of the
        time since boot. Who had the same pid and was killed then is taken for its next owner.
        """
        self._log = Owned(-1)
        self._whole = since_s is None  # nothing of that time was overwritten
        self._since_us = 0.0
        if since_s is not None:
            self._since_us = 1e6 * (since_s * (1 - _CLOCKS_DIFFER_BY) - _CLOCKS_DIFFER_AT_FIRST_S)
        self.victims: set[int] = set()
        with suppress(OSError):
            if _pids_are_the_logs(root) and (since_s is None or _times_are_the_logs(root)):
                self._log = Owned(os.open(files.under(root, "/dev/kmsg"), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
                if since_s is None:
                    os.lseek(self._log.fd, 0, os.SEEK_END)

    def names(self, pid: int) -> bool | None:
        """Whether *pid* was killed for want of memory; None: it is not named, but may have been all the same."""
        try:
            while self._log.is_ours() and (record := os.read(self._log.fd, _RECORD_BYTES_MAX)):
                self._whole = self._whole or self._reaches_back(record)
                self.victims.update(int(pid) for time_us, pid in _KILLED.findall(record) if self._in_time(time_us))
        except BlockingIOError:
            pass  # that is all
        except OSError:  # EPIPE: some were overwritten unread
            self.close()
        return True if pid in self.victims else False if self._whole and self._log.is_ours() else None

    def _reaches_back(self, record: bytes) -> bool:
        """Whether *record* is the very first, or from before the time that matters."""
        head = _HEAD.match(record)
        return head is not None and (int(head[1]) == 0 or not self._in_time(head[2]))

    def _in_time(self, time_us: bytes) -> bool:
        return int(time_us) >= self._since_us

    def close(self) -> None:
        """Read no more. Twice is a no-op."""
        with suppress(OSError):  # it is closed all the same
            self._log.close()


def _pids_are_the_logs(root: Root) -> bool:
    return files.read_link(files.under(root, "/proc/self/ns/pid")) == _FIRST_PID_NAMESPACE


def _times_are_the_logs(root: Root) -> bool:
    try:
        return files.read_link(files.under(root, "/proc/self/ns/time")) == _FIRST_TIME_NAMESPACE
    except KernelError as error:
        return files.is_missing(error)


class KillWatch:
    """Tells a process that the OOM killer ends from one that somebody else kills. One thread at a time.

    The counters say that somebody in the cgroups of this process was shot; who it was, only the log says.
    """

    def __init__(self, root: Root = "/") -> None:
        """Begin to watch. Nothing is raised: what cannot be read is not known."""
        self._root = root
        self._log = KillLog(root)
        try:
            self._before = _kills(root)
        except BaseException:  # for want of memory
            self._log.close()
            raise

    def evidence(self, pid: int) -> str | None:
        """Return what says that the OOM killer ended *pid*, which SIGKILL has ended; None: nothing, so it did not."""
        counts = _kills(self._root)
        rises = {path: rise for path, count in counts.items() if (rise := count - self._before.get(path, count)) > 0}
        named = self._named(pid, max(rises.values(), default=0))
        if named is False and self._log.victims:
            return None  # they are the ones that were counted
        said = [f"oom_kill of {', '.join(rises)} rose"] if rises else []
        if named:
            said.append("the kernel's log names it")
        return " and ".join(said) or None

    def _named(self, pid: int, kills: int) -> bool | None:
        """Return whether the log names *pid*, once it has as many victims as *kills*, or has had the time."""
        told_by_s = time.monotonic() + _LOG_LAG_S
        while (named := self._log.names(pid)) is False and len(self._log.victims) < kills:
            if time.monotonic() > told_by_s:
                break
            time.sleep(_LOG_LAG_S / 100)
        return named

    def close(self) -> None:
        """Close what is open. Twice is a no-op."""
        self._log.close()


def _kills(root: Root) -> dict[str, int]:
    """Return the OOM killer's count in each memory cgroup of this process that tells it; in none, the machine's."""
    kills: dict[str, int] = {}
    with suppress(KernelError):
        for group in cgroup.memory_cgroups(root):
            with suppress(KernelError):
                count = group.oom_kills()
                if count is not None:
                    kills[group.path] = count
    if not kills:
        with suppress(KernelError):
            count = machine_kills(root)
            if count is not None:
                kills["the machine"] = count
    return kills


__all__ = [
    "JOIN_FILE",
    "JOIN_TEXT",
    "SCORE_ADJ_MAX",
    "SCORE_ADJ_MIN",
    "KillLog",
    "KillWatch",
    "check_score_adj",
    "join_path",
    "machine_kills",
    "score_adj_path",
    "write_score_adj",
]
