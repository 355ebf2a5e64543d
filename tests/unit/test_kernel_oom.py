"""Who the OOM killer took: by the counters of cgroups, and by a kernel's log of files."""

import os

import pytest

from memsafe._kernel import oom
from memsafe._kernel.oom import KillLog, KillWatch
from memsafe.testing import FakeKernel
from tests.integration.scenario import open_files, opened_since

MIB = 1024**2
FIRST_NAMESPACE = "pid:[4026531836]"


def killed(pid, facility=0, how="Memory cgroup out of memory", name="python", at_s=14980.894406):
    text = f"{how}: Killed process {pid} ({name}) total-vm:538292kB, anon-rss:97792kB, oom_score_adj:1000"
    return f"{facility * 8 + 3},1234,{round(at_s * 1e6)},-;{text}\n SUBSYSTEM=memory\n"


class Machine:
    """A kernel of files with a log, in which this process has a cgroup."""

    def __init__(self, folder, namespace=FIRST_NAMESPACE):
        self.root = folder
        self.group = FakeKernel(folder).cgroup("/app", limit=64 * MIB, oom_kills=3).join()
        (folder / "dev").mkdir()
        self.log = folder / "dev" / "kmsg"
        self.log.write_text(killed(7) + "6,1,1,-;booted\n")
        (folder / "proc" / "self" / "ns").mkdir()
        (folder / "proc" / "self" / "ns" / "pid").symlink_to(namespace)

    def say(self, text):
        with self.log.open("a") as log:
            log.write(text)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def watch(machine):
    with_log = KillWatch(machine.root)
    yield with_log
    with_log.close()


def test_a_victim_that_the_log_names_was_killed(machine, watch):
    machine.group.oom_kills = 4
    machine.say(killed(41))
    assert watch.evidence(41) == "oom_kill of /app rose and the kernel's log names it"


def test_the_log_is_enough_where_no_counter_rose(machine, watch):
    machine.say(killed(41, how="Out of memory"))
    assert watch.evidence(41) == "the kernel's log names it"


def test_another_victim_in_the_same_cgroup_is_not_taken_for_this_one(machine, watch):
    machine.group.oom_kills = 4
    machine.say(killed(42))
    assert watch.evidence(41) is None


def test_what_was_logged_before_says_nothing(watch):
    assert watch.evidence(7) is None


def test_a_counter_that_rose_decides_where_the_log_stays_silent(machine, watch):
    machine.group.oom_kills = 4
    assert watch.evidence(41) == "oom_kill of /app rose"


def test_without_a_log_the_counter_decides(machine):
    machine.log.unlink()
    watch = KillWatch(machine.root)
    assert watch.evidence(41) is None
    machine.group.oom_kills = 4
    assert watch.evidence(41) == "oom_kill of /app rose"


def test_in_a_pid_namespace_of_its_own_the_logs_pids_are_somebody_elses(tmp_path):
    machine = Machine(tmp_path, namespace="pid:[4026532201]")
    watch = KillWatch(machine.root)
    machine.say(killed(41))
    assert watch.evidence(41) is None
    machine.group.oom_kills = 4
    assert watch.evidence(41) == "oom_kill of /app rose"


def test_outside_of_cgroups_the_machines_counter_stands_in(tmp_path):
    FakeKernel(tmp_path)
    (tmp_path / "proc" / "vmstat").write_text("oom_kill 5\n")
    watch = KillWatch(tmp_path)
    (tmp_path / "proc" / "vmstat").write_text("oom_kill 6\n")
    assert watch.evidence(41) == "oom_kill of the machine rose"


@pytest.mark.parametrize(
    "text",
    [
        killed(41, facility=1),  # anybody with the right to write to the log
        "6,2,2,-;oom-kill:oom_memcg=/out of memory: Killed process 41 (x),task=python,pid=42,uid=0\n",
        "6,2,2,-;traps: Killed process 41 (x) at 0\n",
        killed(4),
        killed(410),
    ],
)
def test_only_the_kernels_own_sentence_counts(machine, text):
    log = KillLog(machine.root)
    machine.say(text)
    assert log.names(41) is False
    log.close()


@pytest.mark.parametrize(
    "how", ["Memory cgroup out of memory", "Out of memory", "Out of memory (oom_kill_allocating_task)"]
)
def test_every_reason_for_a_kill_is_known(machine, how):
    log = KillLog(machine.root)
    machine.say("4,9,9,-,caller=T41;noise\n" + killed(41, how=how, name="a) b"))
    assert log.names(41) is True
    log.close()


def test_a_log_that_was_overwritten_unread_says_only_what_it_said(machine, monkeypatch):
    log = KillLog(machine.root)
    machine.say(killed(41))
    assert log.names(41) is True

    def overwritten(fd, size):
        raise BrokenPipeError

    monkeypatch.setattr(os, "read", overwritten)
    assert log.names(42) is None
    assert log.names(41) is True
    log.close()
    log.close()


BOOTED = "6,0,100,-;Linux version\n"


def named_since(machine, text, pid, since_s):
    """What the log tells, when it holds nothing but *text*."""
    machine.log.write_text(text)
    log = KillLog(machine.root, since_s)
    try:
        return log.names(pid)
    finally:
        log.close()


def test_the_log_is_read_back_to_a_moment(machine):
    text = BOOTED + killed(41, at_s=5000) + killed(42, at_s=6000)
    assert named_since(machine, text, 41, since_s=4999) is True
    assert named_since(machine, text, 43, since_s=4999) is False
    assert named_since(machine, text, 41, since_s=5900) is False
    assert named_since(machine, text, 42, since_s=5900) is True


def test_the_logs_clock_may_be_slow_by_a_thousandth_of_the_uptime_and_a_second(machine):
    text = BOOTED + killed(41, at_s=1_000_000)
    assert named_since(machine, text, 41, since_s=1_001_000) is True
    assert named_since(machine, text, 41, since_s=1_001_003) is False


def test_a_log_whose_beginning_was_overwritten_since_names_but_does_not_acquit(machine):
    text = "6,500,5000000000,-;usb\n" + killed(41, at_s=5001)
    assert named_since(machine, text, 41, since_s=4999) is True
    assert named_since(machine, text, 42, since_s=4999) is None
    assert named_since(machine, text, 42, since_s=5010) is False


def test_an_empty_log_says_nothing_of_the_past(machine):
    assert named_since(machine, "", 41, since_s=5) is None


@pytest.mark.parametrize(("namespace", "named"), [("time:[4026531834]", True), ("time:[4026532201]", None)])
def test_times_of_another_namespace_are_not_compared(machine, namespace, named):
    (machine.root / "proc" / "self" / "ns" / "time").symlink_to(namespace)
    assert named_since(machine, BOOTED + killed(41), 41, since_s=5) is named
    from_now_on = KillLog(machine.root)
    assert from_now_on.names(41) is False
    from_now_on.close()


def test_a_watch_that_cannot_begin_leaves_no_descriptor(machine, monkeypatch):
    def fails(root):
        raise MemoryError

    before = open_files()
    monkeypatch.setattr(oom, "_kills", fails)
    with pytest.raises(MemoryError):
        KillWatch(machine.root)
    assert opened_since(before) == []
