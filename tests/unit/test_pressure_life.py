"""The life of monitors: many of them, threads that start and stop them, forks, exits, descriptors that were taken."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from memsafe import Budget, PressureLevel, PressureMonitor, Thresholds
from memsafe._kernel.descriptors import Owned
from memsafe.testing import FakeKernel

MIB = 1024 * 1024
LOW = PressureLevel.LOW

QUIET = Thresholds(poll_s_min=3600, poll_s_max=3600, cooldown_s=10)


@pytest.fixture
def machine(tmp_path):
    kernel = FakeKernel(tmp_path)
    kernel.cgroup("/app", limit=128 * MIB, usage=32 * MIB).join()
    return kernel


def run(script, *args, returncode=0, flags=()):
    """Run *script* in an interpreter of its own; what it has written on standard error."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", *flags, "-c", script, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert done.returncode == returncode, done.stderr
    return done.stderr


# --- many -----------------------------------------------------------------------------------------------------------


def test_fifty_monitors_in_one_process_hear_each_their_own():
    before = sorted(os.listdir("/proc/self/fd"))
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
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_threads_that_start_and_stop_one_monitor_at_once_leave_it_whole(machine):
    before = sorted(os.listdir("/proc/self/fd"))
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
    assert sorted(os.listdir("/proc/self/fd")) == before


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


# --- descriptors that somebody else has closed ----------------------------------------------------------------------

ROBBED = """
import logging, os, sys, threading, time
from memsafe import Budget, PressureLevel, PressureMonitor, Thresholds

def is_busy(task):
    try:
        with open(f"/proc/self/task/{task}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "R"
    except OSError:
        return False

monitor = PressureMonitor(thresholds=Thresholds(poll_s_min=0.01, poll_s_max=0.05)).start()
thread = monitor._thread
monitor.check()
inside, going_on = threading.Event(), threading.Event()
if sys.argv[3] == "in a callback":
    monitor.on(PressureLevel.LOW, lambda event: (inside.set(), going_on.wait(30)))
    threading.Thread(target=monitor.simulate, args=(PressureLevel.LOW,), daemon=True).start()
    assert inside.wait(30)
if sys.argv[1] == "all":
    os.closerange(3, 256)
else:
    names = sys.argv[1].split()
    for fd in range(3, 256):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
            if any(part in name for part in names):
                os.close(fd)
        except OSError:
            continue  # it was never open, or the monitor has ended meanwhile
# The numbers are somebody else's now.
others = {}
while True:
    fd = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)
    others[fd] = os.fstat(fd)
    if fd > 60:
        break
going_on.set()
thread.join(30)
assert not thread.is_alive(), "it does not wait for what can never come"
assert not any(source.used for source in monitor.sources)
until_s = time.monotonic() + 30
while any(is_busy(task) for task in os.listdir("/proc/self/task") if int(task) != os.getpid()):
    assert time.monotonic() < until_s, "the native thread spins"
monitor.close()
assert all((os.fstat(fd).st_ino, os.fstat(fd).st_size) == (told.st_ino, 0) for fd, told in others.items())
with monitor:
    monitor.simulate(PressureLevel.LOW)
    assert monitor.level == PressureLevel.LOW
assert all(os.fstat(fd).st_size == 0 for fd in others)
"""


@pytest.mark.parametrize("when", ["in the native wait", "in a callback"])
@pytest.mark.parametrize("what", ["all", "eventpoll", "timerfd", "eventfd", "eventfd eventpoll"])
def test_what_lost_its_descriptors_to_somebody_else_says_so_and_ends_without_touching_them(tmp_path, what, when):
    said = run(ROBBED, what, str(tmp_path / "other"), when)
    assert "somebody else has closed descriptors" in said
    assert "Exception in thread" not in said


FEW_DESCRIPTORS = """
import os, resource, sys
from memsafe import Budget, PressureMonitor
from memsafe._kernel import notify
from memsafe.errors import KernelError

def take_all_but(free):
    taken = []
    while True:
        try:
            taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            break
    for _ in range(free):
        os.close(taken.pop())
    return taken

budget = Budget("64 MiB", soft_limit="1 MiB")
PressureMonitor(budget).start().close()  # what is imported late, is
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
outcomes = set()
for free in range(40):
    rest = take_all_but(free)
    monitor = PressureMonitor(budget)
    try:
        monitor.start().check()
    except KernelError as error:
        outcomes.add("refused")
        assert "Too many open files" in str(error), error
    else:
        outcomes.add("some" if any("Too many open files" in each.reason for each in monitor.sources) else "all")
        assert all(each.used for each in monitor.sources if each.name == "polling")
        monitor.close()
    left = take_all_but(0)
    assert len(left) == free, (free, len(left), "a descriptor was left open")
    for fd in (*rest, *left):
        os.close(fd)
assert outcomes >= {"refused", "some"}, outcomes

rest = take_all_but(1)
try:
    notify.open_watched("/proc/self/mountinfo")
except KernelError as error:
    assert "Too many open files" in str(error), error
os.close(os.open("/dev/null", os.O_RDONLY))
"""


def test_without_descriptors_a_source_is_listed_with_the_reason_and_nothing_is_left_open():
    run(FEW_DESCRIPTORS)


def test_a_source_whose_descriptor_was_closed_is_lost_and_opened_again(machine, caplog):
    with PressureMonitor(thresholds=QUIET) as monitor:
        monitor.check()
        source = next(each for each in monitor._hub._chosen if each.used)
        os.close(source._fd)
        monitor.check()
        assert f"{source.name} is lost: wait for it" in caplog.text
        again = next(each for each in monitor.sources if (each.name, each.path) == (source.name, source.path))
        assert again.used
        monitor.check()
        assert all(each.is_intact for each in monitor._hub._chosen if each.used)
        assert caplog.text.count("is lost") == 1


def test_a_source_is_lost_though_the_log_cannot_be_written(machine):
    class Broken(logging.Handler):
        def emit(self, record):
            raise OSError("no space left on the device")

    broken, log = Broken(), logging.getLogger("memsafe.pressure")
    with PressureMonitor(thresholds=QUIET) as monitor:
        monitor.check()
        source = next(each for each in monitor._hub._chosen if each.used)
        os.close(source._fd)
        log.addHandler(broken)
        try:
            monitor.check()
        finally:
            log.removeHandler(broken)
        assert next(each for each in monitor.sources if (each.name, each.path) == (source.name, source.path)).used
        assert all(each.is_intact for each in monitor._hub._chosen if each.used)


def test_the_watermark_of_a_budget_whose_descriptor_was_closed_is_opened_again(machine, caplog):
    passed = threading.Event()
    with (
        Budget("64 MiB", soft_limit="1 MiB") as budget,
        PressureMonitor(budget, root=machine.root, thresholds=QUIET) as monitor,
    ):
        monitor.on(LOW, lambda event: passed.set())
        monitor.check()
        os.close(monitor._hub._watermark._fd)
        monitor.check()
        assert "budget.soft_limit is lost: wait for it" in caplog.text
        assert next(each for each in monitor.sources if each.name == "budget.soft_limit").used
        with budget.reserve("2 MiB"):
            assert passed.wait(30), "nobody but the watermark tells"
    assert caplog.text.count("is lost") == 1


def test_a_budget_writes_to_no_descriptor_that_is_another_files_now(machine, tmp_path):
    with (
        Budget("64 MiB", soft_limit="1 MiB") as budget,
        PressureMonitor(budget, root=machine.root, thresholds=QUIET) as monitor,
        open(tmp_path / "other", "wb") as other,
    ):
        monitor.check()
        os.dup2(other.fileno(), monitor._hub._watermark._fd)
        taken = monitor._hub._watermark._fd
        with budget.reserve("2 MiB"):
            assert os.fstat(taken).st_size == 0
            assert monitor.check() == LOW, "a look sees it all the same"
    os.fstat(taken)  # nor is it closed
    os.close(taken)


def test_a_descriptor_is_closed_once_and_only_while_it_is_ours(tmp_path):
    first = os.open(tmp_path, os.O_RDONLY)
    owned = Owned(first)
    assert owned.is_ours()
    os.close(first)
    assert not owned.is_ours()
    (tmp_path / "file").touch()
    other = os.open(tmp_path / "file", os.O_RDONLY)
    assert other == first
    owned.close()
    os.fstat(other)
    os.close(other)
    mine = Owned(os.eventfd(0))
    mine.close()
    again = os.eventfd(0)
    assert again == mine.fd
    mine.close()
    os.fstat(again)
    os.close(again)
