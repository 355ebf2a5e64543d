"""A run and its job in any order of calls, beside a model that knows only: the first reason stays, one outcome."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memsafe.errors import SnapshotCancelledError, SnapshotFailedError, SnapshotOverrunError
from memsafe.snapshot.job import SnapshotJob, SnapshotResult, SnapshotRun, SnapshotState

RESULT = SnapshotResult("dump.db", 1, 0.1, 0.2, None, "by hand")
LIVE = ("preparing", "running")
ENDS = {"failed": SnapshotFailedError, "overrun": SnapshotOverrunError, "cancelled": SnapshotCancelledError}


def error_of(kind):
    if kind == "overrun":
        return SnapshotOverrunError("x", copy_bytes=2, max_copy_bytes=1)
    return ENDS[kind]("x")


class Life(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.woken = 0
        self.seen, self.heard = [], []
        self.run = SnapshotRun("dump.db", wake=self.wake, on_progress=lambda *report: self.seen.append(report))
        self.job = SnapshotJob(self.run)
        self.state, self.verdict, self.outcome = "preparing", None, None
        self.reported, self.copies = [], []

    def wake(self):
        assert self.run.state is SnapshotState.ENDING
        self.woken += 1

    # The engine.

    @precondition(lambda self: self.state in (*LIVE, "ending"))
    @rule()
    def begin(self):
        self.run.begin()
        if self.state == "preparing":
            self.state = "running"

    @precondition(lambda self: self.state == "running")
    @rule(done=st.integers(0, 9), total=st.integers(0, 9))
    def progress(self, done, total):
        self.run.report_progress(done, total)
        self.reported.append((done, total))

    @precondition(lambda self: self.state == "running")
    @rule(copy_bytes=st.integers(0, 99))
    def copy(self, copy_bytes):
        self.run.report_copies(copy_bytes)
        self.copies.append(copy_bytes)

    @precondition(lambda self: self.outcome is None)
    @rule(kind=st.sampled_from(["failed", "overrun"]))
    def end(self, kind):
        self.run.end(error_of(kind))
        if self.state in LIVE:
            self.state, self.verdict = "ending", kind

    @precondition(lambda self: self.outcome is None)
    @rule()
    def seal(self):
        verdict = self.run.seal()
        assert type(verdict) is ENDS.get(self.verdict, type(None))
        self.state = "settling"

    @precondition(lambda self: self.state == "settling")
    @rule(fails=st.booleans())
    def settle(self, fails):
        kind = self.verdict or ("failed" if fails else None)
        if kind is None:
            self.outcome = RESULT
            self.run.resolve(RESULT)
        else:
            self.outcome = error_of(kind)
            self.run.reject(self.outcome)
        self.state = kind or "done"

    @rule(image=st.booleans())
    def settle_at_the_wrong_time(self, image):
        if self.state == "settling":
            return
        settle, outcome = (self.run.resolve, RESULT) if image else (self.run.reject, SnapshotFailedError("x"))
        with pytest.raises(AssertionError):
            settle(outcome)

    # The owner.

    @rule()
    def cancel(self):
        before = self.woken
        told = self.job.cancel()
        if self.state in LIVE:
            self.state, self.verdict = "ending", "cancelled"
        assert told == ((self.state, self.verdict) == ("ending", "cancelled"))
        assert self.woken - before == told

    @rule()
    def wait(self):
        if self.outcome is None:
            with pytest.raises(TimeoutError, match="still running"):
                self.job.wait(0)
        elif self.state == "done":
            assert self.job.wait(0) is self.outcome
        else:
            with pytest.raises(SnapshotFailedError) as caught:
                self.job.wait(0)
            assert caught.value is self.outcome

    @rule()
    def listen(self):
        self.job.add_done_callback(lambda job: self.heard.append(job.state.value))
        if self.outcome is None:
            self.heard.append(None)  # one more is to come

    @invariant()
    def they_agree(self):
        assert self.job.state.value == self.state
        assert self.state in repr(self.job)
        assert self.job.done() == (self.outcome is not None)
        assert self.job.progress == (self.reported[-1] if self.reported else None)
        assert self.seen == self.reported
        assert (self.job.copy_bytes, self.job.peak_copy_bytes) == (
            self.copies[-1] if self.copies else 0,
            max(self.copies, default=0),
        )
        told = [state for state in self.heard if state is not None]
        assert set(told) <= {self.state}
        assert self.outcome is None or len(told) >= self.heard.count(None)


TestLife = Life.TestCase
