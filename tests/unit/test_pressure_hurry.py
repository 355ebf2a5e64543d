import gc
import os
import subprocess
import sys

import pytest

from memsafe import Budget, PressureLevel, PressureMonitor, Thresholds
from memsafe.pressure.hurry import Hurry
from memsafe.testing import FakeKernel

MIB = 1024 * 1024


class Asker:
    pass


@pytest.fixture
def interval():
    before_s = sys.getswitchinterval()
    yield before_s
    sys.setswitchinterval(before_s)


def test_turns_are_short_until_the_last_who_asked_has_had_enough(interval):
    shorter, one, other = Hurry(), Asker(), Asker()
    shorter.ask(one)
    shorter.ask(other)
    shorter.ask(one)
    assert sys.getswitchinterval() == pytest.approx(0.0005)
    shorter.release(one)
    assert sys.getswitchinterval() == pytest.approx(0.0005)
    shorter.release(other)
    assert sys.getswitchinterval() == interval


def test_an_interval_that_somebody_else_has_set_meanwhile_stays(interval):
    shorter, one = Hurry(), Asker()
    shorter.ask(one)
    sys.setswitchinterval(0.02)
    shorter.release(one)
    assert sys.getswitchinterval() == pytest.approx(0.02)


def test_a_shorter_interval_than_ours_is_left_alone(interval):
    shorter, one = Hurry(), Asker()
    sys.setswitchinterval(0.0001)
    shorter.ask(one)
    assert sys.getswitchinterval() == pytest.approx(0.0001)
    shorter.release(one)
    assert sys.getswitchinterval() == pytest.approx(0.0001)


def test_who_is_gone_asks_no_longer(interval):
    shorter, one, other = Hurry(), Asker(), Asker()
    shorter.ask(one)
    shorter.ask(other)
    del one
    gc.collect()
    shorter.release(other)
    assert sys.getswitchinterval() == interval


def test_a_release_without_a_request_changes_nothing(interval):
    shorter, one, stranger = Hurry(), Asker(), Asker()
    shorter.ask(one)
    shorter.release(stranger)
    assert sys.getswitchinterval() == pytest.approx(0.0005)
    shorter.release(one)


@pytest.fixture
def short_machine(tmp_path):
    """Of 128 MiB, 15 MiB are left: less than LOW begins at."""
    kernel = FakeKernel(tmp_path)
    kernel.cgroup("/app", limit=128 * MIB, usage=113 * MIB).join()
    return kernel


QUIET = Thresholds(poll_s_min=3600, poll_s_max=3600, cooldown_s=0)


def test_turns_are_short_while_memory_is(interval, short_machine):
    with PressureMonitor(root=short_machine.root, thresholds=QUIET) as monitor:
        monitor.check()
        assert sys.getswitchinterval() == pytest.approx(0.0005)
        short_machine.cgroup("/app").usage = MIB
        monitor.check()
        assert sys.getswitchinterval() == interval


def test_a_monitor_that_closes_while_memory_is_short_puts_the_interval_back(interval, short_machine):
    with PressureMonitor(root=short_machine.root, thresholds=QUIET) as monitor:
        monitor.check()
        assert sys.getswitchinterval() == pytest.approx(0.0005)
    assert sys.getswitchinterval() == interval


def test_a_monitor_that_is_not_to_hurry_leaves_it_alone(interval, short_machine):
    with PressureMonitor(root=short_machine.root, thresholds=QUIET, hurry=False) as monitor:
        monitor.check()
        assert monitor.level > 0
        assert sys.getswitchinterval() == interval


def test_a_drill_to_normal_puts_the_interval_back_at_once(interval, short_machine):
    with PressureMonitor(root=short_machine.root, thresholds=QUIET) as monitor:
        monitor.check()
        monitor.simulate(PressureLevel.NORMAL)
        assert sys.getswitchinterval() == interval


def test_a_budget_over_its_soft_limit_is_no_reason_to_hurry(interval, short_machine):
    short_machine.cgroup("/app").usage = MIB
    with (
        Budget("64 MiB", soft_limit="1 MiB") as budget,
        PressureMonitor(budget, root=short_machine.root, thresholds=QUIET) as monitor,
        budget.reserve("2 MiB"),
    ):
        assert monitor.check() == PressureLevel.LOW
        assert sys.getswitchinterval() == interval


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fork_in_the_midst_of_putting_it_back_leaves_the_child_with_it(interval, monkeypatch, when):
    shorter, one = Hurry(), Asker()
    shorter.ask(one)
    set_interval, children = sys.setswitchinterval, []

    def fork(interval_s):
        monkeypatch.undo()
        if when == "after":
            set_interval(interval_s)
        child = os.fork()
        if not child:
            try:
                shorter.renew()
                is_back = sys.getswitchinterval() == interval
                shorter.ask(one)
                os._exit(0 if is_back and sys.getswitchinterval() < interval else 1)
            finally:
                os._exit(2)
        children.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        set_interval(interval_s)

    monkeypatch.setattr(sys, "setswitchinterval", fork)
    shorter.release(one)
    assert children == [0]


FORKS = """
import os, sys
from memsafe import PressureMonitor, Thresholds
before_s = sys.getswitchinterval()
with PressureMonitor(root=sys.argv[1], thresholds=Thresholds(poll_s_min=3600, poll_s_max=3600)) as monitor:
    monitor.check()
    assert sys.getswitchinterval() < before_s
    child = os.fork()
    if not child:
        os._exit(sys.getswitchinterval() != before_s)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_has_its_own_turns_again(short_machine):
    child = subprocess.run([sys.executable, "-c", FORKS, os.fspath(short_machine.root)], capture_output=True, text=True)
    assert (child.returncode, child.stderr) == (0, "")
