"""What steers the OOM killer, and joining a cgroup: the files here are written, by this process or by its child.

Sources: Documentation/filesystems/proc.rst, 3.1; Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/cgroups.rst.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from memsafe._kernel import files

if TYPE_CHECKING:
    from memsafe._kernel.files import Root

SCORE_ADJ_MIN = -1000
"""Never chosen."""
SCORE_ADJ_MAX = 1000
"""Chosen first."""

JOIN_FILE = "cgroup.procs"
JOIN_TEXT = b"0"
"""Written to a cgroup's JOIN_FILE it moves the writer, whatever its pid, v1 and v2 alike."""


def check_score_adj(score_adj: int) -> None:
    """Raise ValueError unless *score_adj* is one that the kernel takes."""
    if not SCORE_ADJ_MIN <= score_adj <= SCORE_ADJ_MAX:
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
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
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


__all__ = [
    "JOIN_FILE",
    "JOIN_TEXT",
    "SCORE_ADJ_MAX",
    "SCORE_ADJ_MIN",
    "check_score_adj",
    "join_path",
    "machine_kills",
    "score_adj_path",
    "write_score_adj",
]
