"""A hypothesis state machine over real forks: whatever its owner, its child and its bounds do, in whatever order."""

import os
import resource
import shutil
import signal
import struct
import tempfile
import threading

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import memsafe
from tests.integration import scenario
from tests.integration.snapshots import PATIENCE_S, content, temporaries, unexpected

ORDER = struct.Struct("=ci")
ENDS = {
    # What the child is told to do: what wait() raises, and what its message has in it.
    b"R": "ValueError: told to",
    b"E": "SystemExit",
    b"0": "exited with status 0",
    b"1": "exited with status 1",
    b"S": "SIGSEGV",
    b"K": "SIGKILL",
}


class Child:
    """`write`, which does what it is told over one pipe, and answers over another."""

    def __init__(self):
        self.orders, self.answers = os.pipe(), os.pipe()
        self.kept = (self.orders[0], self.answers[1])

    def __call__(self, out):
        while True:
            order, number = ORDER.unpack(os.read(self.orders[0], ORDER.size))
            match order:
                case b"w":
                    out.write(b"x" * number)
                case b"f":
                    out.flush()
                case b"p":
                    out.progress(number, 1000)
                case b"F":
                    return
                case b"R":
                    raise ValueError("told to")
                case b"E":
                    raise SystemExit(0)
                case b"0" | b"1":
                    os._exit(int(order))
                case b"S" | b"K":
                    os.kill(os.getpid(), signal.SIGSEGV if order == b"S" else signal.SIGKILL)
            os.write(self.answers[1], struct.pack("=i", os.getpid()))

    def tell(self, order, number=0):
        os.write(self.orders[1], ORDER.pack(order, number))

    def ask(self, order, number=0):
        """Tell, and return the child's pid when it has done it."""
        self.tell(order, number)
        return struct.unpack("=i", os.read(self.answers[0], 4))[0]

    def close(self):
        for fd in (*self.orders, *self.answers):
            os.close(fd)


def running(machine):
    return machine.job is not None


def idle(machine):
    return machine.job is None


class Life(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.folder = tempfile.mkdtemp()
        self.path = os.path.join(self.folder, "dump.db")
        self.image = "old"
        with open(self.path, "w") as file:
            file.write(self.image)
        self.job = self.child = None
        self.written = ""
        self.reported = None

    def teardown(self):
        if self.job is not None:
            self.cancel()
        shutil.rmtree(self.folder)

    def ended(self):
        """The job is over: nothing of it is left."""
        for thread in threading.enumerate():
            if thread is not threading.main_thread():
                thread.join(PATIENCE_S)
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        self.child.close()
        assert scenario.opened_since(self.before) == []
        assert self.job.done()
        assert not self.job.cancel()
        self.job = self.child = None

    def fails(self, state, words):
        with pytest.raises(memsafe.SnapshotFailedError, match=words) as first:
            self.job.wait(PATIENCE_S)
        with pytest.raises(memsafe.SnapshotFailedError) as second:
            self.job.wait(0)
        assert first.value is second.value
        assert self.job.state.value == state
        self.ended()

    # It begins.

    def fork(self, **keywords):
        self.before = scenario.open_files()
        self.child = Child()
        self.written, self.reported = "", None
        self.job = memsafe.fork_snapshot(self.path, self.child, keep_fds=self.child.kept, **keywords)

    @precondition(idle)
    @rule()
    def start(self):
        self.fork()

    @precondition(idle)
    @rule()
    def start_what_hangs(self):
        self.fork(timeout_s=0.02)
        self.fails("failed", "still running after")

    @precondition(idle)
    @rule()
    def start_what_copies_too_much(self):
        self.fork(max_copy=1)
        self.fails("overrun", "max_copy")

    # It goes on.

    @precondition(running)
    @rule(size=st.sampled_from([0, 1, 5000, 300_000]))
    def write(self, size):
        self.child.ask(b"w", size)
        self.written += "x" * size

    @precondition(running)
    @rule()
    def flush(self):
        self.child.ask(b"f")

    @precondition(running)
    @rule(done=st.integers(0, 1000))
    def progress(self, done):
        self.child.ask(b"p", done)
        self.reported = done

    @precondition(running)
    @rule()
    def a_second_one(self):
        with pytest.raises(memsafe.SnapshotInProgressError):
            memsafe.fork_snapshot(self.path, lambda out: None)

    @precondition(running)
    @rule()
    def wait_a_moment(self):
        with pytest.raises(TimeoutError, match="still running"):
            self.job.wait(0)

    @precondition(running)
    @rule()
    def fork_in_between(self):
        pid = os.fork()
        if pid == 0:
            try:
                self.job.wait(PATIENCE_S)
            except RuntimeError:
                os._exit(5)
            os._exit(6)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5

    # It ends.

    @precondition(running)
    @rule()
    def finish(self):
        self.child.tell(b"F")
        self.succeeds()

    def succeeds(self):
        result = self.job.wait(PATIENCE_S)
        assert (result.size_bytes, unexpected(result.warnings)) == (len(self.written), [])
        assert self.job.state is memsafe.SnapshotState.DONE
        assert self.reported is None or self.job.progress == (self.reported, 1000)
        self.image = self.written
        self.ended()

    @precondition(running)
    @rule(end=st.sampled_from(sorted(ENDS)))
    def the_child_ends(self, end):
        self.child.tell(end)
        self.fails("failed", ENDS[end])

    @precondition(running)
    @rule()
    def somebody_kills_it(self):
        os.kill(self.child.ask(b"f"), signal.SIGKILL)
        self.fails("failed", "SIGKILL")

    @precondition(running)
    @rule()
    def cancel(self):
        assert self.job.cancel()
        self.fails("cancelled", "cancelled")

    @precondition(running)
    @rule()
    def cancel_as_it_finishes(self):
        self.child.tell(b"F")
        if self.job.cancel():
            self.fails("cancelled", "cancelled")
        else:
            self.succeeds()

    @invariant()
    def the_file_is_the_last_image(self):
        assert content(self.path) == self.image
        assert temporaries(self.path) == []

    @invariant()
    def a_job_runs_until_somebody_ends_it(self):
        assert self.job is None or not self.job.done()


def lives(examples, steps):
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    how = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Life, settings=how)


def test_any_life_ends_with_one_outcome_and_the_old_or_the_new_file():
    scenario.run(lives, 20, 15)
