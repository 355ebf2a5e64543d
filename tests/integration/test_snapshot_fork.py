"""fork_snapshot on this machine's kernel. Each scenario runs in a process of its own, and must leave nothing there."""

import asyncio
import atexit
import ctypes
import errno
import functools
import gc
import hashlib
import logging
import mmap
import os
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import memsafe
from memsafe._kernel import process
from memsafe._kernel.cgroup import memory_cgroups
from memsafe.testing import FakeKernel
from tests.integration import scenario

MIB = 1024 * 1024
PATIENCE_S = 30
NOBODY = 65534


# What the scenarios share.


def outcome(job):
    """The result's fields, or the error that wait() raises, as plain data."""
    try:
        return {"result": job.wait(PATIENCE_S).as_dict()}
    except memsafe.MemsafeError as error:
        return describe(error)


def describe(error):
    names = ("child_type", "child_message", "child_traceback", "copy_bytes", "max_copy_bytes", "errno")
    fields = {name: getattr(error, name, None) for name in names}
    return {"error": type(error).__name__, "message": str(error), **fields}


def content(path):
    return Path(path).read_bytes().decode()


def temporaries(path):
    return [name for name in os.listdir(os.path.dirname(path)) if ".memsafe-" in name]


def hello(out):
    out.write(b"new")


class Gate:
    """A pipe on which the child waits until the parent opens it."""

    def __init__(self):
        self.read_fd, self.write_fd = os.pipe()

    def wait(self):
        os.read(self.read_fd, 1)

    def open(self):
        os.write(self.write_fd, b"!")

    def close(self):
        os.close(self.read_fd)
        os.close(self.write_fd)


def gated(gate):
    def write(out):
        out.write(b"new")
        gate.wait()

    return write


@pytest.fixture
def path(tmp_path):
    target = tmp_path / "dump.db"
    target.write_bytes(b"old")
    return target


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
    assert result["warnings"] == []
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


def from_thread_that_ends(path):
    gate = Gate()
    jobs = []
    thread = threading.Thread(target=lambda: jobs.append(memsafe.fork_snapshot(path, gated(gate))))
    thread.start()
    thread.join()
    gate.open()
    got = outcome(jobs[0])
    gate.close()
    return got


def test_the_child_outlives_the_thread_that_forked(path):
    assert scenario.run(from_thread_that_ends, path)["result"]["size_bytes"] == 3


def held_locks(path):
    lock = threading.RLock()

    def write(out):
        with lock:
            logging.getLogger("x").debug("its locks are renewed")
            out.write(b"new")

    with lock:
        job = memsafe.fork_snapshot(path, write)
    return outcome(job)


def test_a_lock_that_the_caller_holds_is_its_own_in_the_child(path):
    assert scenario.run(held_locks, path)["result"]["size_bytes"] == 3


# What the child is like.


def child_state(path):
    process.oom_score_adj()
    kept, _kept_peer = socket.socketpair()
    dropped, peer = socket.socketpair()
    gate, ready = Gate(), Gate()
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append("term"))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    own_adj = process.oom_score_adj()
    atexit.register(lambda: Path(path + ".atexit").touch())

    def write(out):
        os.kill(os.getpid(), signal.SIGINT)  # a Ctrl-C at the terminal is for the parent
        state = {
            "oom_score_adj": process.oom_score_adj(),
            "comm": Path("/proc/self/comm").read_text().strip(),
            "gc": gc.isenabled(),
            "frozen": gc.get_freeze_count() > 0,
            "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            "kept": stat.S_ISSOCK(os.fstat(kept.fileno()).st_mode),
            "dropped": stat.S_ISSOCK(os.fstat(dropped.fileno()).st_mode),
            "main": threading.current_thread() is threading.main_thread(),
            "status": [line for line in Path("/proc/self/status").read_text().splitlines() if line[:4] == "SigI"],
        }
        out.write(repr(state).encode())
        out.flush()
        ready.open()
        gate.wait()

    job = memsafe.fork_snapshot(path, write, keep_fds=[kept])
    ready.wait()
    dropped.close()
    half_open = peer.recv(1) != b""
    gate.open()
    got = outcome(job)
    state = eval(content(path))
    for thing in (gate, ready, kept, _kept_peer, peer):
        thing.close()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    return {**got, "state": state, "half_open": half_open, "own_adj": own_adj, "heard": heard}


def test_the_child_is_tame_before_write_runs(path):
    got = scenario.run(child_state, path)
    state = got["state"]
    assert state["oom_score_adj"] == min(1000, got["own_adj"] + 1000)
    assert state["comm"] == "memsafe-snap"
    assert (state["gc"], state["frozen"]) == (False, True)
    assert state["blocked"] == []
    assert (state["kept"], state["dropped"]) == (True, False)
    assert state["main"]
    ignored = int(state["status"][0].split()[1], 16)
    assert all(ignored & 1 << number - 1 for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGUSR2))
    assert not ignored & 1 << signal.SIGTERM - 1
    assert got["half_open"] is False
    assert got["heard"] == []
    assert not (path.parent / "dump.db.memsafe").exists()


def atexit_in_child(path):
    counter = path + ".runs"

    def count():
        with open(counter, "a") as file:
            file.write("x")

    atexit.register(count)
    sys.stdout.write("pending ")
    return outcome(memsafe.fork_snapshot(path, hello))


def test_neither_exit_functions_nor_pending_output_run_twice(path):
    got = scenario.run(atexit_in_child, path)
    assert (path.parent / "dump.db.runs").read_text() == "x"
    assert got["stdout"].count("pending") == 1


# Failures of write.


def write_raises(path):
    def write(out):
        out.write(b"half")
        raise ValueError("no such key")

    return outcome(memsafe.fork_snapshot(path, write))


def write_raises_something_odd(path):
    class Odd(BaseException):
        def __str__(self):
            raise RuntimeError("not even a message")

    def write(out):
        raise Odd

    return outcome(memsafe.fork_snapshot(path, write))


def write_raises_at_length(path):
    def write(out):
        raise ValueError("x" * 10 * MIB)

    return outcome(memsafe.fork_snapshot(path, write))


def write_recurses(path):
    def write(out):
        write(out)

    return outcome(memsafe.fork_snapshot(path, write))


def write_exits(path):
    def write(out):
        out.write(b"half")
        sys.exit(0)

    return outcome(memsafe.fork_snapshot(path, write))


def write_leaves(path):
    def write(out):
        out.write(b"half")
        out.flush()
        os._exit(0)

    return outcome(memsafe.fork_snapshot(path, write))


def write_leaves_with_status(path):
    return outcome(memsafe.fork_snapshot(path, lambda out: os._exit(7)))


def write_segfaults(path):
    def write(out):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.string_at(0)

    return outcome(memsafe.fork_snapshot(path, write))


def write_aborts(path):
    def write(out):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.abort()

    return outcome(memsafe.fork_snapshot(path, write))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (write_raises, ["ValueError", "no such key", "Traceback", "in write"]),
        (write_raises_something_odd, ["Odd"]),
        (write_raises_at_length, ["ValueError", "xxx"]),
        (write_recurses, ["RecursionError"]),
        (write_exits, ["SystemExit"]),
        (write_leaves, ["exited with status 0"]),
        (write_leaves_with_status, ["exited with status 7"]),
        (write_segfaults, ["SIGSEGV"]),
        (write_aborts, ["SIGABRT"]),
    ],
)
def test_a_failing_write_leaves_the_old_file_and_says_what_happened(path, body, words):
    got = scenario.run(body, path)
    assert got["error"] == "SnapshotFailedError"
    assert all(word in got["message"] for word in words), got["message"]
    assert path.read_bytes() == b"old"
    assert temporaries(path) == []


def test_the_error_carries_the_childs_exception(path):
    got = scenario.run(write_raises, path)
    assert (got["child_type"], got["child_message"]) == ("ValueError", "no such key")
    assert "raise ValueError" in got["child_traceback"]


def killed(path, stage):
    from memsafe.snapshot import reports

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def write(out):
        if stage == "before the first byte":
            die()
        out.write(b"new" * 100)
        if stage == "in the middle":
            out.flush()
            die()
        out.flush()
        os.fsync(out.fileno())
        if stage == "after fsync":
            die()

    said_done = reports.Reporter.done

    def done_then_die(self, *args):
        said_done(self, *args)
        die()

    if stage == "after its report":
        reports.Reporter.done = done_then_die
    return outcome(memsafe.fork_snapshot(path, write))


@pytest.mark.parametrize("stage", ["before the first byte", "in the middle", "after fsync", "after its report"])
def test_a_killed_child_is_never_a_success(path, stage):
    got = scenario.run(killed, path, stage)
    assert got["error"] == "SnapshotFailedError"
    assert "SIGKILL" in got["message"]
    assert path.read_bytes() == b"old"
    assert temporaries(path) == []


def terminated(path):
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append("term"))

    def write(out):
        os.kill(os.getpid(), signal.SIGTERM)

    return {**outcome(memsafe.fork_snapshot(path, write)), "heard": heard}


def test_a_signal_to_the_child_does_not_run_the_parents_handler(path):
    got = scenario.run(terminated, path)
    assert "SIGTERM" in got["message"]
    assert got["heard"] == []


# Files that cannot be written.


def begins(path):
    try:
        memsafe.fork_snapshot(path, hello)
    except OSError as error:
        first = describe(error)
    folder = tempfile.mkdtemp()
    again = outcome(memsafe.fork_snapshot(folder + "/next", hello))
    os.unlink(folder + "/next")
    os.rmdir(folder)
    return {**first, "again": again}


def test_a_folder_at_the_path_is_refused(tmp_path):
    got = scenario.run(begins, tmp_path)
    assert got["error"] == "IsADirectoryError"
    assert "result" in got["again"]


def test_a_missing_folder_is_refused(tmp_path):
    got = scenario.run(begins, tmp_path / "none" / "dump.db")
    assert got["error"] == "FileNotFoundError"


def test_something_else_than_a_regular_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    got = scenario.run(begins, tmp_path / "fifo")
    assert got["errno"] == errno.EINVAL
    assert stat.S_ISFIFO(os.stat(tmp_path / "fifo").st_mode)


def without_permission():
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o555)
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
    try:
        memsafe.fork_snapshot(folder + "/dump.db", hello)
    except OSError as error:
        got = describe(error)
    os.seteuid(os.getuid())
    got["left_in_folder"] = os.listdir(folder)
    os.rmdir(folder)
    return got


def test_a_folder_without_permission_is_refused():
    got = scenario.run(without_permission)
    assert got["error"] == "PermissionError"
    assert got["left_in_folder"] == []


def file_size_limit(path, size_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    return outcome(memsafe.fork_snapshot(path, lambda out: out.write(bytes(size_bytes))))


@pytest.mark.parametrize("size_bytes", [1001, 2 * MIB], ids=["when flushed", "when written"])
def test_a_file_that_may_not_grow_is_a_failed_write(path, size_bytes):
    got = scenario.run(file_size_limit, path, size_bytes)
    assert got["child_type"] == "OSError"
    assert "File too large" in got["message"]
    assert path.read_bytes() == b"old"


def full_disk(folder):
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, private = 0x00020000, 1 << 18 | 1 << 14
    if libc.unshare(new_namespace) or libc.mount(b"none", b"/", None, private, None):
        return {"skip": f"no mount namespace: {os.strerror(ctypes.get_errno())}"}
    if libc.mount(b"none", folder.encode(), b"tmpfs", 0, b"size=1m"):
        return {"skip": f"no tmpfs: {os.strerror(ctypes.get_errno())}"}
    path = folder + "/dump.db"
    Path(path).write_bytes(b"old")
    got = outcome(memsafe.fork_snapshot(path, lambda out: out.write(bytes(2 * MIB))))
    free = os.statvfs(folder)
    got.update(content=content(path), names=os.listdir(folder), used=free.f_blocks - free.f_bfree)
    return got


def test_a_full_disk_is_a_failed_write_that_takes_no_room(tmp_path):
    got = scenario.run(full_disk, tmp_path)
    if "skip" in got:
        pytest.skip(got["skip"])
    assert (got["error"], got["child_type"]) == ("SnapshotFailedError", "OSError")
    assert "No space left" in got["message"]
    assert (got["content"], got["names"], got["used"]) == ("old", ["dump.db"], 1)


def rename_fails(path):
    gate = Gate()
    job = memsafe.fork_snapshot(path, gated(gate))
    os.unlink(path)
    os.mkdir(path)
    gate.open()
    got = outcome(job)
    gate.close()
    return got


def test_a_path_that_became_a_folder_meanwhile_is_a_failure_with_its_cause(path):
    got = scenario.run(rename_fails, path)
    assert got["error"] == "SnapshotFailedError"
    assert "Is a directory" in got["message"]
    assert os.listdir(path) == []
    assert temporaries(path) == []


def junk_on_the_pipe(path):
    from memsafe.snapshot import reports

    def junk(self, *args):
        os.write(self._fd, b"junk" * 100)
        Gate().wait()

    reports.Reporter.done = junk
    got = outcome(memsafe.fork_snapshot(path, hello))
    del reports.Reporter.done
    return got


def test_a_child_that_talks_nonsense_is_ended(path):
    got = scenario.run(junk_on_the_pipe, path)
    assert got["error"] == "SnapshotFailedError"
    assert "came from the child" in got["message"]
    assert path.read_bytes() == b"old"


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


def headroom_gone(path, folder):
    app = FakeKernel(folder).cgroup("/app", limit=1024 * MIB, usage=512 * MIB).join()
    gate = Gate()
    job = memsafe.fork_snapshot(path, gated(gate), root=folder)
    app.usage = 1020 * MIB
    got = outcome(job)
    gate.close()
    return got


def test_the_child_is_ended_before_the_parents_last_headroom_is_gone(path, tmp_path):
    got = scenario.run(headroom_gone, path, tmp_path / "machine")
    assert got["error"] == "SnapshotOverrunError"
    assert got["max_copy_bytes"] is None
    assert "4 MiB are left below memory.max of /app (1 GiB)" in got["message"]
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
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_is_done(path, keywords, error):
    with pytest.raises(error):
        memsafe.fork_snapshot(path, hello, **keywords)
    with pytest.raises(TypeError, match="callable"):
        memsafe.fork_snapshot(path, None)


# Who else lives in the parent.


def sigchld_ignored(path):
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    good = outcome(memsafe.fork_snapshot(path, hello))
    bad = outcome(memsafe.fork_snapshot(path, lambda out: os._exit(0)))
    return {"good": good, "bad": bad, "content": content(path)}


def test_a_parent_that_ignores_sigchld_still_tells_success_from_failure(path):
    got = scenario.run(sigchld_ignored, path)
    assert got["good"]["result"]["size_bytes"] == 3
    assert got["bad"]["error"] == "SnapshotFailedError"
    assert got["content"] == "new"


def reaped_by_another(path):
    outcomes = {"good": [], "bad": []}
    statuses = []
    for _ in range(10):
        for name, write in (("good", hello), ("bad", lambda out: os._exit(0))):
            gate = Gate()

            def gated_write(out, gate=gate, write=write):
                gate.wait()
                write(out)

            job = memsafe.fork_snapshot(path, gated_write)
            reaper = threading.Thread(target=lambda: statuses.append(_wait_for_any()))
            reaper.start()
            gate.open()
            outcomes[name].append(next(iter(outcome(job))))
            reaper.join()
            gate.close()
    return {**{name: sorted(set(kinds)) for name, kinds in outcomes.items()}, "reaped": statuses.count(True)}


def _wait_for_any():
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        return False
    return True


def test_a_child_reaped_by_somebody_elses_wait_is_judged_by_what_it_said(path):
    got = scenario.run(reaped_by_another, path)
    assert (got["good"], got["bad"]) == (["result"], ["error"])


def killed_parent(path, pipe_fd):
    def write(out):
        out.write(b"new")
        out.flush()
        os.write(pipe_fd, b"%d\n" % os.getpid())
        Gate().wait()

    threading.Thread(target=lambda: memsafe.fork_snapshot(path, write)).start()
    Gate().wait()


def finishing_parent(path, pipe_fd):
    written = Gate()

    def write(out):
        out.write(b"new")
        os.write(pipe_fd, b"%d\n" % os.getpid())
        written.open()
        Gate().wait()

    # Exit functions run in reverse order: this one sees what ours has done.
    atexit.register(lambda: os.write(pipe_fd, type(job._run.future.exception(0)).__name__.encode()))
    job = memsafe.fork_snapshot(path, write)
    written.wait()
    sys.exit()


@pytest.mark.parametrize("body", [killed_parent, finishing_parent])
def test_the_child_ends_with_its_parent_and_leaves_no_file(path, body):
    read_fd, write_fd = os.pipe()
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen(
        scenario.command(body, str(path), write_fd), pass_fds=[write_fd], env=env, stdout=subprocess.DEVNULL
    )
    try:
        os.close(write_fd)
        child_pid = int(os.read(read_fd, 32))
        child = os.pidfd_open(child_pid)
        if body is killed_parent:
            parent.kill()
        else:
            assert parent.wait(PATIENCE_S) == 0
            assert os.read(read_fd, 64) == b"SnapshotCancelledError"
        assert select.select([child], [], [], PATIENCE_S)[0], "the child outlived its parent"
        os.close(child)
    finally:
        parent.kill()
        parent.wait()
        os.close(read_fd)
    assert path.read_bytes() == b"old"
    assert temporaries(path) == []


def undumpable():
    """As in a daemon that was started by root and changed its user: its /proc/<pid> belongs to root."""
    if os.geteuid():
        return {"skip": "only root can change its user"}
    folder = tempfile.mkdtemp()
    os.chown(folder, NOBODY, NOBODY)
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    path = folder + "/dump.db"
    got = {"free": outcome(memsafe.fork_snapshot(path, hello)), "bounded": _bounded(path), "content": content(path)}
    os.unlink(path)
    os.rmdir(folder)
    return got


def _bounded(path):
    gate = Gate()
    got = outcome(memsafe.fork_snapshot(path, gated(gate), max_copy="1 GiB"))
    gate.close()
    return got


def test_after_a_change_of_user_what_cannot_be_done_is_told():
    got = scenario.run(undumpable)
    if "skip" in got:
        pytest.skip(got["skip"])
    assert "result" in got["free"]
    assert "OOM killer" in " ".join(got["free"]["result"]["warnings"])
    assert got["bounded"]["error"] == "SnapshotFailedError"
    assert "max_copy cannot be kept" in got["bounded"]["message"]
    assert got["content"] == "new"


def used_in_another_child(path):
    gate = Gate()
    job = memsafe.fork_snapshot(path, gated(gate))
    pid = os.fork()
    if pid == 0:
        try:
            job.wait(PATIENCE_S)
        except RuntimeError:
            memsafe.fork_snapshot(path + ".2", hello).wait(PATIENCE_S)
            os._exit(5)
        os._exit(6)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    gate.open()
    got = outcome(job)
    gate.close()
    return {**got, "status": status, "other": content(path + ".2")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_has_a_slot_of_its_own_and_no_claim_on_the_parents_job(path):
    got = scenario.run(used_in_another_child, path)
    assert (got["status"], got["other"]) == (5, "new")
    assert got["result"]["size_bytes"] == 3


def interrupted(path):
    """Ctrl-C while fork is under way: the handler runs when the call returns, before its job is stored."""
    gate = Gate()
    # Not os.kill, which would run the handler itself.
    os.register_at_fork(after_in_parent=functools.partial(ctypes.CDLL(None).kill, os.getpid(), signal.SIGINT))
    try:
        memsafe.fork_snapshot(path, gated(gate))
        return {"raised": False}
    except KeyboardInterrupt:
        pass
    for thread in threading.enumerate():
        if thread.name == "memsafe-snapshot":
            thread.join(PATIENCE_S)
    gate.close()
    return {"raised": True}


def test_an_interrupt_during_the_fork_leaves_no_child_behind(path):
    got = scenario.run(interrupted, path)
    assert got["raised"]
    assert path.read_bytes() == b"old"


def descriptors_exhausted(path):
    """Allow one descriptor more each time, until it succeeds."""
    outcomes = []
    gate = Gate()  # a child that is not ended waits for ever
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    base = max(map(int, os.listdir("/proc/self/fd")))
    for spare in range(40):
        resource.setrlimit(resource.RLIMIT_NOFILE, (base + spare, hard))
        try:
            job = memsafe.fork_snapshot(path, gated(gate))
        except (OSError, memsafe.SnapshotRefusedError) as error:
            outcomes.append(type(error).__name__)
            continue
        gate.open()
        outcomes.append(next(iter(outcome(job))))
        if outcomes[-1] == "result":
            break
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    gate.close()
    return {"outcomes": outcomes, "content": content(path)}


def test_running_out_of_descriptors_at_any_point_harms_nothing(path):
    got = scenario.run(descriptors_exhausted, path)
    assert got["outcomes"][-1] == "result"
    assert len(got["outcomes"]) > 3
    assert "KernelError" in got["outcomes"]
    assert got["content"] == "new"
    assert temporaries(path) == []


def repeated(path, rounds):
    busy = threading.Event()

    def spin():
        while not busy.is_set():
            logging.getLogger("busy").error("x")
            [object() for _ in range(100)]

    logging.basicConfig(filename=os.devnull)
    threads = [threading.Thread(target=spin) for _ in range(2)]
    for thread in threads:
        thread.start()
    results = [next(iter(outcome(memsafe.fork_snapshot(path, hello)))) for _ in range(rounds)]
    busy.set()
    for thread in threads:
        thread.join()
    logging.shutdown()
    return {"kinds": sorted(set(results))}


def test_many_snapshots_beside_busy_threads_leave_nothing_behind(path):
    assert scenario.run(repeated, path, 50)["kinds"] == ["result"]


# The OOM killer.


def oom_killed(path, folder, limit_file):
    Path(folder, "cgroup.procs").write_text(str(os.getpid()))
    Path(folder, limit_file).write_text(str(64 * MIB))
    pids = []
    ended = Gate()

    def write(out):
        out.write(b"%d" % os.getpid())
        out.progress(os.getpid(), os.getpid())
        ended.wait()
        mmap.mmap(-1, 256 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).write(b"x" * 256 * MIB)

    def on_progress(pid, _):
        # While the callback lasts nothing is measured, so that the OOM killer comes before our own bound.
        child = os.pidfd_open(pid)
        ended.open()
        pids.append(bool(select.select([child], [], [], PATIENCE_S)[0]))
        os.close(child)

    got = outcome(memsafe.fork_snapshot(path, write, on_progress=on_progress))
    ended.close()
    return {**got, "ended": pids, "alive": os.getpid()}


def killed_while_counter(path, folder, signal_number, oom_kills):
    kernel = FakeKernel(folder)
    kernel.cgroup("/app", limit=1024 * MIB, oom_kills=3)
    database = kernel.cgroup("/app/db", limit=1024 * MIB, usage=512 * MIB, oom_kills=1).join()

    def write(out):
        database.oom_kills = oom_kills
        os.kill(os.getpid(), signal_number)

    return outcome(memsafe.fork_snapshot(path, write, root=folder))


@pytest.mark.parametrize(
    ("signal_number", "oom_kills", "error"),
    [
        (signal.SIGKILL, 2, "OOMKilledError"),
        (signal.SIGKILL, 1, "SnapshotFailedError"),
        (signal.SIGTERM, 2, "SnapshotFailedError"),
    ],
)
def test_the_oom_killer_is_named_only_for_sigkill_with_a_counter_that_rose(
    path, tmp_path, signal_number, oom_kills, error
):
    got = scenario.run(killed_while_counter, path, tmp_path / "machine", signal_number, oom_kills)
    assert got["error"] == error
    assert ("(oom_kill of /app/db, /app rose)" in got["message"]) == (error == "OOMKilledError")


@pytest.mark.cgroup
def test_a_child_shot_by_the_oom_killer_is_told_and_the_parent_lives(path):
    own = memory_cgroups()
    if not own:
        pytest.skip("no memory cgroup holds this process")
    if own[0].version == 2 and "memory" not in Path(own[0].file("cgroup.subtree_control")).read_text().split():
        pytest.skip(f"cgroup {own[0].path} gives its children no memory controller")
    limit_file = "memory.max" if own[0].version == 2 else "memory.limit_in_bytes"
    folder = Path(own[0].directory, f"memsafe-test-{os.getpid()}")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup may be made: {error}")
    try:
        got = scenario.run(oom_killed, path, folder, limit_file)
    finally:
        _remove_cgroup(folder)
    assert got["ended"] == [True]
    assert got["error"] == "OOMKilledError"
    assert "oom_kill" in got["message"]
    assert path.read_bytes() == b"old"


def _remove_cgroup(folder):
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)  # the last process is being taken apart
        else:
            return


def without_room_for_a_thread(path):
    soft_and_hard = resource.getrlimit(resource.RLIMIT_DATA)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            used_bytes = int(line.split()[1]) * 1024
    memsafe.assess_fork()  # what it imports and caches is there before the limit is
    resource.setrlimit(resource.RLIMIT_DATA, (used_bytes + (5 << 20), soft_and_hard[1]))
    try:
        memsafe.fork_snapshot(path, hello)
    except memsafe.KernelError as error:
        refused = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, soft_and_hard)
    return {"refused": refused, **outcome(memsafe.fork_snapshot(path, hello))}


def test_where_no_thread_can_be_started_nothing_is_done_and_the_next_one_works(path):
    got = scenario.run(without_room_for_a_thread, path)
    assert "pthread_create" in got["refused"]
    assert got["result"]["size_bytes"] > 0


def with_a_folder_that_cannot_be_synced(path):
    real = os.fsync

    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    os.fsync = fsync
    return {**outcome(memsafe.fork_snapshot(path, hello)), "content": content(path)}


def test_where_the_folder_cannot_be_synced_it_says_that_the_new_file_is_there(path):
    path.write_text("old")
    got = scenario.run(with_a_folder_that_cannot_be_synced, path)
    assert got["error"] == "SnapshotFailedError"
    assert "may not survive a power cut" in got["message"]
    assert got["content"] == "new"
