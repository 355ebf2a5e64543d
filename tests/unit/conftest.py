"""Fixtures of the tests of the pressure monitor."""

import pytest

from memsafe.testing import FakeKernel
from tests.unit.small_machine import LIMIT, MIB, Clock, monitored


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def machine(tmp_path):
    kernel = FakeKernel(tmp_path)
    kernel.cgroup("/app", limit=LIMIT, usage=32 * MIB).join()
    return kernel


@pytest.fixture
def monitor(machine, clock):
    with monitored(machine, clock) as running:
        running.check()  # the look at the start is over: the test may write its files in peace
        yield running
