"""This process and the OOM killer: how likely it is chosen, and how often others were.

An ordinary user may make the process likelier to be chosen, and take that back; less likely than it was made by
whoever started it takes CAP_SYS_RESOURCE (Documentation/filesystems/proc.rst, 3.1).
"""

from __future__ import annotations

import errno

from memsafe._kernel import oom as kernel
from memsafe.errors import KernelError, UnsupportedError

PROTECTED_BY = 500
"""What protect() takes off the score: as if the process used half of the machine's memory less than it does."""


def score(*, root: str = "/") -> int:
    """Return how likely the OOM killer chooses this process, 0 (never) to about 2000 (first).

    Args:
        root: Where to find ``proc``; any tree of proc files.
    """
    return kernel.read_score(root)


def score_adj(*, root: str = "/") -> int:
    """Return what is added to the score of this process, -1000 to 1000, in thousandths of all memory."""
    return kernel.read_score_adj(root)


def set_score_adj(n: int, *, root: str = "/") -> int:
    """Set what is added to the score of this process; its children inherit it.

    Args:
        n: -1000 (never chosen) to 1000 (chosen first), in thousandths of all memory that the process may use.
        root: Where to find ``proc``.

    Returns:
        The value that was there before.

    Raises:
        ValueError: *n* is out of its range.
        KernelError: EACCES: it is lower than what the process was started with, and there is no CAP_SYS_RESOURCE.
    """
    kernel.check_score_adj(n)
    before = kernel.read_score_adj(root)
    try:
        kernel.write_score_adj(n, root)
    except OSError as failure:
        call = f"write {n} to {kernel.score_adj_path(root)}"
        raise KernelError(failure.errno or 0, call, _advice(failure.errno, before)) from failure
    return before


def protect(*, root: str = "/") -> int:
    """Make the OOM killer less likely to choose this process: take 500 off its oom_score_adj, down to -999 at most.

    Never -1000: where every process is exempt, the machine hangs or panics instead.

    Returns:
        The value that was there before; ``set_score_adj`` with it takes the protection back.

    Raises:
        KernelError: EACCES: there is no CAP_SYS_RESOURCE. Whoever starts the process can do it instead.
    """
    before = kernel.read_score_adj(root)
    set_score_adj(max(before - PROTECTED_BY, min(before, kernel.SCORE_ADJ_MIN + 1)), root=root)
    return before


def kills(*, root: str = "/") -> int:
    """Return how many processes the OOM killer has ended in this process's memory cgroup since it was made.

    cgroup v2 counts the cgroups below it too, v1 does not.

    Args:
        root: Where to find ``proc`` and ``sys``.

    Raises:
        UnsupportedError: This process is in no memory cgroup that counts, or its files cannot be read.
    """
    raise NotImplementedError


def _advice(code: int | None, before: int) -> str:
    if code not in (errno.EACCES, errno.EPERM):
        return ""
    return (
        f"it is {before}; lowering it takes CAP_SYS_RESOURCE: start the process with OOMScoreAdjust= (systemd), "
        "--oom-score-adj (docker, podman) or choom -n, or raise its children's instead: Popen(oom_score_adj=...)"
    )


__all__ = ["kills", "protect", "score", "score_adj", "set_score_adj"]
