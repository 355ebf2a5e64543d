"""A schedule that a signal's handler interrupts or calls, or another thread closes, at each place in turn."""

import itertools
import sys
import threading
from contextlib import suppress

import pytest

from memsafe.errors import SnapshotInProgressError
from tests.unit.hand_driven import PATIENCE_S, result


class Interrupted(BaseException):
    """What a signal handler raises."""


class Moment:
    """Does something at the n-th place in the schedule's code where handlers run: calls, and what follows them."""

    def __init__(self, number, act):
        self.number, self.act = number, act
        self.has_come = False

    def __enter__(self):
        left = self.number

        def profile(frame, event, argument):
            nonlocal left
            if event in {"call", "return", "c_return"} and "/memsafe/snapshot/s" in frame.f_code.co_filename:
                left -= 1
                if not left:
                    sys.setprofile(None)
                    self.has_come = True
                    self.act()

        sys.setprofile(profile)

    def __exit__(self, kind, error, traceback):
        sys.setprofile(None)
        return kind is Interrupted


def interrupt():
    raise Interrupted


def moments(act=interrupt):
    """Yield a Moment for each place, until the last one has passed."""
    for number in itertools.count(1):
        moment = Moment(number, act)
        yield moment
        if not moment.has_come:
            assert number > 5
            return


@pytest.mark.parametrize("failed", [0, 1])
def test_how_it_ended_is_taken_in_once_wherever_who_looks_is_interrupted(make, engine, failed):
    for moment in moments():
        told = []
        schedule = make(points=(), on_end=told.append)
        schedule.note_changes()
        schedule.save_now()
        engine.runs[-1].future._done_callbacks.clear()  # who looks comes before them
        engine.fail() if failed else engine.succeed()
        with moment:
            assert schedule.job is None
        assert schedule.consecutive_failures == schedule.changes_since == failed
        assert (schedule.last_result is None) == (schedule.last_error is not None) == bool(failed)
        assert schedule.job is None
        schedule.tick()
        assert len(told) == 1


@pytest.mark.parametrize("driven_by", ["save_now", "tick"])
@pytest.mark.parametrize("refusal", [None, OSError("no such folder"), SnapshotInProgressError("another's")])
def test_the_next_one_is_possible_wherever_the_beginning_of_one_is_interrupted(make, engine, driven_by, refusal):
    for moment in moments():
        told = []
        schedule = make(after_changes=1, on_end=told.append)
        schedule.note_changes()
        engine.refusal = refusal
        with moment, suppress(OSError, SnapshotInProgressError):
            getattr(schedule, driven_by)()
        engine.refusal = None
        if has_begun := schedule.job is not None:
            engine.succeed()
        assert schedule.save_now() is schedule.job
        engine.succeed()
        schedule.tick()
        assert len([outcome for outcome in told if outcome == result()]) == 1 + has_begun


@pytest.mark.parametrize("handler", ["closes", "saves"])
def test_a_signal_handler_may_close_or_save_while_one_begins(make, engine, handler):
    schedules, got = [], []

    def handle():
        try:
            got.append(schedules[-1].close(timeout_s=0) if handler == "closes" else schedules[-1].save_now())
        except (TimeoutError, SnapshotInProgressError):
            got.append(None)

    for moment in moments(handle):
        schedule = make(points=())
        schedules.append(schedule)
        before = len(engine.runs)
        with moment, suppress(SnapshotInProgressError, RuntimeError):
            schedule.save_now()
        assert len(engine.runs) - before == (schedule.job is not None)
        if schedule.job is not None:
            engine.succeed()
        assert schedule._attempt is None


def test_nothing_begins_after_another_thread_has_closed_wherever_the_beginning_of_one_stands(make, engine):
    schedules, ends = [], []

    def close():
        if not schedules[-1]._lock.acquire(blocking=False):
            return  # the other one has it, and who closes waits for that
        schedules[-1]._lock.release()
        try:
            schedules[-1].close(timeout_s=0)
            ends.append(("closed", len(engine.runs)))
        except TimeoutError:
            ends.append(("not ended", len(engine.runs)))

    def close_elsewhere():
        thread = threading.Thread(target=close)
        thread.start()
        thread.join()

    for moment in moments(close_elsewhere):
        schedules.append(make(points=()))
        with moment, suppress(RuntimeError):
            schedules[-1].save_now()
        if ends and ends[-1][0] == "closed":
            assert len(engine.runs) == ends[-1][1]
            assert schedules[-1].job is None
        elif schedules[-1].job is not None:
            engine.succeed()
        schedules[-1].close(timeout_s=0)
        ends.clear()


def test_a_start_that_is_interrupted_leaves_no_thread_and_can_be_made_again(make):
    for moment in moments():
        schedule = make(after_changes=1)
        with moment:
            schedule.start()
        with suppress(RuntimeError):  # where it was interrupted when all was done, or not at all
            schedule.start()
        assert schedule._thread.is_alive()
        schedule.close(timeout_s=PATIENCE_S)
        assert not schedule._thread.is_alive()
    for thread in threading.enumerate():
        if thread.name == "memsafe-schedule":
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


def test_a_thread_whose_start_was_interrupted_when_it_ran_already_ends(make, monkeypatch):
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        raise Interrupted

    schedule = make(after_changes=1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(Interrupted):
            schedule.start()
    first = [thread for thread in threading.enumerate() if thread.name == "memsafe-schedule"]
    with schedule:  # another one
        for thread in first:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


def test_a_schedule_whose_thread_cannot_be_started_is_not_driven(make, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    schedule = make(after_changes=1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            schedule.start()
    with schedule:
        pass


def test_a_signal_handler_may_close_while_a_thread_is_being_started(make):
    schedules = []
    for moment in moments(lambda: schedules[-1].close(timeout_s=PATIENCE_S)):
        schedules.append(make(after_changes=1))
        with moment, suppress(RuntimeError):
            schedules[-1].start()
        schedules[-1].close(timeout_s=PATIENCE_S)
        assert schedules[-1]._thread is None or not schedules[-1]._thread.is_alive()


@pytest.mark.parametrize("handler", ["looks", "saves"])
def test_a_signal_handler_that_comes_while_somebody_looks_takes_nothing_in_twice_and_loses_nothing(
    make, engine, handler
):
    schedules, got = [], []

    def handle():
        got.append(schedules[-1].save_now() if handler == "saves" else schedules[-1].job)

    for moment in moments(handle):
        got.clear()
        schedules.append(make(points=()))
        schedules[-1].save_now()
        engine.runs[-1].future._done_callbacks.clear()
        engine.fail()
        with moment:
            assert schedules[-1].last_error is not None
        assert schedules[-1].consecutive_failures == 1
        assert [schedules[-1].job] == (got or [None])
