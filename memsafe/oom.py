"""This process and the OOM killer: how likely it is chosen, and how often it struck here.

An ordinary user may make the process likelier to be chosen, and take that back. The lowest that it may have is what
somebody with CAP_SYS_RESOURCE set last, for it or for the process that it descends from; less takes that capability
(Documentation/filesystems/proc.rst, 3.1; fs/proc/base.c, __set_oom_adj()). Nothing is changed unless it is asked for.
"""

from __future__ import annotations

import errno
import os
import threading
from operator import index
from typing import TYPE_CHECKING

from memsafe._kernel import cgroup, files, oom as kernel, process
from memsafe.errors import KernelError, UnsupportedError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from memsafe._kernel.files import Root

PROTECTED_BY = 500
"""What protect() takes off oom_score_adj: the process counts as if it used half of all memory less than it does."""


_LOWER = (
    "below what the process was started with takes CAP_SYS_RESOURCE: have it started with OOMScoreAdjust= (systemd), "
    "--oom-score-adj (docker, podman) or choom -n, or raise its children instead, memsafe.Popen(..., oom_score_adj=500)"
)
_OWNER = (
    "anybody may raise it, but the file is root's in a process that has changed its user and run no program since: "
    "raise it before"
)


# Held from the reading of a value to the writing of the next. Reentrant: a signal's handler may change it as well.
# Renewed in a forked child, where it may be held by a thread that is not there.
_changing = threading.RLock()


def _renew_lock_after_fork() -> None:
    global _changing
    _changing = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock_after_fork)


class Adjusted(int):
    """The oom_score_adj that was there before a change. As a context manager it takes the change back at the end.

    What is taken back is the difference, not the number: what others have changed meanwhile stays, and changes that
    overlap may end in any order.

    Example:
        >>> from memsafe import oom
        >>> with oom.adjust_by(1) as before:
        ...     oom.score_adj() - before
        1
    """

    _offset: int
    _root: Root

    @classmethod
    def of(cls, before: int, after: int, root: Root) -> Self:
        """Return what stands for the change of *before* to *after*."""
        adjusted = cls(before)
        adjusted._offset, adjusted._root = after - before, root
        return adjusted

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _changing:
            if not self._offset:
                return  # writing what is there anyway may not be permitted
            wanted = score_adj(root=self._root) - self._offset
            self._offset = 0
            set_score_adj(min(max(wanted, kernel.SCORE_ADJ_MIN), kernel.SCORE_ADJ_MAX), root=self._root)


def score(*, root: Root = "/") -> int:
    """Return how likely the OOM killer chooses this process, 0 (never) to about 2000 (first).

    Args:
        root: What stands for "/": any tree of proc files.

    Raises:
        KernelError: The kernel does not tell.
    """
    return _told(process.oom_score(root), "/proc/self/oom_score", root)


def score_adj(*, root: Root = "/") -> int:
    """Return what is added to the score of this process, -1000 to 1000, in thousandths of all memory it may use.

    Args:
        root: What stands for "/".

    Raises:
        KernelError: The kernel does not tell.
    """
    return _told(process.oom_score_adj(root), "/proc/self/oom_score_adj", root)


def set_score_adj(n: int, *, root: Root = "/") -> Adjusted:
    """Set what is added to the score of this process. Children that it starts later inherit it.

    For good; or, as ``with set_score_adj(n):``, until the end of the block. What was inherited is written over: in a
    process that was started at 700, ``set_score_adj(500)`` makes it less likely to be chosen, or is refused.
    adjust_by() goes from what is there.

    Args:
        n: The value itself, as the kernel's file has it: -1000 (never chosen) to 1000 (chosen first), in thousandths of
            all memory that the process may use.
        root: What stands for "/".

    Returns:
        The value that was there before.

    Raises:
        ValueError: *n* is out of its range.
        KernelError: EACCES: *n* is lower than the process may have, and CAP_SYS_RESOURCE is missing. Nothing changed.
    """
    kernel.check_score_adj(n)
    with _changing:
        before = score_adj(root=root)
        try:
            kernel.write_score_adj(n, root)
        except KernelError as error:
            if error.errno not in (errno.EACCES, errno.EPERM):
                raise
            raise KernelError(
                error.errno or errno.EACCES, error.call, f"it is {before}; {_LOWER if n < before else _OWNER}"
            ) from None
    return Adjusted.of(before, n, root)


def adjust_by(offset: int, *, root: Root = "/") -> Adjusted:
    """Add *offset* to what is added to the score of this process, inherited or set: to 1000 at most, or -999 at least.

    Never to -1000: where all that is large is exempt, the kernel kills what is small, or panics. Children that it
    starts later inherit the sum.

    For good; or, as ``with adjust_by(offset):``, until the end of the block.

    Args:
        offset: Above 0 the process is likelier to be chosen, below 0 less likely; in thousandths of all memory that it
            may use.
        root: What stands for "/".

    Returns:
        The value that was there before.

    Raises:
        KernelError: EACCES: *offset* is below 0, the sum lower than the process may have, and CAP_SYS_RESOURCE is
            missing. Nothing changed.
    """
    with _changing:
        before = score_adj(root=root)
        lowest = min(before, kernel.SCORE_ADJ_MIN + 1)
        after = min(max(before + index(offset), lowest), kernel.SCORE_ADJ_MAX)
        return Adjusted.of(before, before, root) if after == before else set_score_adj(after, root=root)


def protect(*, root: Root = "/") -> Adjusted:
    """Make the OOM killer less likely to choose this process: ``adjust_by(-500)``, so to -999 at the lowest.

    Children that are started meanwhile inherit it; a snapshot's child does not, and memsafe.Popen has
    ``oom_score_adj``.

    For good; or, as ``with protect():``, until the end of the block.

    Args:
        root: What stands for "/".

    Returns:
        The value that was there before.

    Raises:
        KernelError: EACCES: CAP_SYS_RESOURCE is missing. The error says who can do it instead.
    """
    return adjust_by(-PROTECTED_BY, root=root)


def kills(*, root: Root = "/") -> int:
    """Return how many processes the OOM killer has ended in this process's memory cgroup since that was made.

    cgroup v2 counts the cgroups below too (memory.events), v1 does not (memory.oom_control). In no memory cgroup, or
    in the root one, it is the whole machine's count since boot (/proc/vmstat).

    Args:
        root: What stands for "/".

    Raises:
        UnsupportedError: The kernel counts in none of these places; it does since Linux 4.13.
        KernelError: A counter is there and cannot be read.
    """
    located = cgroup.locate("memory", root)
    own = cgroup.as_memory(located)[:1]
    count = own[0].oom_kills() if own else None
    if count is None:
        count = kernel.machine_kills(root)
    if count is None:
        where = located.problem or f"{own[0].directory} and /proc/vmstat have no oom_kill"
        raise UnsupportedError(f"OOM kills are not counted here: {where}; kernels count them since Linux 4.13")
    return count


def _told(value: int | None, path: str, root: Root) -> int:
    if value is None:
        raise KernelError(errno.ENOENT, f"read {files.under(root, path)}", "is proc mounted?")
    return value


__all__ = ["Adjusted", "adjust_by", "kills", "protect", "score", "score_adj", "set_score_adj"]
