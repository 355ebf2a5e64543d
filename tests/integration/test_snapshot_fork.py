"""fork_snapshot on this machine's kernel. Each scenario runs in a process of its own, and must leave nothing there."""

import asyncio
import functools
import hashlib
import logging
import mmap
import os
from pathlib import Path

import pytest

import memsafe
from tests.integration import scenario
from tests.integration.snapshots import (
    MIB,
    PATIENCE_S,
    Gate,
    content,
    describe,
    gated,
    hello,
    outcome,
    temporaries,
    unexpected,
)

# Success.


def success(path):
    data = os.urandom(3 * MIB)
    seen = []

    def write(out):
        for start in range(0, len(data), MIB):
            out.write(data[start : start + MIB])
            out.progress(start + MIB, len(data))

    job = memsafe.fork_snapshot(path, write, on_progress=lambda done, total: seen.append((done, total)))
    result = job.wait(PATIENCE_S)
    return {
        "same": hashlib.sha256(Path(path).read_bytes()).digest() == hashlib.sha256(data).digest(),
        "result": result.as_dict(),
        "seen": seen,
        "progress": job.progress,
        "ratio": job.progress.ratio,
        "done": job.done(),
        "copies": job.copy_bytes,
        "again": job.wait(0) == result,
        "cancel": job.cancel(),
    }


def test_a_snapshot_replaces_the_file_with_what_write_wrote(path):
    got = scenario.run(success, path)
    result = got["result"]
    assert got["same"]
    assert result["path"] == str(path)
    assert result["size_bytes"] == 3 * MIB
    assert result["method"] == "fork"
    assert 0 < result["pause_s"] < result["duration_s"]
    assert result["peak_copy_bytes"] >= got["copies"] > 0
    assert unexpected(result["warnings"]) == []
    assert got["seen"] == [[n * MIB, 3 * MIB] for n in (1, 2, 3)]
    assert got["progress"] == [3 * MIB, 3 * MIB]
    assert got["ratio"] == 1
    assert (got["done"], got["again"], got["cancel"]) == (True, True, False)
    assert temporaries(path) == []


def image_of_the_fork(path):
    gate = Gate()
    state = {"value": "then"}

    def write(out):
        gate.wait()
        out.write(state["value"].encode())

    job = memsafe.fork_snapshot(path, write)
    state["value"] = "now"
    before = content(path)
    gate.open()
    job.wait(PATIENCE_S)
    gate.close()
    return {"before": before, "after": content(path)}


def test_the_image_is_of_the_instant_of_the_call_and_the_old_file_stays_until_it_is_whole(path):
    got = scenario.run(image_of_the_fork, path)
    assert (got["before"], got["after"]) == ("old", "then")


def seek_and_close(path):
    def write(out):
        out.write(b"??? body")
        out.seek(0)
        out.write(b"len")
        out.close()

    return {"size": memsafe.fork_snapshot(path, write).wait(PATIENCE_S).size_bytes, "content": content(path)}


def test_write_may_seek_and_may_close_its_file(path):
    got = scenario.run(seek_and_close, path)
    assert (got["size"], got["content"]) == (8, "len body")


def relative(folder):
    os.chdir(folder)
    gate = Gate()
    job = memsafe.fork_snapshot("dump.db", gated(gate))
    os.chdir("/")
    gate.open()
    job.wait(PATIENCE_S)
    gate.close()
    return {}


def test_a_relative_path_means_the_folder_of_the_call(tmp_path):
    scenario.run(relative, tmp_path)
    assert (tmp_path / "dump.db").read_bytes() == b"new"


def many_progress_reports(path):
    def write(out):
        for done in range(200_000):
            out.progress(done + 1, 200_000)

    seen = []
    job = memsafe.fork_snapshot(path, write, on_progress=lambda *report: seen.append(report))
    job.wait(PATIENCE_S)
    return {"progress": job.progress, "reports": len(seen), "rising": seen == sorted(set(seen))}


def test_progress_is_thinned_out_but_the_last_report_arrives(path):
    got = scenario.run(many_progress_reports, path)
    assert got["progress"] == [200_000, 200_000]
    assert got["rising"]
    assert 100 <= got["reports"] < 20_000


def failing_callback(path):
    logging.basicConfig(level=logging.ERROR)

    def on_progress(done, total):
        raise RuntimeError("display broke")

    def write(out):
        out.progress(1, 1)

    return outcome(memsafe.fork_snapshot(path, write, on_progress=on_progress))


def test_a_failing_progress_callback_is_logged_and_costs_nothing_else(path):
    got = scenario.run(failing_callback, path)
    assert got["result"]["size_bytes"] == 0
    assert "display broke" in got["stderr"]


def waiting_for_itself(path):
    jobs, raised = [], []

    def on_progress(done, total):
        try:
            jobs[0].wait()
        except RuntimeError as error:
            raised.append(str(error))

    gate = Gate()

    def write(out):
        gate.wait()
        out.progress(1, 1)

    jobs.append(memsafe.fork_snapshot(path, write, on_progress=on_progress))
    gate.open()
    got = outcome(jobs[0])
    gate.close()
    return {**got, "raised": raised}


def test_a_progress_callback_that_waits_for_its_own_job_is_told_instead_of_hanging(path):
    got = scenario.run(waiting_for_itself, path)
    assert "result" in got
    assert len(got["raised"]) == 1


def awaited(path):
    async def main():
        job = memsafe.fork_snapshot(path, hello)
        first = await job
        again = await job
        gate = Gate()
        job = memsafe.fork_snapshot(path, gated(gate))
        waiter = asyncio.ensure_future(asyncio.wait_for(asyncio.shield(asyncio.ensure_future(wait(job))), None))
        await asyncio.sleep(0)
        waiter.cancel()
        with_running = job.done()
        gate.open()
        third = await job
        gate.close()
        return first == again, with_running, third.size_bytes

    async def wait(job):
        return await job

    same, done, size = asyncio.run(main())
    return {"same": same, "done": done, "size": size}


def test_a_job_can_be_awaited_again_and_survives_the_cancellation_of_a_waiter(path):
    got = scenario.run(awaited, path)
    assert (got["same"], got["done"], got["size"]) == (True, False, 3)


# Bounds.


def cancelled(path):
    gate = Gate()
    job = memsafe.fork_snapshot(path, gated(gate))
    try:
        job.wait(0)
        waited = "ended"
    except TimeoutError:
        waited = "TimeoutError"
    first = job.cancel()
    got = outcome(job)
    gate.close()
    return {**got, "waited": waited, "cancels": [first, job.cancel()]}


def test_cancel_ends_the_child_and_a_second_one_is_a_noop(path):
    got = scenario.run(cancelled, path)
    assert got["waited"] == "TimeoutError"
    assert got["error"] == "SnapshotCancelledError"
    assert got["cancels"] == [True, False]
    assert path.read_bytes() == b"old"
    assert temporaries(path) == []


def cancelled_from_callback(path):
    jobs = []
    gate = Gate()

    def write(out):
        gate.wait()
        out.progress(1, 2)
        gate.wait()

    job = memsafe.fork_snapshot(path, write, on_progress=lambda *_: jobs[0].cancel())
    jobs.append(job)
    gate.open()
    got = outcome(job)
    gate.close()
    return got


def test_a_progress_callback_may_cancel(path):
    assert scenario.run(cancelled_from_callback, path)["error"] == "SnapshotCancelledError"


def late(path):
    gate = Gate()
    got = outcome(memsafe.fork_snapshot(path, gated(gate), timeout_s=0.1))
    gate.close()
    return got


def test_a_child_that_takes_too_long_is_ended(path):
    got = scenario.run(late, path)
    assert got["error"] == "SnapshotFailedError"
    assert "0.1 s" in got["message"]
    assert path.read_bytes() == b"old"


def in_progress(path):
    gate = Gate()
    job = memsafe.fork_snapshot(path, gated(gate))
    try:
        memsafe.fork_snapshot(path + ".other", hello)
    except memsafe.SnapshotInProgressError as error:
        got = describe(error)
    gate.open()
    job.wait(PATIENCE_S)
    got["next"] = outcome(memsafe.fork_snapshot(path, hello))
    gate.close()
    return got


def test_one_snapshot_at_a_time_and_the_next_as_soon_as_wait_returns(path):
    got = scenario.run(in_progress, path)
    assert "dump.db" in got["message"]
    assert "result" in got["next"]


def refused(path):
    # One mapping larger than RAM and swap: the kernel would answer ENOMEM in mode 0 (and the charge is too much in 2).
    size_bytes = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.7)
    try:
        halves = [mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2)]
    except OSError as error:
        return {"skip": f"this kernel did not give the address space: {error}"}
    if memsafe.assess_fork().kernel_would_allow:
        return {"skip": "the kernel would allow it (vm.overcommit_memory=1, or much swap)"}
    try:
        memsafe.fork_snapshot(path, hello)
    except memsafe.SnapshotRefusedError as error:
        got = {**describe(error), "decision": error.assessment.decision, "reasons": error.assessment.reasons}
    for half in halves:
        half.close()
    return {**got, "next": outcome(memsafe.fork_snapshot(path + ".next", hello))}


def test_what_the_kernel_would_refuse_is_refused_with_the_reason_and_nothing_done(path):
    got = scenario.run(refused, path)
    if "skip" in got:
        pytest.skip(got["skip"])
    assert got["decision"] == "refuse"
    assert got["reasons"]
    assert got["reasons"][0] in got["message"]
    assert "result" in got["next"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("keywords", "error"),
    [
        ({"max_copy": "-1"}, ValueError),
        ({"max_copy": "lots"}, ValueError),
        ({"timeout_s": 0}, ValueError),
        ({"timeout_s": float("nan")}, ValueError),
        ({"keep_fds": ["x"]}, (AttributeError, TypeError)),
        ({"keep_fds": [2**40]}, ValueError),
        ({"keep_fds": [-1]}, ValueError),
        ({"on_progress": "x"}, TypeError),
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_is_done(path, keywords, error):
    with pytest.raises(error):
        memsafe.fork_snapshot(path, hello, **keywords)
    with pytest.raises(TypeError, match="callable"):
        memsafe.fork_snapshot(path, None)


@pytest.mark.parametrize("no_path", [5, None])
def test_what_is_no_path_is_refused_before_anything_is_done(no_path, capfd):
    with pytest.raises(TypeError, match="PathLike"):
        memsafe.fork_snapshot(no_path, hello)
    with pytest.raises(TypeError, match="PathLike"):
        memsafe.SnapshotSchedule(no_path, hello, every_s=1)
    assert capfd.readouterr().err == ""


async def coroutine_function(out):
    out.write(b"new")


def generator_function(out):
    yield out.write(b"new")


async def async_generator_function(out):
    yield out.write(b"new")


class Writer:
    async def method(self, out):
        out.write(b"new")

    __call__ = method


@pytest.mark.parametrize(
    "write",
    [
        coroutine_function,
        generator_function,
        async_generator_function,
        functools.partial(coroutine_function),
        functools.partial(Writer().method),
        Writer().method,
        Writer(),
    ],
)
def test_a_write_that_a_call_would_only_begin_is_refused_at_once(path, write):
    with pytest.raises(TypeError, match="coroutine or generator function"):
        memsafe.fork_snapshot(path, write)
    with pytest.raises(TypeError, match="coroutine or generator function"):
        memsafe.SnapshotSchedule(path, write, every_s=1)
