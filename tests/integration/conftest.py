"""Fixtures of the tests on this machine's kernel."""

import time

import pytest

from memsafe.commit import FULL_STALL_PERCENT
from memsafe.status import status_once
from tests.integration import cgroups

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def no_stall_of_an_earlier_test():
    """Wait until snapshots are not put off for what an earlier test did: the kernel averages stalls over 10 s."""
    deadline_s = time.monotonic() + PATIENCE_S
    while _all_stood_still() and time.monotonic() < deadline_s:
        time.sleep(0.1)  # nobody tells when it is over


def _all_stood_still():
    pressure = status_once("/").pressure
    return pressure is not None and pressure.full.avg10 >= FULL_STALL_PERCENT


@pytest.fixture
def path(tmp_path):
    target = tmp_path / "dump.db"
    target.write_bytes(b"old")
    return target


@pytest.fixture
def memory_group():
    """The folder of a memory cgroup below that of the tests, and the name of the file with its limit."""
    with cgroups.memory_group() as found:
        yield found
