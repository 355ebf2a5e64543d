"""Fixtures of the tests on this machine's kernel."""

import pytest

from tests.integration import cgroups


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
