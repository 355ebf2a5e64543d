"""This process and the OOM killer: how likely it is chosen, and how often it struck here.

An ordinary user may make the process likelier to be chosen, and take that back; less likely than whoever started it
made it takes CAP_SYS_RESOURCE (Documentation/filesystems/proc.rst, 3.1).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from memsafe._kernel import cgroup, files, oom as kernel, process
from memsafe.errors import KernelError, UnsupportedError

if TYPE_CHECKING:
    from memsafe._kernel.files import Root

PROTECTED_BY = 500
"""What protect() takes off oom_score_adj: the process counts as if it used half of all memory less than it does."""


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


def set_score_adj(n: int, *, root: Root = "/") -> int:
    """Set what is added to the score of this process. Children that it starts later inherit it.

    Args:
        n: -1000 (never chosen) to 1000 (chosen first), in thousandths of all memory that the process may use.
        root: What stands for "/".

    Returns:
        The value that was there before.

    Raises:
        ValueError: *n* is out of its range.
        KernelError: EACCES: *n* is lower than what the process was started with, and CAP_SYS_RESOURCE is missing.
    """
    kernel.check_score_adj(n)
    before = score_adj(root=root)
    try:
        kernel.write_score_adj(n, root)
    except KernelError as error:
        if error.errno not in (errno.EACCES, errno.EPERM):
            raise
        advice = (
            f"it is {before}; below what the process was started with takes CAP_SYS_RESOURCE: have it started with "
            "OOMScoreAdjust= (systemd), --oom-score-adj (docker, podman) or choom -n, or raise its children instead, "
            "memsafe.Popen(..., oom_score_adj=500)"
        )
        raise KernelError(error.errno or errno.EACCES, error.call, advice) from None
    return before


def protect(*, root: Root = "/") -> int:
    """Make the OOM killer less likely to choose this process: take 500 off its oom_score_adj, to -999 at the lowest.

    Never -1000: where all that is large is exempt, the kernel kills what is small, or panics.

    Args:
        root: What stands for "/".

    Returns:
        The value that was there before; ``set_score_adj`` with it takes the protection back.

    Raises:
        KernelError: EACCES: CAP_SYS_RESOURCE is missing. The error says who can do it instead.
    """
    before = score_adj(root=root)
    if before <= kernel.SCORE_ADJ_MIN + 1:
        return before
    return set_score_adj(max(before - PROTECTED_BY, kernel.SCORE_ADJ_MIN + 1), root=root)


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


__all__ = ["kills", "protect", "score", "score_adj", "set_score_adj"]
