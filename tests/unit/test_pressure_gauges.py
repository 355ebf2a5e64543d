"""Gauges: what the native thread reads by itself, and that it is what a look at all files says."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace

import pytest

from memsafe import EmergencyReserve, PressureMonitor, Thresholds, memory_status
from memsafe._kernel.files import Labelled
from memsafe._kernel.kept import KeptFiles
from memsafe._native import ffi, lib
from memsafe.pressure import gauges, levels
from memsafe.pressure.gauges import Gauge
from memsafe.pressure.reserve import BlockReserve
from memsafe.pressure.waiter import How, Look, Reading, Waiter, open_timer
from memsafe.testing import FakeKernel

MIB = 1024 * 1024
PATIENCE_S = 30
SECOND_NS = 10**9
# A byte a nanosecond: the delay is what is left beyond what is to be told.
EXACT = ffi.new("ms_gauge_pace *", (SECOND_NS, 0, 2**62, 0))


@pytest.fixture
def look(tmp_path):
    timer_fd = open_timer()
    yield Look(timer_fd, KeptFiles(tmp_path), BlockReserve())
    os.close(timer_fd)


@pytest.fixture
def files(tmp_path):
    """Make files with a text, open to be read."""
    fds = []

    def make(name, text):
        path = tmp_path / name
        path.write_text(text)
        fds.append(os.open(path, os.O_RDONLY))
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


def reading_of(base, tell, added, terms, **others):
    return Reading(
        **{
            "token": 1,
            "base_bytes": base,
            "tell_bytes": tell,
            "give_bytes": -1,
            "added_bytes": added,
            "terms": terms,
            **others,
        }
    )


def sight_of(look, *readings, pace=EXACT, rested=1):
    look.read(readings)
    return lib.ms_gauge_read(look.native.gauges, look.native.gauge_count, rested, pace)


def read(look, *readings, pace=EXACT):
    """After how long to read again; 0: there is something to tell."""
    sight = sight_of(look, *readings, pace=pace)
    return 0 if sight.told else sight.next_ns


# --- reading --------------------------------------------------------------------------------------------------------


STAT = "anon 5\ninactive_file 30\nfile 7\nactive_file 4\nslab_reclaimable 1000\n"


def test_what_is_held_is_told_besides_where_the_cache_is_read(look, files):
    usage, stat = files("usage", "60\n"), files("stat", STAT)
    terms = ((usage, b"", -1), (stat, b"inactive_file", 1))
    reading = reading_of(100, 100, 0, terms, held=((stat, b"anon ", 1), (stat, b"file ", 1)))

    def held_of(reading):
        sight_of(look, reading)
        return look.native.gauges[0].seen_bytes, look.native.gauges[0].held_bytes

    assert held_of(reading) == (70, 12)
    assert held_of(replace(reading, held=())) == (70, -1)
    assert held_of(replace(reading, held=((stat, b"absent ", 1),))) == (70, -1)
    assert held_of(replace(reading, tell_bytes=10)) == (70, 12), "though enough is left without the cache"
    assert held_of(replace(reading, tell_bytes=10, held=())) == (40, -1)
    one_file = ((stat, b"inactive_file", 1), (stat, b"active_file", 1))
    assert held_of(replace(reading, terms=one_file)) == (134, 12)


def reads_of_this_thread():
    """How often it has called read(2) and its like: proc_pid_io(5)."""
    with open("/proc/thread-self/io", "rb", buffering=0) as file:
        return Labelled(file.read(), file.name).count(b"syscr")


def test_usage_that_moves_while_the_cache_is_read_is_read_again(look, files, tmp_path):
    usage, stat = files("usage", f"{MIB:12}"), files("stat", STAT)
    reading = reading_of(100 * MIB, 100 * MIB, 0, ((usage, b"", -1), (stat, b"inactive_file", 1)))
    stop = threading.Event()

    def move():
        fd = os.open(tmp_path / "usage", os.O_WRONLY)
        while not stop.is_set():
            os.pwrite(fd, b"%12d" % (9 * MIB), 0)
            os.pwrite(fd, b"%12d" % MIB, 0)
        os.close(fd)

    def reads_of_a_look():
        before = reads_of_this_thread()
        look.read([reading])
        lib.ms_gauge_read(look.native.gauges, 1, 1, EXACT)
        assert look.native.gauges[0].seen_bytes in {91 * MIB + 30, 99 * MIB + 30}
        return reads_of_this_thread() - before - nothing

    nothing = -reads_of_this_thread() + reads_of_this_thread()  # but for the asking itself
    once = reads_of_a_look()
    assert once == 3, "the usage, the cache, and the usage again"
    mover = threading.Thread(target=move)
    mover.start()
    deadline_s = time.monotonic() + PATIENCE_S
    try:
        while (seen := reads_of_a_look()) == once:
            assert time.monotonic() < deadline_s, "none was read again"
        assert seen in {5, 7}
    finally:
        stop.set()
        mover.join()


def test_what_is_left_is_the_sum_of_its_terms(look, files):
    usage, stat = files("usage", "250\n"), files("stat", STAT)
    terms = ((usage, b"", -1), (stat, b"inactive_file", 1), (stat, b"active_file", 1))
    assert read(look, reading_of(1000, 100, 1000, terms)) == 1000 - 250 + 30 + 4 - 100
    meminfo = files("meminfo", "MemTotal:  999 kB\nMemAvailable:    64 kB\nSwapFree:       2 kB\n")
    terms = ((meminfo, b"MemAvailable", 1024), (meminfo, b"SwapFree", 1024))
    assert read(look, reading_of(0, 0, 0, terms)) == 66 * 1024


def test_the_gauge_with_the_least_decides(look, files):
    usage = files("usage", "250\n")
    readings = [reading_of(base, 100, 0, ((usage, b"", -1),)) for base in (900, 700, 800)]
    assert read(look, *readings) == 350
    assert read(look, *readings, reading_of(350, 100, 0, ((usage, b"", -1),))) == 0
    assert read(look) == 2**62


def test_it_is_told_exactly_where_a_level_begins(look, files):
    usage = files("usage", "250\n")
    assert [read(look, reading_of(base, 100, 0, ((usage, b"", -1),))) for base in (349, 350, 351)] == [0, 0, 1]


def test_the_delay_is_what_the_fastest_growth_would_take_within_bounds(look, files):
    pace = ffi.new("ms_gauge_pace *", (1000, 10 * SECOND_NS, 60 * SECOND_NS, 0))
    usage = files("usage", "0\n")
    delays_s = [
        read(look, reading_of(left, 0, 0, ((usage, b"", -1),)), pace=pace) // SECOND_NS for left in (1, 30_000, 2**60)
    ]
    assert delays_s == [10, 30, 60]


def test_what_only_adds_is_read_only_where_the_answer_could_change(look, files, tmp_path):
    usage, stat = files("usage", "250\n"), files("stat", STAT)
    terms = ((usage, b"", -1), (stat, b"inactive_file", 1), (stat, b"active_file", 1))
    unread, with_cache = 1, 34 + 1
    assert read(look, reading_of(351, 100, 0, terms)) == unread, "enough is left without it"
    assert read(look, reading_of(351, 100, 2, terms)) == with_cache, "with it, the next reading could come later"
    assert read(look, reading_of(350, 100, 0, terms)) == with_cache - 1, "without it, it would be told"


def test_what_only_adds_is_remembered(look, files, tmp_path):
    usage, stat = files("usage", "250\n"), files("stat", STAT)
    look.read([reading_of(350, 100, 0, ((usage, b"", -1), (stat, b"inactive_file", 1), (stat, b"active_file", 1)))])

    def delay_with(used):
        (tmp_path / "usage").write_text(f"{used:<8}\n")
        return lib.ms_gauge_read(look.native.gauges, 1, 1, EXACT).next_ns

    assert [delay_with(250), delay_with(217), delay_with(216)] == [34, 67, 34]


def test_while_nothing_moves_it_slows_down_to_a_bound_and_what_is_lost_wakes_it_up(look, tmp_path, files):
    usage = files("usage", "0\n")
    pace = ffi.new("ms_gauge_pace *", (SECOND_NS, 10, SECOND_NS, 0))
    look.read([reading_of(3000, 1000, 0, ((usage, b"", -1),))])

    def delay_with(used):
        (tmp_path / "usage").write_text(f"{used}\n")
        return lib.ms_gauge_read(look.native.gauges, 1, 1, pace).next_ns

    assert [delay_with(1999) for _ in range(9)] == [10, 20, 40, 80, 160, 320, 640, 1000, 1000]
    assert delay_with(0) == 2000, "more is left: no reason to hurry"
    assert [delay_with(1999), delay_with(1999)] == [10, 20]


def test_it_names_the_gauge_that_asks_for_giving_and_goes_on_to_that_mark_after_telling(look, files):
    usage = files("usage", "250\n")

    def sight_with(base):
        terms = ((usage, b"", -1),)
        sight = sight_of(look, reading_of(900, 100, 0, terms), reading_of(base, 100, 0, terms, give_bytes=40))
        return sight.told, sight.short_of, sight.next_ns

    assert sight_with(351) == (0, -1, 1)
    assert sight_with(350) == (1, -1, 60)
    assert sight_with(291) == (1, -1, 1)
    assert sight_with(290) == (1, 1, 550), "nothing is left to be watched for there"
    assert sight_of(look, reading_of(290, 100, 0, ((usage, b"", -1),), give_bytes=40)).left_bytes == 40


def test_what_rests_is_read_with_all_only(look, files):
    usage = files("usage", "250\n")
    resting = reading_of(350, 100, 0, ((usage, b"", -1),), rests=True)
    assert (sight_of(look, resting, rested=0).told, sight_of(look, resting, rested=1).told) == (0, 1)


def test_the_time_that_filling_takes_does_not_slow_down_with_stillness(look, files):
    usage = files("usage", "0\n")
    pace = ffi.new("ms_gauge_pace *", (SECOND_NS, 10, SECOND_NS, 0))
    look.read([reading_of(50, 10, 0, ((usage, b"", -1),))])
    sights = [lib.ms_gauge_read(look.native.gauges, 1, 1, pace) for _ in range(5)]
    assert [sight.next_ns for sight in sights] == [40, 40, 40, 80, 160]
    assert [sight.soonest_ns for sight in sights] == [40] * 5


@pytest.mark.parametrize(
    "text", ["", "max\n", "-1\n", "99999999999999999999\n", "9223372036854775807\n", "other 5\n", " \0 5"]
)
def test_what_makes_no_sense_tells_nothing(look, files, text):
    stat = files("stat", text)
    for key, scale in ((b"", 1024), (b"inactive_file", 1)):
        assert read(look, reading_of(0, 10, 0, ((stat, key, scale),))) == 2**62


def test_only_whole_keys_at_the_start_of_a_line_count(look, files):
    stat = files("stat", "total_inactive_file 9\nnot inactive_file 8\ninactive_file 7\n")
    assert read(look, reading_of(0, 0, 0, ((stat, b"inactive_file", 1),))) == 7


def test_more_than_there_is_room_for_are_left_out(look, files):
    usage = files("usage", "0\n")
    readings = [reading_of(1000, 0, 0, ((usage, b"", -1),)) for _ in range(lib.MS_GAUGES)]
    assert read(look, *readings, reading_of(0, 0, 0, ((usage, b"", -1),))) == 1000


# --- in the native thread -------------------------------------------------------------------------------------------


def test_the_thread_reads_on_and_lets_the_timer_fire_when_there_is_something_to_tell(look, files, tmp_path):
    usage = files("usage", "0\n")
    waiter = Waiter(capacity=2)
    waiter.add(look.native.timer_fd, How.COUNTER, 5)
    look.pace(SECOND_NS, 0.0001, 0.001)
    look.read([reading_of(1000, 100, 0, ((usage, b"", -1),))])
    look.set(timer_s=3600)
    told = []
    thread = threading.Thread(target=lambda: told.extend(waiter.wait(look)))
    thread.start()
    (tmp_path / "usage").write_text("900\n")
    thread.join(30)
    assert [report.token for report in told] == [5]
    waiter.close()


def test_the_timer_fires_in_time_where_no_gauge_tells(look, files):
    usage = files("usage", "0\n")
    waiter = Waiter(capacity=2)
    waiter.add(look.native.timer_fd, How.COUNTER, 5)
    look.pace(SECOND_NS, 0.0001, 3600)
    look.read([reading_of(2**40, 100, 0, ((usage, b"", -1),))])
    look.set(timer_s=0.001)
    assert [report.token for report in waiter.wait(look)] == [5]
    waiter.close()


def test_gauges_that_were_dropped_are_not_read_again(look, files):
    usage = files("usage", "900\n")
    waiter = Waiter(capacity=2)
    waiter.add(look.native.timer_fd, How.COUNTER, 5)
    look.pace(SECOND_NS, 3000, 3600)
    look.read([reading_of(1000, 100, 0, ((usage, b"", -1),))])
    look.set(timer_s=3600)
    os.eventfd_write(waiter.fileno(), 1)
    assert waiter.wait(look) == []
    waiter.drop_gauges()
    look.set()
    os.eventfd_write(waiter.fileno(), 1)
    assert waiter.wait(look) == []
    waiter.close()


def test_what_rests_is_read_as_the_processors_time_passes(look, files):
    usage = files("usage", "900\n")
    waiter = Waiter(capacity=2)
    waiter.require_cpu_time()
    waiter.add(look.native.timer_fd, How.COUNTER, 5)
    look.pace(SECOND_NS, 0.0001, 3600)
    look.read([reading_of(1000, 100, 0, ((usage, b"", -1),), rests=True)])
    look.set(timer_s=3600)
    os.eventfd_write(waiter.fileno(), 1)
    assert waiter.wait(look) == []
    while not (told := waiter.take()):
        pass  # this is what takes time
    assert [report.token for report in told] == [5]
    waiter.close()


@pytest.mark.parametrize("has_told", [False, True])
def test_the_thread_gives_the_reserve_back_while_nobody_waits(look, files, tmp_path, has_told):
    usage = files("usage", "0  \n")
    waiter = Waiter(capacity=2)
    waiter.add(look.native.timer_fd, How.COUNTER, 5)
    look.pace(SECOND_NS, 0.0001, 0.001)
    with EmergencyReserve("64 KiB") as reserve:
        waiter.give(reserve)
        reading = reading_of(1000, 100, 0, ((usage, b"", -1),), token=7, give_bytes=50)
        look.read([reading])
        look.set(timer_s=3600)
        os.eventfd_write(waiter.fileno(), 1)
        assert (waiter.wait(look), look.gave) == ([], None)
        if has_told:
            (tmp_path / "usage").write_text("900\n")
            while not waiter.take():
                pass
            assert reserve.held_bytes == 64 * 1024
        (tmp_path / "usage").write_text("960\n")
        while reserve.held_bytes:
            pass
        look.set()
        assert [report.token for report in waiter.wait(look)] == [5]
        assert look.gave == (7, 40)
        os.eventfd_write(waiter.fileno(), 1)
        assert (waiter.wait(look), look.gave) == ([], None), "it is told once"
        waiter.close()


# --- of a machine ---------------------------------------------------------------------------------------------------


AT_THE_END = Thresholds(low_ratio=0, low_bytes_min=0, critical_ratio=0, critical_bytes_min=0)


def left_by_gauges(machine, look):
    """What every gauge says is left under its limit, and what levels.available_bytes() says."""
    status = memory_status(root=machine.root)
    constraints = dict(gauges.limits(status))
    found = {}
    for gauge in gauges.of(machine.root, status):
        if not isinstance(gauge, Gauge):
            continue
        gauge._fd = gauge._arm()
        left = [
            read(look, replace(reading, added_bytes=2**62)) + reading.tell_bytes  # read it all
            for reading in gauge.readings(constraints[gauge.limit], AT_THE_END, status.swap)
        ]
        found[gauge.limit] = min(left, default=0)  # at the end there is nothing to watch for
        gauge._close_fd()
    return found, {limit: levels.available_bytes(constraint) for limit, constraint in constraints.items()}


@pytest.fixture(params=["v2", "v1", "hybrid"])
def machine(tmp_path, request):
    kernel = FakeKernel(tmp_path, layout=request.param)
    for path in ("/pod", "/pod/app"):
        kernel.cgroup(path, limit=900 * MIB, usage=700 * MIB, inactive_file=50 * MIB, active_file=40 * MIB)
    kernel.cgroup("/pod/app", limit=128 * MIB, usage=100 * MIB, inactive_file=9 * MIB, active_file=5 * MIB).join()
    return kernel


@pytest.mark.parametrize("mode", [0, 2])
def test_a_gauge_says_what_a_look_at_all_files_says(machine, look, mode):
    machine.overcommit.mode = mode
    found, expected = left_by_gauges(machine, look)
    assert found == expected
    assert {kind for kind, _, _ in found} >= {"physical"} | ({"commit"} if mode == 2 else set())


def test_a_gauge_of_a_process_limit_does_too(machine, look):
    machine.process.set(data_limit=256 * MIB, address_space_limit=1024 * MIB, data_vm=100 * MIB, total_vm=300 * MIB)
    found, expected = left_by_gauges(machine, look)
    assert found == expected
    assert found["rlimit_data", None, 256 * MIB] == 156 * MIB
    assert found["rlimit_as", None, 1024 * MIB] == 724 * MIB


@pytest.mark.parametrize("swapped", [0, 20 * MIB, 30 * MIB, 90 * MIB])
@pytest.mark.parametrize("swap_limit", [0, 30 * MIB, 60 * MIB, None])
def test_a_gauge_of_what_swap_counts_in_does_too(machine, look, swapped, swap_limit):
    if machine.layout != "v2" and swap_limit is not None:
        swapped = min(swapped, swap_limit + 28 * MIB)  # v1's limit of both is never passed
    machine.machine.set(swap_total=1024 * MIB, swap_free=40 * MIB, available=3072 * MIB)
    machine.cgroup("/pod/app").set(swap=swapped, swap_limit=swap_limit)
    machine.cgroup("/pod").set(swap=swapped, swap_limit=swap_limit)
    found, expected = left_by_gauges(machine, look)
    assert found == expected


def test_a_v1_limit_of_memory_and_swap_that_is_that_of_memory_has_a_gauge_of_its_own(tmp_path, look):
    machine = FakeKernel(tmp_path, layout="v1")
    machine.machine.set(swap_total=1024 * MIB, swap_free=1000 * MIB)
    machine.cgroup("/app", limit=128 * MIB, usage=60 * MIB, swap=40 * MIB, swap_limit=0).join()
    found, expected = left_by_gauges(machine, look)
    assert found == expected
    assert found["memory.limit_in_bytes", "/app", 128 * MIB] == 68 * MIB
    assert found["memory.memsw.limit_in_bytes", "/app", 128 * MIB] == 28 * MIB


def test_a_copy_of_a_machine_has_none_and_says_so(tmp_path):
    with PressureMonitor(root=FakeKernel(tmp_path).root) as monitor:
        (source,) = (each for each in monitor.sources if each.name == "headroom")
    assert not source.used
    assert "copy" in source.reason


def test_this_machine_has_one_of_its_memory_and_says_why_not_of_commit():
    with PressureMonitor() as monitor:
        found = {each.name: each for each in monitor.sources if each.name.startswith("headroom.")}
    assert found["headroom.physical"].path == "/proc/meminfo"
    assert "headroom.commit" in found
