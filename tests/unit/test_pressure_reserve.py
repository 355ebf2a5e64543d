"""The memory that a monitor holds for its next look."""

import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest

from memsafe import PressureLevel, PressureMonitor, Thresholds
from memsafe.pressure.reserve import RESERVE_BYTES, BlockReserve
from memsafe.testing import FakeKernel

MIB = 1024 * 1024


def held_bytes(reserve: BlockReserve) -> int:
    return sum(map(sys.getsizeof, reserve._blocks))


def test_it_holds_every_size_and_gives_all_back():
    reserve = BlockReserve()
    for _ in range(2):
        reserve.take()
        first = reserve._blocks[0]
        reserve.take()
        assert reserve._blocks[0] is first, "what is held is not taken again"
        sizes = {-(-sys.getsizeof(block) // 16) * 16 for block in reserve._blocks}
        assert sizes >= set(range(16, 513, 16))
        assert RESERVE_BYTES / 2 < held_bytes(reserve) <= RESERVE_BYTES
        reserve.give()
        assert held_bytes(reserve) == 0


def test_it_is_taken_between_looks_while_there_is_plenty_and_not_where_the_last_bytes_are_at_stake(tmp_path):
    machine = FakeKernel(tmp_path)
    machine.cgroup("/app", limit=128 * MIB, usage=32 * MIB).join()
    quiet = Thresholds(poll_s_min=3600, poll_s_max=3600, cooldown_s=0)
    holds = []
    for left_bytes in (64 * MIB, 4 * MIB, 0, 64 * MIB):
        machine.cgroup("/app").usage = 128 * MIB - left_bytes
        with PressureMonitor(root=machine.root, thresholds=quiet) as monitor:
            monitor.check()
            reserve = monitor._hub._reserve
            monitor.check()
            monitor.simulate(monitor.level)  # behind a wake-up that a check may have left
            holds.append(held_bytes(reserve) > 0)
    assert holds == [True, False, False, True]


def test_waking_up_for_anything_but_a_look_leaves_it_held(tmp_path):
    machine = FakeKernel(tmp_path)
    machine.cgroup("/app", limit=128 * MIB, usage=32 * MIB).join()
    quiet = Thresholds(poll_s_min=3600, poll_s_max=3600, cooldown_s=3600)
    with PressureMonitor(root=machine.root, thresholds=quiet) as monitor:
        monitor.check()
        reserve = monitor._hub._reserve
        monitor.simulate(PressureLevel.LOW)
        assert held_bytes(reserve) > 0
        given = threading.Event()
        give = reserve.give
        reserve.give = lambda: (give(), given.set())
        monitor._hub.wake()
        assert given.wait(30)
        monitor.simulate(PressureLevel.CRITICAL)
        assert held_bytes(reserve) > 0


EATEN = """
import gc, sys, time
from resource import RUSAGE_THREAD, getrusage
from memsafe import PressureMonitor
from memsafe.pressure.reserve import BlockReserve

def faults():
    return getrusage(RUSAGE_THREAD).ru_minflt

class Counting(BlockReserve):
    def take(self):
        if sys.argv[1] == "with":
            super().take()
    def give(self):
        self.before = faults()
        super().give()

def clock():
    global during
    if isinstance(reserve, Counting):
        during += faults() - reserve.before
        reserve.before = faults()
    return time.monotonic()

gc.disable()
reserve, during, eaten = None, 0, []
with PressureMonitor(clock=clock) as monitor:
    monitor.check()
    reserve = monitor._hub._reserve
    reserve.__class__ = Counting
    reserve.before = 0
    monitor.check()
    during = 0
    for number in range(100):
        for size in range(15, 480, 16):
            eaten.extend([bytes(size) for _ in range(50 + number % 7)])
        monitor.check()
print(during)
"""


@pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="mimalloc keeps each thread's own blocks")
def test_a_look_begins_few_new_pages_though_other_threads_eat_the_free_blocks():
    began = {}
    for how in ("with", "without"):
        done = subprocess.run(
            [sys.executable, "-c", EATEN, how],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=Path(__file__).parents[2],
        )
        assert done.returncode == 0, done.stderr
        began[how] = int(done.stdout)
    assert began["with"] * 4 < began["without"], began
