"""Callbacks and reclaimers that take long: they are reported while they run, and the level is busy meanwhile."""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import select
import threading

import pytest

from memsafe import Budget, Thresholds
from memsafe.errors import KernelError
from memsafe.pressure.hub import Hub
from tests.unit.small_machine import CRITICAL, LIMIT, LOW, MIB, NORMAL, leave, monitored, run

# All files are looked at a thousand times a second: what is heard is heard by whoever looks.
BUSY = Thresholds(poll_s_min=0.001, poll_s_max=0.001, cooldown_s=10)


class Log(logging.Handler):
    """What the monitor's threads log, as it comes; *act* runs where it is logged."""

    def __init__(self, act=lambda: None):
        super().__init__()
        self.came = threading.Semaphore(0)
        self.lines = []
        self.threads = []
        self._act = act

    def emit(self, record):
        self.lines.append(record.getMessage())
        self.threads.append(threading.current_thread().name)
        self._act()
        self.came.release()


class Block:
    """A callback and a reclaimer that do not return until they are let go."""

    def __init__(self):
        self.entered, self.going_on = threading.Event(), threading.Event()
        self.heard = []

    def __call__(self, event):
        self.heard.append(event)
        self.entered.set()
        assert self.going_on.wait(30)
        return 0


@pytest.fixture
def block():
    blocking = Block()
    yield blocking
    blocking.going_on.set()


@pytest.fixture
def hear_log():
    handlers = []

    def listen(act=lambda: None):
        handlers.append(Log(act))
        logging.getLogger("memsafe.pressure").addHandler(handlers[-1])
        return handlers[-1]

    yield listen
    for handler in handlers:
        logging.getLogger("memsafe.pressure").removeHandler(handler)


busy = functools.partial(monitored, thresholds=BUSY)


def drilled(monitor, level):
    drill = threading.Thread(target=monitor.simulate, args=(level,))
    drill.start()
    return drill


def await_readable(fd):
    assert select.select([fd], [], [], 30)[0]


def test_a_callback_that_hangs_is_reported_once_while_it_runs_by_name_and_stack(
    machine, clock, block, hear_log, monkeypatch
):
    monkeypatch.setattr("memsafe.pressure.deputy.SLOW_S", 0.01)
    log = hear_log()
    with busy(machine, clock) as monitor:
        monitor.on(LOW, block)
        drill = drilled(monitor, LOW)
        assert log.came.acquire(timeout=30)
        assert not block.going_on.is_set()
        (line,) = log.lines
        assert log.threads == ["memsafe-pressure-deputy"]
        assert line.startswith(f"the callback {block!r} for LOW has run for ")
        assert line.splitlines()[-1].endswith("in wait"), "where it stands comes last"
        assert f'"{__file__}"' in line
        leave(machine, 1 * MIB)
        await_readable(monitor.fileno())
        while monitor.level != CRITICAL:  # it goes on looking, and has no more to say
            pass
        assert len(log.lines) == 1
        block.going_on.set()
        drill.join(30)
    assert next(line for line in log.lines if "took" in line).startswith(f"the callback {block!r} for LOW took ")


def test_a_reclaimer_that_hangs_is_reported_while_it_runs(machine, clock, block, hear_log, monkeypatch):
    monkeypatch.setattr("memsafe.pressure.deputy.SLOW_S", 0.01)
    log = hear_log()
    with Budget(name="db") as budget, busy(machine, clock, budget) as monitor:
        budget.reclaimer(block)
        drill = drilled(monitor, CRITICAL)
        assert log.came.acquire(timeout=30)
        assert log.lines[0].startswith("reclaiming the budget <Budget 'db'")
        assert "in __call__" in log.lines[0]
        block.going_on.set()
        drill.join(30)


def test_one_that_hangs_is_reported_though_the_alarm_came_before_the_wait_was_over(
    machine, clock, block, hear_log, monkeypatch
):
    monkeypatch.setattr("memsafe.pressure.deputy.SLOW_S", 0.01)
    log, wait = hear_log(), Hub.wait
    with monitored(machine, clock) as monitor:
        monitor.check()

        def wait_and_be_late(hub, rest_s=0.0, *, alarm_s=0.0):
            reports = wait(hub, rest_s)  # without an alarm after it
            if alarm_s and not block.entered.is_set():
                hub.alarm(0)
                while not monitor._deputy._has_missed:
                    pass
            return reports

        monkeypatch.setattr(Hub, "wait", wait_and_be_late)
        monitor.check()  # the wait that it was in is the last true one
        monitor.on(LOW, block)
        drill = drilled(monitor, LOW)
        assert log.came.acquire(timeout=30)
        block.going_on.set()
        drill.join(30)


def test_it_is_reported_where_nothing_else_wakes_anybody(machine, clock, block, hear_log, monkeypatch):
    monkeypatch.setattr("memsafe.pressure.deputy.SLOW_S", 0.1)  # the deputy has had its first look by then
    log = hear_log()
    with monitored(machine, clock) as monitor:
        monitor.on(LOW, block)
        drill = drilled(monitor, LOW)
        assert log.came.acquire(timeout=30)
        assert "has run for 0.1 s" in log.lines[0]
        block.going_on.set()
        drill.join(30)


def test_an_alarm_that_comes_too_late_finds_the_other_waiting_and_is_not_set_again(machine, clock, monkeypatch):
    monkeypatch.setattr("memsafe.pressure.deputy.STAND_IN_S", 0.001)
    alarms, alarm = threading.Semaphore(0), Hub.alarm
    monkeypatch.setattr(Hub, "alarm", lambda hub, delay_s: (alarms.release(), alarm(hub, delay_s)))

    def count():
        """How many there are until for a hundred times as long as the next would take there is none."""
        return next(number for number in range(100) if number == 99 or not alarms.acquire(timeout=0.1))

    with monitored(machine, clock) as monitor:
        monitor.check()
        count()  # by now it waits
        monitor._hub.alarm(0)
        assert count() == 1, "its own"


def test_a_quick_callback_is_not_reported(machine, clock, hear_log):
    log = hear_log()
    with busy(machine, clock) as monitor:
        monitor.on(LOW, lambda event: None)
        for level in (LOW, CRITICAL, NORMAL):
            monitor.simulate(level)
    assert log.lines == []


def test_one_that_hangs_after_a_slow_look_is_reported_too(machine, clock, block, hear_log, monkeypatch):
    monkeypatch.setattr("memsafe.pressure.deputy.SLOW_S", 0.01)
    alarm, status_once = Hub.alarm, __import__("memsafe").status.status_once
    tried = threading.Event()

    def alarm_again(hub, delay_s):
        tried.set()  # the deputy was there, and the lead was not to be had
        alarm(hub, delay_s)

    def look_slowly(root):
        assert tried.wait(30)
        return status_once(root)

    log = hear_log()
    with monitored(machine, clock) as monitor:
        monitor.check()
        monitor.on(LOW, block)
        monkeypatch.setattr(Hub, "alarm", alarm_again)
        monkeypatch.setattr("memsafe.pressure.monitor.status_once", look_slowly)
        drill = drilled(monitor, LOW)
        assert log.came.acquire(timeout=30)
        assert "has run for" in log.lines[0]
        block.going_on.set()
        drill.join(30)


def test_while_a_callback_hangs_a_rise_shows_everywhere_else_and_is_told_when_it_ends(machine, clock, block):
    async def read(monitor):
        events = monitor.events()
        drill = drilled(monitor, LOW)
        levels = [(await anext(events)).level]
        await asyncio.to_thread(block.entered.wait, 30)
        leave(machine, 1 * MIB)
        levels.append((await anext(events)).level)
        return drill, levels

    with busy(machine, clock, reserve="1 MiB") as monitor:
        later = []
        monitor.on(LOW, block)
        monitor.on(LOW, later.append)
        drill, levels = asyncio.run(read(monitor))
        assert levels == [LOW, CRITICAL]
        assert (monitor.level, monitor.reserve.held_bytes) == (CRITICAL, 0)
        await_readable(monitor.fileno())
        assert (len(block.heard), later) == (1, []), "never two at once"
        block.going_on.set()
        drill.join(30)
        monitor.check()
        for heard in (block.heard, later):
            assert [(event.previous, event.level) for event in heard] == [(NORMAL, LOW), (LOW, CRITICAL)]


def test_what_came_and_passed_while_a_callback_ran_is_told_to_loops_only(machine, clock, block):
    with busy(machine, clock) as monitor:
        monitor.on(LOW, block)
        fd = monitor.fileno()
        leave(machine, 15 * MIB)
        assert block.entered.wait(30)
        leave(machine, 1 * MIB)
        while monitor.level != CRITICAL:
            await_readable(fd)
        leave(machine, 15 * MIB)
        while monitor.level != LOW:
            clock.now_s += 1
        block.going_on.set()
        monitor.check()
        assert [event.level for event in block.heard] == [LOW]
        while monitor.level != NORMAL:
            leave(machine, 100 * MIB)
            clock.now_s += 1


def test_what_passed_while_a_callback_ran_is_told_as_one_change_from_what_was_told_last(machine, clock, block):
    with busy(machine, clock) as monitor:
        monitor.on(LOW, block)
        calm = []
        monitor.on(NORMAL, calm.append)
        leave(machine, 15 * MIB)
        assert block.entered.wait(30)
        leave(machine, 1 * MIB)
        while monitor.level != CRITICAL:
            pass
        leave(machine, 100 * MIB)
        while monitor.level != NORMAL:
            clock.now_s += 1
        block.going_on.set()
        monitor.check()
    assert [(event.previous, event.level) for event in calm] == [(LOW, NORMAL)]


def test_a_rise_while_a_late_callback_ran_is_told_when_that_ends(machine, clock):
    heard = threading.Event()
    with monitored(machine, clock) as monitor:
        leave(machine, 15 * MIB)
        monitor.check()

        @monitor.on(LOW)
        def late(event):
            if event.level == CRITICAL:
                heard.set()
                return
            leave(machine, 1 * MIB)
            while monitor.level != CRITICAL:
                pass

        assert heard.wait(30)


def test_what_the_deputy_saw_is_not_undone_by_an_older_look(machine, clock, block, monkeypatch):
    seen, choose = [], Hub.choose

    def note(hub, status):
        seen.append(min(each.limit_bytes for each in status.constraints))
        return choose(hub, status)

    monkeypatch.setattr(Hub, "choose", note)
    with busy(machine, clock) as monitor:
        monitor.on(LOW, block)
        leave(machine, 15 * MIB)
        assert block.entered.wait(30)
        machine.cgroup("/app").limit = 2 * LIMIT
        while seen[-1:] != [2 * LIMIT]:
            pass
        block.going_on.set()
        monitor.check()
    assert seen == sorted(seen)


def test_a_budget_is_reclaimed_for_a_rise_that_came_while_a_callback_ran(machine, clock, block):
    asked = []
    with Budget(name="db") as budget, budget.reserve("8 MiB"), busy(machine, clock, budget) as monitor:
        budget.reclaimer(lambda need_bytes: asked.append((monitor.level, need_bytes)) or 0)
        monitor.on(LOW, block)
        drill = drilled(monitor, LOW)
        assert block.entered.wait(30)
        leave(machine, 1 * MIB)
        while monitor.level != CRITICAL:
            pass
        block.going_on.set()
        drill.join(30)
        monitor.check()
    assert asked[0] == (CRITICAL, 8 * MIB)


def test_what_is_asked_for_while_a_callback_hangs_is_done_after_it(machine, clock, block, monkeypatch):
    led = threading.Event()
    monkeypatch.setattr("memsafe.pressure.deputy.SLOW_S", 3600)
    with monitored(machine, clock) as monitor:
        monitor.check()
        monkeypatch.setattr(monitor, "_stand_in", lambda hub, is_first: (led.set(), hub.wait()))
        monitor.on(LOW, block)
        drills = [drilled(monitor, LOW)]
        assert led.wait(30), "the deputy has the lead, and is woken by what follows"
        drills += [drilled(monitor, level) for level in (CRITICAL, NORMAL)]
        while len(monitor._requests) < 2:
            pass
        with pytest.raises(TimeoutError):
            monitor.check(timeout_s=0.001)
        block.going_on.set()
        for drill in drills:
            drill.join(30)
            assert not drill.is_alive()


def test_what_grew_since_the_deputy_looked_is_seen_as_soon_as_the_callback_ends(machine, clock, block, monkeypatch):
    led, heard = threading.Event(), threading.Event()
    monkeypatch.setattr("memsafe.pressure.deputy.SLOW_S", 3600)
    with monitored(machine, clock) as monitor:
        monitor.check()
        monkeypatch.setattr(monitor, "_stand_in", lambda hub, is_first: (led.set(), hub.wait()))
        monitor.on(LOW, block)
        monitor.on(CRITICAL, lambda event: heard.set())
        drill = drilled(monitor, LOW)
        assert led.wait(30)
        leave(machine, 1 * MIB)
        block.going_on.set()
        drill.join(30)
        assert heard.wait(30)


def come_and_go(machine, monitor, clock, *lefts):
    """Leave so much, one after the other, each until the deputy has told of it."""
    for left_bytes, level in lefts:
        leave(machine, left_bytes)
        while monitor.level != level:
            clock.now_s += 1


def test_a_callback_that_came_in_between_hears_a_level_that_went_and_came_back(machine, clock, block):
    with busy(machine, clock) as monitor:
        low, late, critical = [], [], []
        monitor.on(LOW, block)
        monitor.on(LOW, low.append)
        leave(machine, 15 * MIB)
        assert block.entered.wait(30)
        come_and_go(machine, monitor, clock, (100 * MIB, NORMAL))
        monitor.on(LOW, late.append)
        monitor.on(CRITICAL, critical.append)
        come_and_go(machine, monitor, clock, (15 * MIB, LOW))
        block.going_on.set()
        monitor.check()
        monitor.check()
        assert [event.level for event in late] == [LOW]
        assert [event.level for event in low] == [LOW]
        assert (len(block.heard), critical) == (1, [])


def test_a_callback_that_came_at_low_hears_it_once_though_critical_came_and_went(machine, clock, block):
    with busy(machine, clock) as monitor:
        late = []
        monitor.on(LOW, block)
        leave(machine, 15 * MIB)
        assert block.entered.wait(30)
        monitor.on(LOW, late.append)
        come_and_go(machine, monitor, clock, (1 * MIB, CRITICAL), (15 * MIB, LOW))
        block.going_on.set()
        monitor.check()
        monitor.check()
        assert [event.level for event in late] == [LOW]


def test_a_deputy_that_has_nothing_left_to_wait_on_ends_and_says_nothing(machine, clock, block, hear_log, monkeypatch):
    def is_robbed(hub, rest_s=0.0, *, alarm_s=0.0):
        raise KernelError(errno.EBADF, "wait")

    log = hear_log()
    with busy(machine, clock) as monitor:
        monitor.on(LOW, block)
        drill = drilled(monitor, LOW)
        assert block.entered.wait(30)
        monkeypatch.setattr(Hub, "wait", is_robbed)
        deputy = monitor._deputy._thread
        deputy.join(30)
        assert not deputy.is_alive()
        assert log.lines == []
        block.going_on.set()
        drill.join(30)
        monitor._thread and monitor._thread.join(30)
        assert "somebody else has closed descriptors" in log.lines[0]


def test_a_deputy_whose_first_look_failed_stands_in_all_the_same(machine, clock, block, hear_log, monkeypatch):
    def lack_memory(hub):
        raise MemoryError

    log = hear_log()
    monkeypatch.setattr(Hub, "rehearse", lack_memory)
    with busy(machine, clock) as monitor:
        assert "the first look failed" in log.lines[0]
        monitor.on(LOW, block)
        drill = drilled(monitor, LOW)
        assert block.entered.wait(30)
        come_and_go(machine, monitor, clock, (1 * MIB, CRITICAL))
        block.going_on.set()
        drill.join(30)


@pytest.mark.parametrize("call", ["close", "check", "simulate"])
def test_the_handler_of_the_report_may_call_the_monitor(machine, clock, block, hear_log, monkeypatch, call):
    monkeypatch.setattr("memsafe.pressure.deputy.SLOW_S", 0.01)
    monitor = busy(machine, clock)
    log = hear_log(
        lambda: None if block.going_on.is_set() else getattr(monitor, call)(*[CRITICAL][: call == "simulate"])
    )
    with monitor:
        monitor.on(LOW, block)
        drill = drilled(monitor, LOW)
        assert log.came.acquire(timeout=30)
        block.going_on.set()
        drill.join(30)
        assert not drill.is_alive()


def test_it_takes_turns_with_the_deputy_a_hundred_times(machine, clock, monkeypatch):
    monkeypatch.setattr("memsafe.pressure.deputy.STAND_IN_S", 0.0001)
    with busy(machine, clock) as monitor:
        led, heard = threading.Event(), []
        stand_in = monitor._stand_in

        def stand_in_and_say(hub, is_first):
            stand_in(hub, is_first)
            led.set()

        monkeypatch.setattr(monitor, "_stand_in", stand_in_and_say)

        @monitor.on(LOW)
        def wait_for_the_deputy(event):
            heard.append(event.level)
            assert led.wait(30)
            led.clear()

        for _ in range(50):
            for level in (CRITICAL, LOW):
                monitor.simulate(level)
    assert heard == [CRITICAL, LOW] * 50


FORK = """
import os
import memsafe.pressure.deputy
from memsafe import PressureLevel, PressureMonitor, Thresholds
memsafe.pressure.deputy.SLOW_S = 3600  # five children may take a while
statuses = []
with PressureMonitor(thresholds=Thresholds(poll_s_min=0.001, poll_s_max=0.001)) as monitor:
    @monitor.on(PressureLevel.LOW)
    def fork(event):
        deputy = monitor._deputy
        while not deputy.has_led:
            pass
        for _ in range(5):  # while the deputy has the lead, and while it has not
            child = os.fork()
            if child == 0:
                return  # the thread ends, and as it is the only one there, the process
            statuses.append(os.waitpid(child, 0)[1])
    monitor.simulate(PressureLevel.LOW)
    monitor.simulate(PressureLevel.CRITICAL)
assert statuses == [0] * 10, statuses
"""


def test_a_callback_may_fork_while_the_deputy_has_the_lead():
    assert run(FORK) == ""
