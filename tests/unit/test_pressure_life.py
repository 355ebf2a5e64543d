"""The life of monitors: starts and stops, by whom and beside what, and many of them."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import pytest

from memsafe import PressureMonitor
from memsafe.pressure.monitor import critical_event
from tests.integration.scenario import open_files, opened_since
from tests.unit.small_machine import CRITICAL, LOW, NORMAL, QUIET, listen, monitored, run

# --- start and close ------------------------------------------------------------------------------------------------

LEAK = """
import gc, os, sys, time
from pathlib import Path
from memsafe import Budget, PressureLevel, PressureMonitor

budget = Budget("64 MiB", soft_limit="1 MiB")

again = PressureMonitor(root=sys.argv[1])

def once(number):
    fresh = PressureMonitor(budget, root=sys.argv[1], reserve="64 KiB")
    fresh.on(PressureLevel.LOW, print)
    with again if number % 3 else fresh as monitor:
        monitor.fileno()
        if number % 15 == 0:
            with again:
                monitor.check()

def held():
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

before = held()
for number in range(30):
    once(number)
before_bytes = resident_bytes()
for number in range(300):
    once(number)
until_s = time.monotonic() + 30  # a thread that was joined may be seen in /proc for a moment still
while held() != before and time.monotonic() < until_s:
    pass
assert held() == before, (held(), before)
# The allocators settle at some 300 KiB more, after whatever number of starts; one native waiter alone has 10 KiB.
grown_bytes = resident_bytes() - before_bytes
assert grown_bytes < 300 * 3 * 1024, grown_bytes
"""


@pytest.mark.parametrize("where", ["copy", "kernel"])
def test_three_hundred_starts_and_stops_leave_no_descriptor_thread_or_memory_behind(machine, where):
    assert run(LEAK, "/" if where == "kernel" else str(machine.root)) == ""


def test_what_does_not_run_says_so(machine, clock):
    monitor = monitored(machine, clock)
    assert (monitor.level, monitor.sources) == (NORMAL, [])
    for call in (monitor.check, monitor.fileno, lambda: monitor.simulate(LOW)):
        with pytest.raises(RuntimeError, match="does not run"):
            call()
    monitor.close()


def test_it_starts_again_with_its_callbacks_and_afresh(monitor):
    heard = listen(monitor, LOW)
    assert monitor.start() is monitor
    monitor.simulate(LOW)
    monitor.close()
    monitor.close()
    monitor.start()
    assert monitor.level == NORMAL
    monitor.simulate(LOW)
    assert len(heard) == 2


def test_a_callback_may_close_the_monitor(machine, clock):
    before = open_files()
    with monitored(machine, clock) as monitor:
        thread = monitor._thread
        monitor.on(LOW, lambda event: monitor.close())
        monitor.simulate(LOW)
        thread.join(30)
    assert not thread.is_alive()
    assert opened_since(before) == []


def test_closing_releases_those_who_wait_and_says_what_was_not_done(monitor):
    inside, going_on, told = threading.Event(), threading.Event(), []

    @monitor.on(LOW)
    def block(event):
        inside.set()
        going_on.wait(30)

    def drill(level):
        try:
            monitor.simulate(level)
        except RuntimeError as error:
            told.append((level, str(error)))

    drills = [threading.Thread(target=drill, args=(level,)) for level in (LOW, CRITICAL)]
    drills[0].start()
    assert inside.wait(30)
    drills[1].start()
    while not monitor._requests:
        pass
    closing = threading.Thread(target=monitor.close)
    closing.start()
    while not monitor._stopping:
        pass
    going_on.set()
    for thread in (*drills, closing):
        thread.join(30)
        assert not thread.is_alive()
    assert told == [(CRITICAL, "the monitor has ended, and did not do what it was asked for")]


def test_one_that_was_closed_in_a_callback_starts_again_when_that_has_returned(machine, clock):
    heard = []
    with monitored(machine, clock) as monitor:

        @monitor.on(LOW)
        def restart(event):
            if not heard:
                monitor.close()
                with pytest.raises(RuntimeError, match="when this callback returns"):
                    monitor.start()
            heard.append(event.level)

        monitor.simulate(LOW)
        monitor.start()
        monitor.simulate(LOW)
        assert heard == [LOW, LOW]


def test_a_start_beside_a_close_that_waits_for_a_callback_waits_for_it_too(monitor):
    inside, going_on = threading.Event(), threading.Event()
    monitor.on(CRITICAL, lambda event: (inside.set(), going_on.wait(30)))
    threads = [threading.Thread(target=monitor.simulate, args=(CRITICAL,)), threading.Thread(target=monitor.close)]
    threads[0].start()
    assert inside.wait(30)
    threads[1].start()
    while not monitor._stopping:
        pass
    threads.append(threading.Thread(target=monitor.start))
    threads[2].start()
    going_on.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert monitor.check() == NORMAL


def test_a_snapshot_may_ask_for_critical_while_other_threads_make_monitors(monitor):
    ready, stop = threading.Event(), threading.Event()

    def make():
        made = []
        while not stop.is_set():
            made.append(PressureMonitor())
            if len(made) == 200:  # so many, that another thread has its turn in the midst of them
                ready.set()
                made.clear()

    makers = [threading.Thread(target=make) for _ in range(2)]
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for maker in makers:
            maker.start()
        assert ready.wait(30)
        for _ in range(1000):
            assert critical_event() is None
    finally:
        stop.set()
        for maker in makers:
            maker.join()
        sys.setswitchinterval(before_s)


# --- many -----------------------------------------------------------------------------------------------------------


def test_fifty_monitors_in_one_process_hear_each_their_own():
    before = open_files()
    monitors = [PressureMonitor(thresholds=QUIET).start() for _ in range(50)]
    heard = []
    for number, monitor in enumerate(monitors):
        monitor.on(LOW, lambda event, number=number: heard.append(number))
    for monitor in monitors:
        monitor.simulate(LOW)
    assert heard == list(range(50))
    for monitor in monitors[::2]:
        monitor.close()
    assert [monitor.check() for monitor in monitors[1::2]] == [LOW] * 25
    for monitor in monitors:
        monitor.close()
    assert opened_since(before) == []


def test_threads_that_start_and_stop_one_monitor_at_once_leave_it_whole(machine):
    before = open_files()
    monitor = PressureMonitor(root=machine.root, thresholds=QUIET)
    failures, gate = [], threading.Barrier(6)

    def start_and_stop(call):
        try:
            gate.wait(30)
            for _ in range(50):
                call()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=start_and_stop, args=(call,)) for call in [monitor.start, monitor.close] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
    with monitor:
        monitor.simulate(LOW)
        assert [thread.name for thread in threading.enumerate()].count("memsafe-pressure") == 1
    assert opened_since(before) == []


def test_one_that_is_dropped_while_it_runs_goes_on_until_its_callback_closes_it(machine):
    heard = []
    monitor = PressureMonitor(root=machine.root, thresholds=QUIET).start()
    monitor.on(LOW, heard.append)
    alive = weakref.ref(monitor)
    thread = monitor._thread
    del monitor
    gc.collect()
    alive().simulate(LOW)
    assert len(heard) == 1
    alive().close()
    thread.join(30)
    gc.collect()
    assert alive() is None, "what is closed is kept by nobody"
