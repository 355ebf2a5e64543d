"""The OOM killer's knobs and counters of a process and of a cgroup.

Source: Documentation/filesystems/proc.rst (oom_score, oom_score_adj), Documentation/admin-guide/cgroup-v2.rst and
cgroup-v1/memory.rst.
"""

from __future__ import annotations

import os
from pathlib import Path

SCORE_ADJ_MIN = -1000
"""Never chosen."""
SCORE_ADJ_MAX = 1000
"""Chosen first."""

_EVENTS_V2 = "memory.events"
_EVENTS_V1 = "memory.oom_control"


def check_score_adj(score_adj: int) -> None:
    """Raise ValueError unless *score_adj* is one that the kernel takes."""
    if not SCORE_ADJ_MIN <= score_adj <= SCORE_ADJ_MAX:
        raise ValueError(f"oom_score_adj must be from {SCORE_ADJ_MIN} to {SCORE_ADJ_MAX}: {score_adj!r}")


def score_adj_path(root: str = "/", pid: int | str = "self") -> Path:
    """Return where a process reads and writes its oom_score_adj."""
    return Path(root, "proc", str(pid), "oom_score_adj")


def read_score_adj(root: str = "/", pid: int | str = "self") -> int:
    """Return the oom_score_adj of a process, -1000 to 1000."""
    return int(score_adj_path(root, pid).read_text())


def write_score_adj(score_adj: int, root: str = "/", pid: int | str = "self") -> None:
    """Set the oom_score_adj of a process; OSError when the kernel refuses."""
    fd = os.open(score_adj_path(root, pid), os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"%d" % score_adj)
    finally:
        os.close(fd)


def read_score(root: str = "/", pid: int | str = "self") -> int:
    """Return the oom_score of a process: how likely the OOM killer chooses it, 0 to 2000."""
    return int(Path(root, "proc", str(pid), "oom_score").read_text())


def read_kills(cgroup: Path) -> int:
    """Return how many processes the OOM killer ended in a memory cgroup.

    v2 counts the whole subtree (``oom_kill`` of memory.events), v1 this cgroup alone (memory.oom_control, Linux 4.13).

    Args:
        cgroup: The cgroup's folder.

    Raises:
        FileNotFoundError: The folder has neither file: the root of v2, or no memory controller.
        ValueError: The file has no ``oom_kill`` line.
    """
    try:
        events = (cgroup / _EVENTS_V2).read_text()
    except FileNotFoundError:
        events = (cgroup / _EVENTS_V1).read_text()
    for line in events.splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill":
            return int(count)
    raise ValueError(f"no oom_kill line in the events of {cgroup}")


def join_path(cgroup: str | os.PathLike[str]) -> Path:
    """Return the file that moves the process which writes ``0`` to it into *cgroup*, v1 and v2 alike."""
    return Path(cgroup, "cgroup.procs")
