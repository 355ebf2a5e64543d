"""What ends a snapshot's child before its parent is harmed, and what is counted to know when."""

import contextlib
import errno
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import memsafe
from memsafe._kernel import process
from memsafe._kernel.oom import KillLog
from memsafe.errors import KernelError
from memsafe.snapshot import child, deadline
from memsafe.testing import FakeKernel
from tests.integration import scenario
from tests.integration.copies import NO_ROOM_BYTES, copies_of, killed_beside_a_victim, write_everything
from tests.integration.snapshots import MIB, PATIENCE_S, Gate, describe, gated, hello, out_of_time, outcome

# What is counted.


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("writers", [["parent"], ["child"], ["parent", "child"]])
def test_a_page_that_either_side_writes_is_one_copy(path, writers, huge):
    got = scenario.run(copies_of, path, writers, huge, 32 * MIB)
    idle = scenario.run(copies_of, path, [], huge, 32 * MIB)["peak"]
    assert idle < 8 * MIB
    assert abs(got["peak"] - idle - 16 * MIB) < 2 * MIB


# What ends the child.


def parent_overruns(path):
    gate = Gate()
    memory = mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"a" * len(memory))
    job = memsafe.fork_snapshot(path, gated(gate), max_copy="16 MiB")
    memory.seek(0)
    memory.write(b"b" * len(memory))
    got = outcome(job)
    gate.close()
    return {**got, "measured": job.copy_bytes}


def child_overruns(path):
    memory = mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"a" * len(memory))

    def write(out):
        memory.seek(0)
        memory.write(b"b" * len(memory))

    job = memsafe.fork_snapshot(path, write, max_copy="16 MiB")
    return {**outcome(job), "measured": job.copy_bytes}


@pytest.mark.parametrize("body", [parent_overruns, child_overruns])
def test_copies_beyond_max_copy_end_the_child_alone(path, body):
    got = scenario.run(body, path)
    assert got["error"] == "SnapshotOverrunError"
    assert got["max_copy_bytes"] == 16 * MIB
    assert got["measured"] >= got["copy_bytes"] > 16 * MIB
    assert path.read_bytes() == b"old"


def within_bound(path):
    memory = mmap.mmap(-1, 8 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(b"a" * len(memory))
    gate = Gate()
    job = memsafe.fork_snapshot(path, gated(gate), max_copy="128 MiB")
    memory.seek(0)
    memory.write(b"b" * len(memory))
    gate.open()
    got = outcome(job)
    gate.close()
    return got


def test_copies_are_counted_and_a_bound_that_holds_changes_nothing(path):
    got = scenario.run(within_bound, path)
    assert 8 * MIB <= got["result"]["peak_copy_bytes"] <= 128 * MIB


def headroom_gone(path, folder, readable):
    if not readable:
        process.smaps_rollup = refuse_to_read
    app = FakeKernel(folder).cgroup("/app", limit=1024 * MIB, usage=512 * MIB).join()
    gate = Gate()
    job = memsafe.fork_snapshot(path, gated(gate), root=folder)
    app.usage = 1020 * MIB
    got = outcome(job)
    gate.close()
    return got


def refuse_to_read(pid=0):
    """As of the child of a daemon that root started and that changed its user."""
    raise KernelError(errno.EACCES, "read", f"/proc/{pid}/smaps_rollup")


@pytest.mark.parametrize("readable", [True, False], ids=["copies-counted", "copies-unreadable"])
def test_the_child_is_ended_before_the_parents_last_headroom_is_gone(path, tmp_path, readable):
    got = scenario.run(headroom_gone, path, tmp_path / "machine", readable)
    assert got["error"] == "SnapshotOverrunError"
    assert got["max_copy_bytes"] is None
    assert "4 MiB are left below memory.max of /app (1 GiB)" in got["message"]
    assert path.read_bytes() == b"old"


# Headroom that goes without a page fault of 4 KiB in this process or its child.

STEP_BYTES = 2 * MIB
STEPS = 128


def fill_huge_pages():
    memory = mmap.mmap(-1, STEPS * STEP_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for _ in range(STEPS):
        memory.write(b"x" * STEP_BYTES)
        yield


def fill_a_file_in_memory():
    with os.fdopen(os.memfd_create("filled"), "wb", buffering=0) as file:
        for _ in range(STEPS):
            file.write(b"x" * STEP_BYTES)
            yield


def fill_another_process():
    program = f"import sys\nheld = []\nwhile sys.stdin.buffer.read(1): held.append(b'x' * {STEP_BYTES})"
    with subprocess.Popen([sys.executable, "-I", "-c", program], stdin=subprocess.PIPE, bufsize=0) as other:
        for _ in range(STEPS):
            other.stdin.write(b"x")
            yield


def headroom_goes(path, folder, limit_file, filling):
    join(folder, limit_file, STEPS * STEP_BYTES)
    gate = Gate()
    job = memsafe.fork_snapshot(path, gated(gate))
    with contextlib.closing(globals()[filling]()) as steps:
        for _ in steps:
            if job.done():
                break
            time.sleep(0.01)  # 200 MiB/s: no sooner than anybody can look
    gate.open()
    got = outcome(job)
    gate.close()
    return got


@pytest.mark.cgroup
@pytest.mark.parametrize("filling", ["fill_huge_pages", "fill_a_file_in_memory", "fill_another_process"])
def test_headroom_that_goes_by_other_ways_than_page_faults_is_seen_in_time(path, memory_group, filling):
    got = scenario.run(headroom_goes, path, *memory_group, filling)
    assert got.get("error") == "SnapshotOverrunError", got
    assert " left below " in got["message"]
    assert path.read_bytes() == b"old"


# Memory pressure.


def at_critical(path, keywords, drill, folder):
    """Let a monitor go to CRITICAL while a snapshot runs: in earnest, or in a drill."""
    app = FakeKernel(folder).cgroup("/app", limit=1024 * MIB, usage=512 * MIB).join()
    gate = Gate()
    with memsafe.PressureMonitor(root=folder) as monitor:
        job = memsafe.fork_snapshot(path, gated(gate), timeout_s=PATIENCE_S, **keywords)
        if drill:
            monitor.simulate(memsafe.PressureLevel.CRITICAL)
        else:
            app.usage = 1020 * MIB
            monitor.check()
        gate.open()
        got = outcome(job)
    gate.close()
    return {**got, "state": job.state.name}


@pytest.mark.parametrize("drill", [False, True])
def test_a_monitor_at_critical_ends_the_child(path, tmp_path, drill):
    got = scenario.run(at_critical, path, {"max_copy": "64 MiB"}, drill, tmp_path / "machine")
    assert (got["error"], got["state"]) == ("SnapshotOverrunError", "OVERRUN")
    assert "CRITICAL" in got["message"]
    assert ("simulate" in got["message"]) == drill
    assert got["max_copy_bytes"] == 64 * MIB
    assert got["copy_bytes"] >= 0
    assert path.read_bytes() == b"old"


def test_a_snapshot_that_is_told_to_goes_on_at_critical(path, tmp_path):
    got = scenario.run(at_critical, path, {"end_at_critical": False}, False, tmp_path / "machine")
    assert "result" in got


def begun_at_critical(path):
    # However long the rest takes, the level does not fall meanwhile.
    with memsafe.PressureMonitor(thresholds=memsafe.Thresholds(cooldown_s=3600)) as monitor:
        monitor.simulate(memsafe.PressureLevel.CRITICAL)
        try:
            memsafe.fork_snapshot(path, hello)
        except memsafe.SnapshotRefusedError as error:
            got = {**describe(error), "decision": error.assessment.decision}
        allowed = outcome(memsafe.fork_snapshot(path, hello, end_at_critical=False))
    return {**got, "allowed": allowed, "after": outcome(memsafe.fork_snapshot(path, hello))}


def test_at_critical_none_is_begun_and_a_monitor_that_was_closed_says_nothing(path):
    got = scenario.run(begun_at_critical, path)
    assert got["decision"] == "defer"
    assert "CRITICAL" in got["message"]
    assert "result" in got["allowed"]
    assert "result" in got["after"]


# While a child that is out of time is asked where it stands.


def asked_where_it_stands(path, folder, critical):
    """The child is asked where it stands, goes on, and then memory runs short; it would have an hour to answer."""
    deadline._LAST_WORDS_S = 3600
    app = FakeKernel(folder).cgroup("/app", limit=1024 * MIB, usage=512 * MIB).join()

    def write(out):
        signal.signal(child.STACK_SIGNAL, lambda *_: out.progress(1, 1))
        while True:
            signal.pause()

    monitor = memsafe.PressureMonitor(root=folder)  # one that is not started looks at nothing

    def on_progress(done, total):
        if critical:
            monitor.simulate(memsafe.PressureLevel.CRITICAL)
        else:
            app.usage = 1020 * MIB

    with monitor if critical else contextlib.nullcontext():
        # A child that cannot be asked yet is out of time, and no more.
        asked = {"on_progress": on_progress, "root": folder}
        return out_of_time(path, write, lambda got: got["error"] != "SnapshotFailedError", **asked)


@pytest.mark.parametrize("critical", [False, True])
def test_bounds_hold_while_a_child_is_asked_where_it_stands(path, tmp_path, critical):
    got = scenario.run(asked_where_it_stands, path, tmp_path / "machine", critical)
    assert got["error"] == "SnapshotOverrunError"
    assert ("CRITICAL" if critical else "4 MiB are left") in got["message"]
    assert path.read_bytes() == b"old"


# With everything against it.


def join(folder, limit_file, limit_bytes):
    Path(folder, "cgroup.procs").write_text(str(os.getpid()))
    Path(folder, limit_file).write_text(str(limit_bytes))


def write_everything_in(path, folder, limit_file):
    join(folder, limit_file, NO_ROOM_BYTES)
    return write_everything(path, 3)


@pytest.mark.cgroup
def test_where_copies_find_no_memory_the_parent_survives_and_the_child_does_not(path, memory_group):
    got = scenario.run(write_everything_in, path, *memory_group)
    assert len(got["outcomes"]) == 3
    assert set(got["outcomes"]) <= {"SnapshotOverrunError", "OOMKilledError"}
    assert path.read_bytes() == b"new"


# Whom the OOM killer took.


def killed_beside_a_victim_in(path, folder, limit_file):
    join(folder, limit_file, 96 * MIB)
    return killed_beside_a_victim(path)


@pytest.mark.cgroup
def test_a_child_killed_by_hand_is_not_taken_for_a_victim_beside_it(path, memory_group):
    with contextlib.closing(KillLog()) as log:
        readable = log.names(0) is not None
    if not readable:
        pytest.skip("the kernel's log may not be read here, or has the pids of another namespace")
    got = scenario.run(killed_beside_a_victim_in, path, *memory_group)
    assert got["signals"] == [signal.SIGKILL]
    assert got["error"] == "SnapshotFailedError"
    assert "SIGKILL" in got["message"]


# What is not in the image.


def kept_out(path):
    budget = memsafe.Budget("64 MiB")
    with budget.child("cache").map("32 MiB") as cache:
        view = cache.view()
        for offset in range(0, len(view), mmap.PAGESIZE):
            view[offset] = 1
        with_cache = memsafe.assess_fork()
        cache.advise("dontfork")
        without = memsafe.assess_fork()
        touched = outcome(memsafe.fork_snapshot(path, lambda out: out.write(view[:1])))
        spared = outcome(memsafe.fork_snapshot(path, hello))
        cache.advise("dofork")
        seen = outcome(memsafe.fork_snapshot(path, lambda out: out.write(view[:1])))
        view.release()
    charges = [with_cache.commit_charge_bytes, without.commit_charge_bytes]
    forecasts = [with_cache.copy_forecast_bytes, without.copy_forecast_bytes]
    return {"charges": charges, "forecasts": forecasts, "touched": touched, "spared": spared, "seen": seen}


def test_a_cache_marked_dontfork_is_neither_charged_nor_forecast_nor_there_in_the_child(path):
    got = scenario.run(kept_out, path)
    assert abs(got["charges"][0] - got["charges"][1] - 32 * MIB) < MIB
    assert abs(got["forecasts"][0] - got["forecasts"][1] - 32 * MIB) < MIB
    assert got["touched"]["error"] == "SnapshotFailedError"
    assert "SIGSEGV" in got["touched"]["message"]
    assert "result" in got["spared"]
    assert "result" in got["seen"]
    assert path.read_bytes() == b"\x01"
