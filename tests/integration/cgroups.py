"""Cgroups below that of the tests: made, or the test is skipped by name; and removed at the end."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memsafe._kernel.cgroup import memory_cgroups

PATIENCE_S = 60.0


@contextmanager
def below(directory: str) -> Iterator[Path]:
    """Make a cgroup below one that holds this process. The test may remove it itself."""
    group = Path(directory, f"memsafe-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup may be made below {directory}: {error}")
    try:
        yield group
    finally:
        remove(group)


@contextmanager
def v1_memory_group(limit_bytes: int | None = None) -> Iterator[Path]:
    """Make a memory cgroup of version 1 below that of the tests."""
    own = memory_cgroups()
    if not own or own[0].version != 1:
        pytest.skip("no v1 memory cgroup here: a v2 child cannot be made below a cgroup that holds processes")
    with below(own[0].directory) as group:
        if limit_bytes is not None:
            (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield group


@contextmanager
def memory_group() -> Iterator[tuple[Path, str]]:
    """Make a memory cgroup of either version below that of the tests; with the name of the file for its limit."""
    own = memory_cgroups()
    if not own:
        pytest.skip("no memory cgroup holds this process")
    if own[0].version == 2 and "memory" not in Path(own[0].file("cgroup.subtree_control")).read_text().split():
        pytest.skip(f"cgroup {own[0].path} gives its children no memory controller")
    with below(own[0].directory) as group:
        yield group, "memory.max" if own[0].version == 2 else "memory.limit_in_bytes"


def remove(group: Path) -> None:
    """Remove a cgroup, if it is there. One whose last process has just ended may be busy for a moment."""
    deadline_s = time.monotonic() + PATIENCE_S
    while group.exists():
        try:
            group.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)  # the last process is being taken apart
