"""What the parent's half of a snapshot cannot get, or loses: the old file or the new one, and nothing is left."""

import contextlib
import errno
import os
import pkgutil
import resource
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path

import pytest

import memsafe
from memsafe.snapshot import supervisor
from tests import snapshot_faults
from tests.integration import scenario
from tests.integration.snapshots import (
    Gate,
    content,
    gated,
    hello,
    let_the_thread_end,
    outcome,
    temporaries,
)

# What it cannot get.


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


class ThreadOfASubinterpreter:
    def start(self):
        raise RuntimeError("daemon thread are not supported in this interpreter")


def test_where_the_interpreter_starts_no_such_thread_its_own_words_say_why():
    with pytest.raises(RuntimeError, match="daemon thread"):
        supervisor._start(ThreadOfASubinterpreter())


# What its own thread meets.


def committed_then_out_of_memory(path, names):
    """Let the job's thread fail after the rename, and then in each of *names* that comes after."""
    from memsafe.snapshot.atomic import AtomicFile
    from memsafe.snapshot.supervisor import Supervisor

    threading.excepthook = lambda failed: None
    commit = AtomicFile.commit

    def fails(*_):
        raise MemoryError

    def committed(file):
        commit(file)
        fails()

    AtomicFile.commit = committed
    for name in names:
        setattr(Supervisor, name, fails)
    return {**outcome(memsafe.fork_snapshot(path, hello)), "content": content(path)}


@pytest.mark.parametrize("names", [[], ["_after"]], ids=["once", "twice"])
def test_whatever_fails_after_the_rename_it_is_said_that_the_new_file_is_there(path, names):
    got = scenario.run(committed_then_out_of_memory, path, names)
    assert got["error"] == "SnapshotFailedError"
    assert f"the new image is at {path}" in got["message"]
    assert "as it was" not in got["message"]
    assert got["content"] == "new"


def thread_fails_around_the_fork(path, when):
    """Let the job's thread run out of memory while the caller's is on its way to the fork, or right after that."""
    from memsafe.snapshot import supervisor

    own_oom_score_adj, prepared = supervisor._own_oom_score_adj, Gate()

    def fails(self):
        prepared.wait()
        if when == "after":
            self._fork_returned.wait()
        raise MemoryError

    def on_the_way():
        prepared.open()
        if when == "before":
            let_the_thread_end()
        return own_oom_score_adj()

    real = supervisor.Supervisor._wait_for_fork
    supervisor.Supervisor._wait_for_fork, supervisor._own_oom_score_adj = fails, on_the_way
    gate = Gate()  # a child that nobody ends waits for ever
    try:
        got = outcome(memsafe.fork_snapshot(path, gated(gate)))
    except MemoryError:
        got = {"error": "MemoryError"}
    supervisor.Supervisor._wait_for_fork, supervisor._own_oom_score_adj = real, own_oom_score_adj
    gate.close()
    prepared.close()
    return {**got, "next": outcome(memsafe.fork_snapshot(path, hello))}


@pytest.mark.parametrize(("when", "error"), [("before", "MemoryError"), ("after", "SnapshotFailedError")])
def test_where_the_jobs_thread_fails_around_the_fork_there_is_no_child_that_nobody_watches(path, when, error):
    got = scenario.run(thread_fails_around_the_fork, path, when)
    assert got["error"] == error
    assert got["next"]["result"]["size_bytes"] == 3


def out_of_memory_in_the_thread(path, owner, name, write):
    """Let a step of the job's thread fail where it should not, then take another snapshot."""
    failures = []
    threading.excepthook = lambda failed: failures.append(failed.exc_type.__name__)
    owner = pkgutil.resolve_name(owner)
    real = getattr(owner, name)

    def fails(*_, **__):
        raise MemoryError

    setattr(owner, name, fails)
    try:
        got = outcome(memsafe.fork_snapshot(path, globals()[write]))
    except MemoryError:
        got = {"error": "MemoryError"}
    setattr(owner, name, real)
    let_the_thread_end()
    return {**got, "failures": failures, "next": outcome(memsafe.fork_snapshot(path, hello))}


def breaks(_):
    raise ValueError


SUPERVISOR = "memsafe.snapshot.supervisor"


@pytest.mark.parametrize(
    ("owner", "name", "write", "outcome_now"),
    [
        (SUPERVISOR, "ExitStack", "hello", "MemoryError"),
        (f"{SUPERVISOR}:Supervisor", "_after", "breaks", "SnapshotFailedError"),
        (f"{SUPERVISOR}:shorter_turns", "release", "hello", "result"),
        ("memsafe.snapshot.fork:_Claim", "saw", "hello", "result"),
    ],
)
def test_a_failure_of_the_jobs_own_thread_leaves_nobody_waiting(path, owner, name, write, outcome_now):
    got = scenario.run(out_of_memory_in_the_thread, path, owner, name, write)
    assert outcome_now in (got.get("error"), *got)
    assert got["failures"] == ["MemoryError"]
    assert got["next"]["result"]["size_bytes"] == 3


# What a sandbox refuses.


def unkillable(path):
    """The child has become another user's, whom this process may not signal."""
    refused = []

    def refuse(fd, signo):
        refused.append(signo)
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    signal.pidfd_send_signal = refuse
    gate = Gate()
    job = memsafe.fork_snapshot(path, gated(gate))
    job.cancel()
    got = outcome(job)
    gate.close()
    return {**got, "refused": len(refused)}


def test_a_child_that_may_not_be_signalled_is_ended_by_its_guard(path):
    got = scenario.run(unkillable, path)
    assert got["error"] == "SnapshotCancelledError"
    assert got["refused"] >= 1
    assert path.read_bytes() == b"old"


# What strangers close.


def all_closed_at_once(path, strangers):
    """Close all descriptors as a program does that becomes a daemon, and put *strangers* in their place."""
    job = memsafe.fork_snapshot(path, gated(Gate()))
    return {**closed(strangers, range(3, 200), job), "content": content(path)}


def closed_while_it_is_watched(path, what, strangers):
    """Close the job's own descriptors that are called *what* in /proc, once the child is watched."""
    heard, gate = threading.Event(), Gate()

    def write(out):
        out.progress(1, 2)
        gate.wait()

    before = scenario.open_files()
    job = memsafe.fork_snapshot(path, write, on_progress=lambda done, total: heard.set())
    heard.wait()
    mine = [fd for fd, target in scenario.open_files().items() if fd not in before and what in target]
    assert mine
    return {**closed(strangers, mine, job), "content": content(path)}


def closed(strangers, fds, job):
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
    quiet = socket.socketpair()  # nothing is ever ready on it
    stranger = {"none": -1, "files": os.memfd_create("stranger"), "sockets": quiet[0].fileno()}[strangers]
    taken = [] if stranger < 0 else [fd for fd in fds[:40] if fd not in (stranger, quiet[1].fileno())]
    for fd in taken:
        os.dup2(stranger, fd)
    inodes = [os.fstat(fd).st_ino for fd in taken]
    got = outcome(job)
    let_the_thread_end()
    intact = [os.fstat(fd).st_ino for fd in taken] == inodes
    os.closerange(3, 250)
    return {**got, "intact": intact}


STRANGERS = ["none", "files", "sockets"]


@pytest.mark.parametrize("strangers", STRANGERS)
def test_where_all_descriptors_are_closed_the_job_fails_and_closes_nobody_elses(path, strangers):
    got = scenario.run(all_closed_at_once, path, strangers)
    assert got["error"] == "SnapshotFailedError"
    assert "closed descriptors" in got["message"]
    assert (got["intact"], got["content"]) == (True, "old")


@pytest.mark.parametrize("strangers", STRANGERS)
@pytest.mark.parametrize("what", ["[pidfd]", "[eventfd]", "pipe:"])
def test_where_one_that_is_watched_is_closed_the_child_is_ended_and_the_job_fails(path, what, strangers):
    got = scenario.run(closed_while_it_is_watched, path, what, strangers)
    assert got["error"] == "SnapshotFailedError"
    assert "closed descriptors" in got["message"]
    assert (got["intact"], got["content"]) == (True, "old")


def image_closed(path):
    """Put another file in the place of the image while it is written."""
    gate = Gate()
    job = memsafe.fork_snapshot(path, gated(gate))
    (image,) = (fd for fd, target in scenario.open_files().items() if target.startswith(f"{os.path.dirname(path)}/"))
    other = os.memfd_create("stranger")
    os.dup2(other, image)
    gate.open()
    got = outcome(job)
    let_the_thread_end()
    intact = os.path.sameopenfile(other, image)
    os.closerange(3, 250)
    return {**got, "intact": intact, "content": content(path)}


def test_another_file_in_the_place_of_the_image_is_never_put_at_the_path(path):
    got = scenario.run(image_closed, path)
    assert got["error"] == "SnapshotFailedError"
    assert "has closed the new file" in got["message"]
    assert (got["intact"], got["content"]) == (True, "old")


def without_waiting_by_pidfd(path):
    """As in a sandbox that knows pidfds, but not P_PIDFD."""

    def refuse(idtype, *_):
        assert idtype == os.P_PIDFD
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    os.waitid = refuse
    good = outcome(memsafe.fork_snapshot(path, hello))
    return {"good": good, "bad": outcome(memsafe.fork_snapshot(path, lambda out: os._exit(0)))}


def test_a_child_that_cannot_be_waited_for_by_pidfd_is_reaped_all_the_same(path):
    got = scenario.run(without_waiting_by_pidfd, path)
    assert got["good"]["result"]["size_bytes"] == 3
    assert got["bad"]["error"] == "SnapshotFailedError"


# Every system call.


@pytest.fixture(scope="module")
def tracer(tmp_path_factory):
    if os.uname().machine != "x86_64":
        pytest.skip("tests/native/syscall_faults.c knows the registers of x86-64 alone")
    if shutil.which(snapshot_faults.COMPILER) is None:
        pytest.skip(f"no C compiler: {snapshot_faults.COMPILER}")
    program = snapshot_faults.build(tmp_path_factory.mktemp("tracer"))
    done = subprocess.run([program, "true"], capture_output=True, text=True)
    if "not permitted" in done.stderr:
        pytest.skip(f"no tracing of children here: {done.stderr}")
    return program


@pytest.mark.parametrize("fault", snapshot_faults.QUICK, ids=str)
def test_whichever_system_call_fails_it_is_the_old_file_or_the_new_one_and_nothing_is_left(tracer, tmp_path, fault):
    reports = snapshot_faults.run(tracer, tmp_path, fault)
    assert [report for report in reports if report["problems"]] == []
    failed = [report for report in reports if report["number"] >= 0]
    assert len(failed) >= 10
    names = {snapshot_faults.call_names()[report["number"]] for report in failed}
    assert names >= ({"openat", "write"} if fault.where == "child" else {"waitid", "fsync", "close"}), names
