"""Fixtures of the tests on this machine's kernel."""

import errno
import os
import time
from pathlib import Path

import pytest

from memsafe._kernel.cgroup import memory_cgroups
from tests.integration.snapshots import PATIENCE_S


@pytest.fixture
def path(tmp_path):
    target = tmp_path / "dump.db"
    target.write_bytes(b"old")
    return target


@pytest.fixture
def memory_group():
    """The folder of a memory cgroup below that of the tests, and the name of the file with its limit."""
    own = memory_cgroups()
    if not own:
        pytest.skip("no memory cgroup holds this process")
    if own[0].version == 2 and "memory" not in Path(own[0].file("cgroup.subtree_control")).read_text().split():
        pytest.skip(f"cgroup {own[0].path} gives its children no memory controller")
    folder = Path(own[0].directory, f"memsafe-test-{os.getpid()}")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup may be made: {error}")
    yield folder, "memory.max" if own[0].version == 2 else "memory.limit_in_bytes"
    _remove(folder)


def _remove(folder):
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)  # the last process is being taken apart
        else:
            return
