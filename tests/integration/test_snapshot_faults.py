"""Snapshots that go wrong: at the path there is the old file or the complete new one, and nothing else is left."""

import contextlib
import ctypes
import dis
import errno
import functools
import mmap
import os
import pkgutil
import resource
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

import memsafe
from memsafe.testing import FakeKernel
from tests import snapshot_faults
from tests.integration import scenario
from tests.integration.snapshots import MIB, PATIENCE_S, Gate, content, describe, gated, hello, outcome, temporaries

NOBODY = 65534


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
def test_a_child_shot_by_the_oom_killer_is_told_and_the_parent_lives(path, memory_group):
    got = scenario.run(oom_killed, path, *memory_group)
    assert got["ended"] == [True]
    assert got["error"] == "OOMKilledError"
    assert "oom_kill" in got["message"]
    assert path.read_bytes() == b"old"


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


def cancelled_then_junk(path):
    from memsafe.snapshot import reports

    jobs, begin, cancelled, written = [], Gate(), Gate(), Gate()
    fds = []
    real = reports.Reporter.__init__

    def init(self, fd):
        fds.append(fd)
        real(self, fd)

    reports.Reporter.__init__ = init

    def write(out):
        begin.wait()
        out.progress(1, 2)
        cancelled.wait()
        os.write(fds[0], b"junk" * 100)
        written.open()
        Gate().wait()

    def on_progress(done, total):
        jobs[0].cancel()
        cancelled.open()
        written.wait()

    jobs.append(memsafe.fork_snapshot(path, write, on_progress=on_progress))
    begin.open()
    got = outcome(jobs[0])
    for gate in (begin, cancelled, written):
        gate.close()
    return got


def test_what_was_cancelled_is_cancelled_whatever_goes_wrong_after(path):
    assert scenario.run(cancelled_then_junk, path)["error"] == "SnapshotCancelledError"


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
            _let_the_thread_end()
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
    for thread in threading.enumerate():
        if thread.name == "memsafe-snapshot":
            thread.join(PATIENCE_S)
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


# Who else is there.


def pid_reused(path):
    """The child is gone, and a stranger has its number, when the job's thread comes to end it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gate = Gate()
    jobs, strangers = [], []

    def write(out):
        gate.wait()
        out.progress(os.getpid(), 1)
        gate.wait()
        os._exit(0)

    def on_progress(pid, _):
        child = os.pidfd_open(pid)
        gate.open()
        select.select([child], [], [], PATIENCE_S)
        os.close(child)
        while strangers[-1:] != [pid]:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
            strangers.append(os.posix_spawn("/bin/sleep", ["sleep", "100"], {}))
        jobs[0].cancel()

    jobs.append(memsafe.fork_snapshot(path, write, on_progress=on_progress))
    gate.open()
    got = outcome(jobs[0])
    gate.close()
    stranger = os.pidfd_open(strangers[-1])
    lives = not select.select([stranger], [], [], 0)[0]
    os.close(stranger)
    for pid in strangers:
        os.kill(pid, signal.SIGKILL)
    for pid in strangers:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    return {**got, "lives": lives}


def test_a_stranger_who_got_the_childs_number_is_not_killed_in_its_place(path):
    if not os.path.exists("/proc/sys/kernel/ns_last_pid"):
        pytest.skip("this kernel was built without CONFIG_CHECKPOINT_RESTORE: no number can be chosen")
    prefix = ["unshare", *(["--user", "--map-root-user"] if os.geteuid() else []), "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no pid namespace may be made")
    got = scenario.run(pid_reused, path, prefix=prefix)
    assert got["error"] == "SnapshotCancelledError"
    assert got["lives"]


# Everything else that may come between.


def no_zombies_wanted(path):
    """SA_NOCLDWAIT: children end without becoming zombies, though SIGCHLD is heard."""
    libc = ctypes.CDLL(None, use_errno=True)
    action = ctypes.create_string_buffer(152)  # struct sigaction: the handler, the mask, the flags, the restorer
    assert libc.sigaction(signal.SIGCHLD, None, action) == 0
    no_cld_wait = 2
    ctypes.c_int.from_buffer(action, 8 + 128).value |= no_cld_wait
    assert libc.sigaction(signal.SIGCHLD, action, None) == 0
    good = outcome(memsafe.fork_snapshot(path, hello))
    bad = outcome(memsafe.fork_snapshot(path, lambda out: os._exit(0)))
    gate = Gate()
    job = memsafe.fork_snapshot(path, gated(gate))
    job.cancel()
    ended = outcome(job)
    gate.close()
    return {"good": good, "bad": bad, "ended": ended}


def test_where_children_are_reaped_by_the_kernel_their_outcomes_are_told_all_the_same(path):
    got = scenario.run(no_zombies_wanted, path)
    assert got["good"]["result"]["size_bytes"] == 3
    assert got["bad"]["error"] == "SnapshotFailedError"
    assert got["ended"]["error"] == "SnapshotCancelledError"


def storm(path, rounds):
    heard = []
    signal.signal(signal.SIGALRM, lambda *_: heard.append(os.getpid()))
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(os.getpid()))
    stop = threading.Event()
    main, own = threading.main_thread().ident, os.getpid()

    def keep_signalling():
        while not stop.wait(0.001):
            signal.pthread_kill(main, signal.SIGUSR1)

    def write(out):
        out.write(b"new")
        out.flush()
        out.write(b"" if set(heard) <= {own} else b"the parent's handler ran here")

    thread = threading.Thread(target=keep_signalling)
    thread.start()
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    outcomes = [outcome(memsafe.fork_snapshot(path, write)) for _ in range(rounds)]
    signal.setitimer(signal.ITIMER_REAL, 0)
    stop.set()
    thread.join()
    return {"sizes": [got.get("result", got).get("size_bytes", got) for got in outcomes], "heard": len(heard)}


def test_snapshots_go_on_in_a_storm_of_signals_and_none_of_them_reaches_a_child(path):
    got = scenario.run(storm, path, 40)
    assert set(got["sizes"]) == {3}
    assert got["heard"] > 40


def interrupted_everywhere(path, step):
    """Raise KeyboardInterrupt at the n-th bytecode of memsafe.snapshot in the calling thread, for every step-th n."""
    package = os.path.dirname(memsafe.snapshot.__file__)
    outcomes = []
    memsafe.fork_snapshot(path, hello).wait(PATIENCE_S)  # what is imported and cached is so before
    n = 0
    while outcomes[-1:] != ["done"]:
        n += step
        before = _open_files()
        outcomes.append(_interrupted_at(n, path, package))
        _let_the_thread_end()
        left = [target for fd, target in _open_files().items() if before.get(fd) != target]
        if left or temporaries(path) or content(path) not in ("old", "new"):
            return {"n": n, "left": left, "temporaries": temporaries(path), "content": content(path)}
        again = outcome(memsafe.fork_snapshot(path, hello))
        if "result" not in again:
            return {"n": n, "again": again}
        Path(path).write_text("old")
    return {"points": n, "outcomes": sorted(set(outcomes))}


def _interrupted_at(n, path, package):
    left, own = n, os.getpid()

    def count(frame, event, _):
        nonlocal left
        if os.getpid() != own or not frame.f_code.co_filename.startswith(package):
            return None
        frame.f_trace_opcodes = True
        # Signals are looked for after calls and at jumps back, never between a value and its return.
        if event == "opcode" and not dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN"):
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return count

    gate = Gate()  # a child that nobody ends waits for ever
    try:
        sys.settrace(count)
        try:
            job = memsafe.fork_snapshot(path, gated(gate))
        finally:
            sys.settrace(None)
        gate.open()
        job.wait(PATIENCE_S)
    except KeyboardInterrupt:
        return "interrupted"
    finally:
        gate.close()
    return "done"


def _let_the_thread_end():
    for thread in threading.enumerate():
        if thread.name == "memsafe-snapshot":
            thread.join(PATIENCE_S)


def _open_files():
    found = {}
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def test_an_interrupt_at_any_bytecode_leaves_no_child_file_or_descriptor_and_the_next_one_works(path):
    got = scenario.run(interrupted_everywhere, path, 7)
    assert got.get("outcomes") == ["done", "interrupted"], got
    assert got["points"] > 300
