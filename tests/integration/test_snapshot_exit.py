"""An interpreter that exits while a snapshot runs, or is about to: it ends in time, without a word, and leaves nothing.

Exit functions are called in the opposite order of their registration; memsafe's come when the first snapshot is taken
and when a schedule is started.
"""

import atexit
import os
import select
import signal
import sys
import threading
from pathlib import Path

import pytest

import memsafe
from tests.integration import scenario
from tests.integration.snapshots import PATIENCE_S, Gate, gated, hello, outcome, temporaries, without_tmpfile

STATUS = 3


def exits(body, path, *args):
    """Run *body*, which exits; nothing may be left, nor said."""
    got = scenario.run(body, path, *args, returncode=STATUS)
    assert got["stderr"] == ""
    for pid in map(int, got["stdout"].split()):
        assert not os.path.exists(f"/proc/{pid}")
    assert temporaries(path) == []
    assert path.read_bytes() == b"old"


def hanging(begun):
    def write(out):
        out.write(b"new")
        os.write(1, b"%d\n" % os.getpid())
        begun.open()
        Gate().wait()

    return write


def schedule_of(path, write, **keywords):
    schedule = memsafe.SnapshotSchedule(path, write, after_changes=1, retry_s=1e-3, retry_max_s=1e-3, **keywords)
    schedule.note_changes()
    return schedule


def running(path, order, named):
    """Exit while a snapshot runs, whoever has registered his exit function first."""
    if named:
        without_tmpfile()
    begun = Gate()
    if order == "snapshot first":
        memsafe.fork_snapshot(path, hanging(begun))
        begun.wait()
    if order != "snapshot alone":
        schedule_of(path, hanging(begun)).start()
    else:
        memsafe.fork_snapshot(path, hanging(begun))
    if order != "snapshot first":
        begun.wait()
    raise SystemExit(STATUS)


@pytest.mark.parametrize("named", [False, True], ids=["nameless", "named"])
@pytest.mark.parametrize("order", ["snapshot first", "schedule first", "snapshot alone"])
def test_a_snapshot_that_runs_is_ended_and_taken_back(path, order, named):
    exits(running, path, order, named)


def next_one(path):
    """Give a schedule time between the exit functions: what was ended must not be followed by another one."""
    begun, taken = Gate(), []

    def take(*args, **keywords):
        taken.append(memsafe.fork_snapshot(*args, **keywords))
        return taken[-1]

    def in_between():
        if taken[0].done():  # it was ended before the schedule was told
            begun.wait()

    schedule = schedule_of(path, hanging(begun), take=take)
    schedule.start()
    atexit.register(in_between)
    begun.wait()
    raise SystemExit(STATUS)


def test_a_schedule_is_told_before_its_snapshot_is_ended(path):
    exits(next_one, path)


class OpenedAtExit:
    """A lock that a schedule's thread gets when the exit has begun."""

    def __init__(self):
        self.asked, self.given = threading.Event(), threading.Event()
        atexit.register(self.given.set)

    def __enter__(self):
        self.asked.set()
        self.given.wait()

    def __exit__(self, *_):
        pass


def beginning(path):
    without_tmpfile()
    begun = Gate()
    schedule = schedule_of(path, hanging(begun), lock=(lock := OpenedAtExit()))
    atexit.unregister(lock.given.set)
    schedule.start()
    atexit.register(lock.given.set)  # called first
    lock.asked.wait()
    raise SystemExit(STATUS)


def test_a_snapshot_that_a_schedule_is_just_beginning_is_ended_too(path):
    exits(beginning, path)


def too_late(path, when):
    """A thread of the user's asks for a snapshot when memsafe's exit function is done, or has it half begun then."""
    from memsafe.snapshot import fork

    asked, released, said = threading.Event(), threading.Event(), []
    half, name = (fork, "assess") if when == "assessed" else (fork, "Supervisor")
    real = getattr(fork, name)

    def wait_there(*args, **keywords):
        asked.set()
        released.wait()
        return real(*args, **keywords)

    def ask():
        if when == "not begun":
            asked.set()
            released.wait()
        try:
            said.append(memsafe.fork_snapshot(path, hello))
        except RuntimeError as error:
            said.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)

    def afterwards():
        released.set()
        thread.join(PATIENCE_S)
        if "is exiting" not in str(said):
            print(said, file=sys.stderr)

    atexit.register(afterwards)
    memsafe.fork_snapshot(path + ".first", hello).wait(PATIENCE_S)
    if when != "not begun":
        setattr(half, name, wait_there)
    thread.start()
    asked.wait()
    raise SystemExit(STATUS)


@pytest.mark.parametrize("when", ["not begun", "assessed", "supervised"])
def test_a_thread_that_ends_with_the_interpreter_can_begin_none(path, when):
    exits(too_late, path, when)


def the_last_one(path, who):
    """Take one when the main thread has ended: in an exit function, or a thread for which the exit waits."""

    def take():
        if who == "thread":
            threading.main_thread().join(PATIENCE_S)
        try:
            print(outcome(memsafe.fork_snapshot(path, hello))["result"]["size_bytes"])
        except RuntimeError as error:
            print(error)

    memsafe.fork_snapshot(path + ".first", hello).wait(PATIENCE_S)
    if who == "exit function":
        atexit.register(take)
    else:
        threading.Thread(target=take).start()
    raise SystemExit(STATUS)


@pytest.mark.parametrize("who", ["exit function", "thread"])
def test_when_the_main_thread_has_ended_one_is_taken_or_cpython_s_reason_given(path, who):
    got = scenario.run(the_last_one, path, who, returncode=STATUS)
    assert got["stderr"] == ""
    if sys.version_info < (3, 12) or path.read_bytes() == b"new":
        assert (got["stdout"], path.read_bytes()) == ("3\n", b"new")
    else:  # from some moment on it starts no thread any more, which differs from version to version
        assert "is exiting" in got["stdout"]


def forked_copy(path):
    """Exit in a forked child whose copy of the schedule's event is locked for ever."""
    gate = Gate()
    schedule = schedule_of(path, gated(gate))
    schedule.start()
    schedule._stopped._cond.acquire()  # as another thread may, at the fork
    pid = os.fork()
    if not pid:
        raise SystemExit(0)
    schedule._stopped._cond.release()
    pidfd = os.pidfd_open(pid)
    ended = bool(select.select([pidfd], [], [], PATIENCE_S)[0])
    if not ended:
        os.kill(pid, signal.SIGKILL)
    os.close(pidfd)
    status = os.waitpid(pid, 0)[1]
    gate.open()
    schedule.close()
    gate.close()
    return {"ended": ended, "status": status}


def test_a_forked_child_exits_whatever_its_copy_of_a_schedule_waits_for(path):
    got = scenario.run(forked_copy, path)
    assert (got["ended"], got["status"]) == (True, 0)
    assert Path(path).read_bytes() == b"new"
