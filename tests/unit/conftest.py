"""Fixtures: a machine and its monitor, schedules driven by hand, and a collector that waits to be called."""

import gc

import pytest

from memsafe.snapshot import SnapshotSchedule
from memsafe.testing import FakeKernel
from tests.unit.hand_driven import Engine
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


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def make(clock, engine):
    """Make a schedule whose snapshots are the engine's, and whose time is the clock's."""

    def make(**arguments):
        return SnapshotSchedule("dump.db", print, take=engine.take, clock=clock, **arguments)

    return make


@pytest.fixture
def no_collector():
    """Garbage is collected when the test says so, and what earlier tests left is gone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
