"""Exits and forks of a process in which monitors run."""

from __future__ import annotations

import pytest

from tests.unit.small_machine import run

# --- exits ----------------------------------------------------------------------------------------------------------

STARTED = """
import os, sys, threading
from memsafe import PressureLevel, PressureMonitor, Thresholds
monitor = PressureMonitor().start()
inside = threading.Event()
"""

EXITS = {
    "the end of the program": ("", 0),
    "sys.exit": ("sys.exit(5)", 5),
    "os._exit": ("os._exit(6)", 6),
    "os._exit in a callback": (
        "monitor.on(PressureLevel.LOW, lambda event: os._exit(7))\nmonitor.simulate(PressureLevel.LOW)",
        7,
    ),
    "in the midst of a callback": (
        """
monitor.on(PressureLevel.LOW, lambda event: (inside.set(), threading.Event().wait()))
threading.Thread(target=monitor.simulate, args=(PressureLevel.LOW,), daemon=True).start()
assert inside.wait(30)
""",
        0,
    ),
    "in the midst of looks": (
        """
busy = PressureMonitor(thresholds=Thresholds(poll_s_min=1e-6, poll_s_max=1e-6)).start()
looks = []
import memsafe.pressure.monitor as module
look = module.status_once
module.status_once = lambda root: (looks.append(1), len(looks) > 20 and inside.set(), look(root))[2]
assert inside.wait(30)
""",
        0,
    ),
    "a daemon thread that started it": (
        """
ready = threading.Event()
def serve():
    with PressureMonitor():
        ready.set()
        threading.Event().wait()
threading.Thread(target=serve, daemon=True).start()
assert ready.wait(30)
""",
        0,
    ),
}


@pytest.mark.parametrize("how", EXITS)
def test_the_interpreter_ends_as_asked_while_one_runs(how):
    script, returncode = EXITS[how]
    assert run(STARTED + script, returncode=returncode, flags=["-X", "dev"]) == ""


ENDS = """
import time
from memsafe import PressureLevel, PressureMonitor
monitor = PressureMonitor().start()
monitor.simulate(PressureLevel.LOW)
"""


def test_the_interpreter_ends_while_one_runs():
    assert run(ENDS) == ""


def test_a_callback_that_exits_ends_nothing():
    script = STARTED + (
        "monitor.on(PressureLevel.LOW, lambda event: sys.exit(3))\n"
        "monitor.simulate(PressureLevel.LOW)\n"
        "assert monitor.check() == PressureLevel.LOW\n"
    )
    assert "SystemExit: 3" in run(script)


# --- forks ----------------------------------------------------------------------------------------------------------

FORK = """
import os, sys, threading, time
from memsafe import Budget, PressureLevel, PressureMonitor, Thresholds

def in_child(test):
    child = os.fork()
    if child == 0:
        try:
            test()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

def is_clean():
    assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
    assert len(os.listdir("/proc/self/task")) == 1
    for fd in os.listdir("/proc/self/fd"):
        if os.path.lexists(f"/proc/self/fd/{fd}"):  # but for that of the listing
            kind = os.readlink(f"/proc/self/fd/{fd}")
            assert "eventpoll" not in kind and "timerfd" not in kind, kind
    for monitor in monitors:
        assert not any(source.used for source in monitor.sources)
        monitor.close()
        with monitor:
            monitor.simulate(PressureLevel.LOW, timeout_s=30)
            assert monitor.level == PressureLevel.LOW

def goes_on():
    for monitor in monitors:
        assert all(source.used for source in monitor.sources if source.name == "polling")
        monitor.simulate(PressureLevel.CRITICAL, timeout_s=30)
        monitor.simulate(PressureLevel.NORMAL, timeout_s=30)
        assert monitor._hub._waiter._native is not None

"""

FORKS = {
    "in the native wait": """
monitors = [PressureMonitor().start() for _ in range(5)]
for monitor in monitors:
    monitor.check()
for _ in range(5):
    in_child(is_clean)
    goes_on()
""",
    "in the midst of a callback": """
monitors = [PressureMonitor().start()]
inside, going_on = threading.Event(), threading.Event()
def wait(event):
    if os.getpid() == parent:
        inside.set()
        assert going_on.wait(30)
parent = os.getpid()
monitors[0].on(PressureLevel.LOW, wait)
drill = threading.Thread(target=monitors[0].simulate, args=(PressureLevel.LOW,))
drill.start()
assert inside.wait(30)
in_child(is_clean)
going_on.set()
drill.join()
goes_on()
""",
    "by a callback": """
monitors = [PressureMonitor().start()]
failures = []
def fork(event):
    if event.level == PressureLevel.LOW and os.getpid() == parent:
        child = os.fork()
        if child == 0:
            try:
                assert not any(source.used for source in monitors[0].sources)
                with PressureMonitor() as own:
                    own.simulate(PressureLevel.CRITICAL, timeout_s=30)
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(2)
        failures.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
parent = os.getpid()
monitors[0].on(PressureLevel.LOW, fork)
monitors[0].simulate(PressureLevel.LOW)
assert failures == [0]
goes_on()
""",
    "by a callback that returns in the child": """
monitors, statuses = [PressureMonitor().start()], []
def fork(event):
    child = os.fork()
    if child:
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
monitors[0].on(PressureLevel.LOW, fork)
# The child comes so far only where it goes on with what is the parent's.
monitors[0].on(PressureLevel.LOW, lambda event: os.getpid() == parent or os._exit(3))
parent = os.getpid()
for level in (PressureLevel.LOW, PressureLevel.CRITICAL):
    monitors[0].simulate(level)
assert statuses == [0, 0], statuses
""",
    "by a reclaimer that returns in the child": """
budget, statuses = Budget(), []
held = budget.charge("8 MiB")
monitors = [PressureMonitor(budget, thresholds=Thresholds(low_ratio=1.0, low_bytes_max=1 << 60))]
@budget.reclaimer
def fork(need_bytes):
    child = os.fork()
    if child:
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return 0
monitors[0].start()
monitors[0].simulate(PressureLevel.CRITICAL)
assert statuses and set(statuses) == {0}, statuses
""",
    "with locks held and in the midst of looks": """
budget = Budget("64 MiB", soft_limit="1 MiB")
# Looks all the time, so that a fork finds the thread anywhere; another thread that takes the lock, too.
monitors = [PressureMonitor(budget, thresholds=Thresholds(poll_s_min=1e-6, poll_s_max=1e-6)).start() for _ in range(3)]
stop = threading.Event()
def bother():
    while not stop.is_set():
        for monitor in monitors:
            monitor.check()
            monitor.on(PressureLevel.NORMAL, lambda event: None)
            monitor._callbacks = ()
        with budget.reserve("2 MiB"):
            pass
bothering = threading.Thread(target=bother)
bothering.start()
def starts_again():
    for monitor in monitors:
        monitor.close()
        monitor.on(PressureLevel.LOW, lambda event: None)
    with PressureMonitor(budget) as own:
        own.simulate(PressureLevel.LOW, timeout_s=30)
for _ in range(60):
    in_child(starts_again)
stop.set()
bothering.join()
goes_on()
""",
}


@pytest.mark.parametrize("where", FORKS)
def test_a_fork_leaves_the_child_clean_and_the_parent_as_it_was(where):
    assert run(FORK + FORKS[where]) == ""


def test_what_a_child_does_with_its_copies_does_not_make_the_parent_deaf():
    """The epoll set is shared with the child: a source that it removed from it would be gone in the parent."""
    script = """
import os
from memsafe import Budget, PressureLevel, PressureMonitor, Thresholds
budget = Budget("64 MiB", soft_limit="1 MiB")
import threading
heard = threading.Event()
monitor = PressureMonitor(budget, thresholds=Thresholds(poll_s_min=3600, poll_s_max=3600)).start()
monitor.check()
child = os.fork()
if child == 0:
    monitor.close()
    with monitor:
        monitor.check()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
monitor.on(PressureLevel.LOW, lambda event: heard.set())
with budget.reserve("2 MiB"):  # nobody polls: the source itself is heard
    assert heard.wait(30)
monitor.close()
"""
    assert run(script) == ""


INERT = """
import os, sys, threading
from memsafe import PressureLevel, PressureMonitor
before = set(os.listdir("/proc/self/fd"))
monitor = PressureMonitor().start()
heard = []
monitor.on(PressureLevel.LOW, heard.append)
monitor.check()  # the first look is over: a file that it has open would be the child's, too
child = os.fork()
if child == 0:
    try:
        assert set(os.listdir("/proc/self/fd")) == before
        assert len(os.listdir("/proc/self/task")) == 1
        assert not any(source.used for source in monitor.sources)
        for call in (monitor.check, monitor.fileno):
            try:
                call()
                os._exit(1)
            except RuntimeError:
                pass
        monitor.close()
        with PressureMonitor() as own:
            own.on(PressureLevel.LOW, heard.append)
            own.simulate(PressureLevel.LOW)
        assert len(heard) == 1
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
monitor.simulate(PressureLevel.LOW)
assert len(heard) == 1
assert all(s.used for s in monitor.sources if s.name == "polling")
monitor.close()
assert set(os.listdir("/proc/self/fd")) == before
"""


def test_in_a_forked_child_it_is_inert_and_another_works_there():
    assert run(INERT) == ""
