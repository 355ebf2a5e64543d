"""When a snapshot's copies are measured, with this process in the place of the child."""

import math
import mmap
import os
from resource import RUSAGE_SELF, getrusage
from types import SimpleNamespace

import pytest

from memsafe._kernel import machine as memory, process
from memsafe.errors import KernelError
from memsafe.snapshot.meter import Meter
from memsafe.testing import FakeKernel
from tests.integration.scenario import open_files, opened_since

MIB = 1024 * 1024


@pytest.fixture
def machine(tmp_path):
    machine = FakeKernel(tmp_path)
    machine.cgroup("/app", limit=1024 * MIB, usage=512 * MIB).join()
    return machine


@pytest.fixture
def newborn(monkeypatch):
    """A child's page faults are counted from its birth; this process may have had any number before."""
    counted = process.minor_faults
    before = counted(os.getpid())
    monkeypatch.setattr(process, "minor_faults", lambda pid, *args, **options: counted(pid, *args, **options) - before)


def fresh(size_bytes):
    memory = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for start in range(0, size_bytes, mmap.PAGESIZE):
        memory[start] = 1
    return memory


def touch(size_bytes):
    fresh(size_bytes).close()


@pytest.fixture
def elsewhere(monkeypatch):
    """What the machine has taken besides this process; others that run now would be in it."""
    counted = SimpleNamespace(bytes=0)
    monkeypatch.setattr(
        memory, "anonymous_bytes", lambda root: process.status(root).anonymous_bytes + counted.bytes + 4096 * MIB
    )
    return counted


def test_faults_that_were_fresh_memory_make_no_reading_due(machine, now, newborn, elsewhere, monkeypatch):
    monkeypatch.setattr(memory, "unfaulted_bytes", lambda root: 0)  # other processes may be given huge pages
    own_bytes = process.smaps_rollup().private_dirty_bytes
    meter = Meter(machine.root, own_bytes + 64 * MIB)
    meter.measure(os.getpid())
    elsewhere.bytes += 96 * MIB
    now.s += 0.009
    taken = fresh(48 * MIB)  # counted as the child's too, which copies whatever it writes
    meter.runs_short(os.getpid())
    assert not meter.is_due()
    taken.close()
    touch(48 * MIB)
    meter.runs_short(os.getpid())
    assert meter.is_due()
    meter.close()


def short_after(meter, size_bytes):
    """Whether memory runs short by what is read after so many bytes of faults, seen in no haste."""
    touch(size_bytes)
    meter._counted_s = -1e9  # so that the rate is nothing
    return meter.runs_short(os.getpid()) is not None


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until it is moved."""
    clock = Clock()
    monkeypatch.setattr("memsafe.snapshot.meter.time", clock)
    return clock


class Clock:
    s = 1000.0
    cost_s = 0.0

    def monotonic(self):
        return self.s

    def thread_time(self):
        self.cost_s += 0.0005
        return self.cost_s


def test_faults_that_could_pass_the_bound_make_a_reading_due_where_the_machine_has_given_as_much(
    machine, now, newborn, elsewhere
):
    own_bytes = process.smaps_rollup().private_dirty_bytes
    meter = Meter(machine.root, own_bytes + 64 * MIB)
    meter.measure(os.getpid())
    now.s += 0.009  # the regular one is due after 285 ms
    meter.runs_short(os.getpid())
    assert not meter.is_due()
    elsewhere.bytes += 80 * MIB
    touch(80 * MIB)
    meter.runs_short(os.getpid())
    assert meter.is_due()


def test_faults_alone_make_a_reading_due_that_was_saved(machine, now, newborn, elsewhere):
    own_bytes = process.smaps_rollup().private_dirty_bytes
    meter = Meter(machine.root, own_bytes + 64 * MIB)
    meter.measure(os.getpid())
    touch(80 * MIB)
    now.s += 0.009
    meter.runs_short(os.getpid())
    assert not meter.is_due()
    now.s += 0.2
    assert meter.is_due()


def test_what_the_machine_has_given_makes_none_due_without_faults(machine, now, newborn, elsewhere):
    own_bytes = process.smaps_rollup().private_dirty_bytes
    meter = Meter(machine.root, own_bytes + 64 * MIB)
    meter.measure(os.getpid())
    elsewhere.bytes += 1024 * MIB
    now.s += 0.2
    meter.runs_short(os.getpid())
    assert not meter.is_due()


def test_it_waits_for_as_many_faults_as_could_pass_the_bound_and_after_a_hearing_for_more(
    machine, now, newborn, elsewhere
):
    meter = Meter(machine.root, 64 * MIB)
    before = getrusage(RUSAGE_SELF).ru_minflt
    first, _ = meter.expected_faults()
    assert first - before == pytest.approx(64 * MIB // mmap.PAGESIZE, rel=0.01)
    touch(64 * MIB)
    meter.runs_short(os.getpid())
    meter.is_due()
    again, not_before_s = meter.expected_faults()
    assert again - first > 64 * MIB // mmap.PAGESIZE
    assert not_before_s <= now.s


def test_without_a_bound_it_waits_for_no_faults(machine, now):
    assert Meter(machine.root, None).expected_faults() is None


def test_the_first_reading_by_the_clock_waits_until_one_as_slow_as_the_fork_is_affordable(machine, now):
    meter = Meter(machine.root, None)
    meter.expect_cost(0.007)
    now.s += 1.9
    assert not meter.is_due()
    now.s += 0.2
    assert meter.is_due()


def test_it_does_not_wait_for_ever_where_the_fork_was_slow(machine, now):
    meter = Meter(machine.root, None)
    meter.expect_cost(3600)
    now.s += 9.9
    assert not meter.is_due()
    now.s += 0.2
    assert meter.is_due()


def test_once_there_were_enough_faults_it_waits_for_the_reading_that_they_are_a_reason_for(
    machine, now, newborn, elsewhere
):
    meter = Meter(machine.root, process.smaps_rollup().private_dirty_bytes + 64 * MIB)
    meter.measure(os.getpid())
    meter._bound.due_s = now.s + 5
    _, not_before_s = meter.expected_faults()
    assert not_before_s <= now.s
    elsewhere.bytes += 1024 * MIB
    touch(80 * MIB)
    meter.runs_short(os.getpid())
    assert not meter.is_due()
    meter.next_look_s = now.s + 60
    assert meter.expected_faults() is None
    assert meter.next_look_s == now.s + 5


def test_what_is_copied_while_the_child_is_walked_is_still_to_come(machine, now, newborn, elsewhere, monkeypatch):
    meter = Meter(machine.root, process.smaps_rollup().private_dirty_bytes + 64 * MIB)
    walk = process.smaps_rollup

    def walked(pid):
        told = walk(pid)
        elsewhere.bytes += 80 * MIB
        touch(80 * MIB)
        return told

    meter.measure(os.getpid())
    monkeypatch.setattr(process, "smaps_rollup", walked)
    meter.measure(os.getpid())
    now.s += 0.009
    meter.runs_short(os.getpid())
    assert meter.is_due()


def test_headroom_is_read_now_and_then_whatever_the_faults_say(machine, now, newborn):
    meter = Meter(machine.root, None)
    machine.cgroup("/app").usage = 1012 * MIB
    meter._counted_s = -1e9
    assert meter.runs_short(os.getpid()) is None
    now.s += 0.2
    assert meter.runs_short(os.getpid()) is not None


def test_woken_it_looks_at_once_unless_it_was_stopped(machine, now):
    meter = Meter(machine.root, 64 * MIB)
    meter.look_now()
    assert meter.next_look_s == now.s
    meter.stop()
    meter.look_now()
    assert meter.next_look_s == math.inf


def test_faults_that_could_eat_the_headroom_have_it_read_without_a_bound(machine, now, newborn):
    meter = Meter(machine.root, None)
    machine.cgroup("/app").usage = 1012 * MIB
    assert not short_after(meter, MIB), "not read: so little cannot have eaten half a GiB"
    meter._headroom.slack_bytes = 16 * MIB
    assert short_after(meter, 32 * MIB)


def test_doubts_have_so_many_readings_before_their_time_and_no_more(machine, now):
    meter = Meter(machine.root, 1024 * MIB)
    waits_s = []
    for _ in range(10):
        touch(MIB)  # and given back
        meter.measure(os.getpid())
        waits_s.append(round(meter._bound.due_s - now.s, 6))
    # A reading costs 0.5 ms: as long from one to the next, then 0.35 % of all the time.
    assert waits_s == [0.0005] * 8 + [0.142857, 0.285714]
    now.s += 3600
    meter.measure(os.getpid())
    assert meter._bound.due_s == pytest.approx(now.s + 0.0005)


def test_readings_by_the_clock_save_as_many_for_doubts(machine, now):
    meter = Meter(machine.root, 1024 * MIB)
    for _ in range(40):
        meter.measure(os.getpid())
        now.s = meter._due_s
    saved = 0
    while meter._bound.due_s <= now.s + 0.01:
        meter.measure(os.getpid())
        saved += 1
    assert saved == pytest.approx(40 + 8, abs=2)


def test_readings_by_the_clock_take_their_share_of_all_the_time(machine, now):
    meter = Meter(machine.root, None)
    dues_s = []
    for _ in range(3):
        meter.measure(os.getpid())
        dues_s.append(round(meter._due_s - now.s, 6))
    assert dues_s == pytest.approx([0.285714, 0.571429, 0.857143])


def test_what_will_be_gone_at_this_rate_is_as_good_as_gone_once_an_eighth_of_it_is(machine, now):
    meter = Meter(machine.root, None)
    for usage_mib, short in ((560, False), (600, True)):  # of 512 MiB that were left at the start
        machine.cgroup("/app").usage = usage_mib * MIB
        now.s += 0.1
        touch(16 * MIB)
        meter._counted_s = now.s - 0.0005  # 32 GiB/s
        assert (meter.runs_short(os.getpid()) is not None) == short


def test_the_less_is_left_the_sooner_is_the_next_look(machine, now, newborn):
    meter = Meter(machine.root, None)
    assert not meter.is_tight
    assert meter.next_look_s == pytest.approx(now.s + 0.03, abs=0.001)
    machine.cgroup("/app").usage = 976 * MIB
    meter = Meter(machine.root, None)
    assert meter.is_tight
    assert meter.next_look_s == pytest.approx(now.s + 0.0021, abs=0.0003)


def looks(meter, now, count, moved_bytes):
    """Have it look when it plans to; return after how long each was. The clock says that each costs 0.5 ms."""
    waits_s = []
    for _ in range(count):
        touch(moved_bytes)
        waits_s.append(meter.next_look_s - now.s)
        now.s = meter.next_look_s
        meter.runs_short(os.getpid())
    return waits_s


def test_looks_come_sooner_where_headroom_would_be_gone_soon_at_this_rate(machine, now, newborn):
    machine.cgroup("/app").usage = 976 * MIB
    meter = Meter(machine.root, None)
    calm_s = looks(meter, now, 20, mmap.PAGESIZE)[-1]
    looks(meter, now, 1, 12 * MIB)
    assert looks(meter, now, 1, mmap.PAGESIZE)[0] < 0.9 * calm_s


def test_looks_ahead_are_made_up_for_by_looking_half_as_often_and_not_by_a_pause(machine, now):
    machine.cgroup("/app").usage = 976 * MIB
    meter = Meter(machine.root, None)
    affordable_s = 0.0005 / 0.0035
    assert max(looks(meter, now, 80, 16 * MIB)) < 3.5 * affordable_s
    assert affordable_s < looks(meter, now, 20, mmap.PAGESIZE)[-1] < 3.5 * affordable_s


def test_headroom_below_the_reserve_is_told(machine):
    meter = Meter(machine.root, None)
    machine.cgroup("/app").usage = 1012 * MIB
    assert "12 MiB are left below memory.max of /app (1 GiB)" in meter.measure(os.getpid()).short


def test_a_process_that_always_lives_near_its_limit_has_a_smaller_reserve(machine):
    machine.cgroup("/app").usage = 1012 * MIB
    meter = Meter(machine.root, None)
    assert meter.measure(os.getpid()).short is None
    machine.cgroup("/app").usage = 1022 * MIB
    assert meter.measure(os.getpid()).short is not None


def test_file_cache_in_use_counts_as_headroom(machine):
    meter = Meter(machine.root, None)
    machine.cgroup("/app", usage=1020 * MIB, active_file=500 * MIB)
    assert meter.measure(os.getpid()).short is None


def test_a_stopped_meter_is_never_due(machine):
    meter = Meter(machine.root, 0)
    meter.stop()
    assert meter.next_look_s == math.inf
    assert not meter.is_due()


def test_what_it_reads_stays_open_until_it_is_closed():
    before = open_files()
    meter = Meter("/", None)
    for _ in range(2):
        assert meter.measure(os.getpid()).copy_bytes > 0
    assert f"/proc/{os.getpid()}/smaps_rollup" in opened_since(before)
    for _ in range(2):
        meter.close()
    assert opened_since(before) == []


def test_minor_faults_are_read_behind_any_process_name(machine):
    machine.write("/proc/7/stat", "7 (a) b (c)) S 1 7 7 0 -1 4194304 1234 0 0 0\n")
    assert process.minor_faults(7, machine.root) == 1234


@pytest.mark.parametrize("text", ["", "7 (x) S 1 2 3", "7 (x) S 1 7 7 0 -1 0 many 0\n"])
def test_a_stat_that_makes_no_sense_is_an_error_that_names_it(machine, text):
    machine.write("/proc/7/stat", text)
    with pytest.raises(KernelError, match="/proc/7/stat"):
        process.minor_faults(7, machine.root)
