"""Scheduled snapshots with real forks. Each scenario runs in a process of its own, and must leave nothing there."""

import asyncio
import json
import os
import threading
import time
from pathlib import Path

import pytest

import memsafe
from memsafe.testing import FakeKernel
from tests.integration import scenario
from tests.integration.snapshots import Gate, gated

MIB = 1024 * 1024
PATIENCE_S = 30


@pytest.fixture
def path(tmp_path):
    return tmp_path / "dump.json"


def until(condition):
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)  # another thread's state


def under_writes(path):
    """Two threads keep a pair equal under a lock; every image must have it so."""
    state, lock, stop = [0, 0], threading.Lock(), threading.Event()
    images = []

    def write(out):
        out.write(json.dumps(state).encode())

    def change():
        while not stop.is_set():
            with lock:
                state[0] += 1
                state[1] += 1
                schedule.note_changes()

    def took(outcome):
        images.append(json.loads(Path(path).read_text()))

    schedule = memsafe.SnapshotSchedule(path, write, after_changes=50, lock=lock, on_end=took, checksum="crc32")
    threads = [threading.Thread(target=change) for _ in range(2)]
    with schedule:
        for thread in threads:
            thread.start()
        until(lambda: len(images) >= 4)
        stop.set()
        for thread in threads:
            thread.join()
    forecast = schedule.forecast()
    return {
        "images": images,
        "failures": schedule.consecutive_failures,
        "changes_match": schedule.changes_since == state[0] - json.loads(Path(path).read_text())[0],
        "checksum": schedule.last_result.checksum,
        "forecast": [forecast.runs, forecast.size_bytes > 0, forecast.duration_s > 0, forecast.copy_bytes > 0],
    }


def test_images_are_taken_unasked_each_of_one_moment(path):
    got = scenario.run(under_writes, path)
    assert len(got["images"]) >= 4
    assert all(first == second for first, second in got["images"])
    assert got["images"] == sorted(got["images"])
    assert got["failures"] == 0
    assert got["changes_match"]
    assert got["checksum"].startswith("crc32:")
    assert got["forecast"] == [min(len(got["images"]), 5), True, True, True]


def on_a_loop(path):
    async def main():
        ended = asyncio.Queue()
        loop = asyncio.get_running_loop()
        state = {"value": 0}
        async with memsafe.SnapshotSchedule(
            path,
            lambda out: out.write(json.dumps(state).encode()),
            after_changes=1,
            on_end=lambda outcome: loop.call_soon_threadsafe(ended.put_nowait, outcome),
        ) as schedule:
            state["value"] = 1
            schedule.note_changes()
            await asyncio.wait_for(ended.get(), PATIENCE_S)
            return {"image": json.loads(Path(path).read_text()), "since": schedule.changes_since}

    return asyncio.run(main())


def test_an_event_loop_drives_it(path):
    got = scenario.run(on_a_loop, path)
    assert (got["image"], got["since"]) == ({"value": 1}, 0)


def failing_then_not(path):
    broken = [True]

    def write(out):
        if broken:
            raise RuntimeError("broken state")
        out.write(b"{}")

    outcomes = []
    with memsafe.SnapshotSchedule(
        path, write, after_changes=1, retry_s=0.01, retry_max_s=0.02, on_end=outcomes.append
    ) as schedule:
        schedule.note_changes()
        until(lambda: schedule.consecutive_failures >= 2)
        broken.clear()
        until(lambda: schedule.last_result is not None)
        return {
            "failed": [outcome.child_message for outcome in outcomes if isinstance(outcome, memsafe.MemsafeError)],
            "failures": schedule.consecutive_failures,
            "error": schedule.last_error,
        }


def test_it_recovers_by_itself(path):
    got = scenario.run(failing_then_not, path)
    assert len(got["failed"]) >= 2
    assert set(got["failed"]) == {"broken state"}
    assert (got["failures"], got["error"]) == (0, None)
    assert path.read_text() == "{}"


def beside_another(path):
    gate = Gate()
    other = memsafe.fork_snapshot(path + ".other", gated(gate))
    schedule = memsafe.SnapshotSchedule(path, lambda out: out.write(b"{}"), after_changes=1, retry_s=0.01)
    schedule.note_changes()
    schedule.tick()
    put_off = type(schedule.deferred_by).__name__
    gate.open()
    other.wait(PATIENCE_S)
    gate.close()
    until(lambda: schedule.tick() and schedule.last_result)
    return {"put_off": put_off, "failures": schedule.consecutive_failures, "now": schedule.deferred_by}


def test_somebody_else_s_snapshot_is_waited_for(path):
    got = scenario.run(beside_another, path)
    assert (got["put_off"], got["failures"], got["now"]) == ("SnapshotInProgressError", 0, None)


def in_a_cgroup_that_is_nearly_full(path, folder):
    group = FakeKernel(folder).cgroup("/app", limit=64 * MIB, usage=64 * MIB).join()
    schedule = memsafe.SnapshotSchedule(path, lambda out: None, after_changes=1, retry_s=0.01, root=folder)
    schedule.note_changes()
    schedule.tick()
    error = schedule.deferred_by or schedule.last_error
    got = {
        "error": type(error).__name__,
        "decision": error.assessment.decision,
        "put_off": schedule.deferred_by is not None,
        "failures": schedule.consecutive_failures,
    }
    group.usage = 0
    until(lambda: schedule.tick() and schedule.last_result)
    return got


def test_a_snapshot_that_would_not_be_safe_now_is_taken_once_it_is(path, tmp_path):
    got = scenario.run(in_a_cgroup_that_is_nearly_full, path, tmp_path / "machine")
    assert (got["error"], got["failures"]) == ("SnapshotRefusedError", 0)
    assert (got["decision"], got["put_off"]) == ("defer", True)


def in_a_forked_child(path):
    schedule = memsafe.SnapshotSchedule(path, lambda out: out.write(b"{}"), after_changes=1)
    with schedule:
        read_fd, write_fd = os.pipe()
        schedule._lock.acquire()  # as another thread may, at the fork
        pid = os.fork()
        if not pid:
            said = []
            schedule.note_changes(5)
            schedule.note_saved()
            said.append([schedule.tick(), schedule.next_attempt_in_s, schedule.job, schedule.last_result])
            for refused in (schedule.save_now, schedule.start):
                try:
                    refused()
                except RuntimeError as error:
                    said.append("belongs to process" in str(error))
            schedule.close()
            os.write(write_fd, json.dumps(said).encode())
            os._exit(0)
        schedule._lock.release()
        os.waitpid(pid, 0)
        said = json.loads(os.read(read_fd, 10_000))
        os.close(read_fd)
        os.close(write_fd)
        schedule.save_now().wait(PATIENCE_S)
        return {"said": said, "still": schedule.last_result.size_bytes}


def test_in_a_forked_child_it_does_nothing_and_never_hangs(path):
    got = scenario.run(in_a_forked_child, path)
    assert got["said"] == [[1.0, None, None, None], True, True]
    assert got["still"] == 2


def left_open(path):
    schedule = memsafe.SnapshotSchedule(path, lambda out: out.write(b"{}"), after_changes=1)
    schedule.start()
    schedule.save_now().wait(PATIENCE_S)
    raise SystemExit(3)


def test_an_interpreter_that_ends_with_an_open_schedule_ends(path):
    scenario.run(left_open, path, returncode=3)
    assert path.read_text() == "{}"
