"""Gauges: what the native thread reads by itself, and that it is what a look at all files says."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import pytest

from memsafe import PressureMonitor, Thresholds, memory_status
from memsafe._kernel.kept import KeptFiles
from memsafe._native import ffi, lib
from memsafe.pressure import gauges, levels
from memsafe.pressure.gauges import Gauge
from memsafe.pressure.reserve import BlockReserve
from memsafe.pressure.waiter import How, Look, Reading, Waiter, open_timer
from memsafe.testing import FakeKernel

MIB = 1024 * 1024
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


def read(look, *readings, pace=EXACT):
    look.read(readings)
    return lib.ms_gauge_read(look.native.gauges, look.native.gauge_count, pace)


# --- reading --------------------------------------------------------------------------------------------------------


STAT = "anon 5\ninactive_file 30\nfile 7\nactive_file 4\nslab_reclaimable 1000\n"


def test_what_is_left_is_the_sum_of_its_terms(look, files):
    usage, stat = files("usage", "250\n"), files("stat", STAT)
    terms = ((usage, b"", -1), (stat, b"inactive_file", 1), (stat, b"active_file", 1))
    assert read(look, Reading(1000, 100, 1000, terms)) == 1000 - 250 + 30 + 4 - 100
    meminfo = files("meminfo", "MemTotal:  999 kB\nMemAvailable:    64 kB\nSwapFree:       2 kB\n")
    terms = ((meminfo, b"MemAvailable", 1024), (meminfo, b"SwapFree", 1024))
    assert read(look, Reading(0, 0, 0, terms)) == 66 * 1024


def test_the_gauge_with_the_least_decides(look, files):
    usage = files("usage", "250\n")
    readings = [Reading(base, 100, 0, ((usage, b"", -1),)) for base in (900, 700, 800)]
    assert read(look, *readings) == 350
    assert read(look, *readings, Reading(350, 100, 0, ((usage, b"", -1),))) == 0
    assert read(look) == 2**62


def test_it_is_told_exactly_where_a_level_begins(look, files):
    usage = files("usage", "250\n")
    assert [read(look, Reading(base, 100, 0, ((usage, b"", -1),))) for base in (349, 350, 351)] == [0, 0, 1]


def test_the_delay_is_what_the_fastest_growth_would_take_within_bounds(look, files):
    pace = ffi.new("ms_gauge_pace *", (1000, 10 * SECOND_NS, 60 * SECOND_NS, 0))
    usage = files("usage", "0\n")
    delays_s = [
        read(look, Reading(left, 0, 0, ((usage, b"", -1),)), pace=pace) // SECOND_NS for left in (1, 30_000, 2**60)
    ]
    assert delays_s == [10, 30, 60]


def test_what_only_adds_is_read_only_where_the_answer_could_change(look, files, tmp_path):
    usage, stat = files("usage", "250\n"), files("stat", STAT)
    terms = ((usage, b"", -1), (stat, b"inactive_file", 1), (stat, b"active_file", 1))
    unread, with_cache = 1, 34 + 1
    assert read(look, Reading(351, 100, 0, terms)) == unread, "enough is left without it"
    assert read(look, Reading(351, 100, 2, terms)) == with_cache, "with it, the next reading could come later"
    assert read(look, Reading(350, 100, 0, terms)) == with_cache - 1, "without it, there would be something to tell"


def test_what_only_adds_is_remembered(look, files, tmp_path):
    usage, stat = files("usage", "250\n"), files("stat", STAT)
    look.read([Reading(350, 100, 0, ((usage, b"", -1), (stat, b"inactive_file", 1), (stat, b"active_file", 1)))])

    def delay_with(used):
        (tmp_path / "usage").write_text(f"{used:<8}\n")
        return lib.ms_gauge_read(look.native.gauges, 1, EXACT)

    assert [delay_with(250), delay_with(217), delay_with(216)] == [34, 67, 34]


def test_while_nothing_moves_it_slows_down_to_a_bound_and_what_is_lost_wakes_it_up(look, tmp_path, files):
    usage = files("usage", "0\n")
    pace = ffi.new("ms_gauge_pace *", (SECOND_NS, 10, SECOND_NS, 0))
    look.read([Reading(1640, 1000, 0, ((usage, b"", -1),))])

    def delay_with(used):
        (tmp_path / "usage").write_text(f"{used}\n")
        return lib.ms_gauge_read(look.native.gauges, 1, pace)

    assert [delay_with(639) for _ in range(7)] == [10, 20, 40, 80, 160, 200, 200]
    assert delay_with(0) == 640, "more is left: no reason to hurry"
    assert [delay_with(639), delay_with(639)] == [10, 20]


@pytest.mark.parametrize(
    "text", ["", "max\n", "-1\n", "99999999999999999999\n", "9223372036854775807\n", "other 5\n", " \0 5"]
)
def test_what_makes_no_sense_tells_nothing(look, files, text):
    stat = files("stat", text)
    for key, scale in ((b"", 1024), (b"inactive_file", 1)):
        assert read(look, Reading(0, 10, 0, ((stat, key, scale),))) == 2**62


def test_only_whole_keys_at_the_start_of_a_line_count(look, files):
    stat = files("stat", "total_inactive_file 9\nnot inactive_file 8\ninactive_file 7\n")
    assert read(look, Reading(0, 0, 0, ((stat, b"inactive_file", 1),))) == 7


def test_more_than_there_is_room_for_are_left_out(look, files):
    usage = files("usage", "0\n")
    readings = [Reading(1000, 0, 0, ((usage, b"", -1),)) for _ in range(lib.MS_GAUGES)]
    assert read(look, *readings, Reading(0, 0, 0, ((usage, b"", -1),))) == 1000


# --- in the native thread -------------------------------------------------------------------------------------------


def test_the_thread_reads_on_and_lets_the_timer_fire_when_there_is_something_to_tell(look, files, tmp_path):
    usage = files("usage", "0\n")
    waiter = Waiter(capacity=2)
    waiter.add(look.native.timer_fd, How.COUNTER, 5)
    look.pace(SECOND_NS, 0.0001, 0.001)
    look.read([Reading(1000, 100, 0, ((usage, b"", -1),))])
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
    look.read([Reading(2**40, 100, 0, ((usage, b"", -1),))])
    look.set(timer_s=0.001)
    assert [report.token for report in waiter.wait(look)] == [5]
    waiter.close()


def test_gauges_that_were_dropped_are_not_read_again(look, files):
    usage = files("usage", "900\n")
    waiter = Waiter(capacity=2)
    waiter.add(look.native.timer_fd, How.COUNTER, 5)
    look.pace(SECOND_NS, 3000, 3600)
    look.read([Reading(1000, 100, 0, ((usage, b"", -1),))])
    look.set(timer_s=3600)
    os.eventfd_write(waiter.fileno(), 1)
    assert waiter.wait(look) == []
    waiter.drop_gauges()
    look.set()
    os.eventfd_write(waiter.fileno(), 1)
    assert waiter.wait(look) == []
    waiter.close()


# --- of a machine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["v2", "v1", "hybrid"])
@pytest.mark.parametrize("mode", [0, 2])
def test_a_gauge_says_what_a_look_at_all_files_says(tmp_path, look, layout, mode):
    machine = FakeKernel(tmp_path, layout=layout)
    machine.overcommit.mode = mode
    for path in ("/pod", "/pod/app"):
        machine.cgroup(path, limit=900 * MIB, usage=700 * MIB, inactive_file=50 * MIB, active_file=40 * MIB)
    machine.cgroup("/pod/app", limit=128 * MIB, usage=100 * MIB, inactive_file=9 * MIB, active_file=5 * MIB).join()
    status = memory_status(root=machine.root)
    constraints = {gauges.limit_of(constraint): constraint for constraint in status.constraints}
    found = {}
    for gauge in gauges.of(machine.root, status):
        if not isinstance(gauge, Gauge):
            continue
        gauge._fd = gauge._arm()
        reading = replace(gauge.reading(constraints[gauge.limit], Thresholds()), added_bytes=2**62)  # read it all
        found[gauge.limit] = read(look, reading) + reading.tell_bytes
        gauge._close_fd()
    assert found == {limit: levels.available_bytes(constraint) for limit, constraint in constraints.items()}
    assert {kind for kind, _, _ in found} >= {"physical"} | ({"commit"} if mode == 2 else set())


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
