"""Who hears what, when, and in which thread: of the machine, and of a drill."""

from __future__ import annotations

import itertools
import logging
import math
import threading

import pytest

from memsafe import PressureLevel
from tests.unit.small_machine import CRITICAL, LOW, MIB, NORMAL, leave, listen, monitored

# --- callbacks ------------------------------------------------------------------------------------------------------


def test_who_hears_what(monitor):
    low, critical, normal = (listen(monitor, level) for level in (LOW, CRITICAL, NORMAL))
    for level in (LOW, CRITICAL, LOW, NORMAL, CRITICAL, NORMAL):
        monitor.simulate(level)
    assert [event.level for event in low] == [LOW, CRITICAL, LOW, CRITICAL]
    assert [event.level for event in critical] == [CRITICAL, CRITICAL]
    assert [event.previous for event in normal] == [LOW, CRITICAL]


def test_callbacks_run_in_order_on_one_thread_of_the_monitors_own(monitor):
    order, threads = [], set()

    def note(name):
        def callback(event):
            order.append(name)
            threads.add(threading.current_thread().name)

        return callback

    monitor.on(LOW, note("first"))
    monitor.on(CRITICAL, note("never"))
    monitor.on(LOW)(note("second"))
    monitor.simulate(LOW)
    assert order == ["first", "second"]
    assert threads == {"memsafe-pressure"}


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()])
def test_a_failing_callback_is_logged_and_the_rest_run(monitor, caplog, error):
    def fail(event):
        raise error

    monitor.on(LOW, fail)
    heard = listen(monitor, LOW)
    monitor.simulate(LOW)
    assert len(heard) == 1
    (record,) = caplog.records
    assert record.name == "memsafe.pressure"
    assert record.levelno == logging.ERROR
    assert repr(fail) in record.getMessage()
    assert record.exc_info[1] is error
    monitor.simulate(CRITICAL)
    assert len(heard) == 2


def test_on_is_a_decorator_that_returns_its_function(monitor):
    @monitor.on(PressureLevel.LOW)
    def shed(event):
        shed.heard = event

    assert monitor.on(LOW, shed) is shed
    monitor.simulate(LOW)
    assert shed.heard.level == LOW


async def coroutine(event):
    pass


@pytest.mark.parametrize(
    ("level", "function", "error"), [(7, print, ValueError), (LOW, "shed", TypeError), (LOW, coroutine, TypeError)]
)
def test_junk_is_no_callback(monitor, level, function, error):
    with pytest.raises(error):
        monitor.on(level, function)


def test_a_callback_that_comes_late_hears_what_it_missed_once(machine, monitor):
    leave(machine, 15 * MIB)
    monitor.check()
    low, critical, normal = (listen(monitor, level) for level in (LOW, CRITICAL, NORMAL))
    monitor.check()
    monitor.check()
    assert [event.level for event in low] == [LOW]
    assert critical == normal == []


def test_a_late_callback_that_heard_something_newer_is_not_told_the_old(machine, monitor):
    heard = []

    def register_and_escalate(event):
        if event.level == LOW:
            monitor.on(LOW, heard.append)
            monitor.simulate(CRITICAL)

    monitor.on(LOW, register_and_escalate)
    leave(machine, 15 * MIB)
    monitor.check()
    monitor.check()
    assert [event.level for event in heard] == [CRITICAL]


def test_a_callback_that_comes_after_a_drill_hears_the_next_change_only(monitor):
    monitor.simulate(LOW)
    heard = listen(monitor, LOW)
    monitor.simulate(CRITICAL)
    assert [event.level for event in heard] == [CRITICAL]


def test_a_callback_that_comes_after_a_drill_hears_what_was_short_before_it(machine, monitor):
    leave(machine, 15 * MIB)
    monitor.check()
    monitor.simulate(CRITICAL)
    low, critical = listen(monitor, LOW), listen(monitor, CRITICAL)
    monitor.check()
    assert [event.level for event in low] == [LOW]
    assert critical == []


def test_a_callback_that_comes_after_a_drill_to_normal_hears_what_is_short_once(machine, monitor):
    leave(machine, 15 * MIB)
    monitor.check()
    monitor.simulate(NORMAL)
    low = listen(monitor, LOW)
    leave(machine, 100 * MIB)
    assert monitor.check() == NORMAL
    assert low == []
    leave(machine, 15 * MIB)
    assert monitor.check() == LOW
    assert [event.level for event in low] == [LOW]


# --- drills ---------------------------------------------------------------------------------------------------------


def test_a_drill_says_that_it_is_one_and_falls_back(monitor, clock):
    heard = listen(monitor, LOW)
    monitor.simulate(LOW)
    (event,) = heard
    assert (event.source, event.level) == ("simulate", LOW)
    assert event.detail.startswith("simulated; 96 MiB available")
    assert monitor.check() == LOW
    clock.now_s += 10
    assert monitor.check() == NORMAL


def test_a_drill_to_the_level_in_force_is_told_nobody(monitor):
    heard = listen(monitor, LOW)
    monitor.simulate(LOW)
    monitor.simulate(LOW)
    assert len(heard) == 1


def test_a_real_cause_outlasts_a_drill_to_normal(machine, monitor):
    leave(machine, 1 * MIB)
    monitor.check()
    monitor.simulate(NORMAL)
    assert monitor.level == NORMAL
    assert monitor.check() == CRITICAL


def test_a_drill_from_a_callback_runs_after_it(monitor):
    order = []

    @monitor.on(LOW)
    def escalate(event):
        if event.level == LOW:
            monitor.simulate(CRITICAL)
            monitor.check()
        order.append(event.level)

    heard = listen(monitor, LOW)
    monitor.simulate(LOW)
    monitor.check()
    assert order == [LOW, CRITICAL]
    assert [event.level for event in heard] == [LOW, CRITICAL]


def test_drills_from_many_threads_are_told_in_turn(monitor):
    running, heard = [], []

    @monitor.on(LOW)
    def alone(event):
        running.append(event)
        assert len(running) == 1
        heard.append(event)
        running.pop()

    def drill():
        for _ in range(20):
            monitor.simulate(CRITICAL)
            monitor.simulate(LOW)

    threads = [threading.Thread(target=drill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for before, after in itertools.pairwise(heard):
        assert after.previous == before.level


def test_a_drill_does_not_wait_longer_than_told(monitor):
    going_on = threading.Event()
    monitor.on(LOW, lambda event: going_on.wait(30))
    with pytest.raises(TimeoutError):
        monitor.simulate(LOW, timeout_s=0.001)
    going_on.set()


@pytest.mark.parametrize("timeout_s", [None, math.inf, 1e300])
def test_a_drill_may_be_waited_for_for_ever(monitor, timeout_s):
    monitor.simulate(LOW, timeout_s=timeout_s)
    assert monitor.check(timeout_s=timeout_s) == LOW


@pytest.mark.parametrize("level", [-1, 3, "LOW"])
def test_a_drill_of_no_level_is_refused(monitor, level):
    with pytest.raises(ValueError, match="PressureLevel"):
        monitor.simulate(level)


def test_a_drill_is_refused_before_the_start_and_after_the_end(machine, clock):
    monitor = monitored(machine, clock)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="does not run"):
            monitor.simulate(LOW)
        with monitor:
            monitor.simulate(CRITICAL)
        assert monitor.level == CRITICAL
