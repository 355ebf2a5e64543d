from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from memsafe._kernel import files
from memsafe._kernel.kept import KeptFiles
from memsafe.errors import KernelError
from memsafe.pressure.reserve import BlockReserve
from memsafe.pressure.waiter import How, Look, Waiter, open_timer, set_timer


@pytest.fixture
def waiter():
    made = Waiter(capacity=4)
    yield made
    made.close()


@pytest.fixture
def counter():
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def readable(fd: int, timeout_s: float = 0) -> bool:
    return bool(select.select([fd], [], [], timeout_s)[0])


def tasks_named(name: str) -> list[Path]:
    named = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended since it was listed
            if (task / "comm").read_text().strip() == name:
                named.append(task)
    return named


def collect(waiter: Waiter, token: int, count: int) -> int:
    """Take until *token* has counted *count*; when the last report was seen first."""
    total = 0
    while total < count:
        for report in waiter.wait():
            assert report.token == token
            assert not report.lost_errno
            total += report.count
            first_ns = report.first_ns
    assert total == count
    return first_ns


def test_an_event_is_reported_with_its_token_and_time(waiter, counter):
    waiter.add(counter, How.COUNTER, 77)
    before_ns = time.monotonic_ns()
    os.eventfd_write(counter, 3)
    first_ns = collect(waiter, 77, 3)
    assert before_ns <= first_ns <= time.monotonic_ns()


def test_a_burst_becomes_one_report(waiter, counter):
    waiter.add(counter, How.COUNTER, 1)
    for _ in range(1000):
        os.eventfd_write(counter, 1)
    while readable(counter):  # until the thread has drained it
        pass
    assert [report.count for report in waiter.take()] == [1000]


def test_nothing_is_readable_after_all_was_taken(waiter, counter):
    waiter.add(counter, How.COUNTER, 1)
    os.eventfd_write(counter, 1)
    assert readable(waiter.fileno(), 10)
    assert [report.count for report in waiter.take()] == [1]
    assert not readable(waiter.fileno())
    assert waiter.take() == []


def test_the_native_thread_works_while_this_one_keeps_the_gil(waiter, counter):
    waiter.add(counter, How.COUNTER, 1)

    class PollFd(ctypes.Structure):
        _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))

    keeping_gil = ctypes.PyDLL(None)
    one, news = ctypes.c_uint64(1), PollFd(waiter.fileno(), select.POLLIN, 0)
    assert keeping_gil.write(counter, ctypes.byref(one), 8) == 8
    assert keeping_gil.poll(ctypes.byref(news), 1, 10_000) == 1


def test_the_native_thread_blocks_every_signal(waiter, counter):
    waiter.add(counter, How.COUNTER, 1)
    os.eventfd_write(counter, 1)
    collect(waiter, 1, 1)  # it runs, hence it has its name
    (task,) = tasks_named("memsafe-waiter")
    blocked = int(next(line for line in (task / "status").read_text().splitlines() if "SigBlk" in line).split()[1], 16)
    # All but SIGKILL and SIGSTOP, and the two that glibc keeps for itself.
    assert blocked | 1 << 8 | 1 << 18 | 0b11 << 31 == 2**64 - 1


def test_a_timer_fires_once_per_setting(waiter):
    timer = open_timer()
    try:
        waiter.add(timer, How.COUNTER, 5)
        set_timer(timer, 0)
        collect(waiter, 5, 1)
        set_timer(timer, 0.001)
        collect(waiter, 5, 1)
        set_timer(timer, 3600)
        assert waiter.take() == []
        waiter.remove(5)
    finally:
        os.close(timer)


def test_a_look_sets_the_timer_and_reads_the_files(waiter, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"1")
    kept, reserve = KeptFiles(tmp_path), BlockReserve()
    kept.hold([str(file)])
    reserve.take()
    timer = open_timer()
    waiter.add(timer, How.COUNTER, 5)
    look = Look(timer, kept, reserve)
    file.write_bytes(b"22")
    look.set(timer_s=0, rest_s=0.001)
    assert [report.token for report in waiter.wait(look)] == [5]
    file.write_bytes(b"333")
    assert [bool(portion) for portion in reserve._portions] == [False, True]
    with kept.reading():
        assert files.read(str(file)) == b"22"
    with kept.reading():
        assert files.read(str(file)) == b"333"
    look.set()
    os.eventfd_write(waiter.fileno(), 1)
    assert waiter.wait(look) == []  # the timer was left alone
    waiter.remove(5)
    os.close(timer)
    kept.close()


def test_the_alarm_fires_after_a_wait_unless_the_next_one_begins_before(waiter):
    alarm, kept = open_timer(), KeptFiles("/")
    look = Look(-1, kept, BlockReserve(), alarm)

    def rings(timeout_s):
        return bool(select.select([alarm], [], [], timeout_s)[0])

    for alarm_s, rung in ((1e-9, True), (3600, False), (0, False), (1e-9, True), (0, True)):
        look.set(alarm_s=alarm_s)
        os.eventfd_write(waiter.fileno(), 1)
        waiter.wait(look)
        assert rings(30 if rung else 0) == rung
    os.close(alarm)
    kept.close()


def test_a_stream_is_drained_and_its_end_is_a_loss(waiter, counter):
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    waiter.add(read_fd, How.STREAM, 1)
    waiter.add(counter, How.COUNTER, 2)
    os.write(write_fd, b"x" * 5000)
    (report,) = waiter.wait()
    assert (report.token, report.lost_errno) == (1, 0)
    os.close(write_fd)
    lost = next(report for _ in iter(int, 1) for report in waiter.wait() if report.lost_errno)
    assert (lost.token, lost.lost_errno) == (1, errno.EPIPE)
    os.eventfd_write(counter, 1)
    collect(waiter, 2, 1)  # the rest goes on, and the loss is told once
    waiter.remove(1)
    os.close(read_fd)


def test_a_trigger_that_hangs_up_is_lost_once_and_the_others_go_on(waiter, counter):
    ours, theirs = socket.socketpair()
    waiter.add(ours.fileno(), How.TRIGGER, 1)
    waiter.add(counter, How.COUNTER, 2)
    theirs.close()
    (report,) = waiter.wait()
    assert (report.token, report.lost_errno) == (1, errno.ENODEV)
    for _ in range(3):
        os.eventfd_write(counter, 1)
        collect(waiter, 2, 1)
    waiter.remove(1)
    ours.close()


def test_of_a_descriptor_that_is_another_files_now_nothing_is_read_and_nothing_spins(waiter, counter, tmp_path):
    waiter.add(counter, How.COUNTER, 1)
    copy = os.dup(counter)  # as a child that was forked has one: so the file still signals
    taken, mine = os.pipe2(os.O_NONBLOCK)
    os.write(mine, b"somebody's")
    os.dup2(taken, counter)
    os.eventfd_write(copy, 1)
    assert readable(waiter.fileno(), 10)
    (report,) = waiter.take()  # a wait() might begin when the thread has ended already
    assert (report.token, report.lost_errno) == (1, errno.EBADF)
    # Nothing can take it out of the epoll set, so the native thread has ended.
    with pytest.raises(KernelError) as robbed:
        waiter.wait()
    assert robbed.value.errno == errno.EBADF
    assert os.read(taken, 64) == b"somebody's"
    waiter.close()
    for fd in (copy, taken, mine):
        os.close(fd)


def test_a_removed_source_is_silent_and_its_token_is_free(waiter, counter):
    waiter.add(counter, How.COUNTER, 1)
    os.eventfd_write(counter, 1)
    assert readable(waiter.fileno(), 10)
    waiter.remove(1)
    assert waiter.take() == []
    os.eventfd_write(counter, 1)
    waiter.add(counter, How.COUNTER, 1)
    collect(waiter, 1, 1)


def test_more_sources_than_one_take_holds_are_all_told(counter):
    waiter = Waiter(capacity=200)
    fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(200)]
    for token, fd in enumerate(fds):
        waiter.add(fd, How.COUNTER, token)
        os.eventfd_write(fd, 1)
    heard: set[int] = set()
    while len(heard) < 200:
        reports = waiter.wait()
        assert len(reports) <= 64
        heard |= {report.token for report in reports}
    waiter.close()
    for fd in fds:
        os.close(fd)


def blocking_eventfd(_: Path) -> int:
    return os.eventfd(0, os.EFD_CLOEXEC)


def plain_file(tmp_path: Path) -> int:
    return os.open(tmp_path / "plain", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)


@pytest.mark.parametrize(
    ("make", "how", "expected"),
    [
        (blocking_eventfd, How.COUNTER, errno.EINVAL),
        (plain_file, How.KERNFS, errno.EPERM),
        (plain_file, How.TRIGGER, errno.EPERM),
        (plain_file, 9, errno.EINVAL),
    ],
)
def test_what_cannot_be_waited_for_is_refused(waiter, tmp_path, make, how, expected):
    fd = make(tmp_path)
    with pytest.raises(KernelError) as refused:
        waiter.add(fd, how, 1)
    assert refused.value.errno == expected
    os.close(fd)
    with pytest.raises(KernelError):
        waiter.add(fd, how, 1)


def test_a_token_twice_and_a_full_waiter_are_refused(waiter, counter):
    others = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(4)]
    waiter.add(counter, How.COUNTER, 0)
    for expected, token, fd in [(errno.EEXIST, 0, others[0]), (errno.EINVAL, 1, counter)]:
        with pytest.raises(KernelError) as refused:
            waiter.add(fd, How.COUNTER, token)
        assert refused.value.errno == expected
    for token, fd in enumerate(others[:3], 1):
        waiter.add(fd, How.COUNTER, token)
    with pytest.raises(KernelError) as refused:
        waiter.add(others[3], How.COUNTER, 9)
    assert refused.value.errno == errno.ENOSPC
    with pytest.raises(KernelError) as missing:
        waiter.remove(9)
    assert missing.value.errno == errno.ENOENT
    for fd in others:
        os.close(fd)


@pytest.mark.parametrize("capacity", [0, -1, 4097])
def test_a_capacity_out_of_bounds_is_refused(capacity):
    with pytest.raises(KernelError) as refused:
        Waiter(capacity)
    assert refused.value.errno == errno.EINVAL


def test_a_closed_waiter_says_so_and_closes_twice(waiter):
    waiter.close()
    waiter.close()
    with pytest.raises(ValueError, match="closed"):
        waiter.take()


def test_two_hundred_waiters_leave_nothing_behind(counter):
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(tasks_named("memsafe-waiter"))

    before = held()
    for token in range(200):
        waiter = Waiter()
        waiter.add(counter, How.COUNTER, token)
        waiter.close()
    until_s = time.monotonic() + 30  # a thread that was joined may be seen in /proc for a moment still
    while held() != before and time.monotonic() < until_s:
        pass
    assert held() == before


FORK = """
import errno, os
from memsafe.errors import KernelError
from memsafe.pressure.waiter import How, Waiter
waiter = Waiter()
counter = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
waiter.add(counter, How.COUNTER, 1)
held = set(os.listdir("/proc/self/fd"))
child = os.fork()
if child == 0:
    for call in (waiter.take, waiter.wait, lambda: waiter.remove(1), lambda: waiter.add(counter, How.COUNTER, 2)):
        try:
            call()
            os._exit(1)
        except KernelError as error:
            assert error.errno == errno.ECHILD
    waiter.close()
    os._exit(0 if len(held) - len(set(os.listdir("/proc/self/fd"))) == 4 else 2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
os.eventfd_write(counter, 1)
(report,) = waiter.wait()
assert (report.token, report.count) == (1, 1)
waiter.close()
"""


def test_a_forked_child_may_only_close_and_the_parent_goes_on():
    subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK], check=True, timeout=60)


# The first child after unshare() is number 1 of its namespace; what it forks after another one is, too.
FIRST_OF_ALL = """
import ctypes, errno, os, select, sys
from memsafe import Budget, EmergencyReserve
from memsafe.errors import KernelError
from memsafe.pressure.waiter import How, Waiter

NEWPID, NEWUSER = 0x20000000, 0x10000000
libc = ctypes.CDLL(None)

def end_as(child):
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

if libc.unshare(NEWPID if os.geteuid() == 0 else NEWPID | NEWUSER):
    sys.exit(77)
if first := os.fork():
    end_as(first)
counter = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
waiter, reserve = Waiter(), EmergencyReserve("1 MiB")
region = Budget().map(1 << 20, zero_on_close=True)
region.advise("dontfork")
waiter.add(counter, How.COUNTER, 1)
assert os.getpid() == 1 and libc.unshare(NEWPID) == 0
child = os.fork()
if child == 0:
    assert os.getpid() == 1 and (reserve.held_bytes, reserve.give()) == (0, 0)
    region.close()  # zeroing it would be a SIGSEGV
    try:
        waiter.take()
    except KernelError as error:
        assert error.errno == errno.ECHILD
        waiter.close()
        os._exit(0)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
os.eventfd_write(counter, 1)
assert select.select([waiter.fileno()], [], [], 30)[0], "the native thread is gone"
(report,) = waiter.take()
assert (report.token, report.count, reserve.held_bytes) == (1, 1, 1 << 20)
os._exit(0)
"""


def test_a_forked_child_with_its_parents_number_is_a_child_all_the_same():
    done = subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", FIRST_OF_ALL], timeout=60)
    if done.returncode == 77:
        pytest.skip("no PID namespace may be made here")
    assert done.returncode == 0


TOLD_LATER = """
import os, sys
from memsafe._kernel.kept import KeptFiles
from memsafe.pressure.reserve import BlockReserve
from memsafe.pressure.waiter import How, Look, Reading, Waiter, open_timer
counter, gauge = int(sys.argv[1]), os.open(sys.argv[2], os.O_RDONLY)
waiter, timer = Waiter(), open_timer()
waiter.add(timer, How.COUNTER, 1)
waiter.add(counter, How.COUNTER, 2)
look = Look(timer, KeptFiles("/"), BlockReserve())
look.pace(10**9, 0.02, 0.02)
look.read([Reading(7, 0, 1000, 10, 0, ((gauge, b"", 1),))])
look.set(timer_s=600)
os.eventfd_write(waiter.fileno(), 1)
assert waiter.wait(look) == []
for _ in range(2):
    print("waiting", flush=True)
    print([report.token for report in waiter.wait()], flush=True)
"""


def has_timer_fired(pid: int) -> bool:
    infos = list(Path(f"/proc/{pid}/fdinfo").iterdir())
    ticks = [line for info in infos for line in info.read_text().splitlines() if line.startswith("ticks:")]
    assert ticks
    return any(int(line.split()[1]) for line in ticks)


def test_gauges_are_read_on_after_a_source_signalled_together_with_their_timer(counter, tmp_path):
    gauge = tmp_path / "gauge"
    gauge.write_text("1000000000\n")
    child = subprocess.Popen(
        [sys.executable, "-c", TOLD_LATER, str(counter), str(gauge)],
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[counter],
    )
    try:
        assert child.stdout.readline() == "waiting\n"
        os.kill(child.pid, signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        give_up_s = time.monotonic() + 5  # stopped between reading the timer and setting it, the child proves nothing
        while not has_timer_fired(child.pid) and time.monotonic() < give_up_s:
            time.sleep(0.001)
        os.eventfd_write(counter, 1)
        os.kill(child.pid, signal.SIGCONT)
        assert child.stdout.readline() == "[2]\n"
        assert child.stdout.readline() == "waiting\n"
        gauge.write_text("5\n")
        assert readable(child.stdout.fileno(), 30), "the gauge was not read again"
        assert child.stdout.readline() == "[1]\n"
    finally:
        child.kill()
        child.communicate()
