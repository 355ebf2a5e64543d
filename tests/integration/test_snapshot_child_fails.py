"""What goes wrong in a snapshot's child: at the path the old file stays, and the parent is told what happened."""

import ctypes
import mmap
import os
import resource
import select
import signal
import sys
from pathlib import Path

import pytest

import memsafe
from memsafe.testing import FakeKernel
from tests.integration import scenario
from tests.integration.copies import keep_sentries_out
from tests.integration.snapshots import MIB, PATIENCE_S, Gate, hello, outcome, temporaries


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


def write_returns_a_coroutine(path):
    async def later(out):
        out.write(b"new")

    return outcome(memsafe.fork_snapshot(path, lambda out: later(out)))


def write_returns_a_generator(path):
    return outcome(memsafe.fork_snapshot(path, lambda out: (out.write(part) for part in [b"new"])))


def write_returns_an_async_generator(path):
    async def later(out):
        yield out.write(b"new")

    return outcome(memsafe.fork_snapshot(path, lambda out: later(out)))


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
        (write_returns_a_coroutine, ["TypeError", "returned <coroutine"]),
        (write_returns_a_generator, ["TypeError", "returned <generator"]),
        (write_returns_an_async_generator, ["TypeError", "returned <async_generator"]),
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
    assert "never awaited" not in got["stderr"]
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
        os.fsync(out.raw.fileno())
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

    keep_sentries_out()
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
