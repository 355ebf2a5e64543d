"""When a snapshot's copies are measured, with this process in the place of the child."""

import math
import mmap
import os
from pathlib import Path

import pytest

from memsafe._kernel import process
from memsafe.errors import KernelError
from memsafe.snapshot.meter import Meter
from memsafe.testing import FakeKernel

MIB = 1024 * 1024


@pytest.fixture
def machine(tmp_path):
    machine = FakeKernel(tmp_path)
    machine.cgroup("/app", limit=1024 * MIB, usage=512 * MIB).join()
    return machine


def touch(size_bytes):
    memory = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for start in range(0, size_bytes, mmap.PAGESIZE):
        memory[start] = 1
    memory.close()


def in_doubt_only(meter):
    """Set the clocks: the regular reading is far away, one in doubt is allowed."""
    meter._due_s = math.inf
    meter._in_doubt_due_s = 0


def test_faults_that_could_pass_the_bound_make_a_reading_due(machine):
    own_bytes = process.smaps_rollup().private_dirty_bytes
    meter = Meter(machine.root, own_bytes + 64 * MIB)
    meter.measure(os.getpid())
    in_doubt_only(meter)
    assert not meter.is_due(os.getpid())
    touch(64 * MIB)
    assert meter.is_due(os.getpid())


def test_faults_that_could_eat_the_headroom_make_a_reading_due_without_a_bound(machine):
    meter = Meter(machine.root, None)
    machine.cgroup("/app").usage = 976 * MIB
    assert meter.measure(os.getpid()).short is None
    in_doubt_only(meter)
    assert not meter.is_due(os.getpid())
    touch(32 * MIB)
    assert meter.is_due(os.getpid())


def test_faults_that_bring_no_bound_nearer_are_believed_less_each_time(machine):
    meter = Meter(machine.root, 1024 * MIB)
    meter.measure(os.getpid())
    duties = []
    for _ in range(6):
        touch(MIB)  # and given back
        meter.measure(os.getpid())
        duties.append(meter._duty_in_doubt)
    assert duties == [20, 40, 80, 100, 100, 100]  # as seldom as without doubt


def test_faults_that_bring_a_bound_nearer_are_believed_again(machine):
    meter = Meter(machine.root, None)
    meter.measure(os.getpid())
    touch(2 * MIB)
    meter.measure(os.getpid())
    assert meter._duty_in_doubt == 20
    machine.cgroup("/app").usage = 576 * MIB
    touch(32 * MIB)
    meter.measure(os.getpid())
    assert meter._duty_in_doubt == 10


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
    assert not meter.is_due(os.getpid())


def test_what_it_reads_stays_open_until_it_is_closed():
    before = set(os.listdir("/proc/self/fd"))
    meter = Meter("/", None)
    for _ in range(2):
        assert meter.measure(os.getpid()).copy_bytes > 0
    kept = [Path("/proc/self/fd", number) for number in set(os.listdir("/proc/self/fd")) - before]
    names = [os.readlink(path) for path in kept if path.is_symlink()]  # the listing's own is gone by now
    assert f"/proc/{os.getpid()}/smaps_rollup" in names
    for _ in range(2):
        meter.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_minor_faults_are_read_behind_any_process_name(machine):
    machine.write("/proc/7/stat", "7 (a) b (c)) S 1 7 7 0 -1 4194304 1234 0 0 0\n")
    assert process.minor_faults(7, machine.root) == 1234


@pytest.mark.parametrize("text", ["", "7 (x) S 1 2 3", "7 (x) S 1 7 7 0 -1 0 many 0\n"])
def test_a_stat_that_makes_no_sense_is_an_error_that_names_it(machine, text):
    machine.write("/proc/7/stat", text)
    with pytest.raises(KernelError, match="/proc/7/stat"):
        process.minor_faults(7, machine.root)
