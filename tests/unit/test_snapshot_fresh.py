"""What is told from copies among a process's faults, by files that say what was taken."""

from types import SimpleNamespace

import pytest

from memsafe._kernel.machine import PAGE_BYTES
from memsafe.snapshot import fresh
from memsafe.snapshot.fresh import FreshMemory
from memsafe.testing import FakeKernel

MIB = 1024 * 1024
HUGE = "sys/kernel/mm/transparent_hugepage"
LAG = fresh._LAG_BYTES
MACHINE_LAG = fresh.MACHINE_LAG_BYTES


class Program:
    """A process that takes memory: small pages fault each, huge pages but once."""

    def __init__(self, folder):
        self.kernel = FakeKernel(folder)
        self.kernel.write(f"/{HUGE}/hpage_pmd_size", "2097152\n")
        self.faults = self.anonymous_bytes = self.huge_pages = self.swapped_pages = self.elsewhere_bytes = 0
        self.tell()

    def tell(self):
        self.kernel.write("/proc/self/status", f"Name:\tx\nRssAnon:\t{self.anonymous_bytes // 1024 + 1000} kB\n")
        pages = (self.anonymous_bytes + self.elsewhere_bytes) // PAGE_BYTES + 1_000_000  # of a machine with others
        text = f"nr_anon_pages {pages}\npswpin {self.swapped_pages}\nthp_fault_alloc {self.huge_pages}\n"
        self.kernel.write("/proc/vmstat", text)

    def take(self, size_bytes):
        self.faults += size_bytes // PAGE_BYTES
        self.anonymous_bytes += size_bytes
        self.tell()

    def take_huge(self, count):
        self.faults += count
        self.huge_pages += count
        self.anonymous_bytes += count * 2 * MIB
        self.tell()

    def copy(self, size_bytes):
        self.faults += size_bytes // PAGE_BYTES
        self.others_take(size_bytes)

    def others_take(self, size_bytes):
        self.elsewhere_bytes += size_bytes
        self.tell()

    def swap_in(self, size_bytes):
        self.swapped_pages += size_bytes // PAGE_BYTES
        self.anonymous_bytes += size_bytes
        self.tell()

    def give_back(self, size_bytes):
        self.anonymous_bytes -= size_bytes
        self.tell()


@pytest.fixture
def program(tmp_path, monkeypatch):
    program = Program(tmp_path)
    monkeypatch.setattr(fresh, "getrusage", lambda _: SimpleNamespace(ru_minflt=program.faults))
    return program


@pytest.fixture
def counted(program):
    return FreshMemory(program.kernel.root)


def test_fresh_memory_is_counted_but_for_what_the_kernels_counters_may_be_late_by(program, counted):
    program.take(64 * MIB)
    assert counted.count().fresh_bytes == 64 * MIB - LAG
    program.take(MIB)
    assert counted.count().fresh_bytes == 65 * MIB - LAG


def test_copies_are_not(program, counted):
    program.copy(64 * MIB)
    assert counted.count().fresh_bytes == 0
    program.take(64 * MIB)
    program.copy(16 * MIB)
    assert counted.count().fresh_bytes == 64 * MIB - LAG


def test_huge_pages_hide_no_copies(program, counted):
    program.take_huge(100)
    program.copy(16 * MIB)
    assert counted.count().fresh_bytes == 0


def test_swapped_pages_that_come_back_hide_no_copies(program, counted):
    program.swap_in(64 * MIB)
    program.copy(16 * MIB)
    assert counted.count().fresh_bytes == 0


def test_there_is_no_more_than_there_were_faults(program, counted):
    program.anonymous_bytes += 64 * MIB  # by means that nobody tells
    program.copy(MIB)
    assert counted.count().fresh_bytes == MIB


def test_what_was_given_back_and_is_taken_anew_is_counted_anew(program, counted):
    program.take(32 * MIB)
    before = counted.count().fresh_bytes
    program.give_back(32 * MIB)
    assert counted.count().fresh_bytes == before
    program.take(32 * MIB)
    assert counted.count().fresh_bytes == before + 32 * MIB - LAG


def test_a_counter_that_wobbles_counts_nothing(program, counted):
    for _ in range(20):
        program.take(LAG)
        counted.count()
        program.give_back(LAG)
        assert counted.count().fresh_bytes == 0


@pytest.mark.parametrize(("chosen", "told"), [("always", False), ("inherit", False), ("never", True)])
def test_where_pages_of_other_sizes_may_be_given_nothing_can_be_told_apart(program, chosen, told):
    text = " ".join(f"[{word}]" if word == chosen else word for word in ("always", "inherit", "madvise", "never"))
    program.kernel.write(f"/{HUGE}/hugepages-64kB/enabled", f"{text}\n")
    program.kernel.write(f"/{HUGE}/hugepages-2048kB/enabled", "[always] inherit madvise never\n")
    counted = FreshMemory(program.kernel.root)
    program.take(64 * MIB)
    assert (counted.count().fresh_bytes > 0) == told


def test_where_nothing_is_told_nothing_is_counted(tmp_path):
    counted = FreshMemory(tmp_path)
    assert counted.count() == fresh.Taken(0, None)
    for _ in range(2):
        counted.close()


def test_copies_are_taken_elsewhere(program, counted):
    program.copy(64 * MIB)
    assert counted.count().elsewhere_bytes == 64 * MIB - MACHINE_LAG
    program.copy(MIB)
    assert counted.count().elsewhere_bytes == 65 * MIB - MACHINE_LAG


def test_what_this_process_takes_and_gives_back_is_not(program, counted):
    for _ in range(20):
        program.take(32 * MIB)
        program.take_huge(1)
        program.swap_in(MIB)
        assert counted.count().elsewhere_bytes == 0
        program.give_back(35 * MIB)


def test_memory_that_others_give_back_hides_copies_between_two_counts_and_none_after(program, counted):
    program.others_take(-500 * MIB)
    program.copy(16 * MIB)
    assert counted.count().elsewhere_bytes == 0
    program.copy(64 * MIB)
    assert counted.count().elsewhere_bytes == 64 * MIB - MACHINE_LAG


def test_where_fresh_memory_cannot_be_told_apart_copies_can(program):
    program.kernel.write(f"/{HUGE}/hugepages-64kB/enabled", "[always] inherit madvise never\n")
    counted = FreshMemory(program.kernel.root)
    program.take(64 * MIB)
    program.copy(16 * MIB)
    assert counted.count() == fresh.Taken(0, 16 * MIB - MACHINE_LAG)


def test_what_cannot_be_read_any_more_leaves_what_was_counted(program, counted):
    program.take(64 * MIB)
    before = counted.count().fresh_bytes
    program.take(64 * MIB)
    program.kernel.write("/proc/vmstat", "thp_fault_alloc many\n")
    assert counted.count().fresh_bytes == before
