"""A child that does nothing is told once; a sign of life, whichever, puts it off."""

import pytest

from memsafe._kernel import process
from memsafe.snapshot.standstill import LOOK_EVERY_S, STANDSTILL_S, Standstill
from tests.unit.proc_tree import ProcTree


class Child:
    """A process of files."""

    def __init__(self, tree):
        self.tree = tree
        self.ticks = self.written = 0
        self.state = "S"
        self.write()

    def write(self):
        fields = ["1"] * 10
        self.tree.write("/proc/7/stat", f"7 (a) b (c)) {self.state} {' '.join(fields)} {self.ticks} 3 0 0\n")
        self.tree.write("/proc/7/io", f"rchar: 5\nwchar: {self.written}\nsyscr: 1\n")


@pytest.fixture
def child(tmp_path):
    return Child(ProcTree(tmp_path))


@pytest.fixture
def standstill(child):
    return Standstill(7, 0.0, child.tree.root)


def looks(standstill, until_s, reported=None):
    """Look whenever it is planned; return what was told, and when."""
    told = []
    while standstill.next_look_s <= until_s:
        now_s = standstill.next_look_s
        does = standstill.look(now_s, reported)
        if does is not None:
            told.append((now_s, does))
    return told


def test_a_child_that_does_nothing_is_told_once(standstill):
    assert looks(standstill, 10 * STANDSTILL_S) == [(STANDSTILL_S + LOOK_EVERY_S, "waits")]


@pytest.mark.parametrize(
    ("state", "word"), [("S", "waits"), ("D", "waits for a device"), ("T", "by a signal"), ("t", "by a debugger")]
)
def test_it_is_said_what_the_child_does(child, standstill, state, word):
    child.state = state
    child.write()
    ((_, does),) = looks(standstill, 2 * STANDSTILL_S)
    assert word in does


def uses_the_processor(child):
    child.ticks += 1


def writes(child):
    child.written += 1


@pytest.mark.parametrize("live", [uses_the_processor, writes])
def test_a_sign_of_life_puts_it_off(child, standstill, live):
    for turn in range(1, 5):
        assert looks(standstill, turn * STANDSTILL_S * 2 / 3) == []
        live(child)
        child.write()
    assert len(looks(standstill, 10 * STANDSTILL_S)) == 1


def test_a_report_puts_it_off(standstill):
    for turn in range(1, 5):
        assert looks(standstill, turn * STANDSTILL_S * 2 / 3, reported=turn) == []


def test_a_child_that_is_not_to_be_seen_is_not_told(tmp_path):
    assert looks(Standstill(7, 0.0, tmp_path), 10 * STANDSTILL_S) == []


def test_without_the_count_of_bytes_the_rest_is_told(child):
    (child.tree.root / "proc/7/io").unlink()
    activity = process.activity(7, child.tree.root)
    assert activity == process.Activity("S", 3, None)


def test_a_stat_file_that_is_cut_off_is_an_error(child):
    child.tree.write("/proc/7/stat", "7 (a) S 1 1 1 1 1 1 1 1\n")
    with pytest.raises(OSError, match="utime"):
        process.activity(7, child.tree.root)
