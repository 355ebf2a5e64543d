"""Descriptors of a monitor that somebody else has closed, or that could not be had."""

from __future__ import annotations

import logging
import os
import threading

import pytest

from memsafe import Budget, PressureMonitor
from memsafe._kernel.descriptors import Owned
from memsafe.pressure.alarm import alarm
from tests.unit.small_machine import CRITICAL, LOW, NORMAL, QUIET, listen, monitored, run

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
    assert (owned.is_ours(), owned.is_lost()) == (True, False)
    os.close(first)
    assert (owned.is_ours(), owned.is_lost()) == (False, True)
    (tmp_path / "file").touch()
    other = os.open(tmp_path / "file", os.O_RDONLY)
    assert other == first
    owned.close()
    os.fstat(other)
    os.close(other)
    mine = Owned(os.eventfd(0))
    mine.close()
    assert (mine.is_ours(), mine.is_lost()) == (False, False)
    again = os.eventfd(0)
    assert again == mine.fd
    mine.close()
    os.fstat(again)
    os.close(again)


def test_between_the_look_and_the_closing_no_other_thread_gives_the_number_away(tmp_path, monkeypatch):
    (tmp_path / "stranger").touch()
    with open(tmp_path / "stranger", "rb") as stranger:
        owned, given, look = Owned(os.open(tmp_path, os.O_RDONLY)), [], os.fstat

        def look_and_lose_the_gil(number):
            found = look(number)
            given.append(os.dup2(stranger.fileno(), number))
            return found

        with monkeypatch.context() as patched:
            patched.setattr(os, "fstat", look_and_lose_the_gil)
            owned.close()
        for number in given:
            assert os.path.sameopenfile(number, stranger.fileno())
        assert not given, "it is one step"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(owned.fd)


def test_a_descriptor_that_somebody_closed_keeps_nothing_from_being_done_at_critical(machine, clock, tmp_path):
    with (
        monitored(machine, clock, reserve="1 MiB") as monitor,
        open(tmp_path / "other", "wb") as other,
    ):
        sounded, heard = [], listen(monitor, CRITICAL)
        taken = monitor.fileno()
        os.dup2(other.fileno(), taken)
        assert monitor.reserve.held_bytes
        with alarm.heard_by(sounded.append):
            monitor.simulate(CRITICAL)
        assert (len(sounded), len(heard), monitor.reserve.held_bytes) == (1, 1, 0)
        assert os.fstat(taken).st_size == 0
        monitor.simulate(NORMAL)
        os.close(taken)
        monitor.simulate(CRITICAL)
        assert len(heard) == 2
