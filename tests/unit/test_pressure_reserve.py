"""The memory that a monitor holds for its next look."""

import queue
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest

from memsafe import Budget, PressureLevel, PressureMonitor, Thresholds, memory_status
from memsafe.pressure.hub import Hub
from memsafe.pressure.reserve import RESERVE_BYTES, BlockReserve
from memsafe.pressure.waiter import Reading
from memsafe.testing import FakeKernel
from tests.unit.small_machine import MIB, leave


def held_bytes(reserve: BlockReserve) -> int:
    return sum(sys.getsizeof(block) for portion in reserve._portions for block in portion)


def test_it_holds_every_size_twice_and_gives_a_portion_at_a_time():
    reserve = BlockReserve()
    for _ in range(2):
        reserve.take()
        first = [portion[0] for portion in reserve._portions]
        reserve.take()
        assert all(portion[0] is each for portion, each in zip(reserve._portions, first, strict=True)), "taken again"
        for portion in reserve._portions:
            sizes = {-(-sys.getsizeof(block) // 16) * 16 for block in portion}
            assert sizes >= set(range(16, 513, 16))
        all_bytes = held_bytes(reserve)
        assert RESERVE_BYTES / 3 < all_bytes <= RESERVE_BYTES / 2, "the rest is the large blocks"
        for left_bytes in (all_bytes / 2, 0, 0):
            reserve.give()
            assert held_bytes(reserve) == left_bytes


def test_a_portion_that_was_given_back_is_taken_again_beside_one_that_is_held():
    reserve = BlockReserve()
    reserve.take()
    all_bytes = held_bytes(reserve)
    reserve.give()
    reserve.take()
    assert held_bytes(reserve) == all_bytes


def test_it_is_given_back_before_a_look_allocates_anything(tmp_path, monkeypatch):
    kernel = FakeKernel(tmp_path)
    kernel.cgroup("/app", limit=128 * MIB, usage=113 * MIB).join()
    calls, asked, draw, reading = [], [], Hub.draw, Hub.reading
    monkeypatch.setattr(Hub, "draw", lambda hub: (calls.append("draw"), draw(hub)))
    monkeypatch.setattr(Hub, "reading", lambda hub: (calls.append("reading"), reading(hub))[1])
    quiet = Thresholds(poll_s_min=3600, poll_s_max=3600)
    with Budget("64 MiB") as budget, budget.reserve("8 MiB"):
        budget.reclaimer(lambda need_bytes: asked.append(list(calls)) or 0)
        with PressureMonitor(budget, root=kernel.root, thresholds=quiet) as monitor:
            monitor.check()
    assert asked[0][-2:] == ["draw", "reading"], "the responder's own look"


@pytest.fixture
def provided(monkeypatch):
    """Whether a monitor holds the blocks, each time that it is about to wait."""
    provide, told = Hub.provide, queue.SimpleQueue()

    def tell(hub, *status):
        provide(hub, *status)
        told.put(held_bytes(hub._reserve) > 0)

    monkeypatch.setattr(Hub, "provide", tell)
    return told


def test_it_is_taken_between_looks_while_there_is_plenty_and_not_where_the_last_bytes_are_at_stake(machine, provided):
    quiet = Thresholds(poll_s_min=3600, poll_s_max=3600, cooldown_s=0)
    holds = []
    for left_bytes in (64 * MIB, 4 * MIB, 0, 64 * MIB):
        leave(machine, left_bytes)
        with PressureMonitor(root=machine.root, thresholds=quiet) as monitor:
            monitor.check()
            holds.append(provided.get(timeout=30))
        while not provided.empty():
            provided.get()
    assert holds == [True, False, False, True]


def test_waking_up_for_anything_but_a_look_leaves_it_as_it_was(machine, provided):
    quiet = Thresholds(poll_s_min=3600, poll_s_max=3600, cooldown_s=3600)
    with PressureMonitor(root=machine.root, thresholds=quiet) as monitor:
        for left_bytes, holds in ((64 * MIB, True), (0, False)):
            leave(machine, left_bytes)
            monitor.check()
            while not provided.empty():
                provided.get()
            monitor._hub.wake()
            monitor.simulate(PressureLevel.NORMAL)
            assert provided.get(timeout=30) is holds


def test_it_is_not_taken_where_memory_has_filled_up_since_the_look(machine, tmp_path):
    left = tmp_path / "left"
    left.write_text("1000")
    leave(machine, 64 * MIB)
    status = memory_status(root=machine.root)
    with open(left) as file:
        hub = Hub(machine.root, Thresholds())
        hub._between.read([Reading(1, 0, 100, 10, 0, ((file.fileno(), b"", 1),))])
        for provide in (lambda: hub.provide(status), hub.provide):
            for left_bytes, holds in ((1000, True), (100, False)):
                left.write_text(str(left_bytes))
                hub.draw()
                hub.draw()
                provide()
                assert (held_bytes(hub._reserve) > 0) is holds
        hub.close()


def test_each_thread_that_looks_is_made_ready_when_it_begins(machine, monkeypatch):
    ready, told = Hub.ready, queue.SimpleQueue()

    def tell(hub):
        ready(hub)
        told.put((threading.current_thread().name, hub._reserve._own.block is not None))

    monkeypatch.setattr(Hub, "ready", tell)
    with PressureMonitor(root=machine.root):
        found = {told.get(timeout=30) for _ in range(2)}
    assert found == {("memsafe-pressure", True), ("memsafe-pressure-deputy", True)}


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
