"""The native sentry, on any child and on files that say what is left."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import signal
import subprocess
import threading
import time
from resource import RUSAGE_SELF, getrusage

import pytest

from memsafe._native import check, ffi, lib
from memsafe.pressure.waiter import Reading, fill_gauges, new_gauges
from memsafe.snapshot.sentry import Sentry
from tests.integration.scenario import open_files, opened_since

MIB = 1024 * 1024
PATIENCE_S = 30
IN_ACCESS = 1
PACE = (16 << 30, 1_000_000, 10_000_000, 0)


@pytest.fixture
def sleeper():
    with subprocess.Popen(["sleep", "60"]) as process:
        process.pidfd = os.pidfd_open(process.pid)
        yield process
        os.close(process.pidfd)
        process.kill()


@pytest.fixture
def usage(tmp_path):
    path = tmp_path / "usage"
    path.write_text("0")
    return path


@pytest.fixture
def watch(usage):
    """Start a sentry over 100 MiB, of which *usage* are gone; yields how, and its eventfd."""
    opened = []
    fd = os.open(usage, os.O_RDONLY)
    wake_fd = os.eventfd(0, os.EFD_NONBLOCK)

    def start(pidfd, *, give_mib, tell_mib, notice_s=0.05, count=1, pace=PACE, cache=(), held=()):
        gauges = new_gauges()
        terms = ((fd, b"", -1), *cache)
        reading = Reading(
            7, 100 * MIB, tell_mib * MIB, give_mib * MIB, 0, terms, held=tuple((fd, key, 1) for key in held)
        )
        orders = {
            "gauges": gauges,
            "gauge_count": fill_gauges(gauges, [reading]) if count == 1 else count,
            "notice_ns": int(notice_s * 1e9),
            "pace": pace,
            "wake_fd": wake_fd,
        }
        made = ffi.new("ms_sentry **")
        check(lib.ms_sentry_open(ffi.new("ms_sentry_orders *", orders), made), "open")
        opened.append(made[0])
        lib.ms_sentry_watch(made[0], pidfd, 0)
        return made[0]

    yield start, wake_fd
    for native in opened:
        lib.ms_sentry_close(native)
    os.close(fd)
    os.close(wake_fd)


def told(native):
    report = ffi.new("ms_sentry_report *")
    if not lib.ms_sentry_told(native, report):
        return None
    return report.token, report.left_bytes, report.rate_bytes_per_s


def has_ended(pidfd, patience_s):
    return bool(select.select([pidfd], [], [], patience_s)[0])


def test_a_child_is_ended_where_no_more_is_left_than_the_reserve_and_the_reason_is_told(sleeper, usage, watch):
    start, wake_fd = watch
    native = start(sleeper.pidfd, give_mib=10, tell_mib=50)
    assert told(native) is None
    usage.write_text(f"{95 * MIB}")
    assert has_ended(sleeper.pidfd, PATIENCE_S)
    assert told(native) == (7, 5 * MIB, 0)
    assert sleeper.wait() == -signal.SIGKILL
    assert select.select([wake_fd], [], [], PATIENCE_S)[0]


def test_what_is_going_fast_ends_it_sooner_and_what_is_going_slowly_does_not(sleeper, usage, watch):
    start, _ = watch
    # All that is left in an hour's time: whatever moves by then is too fast.
    native = start(sleeper.pidfd, give_mib=1, tell_mib=80, notice_s=3600)
    stop = threading.Event()

    def fill():
        used = 0
        while not stop.is_set():
            used += MIB // 4
            usage.write_text(f"{used}".rjust(12, "0"))
            stop.wait(0.001)

    writer = threading.Thread(target=fill)
    writer.start()
    assert has_ended(sleeper.pidfd, PATIENCE_S)
    stop.set()
    writer.join()
    token, left_bytes, rate = told(native)
    assert token == 7
    assert 1 * MIB < left_bytes <= 80 * MIB
    assert rate > 0


def test_a_burst_seen_by_looks_that_are_far_apart_on_purpose_ends_nothing(sleeper, usage, watch):
    start, _ = watch
    every_s = 0.5
    pace = (MIB, int(every_s * 1e9), int(every_s * 1e9), 0)
    native = start(sleeper.pidfd, give_mib=10, tell_mib=90, notice_s=0.001, pace=pace)
    assert not has_ended(sleeper.pidfd, 0.1)  # the first look was at once
    usage.write_text(f"{70 * MIB}")
    assert not has_ended(sleeper.pidfd, 2.5 * every_s)
    assert told(native) is None


@pytest.fixture
def next_look(usage):
    """Wait until the file has been read once more: inotify(7)."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_CLOEXEC)
    assert fd >= 0 <= libc.inotify_add_watch(fd, os.fsencode(usage), IN_ACCESS), os.strerror(ctypes.get_errno())

    def wait(pidfd=fd):
        """Return at once where the process of *pidfd* has ended: nobody looks any more."""
        ready = select.select([fd, pidfd], [], [], PATIENCE_S)[0]
        assert ready, "nobody reads it"
        if fd in ready:
            os.read(fd, 4096)

    yield wait
    os.close(fd)


@pytest.mark.parametrize("looks", [1, 3])
def test_what_goes_at_once_and_then_no_more_has_no_rate(sleeper, usage, watch, next_look, looks):
    start, _ = watch
    every_ns = 200_000_000
    usage.write_text(f"{60 * MIB}")
    native = start(sleeper.pidfd, give_mib=1, tell_mib=80, notice_s=4, pace=(16 << 30, every_ns, every_ns, 0))
    next_look()
    for used_mib in (85, 60, 85, 60):
        usage.write_text(f"{used_mib * MIB}")
        for _ in range(looks):
            next_look()
        # What a processor may take of the usage at a time is no sign.
        usage.write_text(f"{used_mib * MIB + MIB // 4}")
        next_look()
    assert told(native) is None
    assert not has_ended(sleeper.pidfd, 0)
    used = (f"{used_mib * MIB}" for used_mib in range(85, 99))
    while not has_ended(sleeper.pidfd, 0):
        usage.write_text(next(used))  # it goes on
        for _ in range(2):  # the first may have been under way
            next_look(sleeper.pidfd)
    assert told(native)[2] > 0


def test_what_processes_are_seen_to_take_need_not_go_on(sleeper, usage, watch, next_look, tmp_path):
    start, _ = watch
    stat = tmp_path / "stat"
    stat.write_text("inactive_file 0\n")
    usage.write_text(f"{60 * MIB}\nanon {50 * MIB}\n")
    with stat.open("rb") as file:
        cache = ((file.fileno(), b"inactive_file", 1),)
        start(sleeper.pidfd, give_mib=1, tell_mib=20, notice_s=3600, cache=cache, held=[b"anon "])
        for _ in range(4):  # a look reads the file three times: the first is over, whatever of it was seen
            next_look()
        usage.write_text(f"{85 * MIB}\nanon {75 * MIB}\n")
        assert has_ended(sleeper.pidfd, PATIENCE_S)


def test_a_huge_page_is_taken_at_once_and_tells_no_rate(sleeper, usage, watch):
    start, _ = watch
    usage.write_text(f"{60 * MIB}")
    native = start(sleeper.pidfd, give_mib=1, tell_mib=80, notice_s=3600)
    assert not has_ended(sleeper.pidfd, 0.1)
    usage.write_text(f"{62 * MIB}")
    assert not has_ended(sleeper.pidfd, 0.3)
    assert told(native) is None


def test_one_at_rest_ends_nobody(sleeper, usage, watch):
    start, _ = watch
    native = start(sleeper.pidfd, give_mib=10, tell_mib=50)
    lib.ms_sentry_rest(native)
    usage.write_text(f"{95 * MIB}")
    assert not has_ended(sleeper.pidfd, 0.1)
    assert told(native) is None
    lib.ms_sentry_watch(native, sleeper.pidfd, 0)
    assert has_ended(sleeper.pidfd, PATIENCE_S)


def test_a_file_that_makes_no_sense_ends_nobody(sleeper, usage, watch):
    usage.write_text("much")
    start, _ = watch
    native = start(sleeper.pidfd, give_mib=10, tell_mib=50)
    assert not has_ended(sleeper.pidfd, 0.1)
    assert told(native) is None


# Where somebody else has closed a descriptor, and its number is another file's.


@pytest.fixture
def stranger():
    """A process that is nobody's child here."""
    with subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE) as parent:
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        yield pidfd
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)


def test_a_stranger_whose_pidfd_got_the_number_lives(sleeper, stranger, usage, watch):
    start, wake_fd = watch
    native = start(sleeper.pidfd, give_mib=10, tell_mib=50)
    os.dup2(stranger, sleeper.pidfd)
    usage.write_text(f"{95 * MIB}")
    assert not has_ended(stranger, 0.1)
    assert told(native) is None
    assert not select.select([wake_fd], [], [], 0)[0]


def test_what_another_file_says_ends_nobody(sleeper, usage, watch, tmp_path):
    start, _ = watch
    native = start(sleeper.pidfd, give_mib=10, tell_mib=50)
    other = tmp_path / "other"
    other.write_text(f"{95 * MIB}")
    usage_fd = next(int(fd) for fd in os.listdir("/proc/self/fd") if is_open_at(int(fd), usage))
    with other.open() as file:
        os.dup2(file.fileno(), usage_fd)
    assert not has_ended(sleeper.pidfd, 0.1)
    assert told(native) is None


def is_open_at(fd, path):
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:  # what listed them
        return False


def test_nothing_is_written_to_another_file_than_the_eventfd(sleeper, usage, watch, tmp_path):
    start, wake_fd = watch
    native = start(sleeper.pidfd, give_mib=10, tell_mib=50)
    with (tmp_path / "other").open("wb") as other:
        os.dup2(other.fileno(), wake_fd)
    usage.write_text(f"{95 * MIB}")
    assert has_ended(sleeper.pidfd, PATIENCE_S)
    lib.ms_sentry_rest(native)  # returns when nothing is being ended
    assert (tmp_path / "other").read_bytes() == b""


def test_a_descriptor_that_is_none_is_refused(sleeper, usage):
    gauges = new_gauges()
    orders = {"gauges": gauges, "gauge_count": fill_gauges(gauges, [Reading(7, 0, 0, 0, 0, ((2**30, b"", -1),))])}
    for each in ({**orders, "wake_fd": -1}, {"wake_fd": 2**30}):
        assert lib.ms_sentry_open(ffi.new("ms_sentry_orders *", each), ffi.new("ms_sentry **")) == -errno.EBADF


def test_of_a_child_that_ended_by_itself_nothing_is_told(sleeper, usage, watch):
    start, wake_fd = watch
    sleeper.kill()
    assert has_ended(sleeper.pidfd, PATIENCE_S)
    usage.write_text(f"{95 * MIB}")
    native = start(sleeper.pidfd, give_mib=10, tell_mib=50)
    assert not select.select([wake_fd], [], [], 0.1)[0]
    assert told(native) is None


def test_more_gauges_than_there_is_room_for_are_refused(sleeper, watch):
    start, _ = watch
    for count in (-1, lib.MS_GAUGES + 1):
        with pytest.raises(OSError, match="Invalid argument"):
            start(sleeper.pidfd, give_mib=10, tell_mib=50, count=count)


@pytest.fixture
def counting(sleeper, watch, tmp_path):
    """Have a sentry wait for faults of this process and of a child whose file says 1,000."""
    start, wake_fd = watch
    stat = tmp_path / "stat"
    stat.write_text(stat_of(1000))
    fd = os.open(stat, os.O_RDONLY)
    native = start(sleeper.pidfd, give_mib=10, tell_mib=50)

    def expect(faults, not_before_s=0.0):
        own = getrusage(RUSAGE_SELF).ru_minflt
        lib.ms_sentry_expect(native, fd, own + faults, int(not_before_s * 1e9))
        return native

    yield expect, wake_fd, stat
    lib.ms_sentry_rest(native)
    os.close(fd)


def stat_of(faults):
    return f"7 (a) b (c)) S 1 7 7 0 -1 4194304 {faults} 0 0 0\n"


def is_set(wake_fd, patience_s):
    return bool(select.select([wake_fd], [], [], patience_s)[0])


def test_who_waits_for_faults_is_told_once_there_were_as_many(counting):
    expect, wake_fd, stat = counting
    expect(1_000_000)
    assert not is_set(wake_fd, 0.1)
    stat.write_text(stat_of(1_000_000))
    assert is_set(wake_fd, PATIENCE_S)


def test_who_waits_for_faults_is_told_of_this_processs_own_as_well(counting):
    expect, wake_fd, _ = counting
    expect(1000 + 4096)
    with mmap.mmap(-1, 32 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        memory.write(bytes(len(memory)))
    assert is_set(wake_fd, PATIENCE_S)


def test_who_waits_for_faults_is_told_once(counting):
    expect, wake_fd, _ = counting
    expect(1000)
    assert is_set(wake_fd, PATIENCE_S)
    os.eventfd_read(wake_fd)
    assert not is_set(wake_fd, 0.1)
    expect(1000)
    assert is_set(wake_fd, PATIENCE_S)


def test_who_waits_for_faults_is_not_told_before_the_time(counting):
    expect, wake_fd, _ = counting
    expect(1000, time.monotonic() + 3600)
    assert not is_set(wake_fd, 0.1)
    expect(1000, time.monotonic() + 0.01)
    assert is_set(wake_fd, PATIENCE_S)


@pytest.mark.parametrize("text", ["", "7 (x) S 1 2 3", "7 (x) S 1 7 7 0 -1 0 many 0\n", ") " * 400])
def test_a_stat_that_makes_no_sense_tells_nobody_anything(counting, text):
    expect, wake_fd, stat = counting
    stat.write_text(text)
    expect(0)
    assert not is_set(wake_fd, 0.1)
    stat.write_text(stat_of(1000))
    assert is_set(wake_fd, PATIENCE_S)


def test_at_rest_it_counts_for_nobody(counting):
    expect, wake_fd, stat = counting
    lib.ms_sentry_rest(expect(1_000_000))
    stat.write_text(stat_of(1_000_000))
    assert not is_set(wake_fd, 0.1)


def test_while_it_counts_the_child_is_still_ended(counting, sleeper, usage):
    expect, _, _ = counting
    expect(1_000_000)
    usage.write_text(f"{95 * MIB}")
    assert has_ended(sleeper.pidfd, PATIENCE_S)


def test_what_it_opens_is_closed():
    before = open_files()
    sentry = Sentry("/", -1)
    assert sentry.told() is None
    sentry.expect(0, 0)  # of nobody yet
    sentry.count_faults(os.getpid())
    sentry.expect(0, 0)
    for _ in range(2):
        sentry.close()
    assert opened_since(before) == []
