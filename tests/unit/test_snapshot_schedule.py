"""Save points by a manual clock, with an engine that is driven by hand: no process is forked, nothing sleeps."""

import asyncio
import itertools
import json
import logging
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from memsafe.errors import (
    SnapshotCancelledError,
    SnapshotFailedError,
    SnapshotInProgressError,
    SnapshotRefusedError,
)
from memsafe.snapshot import SavePoint, SnapshotForecast, SnapshotSchedule
from memsafe.snapshot.changes import ChangeCount
from memsafe.snapshot.job import SnapshotJob, SnapshotResult, SnapshotRun

PATIENCE_S = 30


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


class Engine:
    """Takes snapshots that end when the test says so, or refuses."""

    def __init__(self):
        self.runs = []
        self.calls = []
        self.refusal = None
        self.began = threading.Event()

    def take(self, path, write, **arguments):
        self.calls.append((path, write, arguments))
        if self.refusal is not None:
            raise self.refusal
        self.runs.append(SnapshotRun(path, wake=lambda: None))
        self.began.set()
        return SnapshotJob(self.runs[-1])

    def succeed(self, **fields):
        run = self.runs[-1]
        run.seal()
        run.resolve(result(**fields))

    def fail(self, error=None):
        run = self.runs[-1]
        run.seal()
        run.reject(error or SnapshotFailedError("the disk is full"))


def result(duration_s=2.0, size_bytes=100, pause_s=0.001, peak_copy_bytes=10):
    return SnapshotResult("dump.db", size_bytes, pause_s, duration_s, peak_copy_bytes, "by hand")


def refused(decision):
    return SnapshotRefusedError(f"would not be safe ({decision})", SimpleNamespace(decision=decision))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def make(clock, engine):
    def make(**arguments):
        return SnapshotSchedule("dump.db", print, take=engine.take, clock=clock, **arguments)

    return make


# When.


def test_an_image_is_due_when_both_the_time_and_the_changes_of_a_point_are_reached(make, clock, engine):
    schedule = make(every_s=300, after_changes=100)
    schedule.note_changes(99)
    clock.now_s += 1000
    schedule.tick()
    assert engine.runs == []
    assert schedule.next_attempt_in_s is None
    schedule.note_changes()
    assert schedule.next_attempt_in_s == 0
    schedule.tick()
    assert len(engine.runs) == 1


def test_enough_changes_wait_for_the_time(make, clock, engine):
    schedule = make(every_s=300, after_changes=100)
    schedule.note_changes(100)
    assert schedule.next_attempt_in_s == 300
    clock.now_s += 299.9
    schedule.tick()
    assert engine.runs == []
    clock.now_s += 0.1
    schedule.tick()
    assert len(engine.runs) == 1


@pytest.mark.parametrize(("changes", "due_s"), [(0, None), (1, 3600), (99, 3600), (100, 300), (10_000, 60)])
def test_of_several_points_the_first_one_that_is_reached_counts(make, changes, due_s):
    schedule = make(points=[(3600, 1), (300, 100), (60, 10_000)])
    schedule.note_changes(changes)
    assert schedule.next_attempt_in_s == due_s
    assert schedule.points[0] == SavePoint(every_s=3600, after_changes=1)


def test_time_alone_asks_for_no_changes_and_changes_alone_for_no_time(make, clock, engine):
    assert make(every_s=60).next_attempt_in_s == 60
    by_changes = make(after_changes=3)
    by_changes.note_changes(2)
    assert by_changes.next_attempt_in_s is None
    by_changes.note_changes(1)
    assert by_changes.next_attempt_in_s == 0


def test_time_counts_from_the_end_of_the_last_success_and_changes_from_its_moment(make, clock, engine):
    schedule = make(every_s=60, after_changes=5)
    schedule.note_changes(5)
    clock.now_s += 60
    schedule.tick()
    schedule.note_changes(7)
    clock.now_s += 30
    engine.succeed()
    assert schedule.changes_since == 7
    assert schedule.next_attempt_in_s == 60


def test_after_a_failure_all_changes_are_still_to_be_saved(make, clock, engine):
    schedule = make(after_changes=5)
    schedule.note_changes(5)
    schedule.tick()
    schedule.note_changes(2)
    engine.fail()
    assert schedule.changes_since == 7


def test_one_at_a_time(make, clock, engine):
    schedule = make(after_changes=1)
    schedule.note_changes()
    schedule.tick()
    schedule.note_changes()
    clock.now_s += 1000
    schedule.tick()
    assert len(engine.runs) == 1
    assert schedule.next_attempt_in_s is None
    with pytest.raises(SnapshotInProgressError, match="still running"):
        schedule.save_now()
    assert schedule.consecutive_failures == 0
    engine.succeed()
    schedule.tick()
    assert len(engine.runs) == 2


def test_asked_for_from_within_its_own_beginning_it_says_that_one_is_running(make, engine, monkeypatch):
    """As a signal handler may."""
    schedule = make(after_changes=1)
    said = []
    take = engine.take

    def interrupted(*args, **arguments):
        try:
            schedule.save_now()
        except SnapshotInProgressError as error:
            said.append(str(error))
        return take(*args, **arguments)

    monkeypatch.setattr(schedule, "_take", interrupted)
    schedule.save_now()
    assert len(said) == len(engine.runs) == 1


def test_look_again_soon_where_changes_are_missing_and_never_later_than_in_a_second(make, clock, engine):
    schedule = make(points=[(3600, 1), (10, 50)])
    assert schedule.tick() == 1
    clock.now_s += 9.5
    assert schedule.tick() == 0.5
    clock.now_s += 0.5
    assert schedule.tick() == 0.2
    schedule.note_changes(50)
    engine.refusal = OSError("no")
    assert schedule.tick() == 1  # it backs off
    assert make(points=()).tick() == 1
    slow = make(points=[(60, 10**6)])
    clock.now_s += 1000
    assert slow.tick() == pytest.approx(0.6)


def test_points_may_be_changed_and_may_be_none(make, clock, engine):
    schedule = make(points=())
    schedule.note_changes(1000)
    clock.now_s += 1e6
    schedule.tick()
    assert engine.runs == []
    schedule.points = [(10, 5)]
    schedule.tick()
    assert len(engine.runs) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"every_s": 1, "points": [(1, 1)]},
        {"after_changes": 1, "points": ()},
        {"every_s": -1},
        {"every_s": 0},
        {"every_s": float("nan")},
        {"every_s": float("inf")},
        {"points": [(0, 0)]},
        {"points": [(1, -1)]},
        {"every_s": 1, "retry_s": 0},
        {"every_s": 1, "retry_s": 10, "retry_max_s": 5},
    ],
)
def test_what_makes_no_sense_is_refused(make, arguments):
    with pytest.raises(ValueError, match=r"save point|retry_s|something to go by"):
        make(**arguments)


def test_arguments_that_the_engine_does_not_take_are_refused_at_once():
    with pytest.raises(TypeError, match="max_copi"):
        SnapshotSchedule("dump.db", print, every_s=1, max_copi="1 MiB")
    with pytest.raises(TypeError, match="not a callable"):
        SnapshotSchedule("dump.db", print, every_s=1, take=17)
    SnapshotSchedule("dump.db", print, every_s=1, max_copy="1 MiB")


def test_an_engine_that_does_not_tell_its_arguments_is_taken_at_its_word(engine, monkeypatch):
    class Opaque:
        @property
        def __signature__(self):
            raise ValueError("no signature found")

        def __call__(self, *args, **arguments):
            return engine.take(*args, **arguments)

    SnapshotSchedule("dump.db", print, points=(), take=Opaque(), max_copi=1).save_now()
    assert engine.calls[0][2] == {"max_copi": 1}


# Failures.


def test_failures_are_tried_again_ever_more_seldom_up_to_a_bound(make, clock, engine):
    schedule = make(after_changes=1, retry_s=5, retry_max_s=60)
    schedule.note_changes()
    waits_s = []
    for failures in range(1, 8):
        schedule.tick()
        engine.fail()
        assert schedule.consecutive_failures == failures
        assert "disk is full" in str(schedule.last_error)
        waits_s.append(schedule.next_attempt_in_s)
        clock.now_s += waits_s[-1] - 0.01
        schedule.tick()
        assert len(engine.runs) == failures
        clock.now_s += 0.02
    assert waits_s == [5, 10, 20, 40, 60, 60, 60]
    schedule.tick()
    engine.succeed()
    assert (schedule.consecutive_failures, schedule.last_error) == (0, None)
    schedule.note_changes()
    assert schedule.next_attempt_in_s == 0


def test_thousands_of_failures_overflow_nothing(make, clock, engine):
    schedule = make(after_changes=1)
    schedule.note_changes()
    engine.refusal = OSError("no such folder")
    for _ in range(3000):
        schedule.tick()
        clock.now_s += schedule.next_attempt_in_s
    assert schedule.consecutive_failures == 3000


@pytest.mark.parametrize("error", [refused("defer"), SnapshotInProgressError("somebody else's")])
def test_what_is_put_off_is_tried_later_and_is_no_failure(make, clock, engine, error):
    told = []
    schedule = make(after_changes=1, retry_s=5, on_end=told.append)
    schedule.note_changes()
    engine.refusal = error
    for _ in range(4):
        schedule.tick()
        assert schedule.deferred_by is error
        assert (schedule.consecutive_failures, schedule.last_error) == (0, None)
        assert schedule.next_attempt_in_s == 5
        clock.now_s += 5
    assert len(engine.calls) == 4
    engine.refusal = None
    schedule.tick()
    assert schedule.deferred_by is None
    assert told == []
    engine.succeed()


def test_a_failure_after_what_was_put_off_was_not_put_off(make, clock, engine):
    schedule = make(after_changes=1, retry_s=5)
    schedule.note_changes()
    engine.refusal = put_off = refused("defer")
    schedule.tick()
    assert schedule.deferred_by is put_off
    clock.now_s += 5
    engine.refusal = OSError("no such folder")
    schedule.tick()
    assert (schedule.deferred_by, schedule.last_error) == (None, engine.refusal)


@pytest.mark.parametrize("error", [refused("refuse"), OSError("no such folder"), TypeError("write is no function")])
def test_what_cannot_begin_is_a_failure_and_the_schedule_goes_on(make, clock, engine, error):
    told = []
    schedule = make(after_changes=1, on_end=told.append)
    schedule.note_changes()
    engine.refusal = error
    schedule.tick()
    assert (schedule.consecutive_failures, schedule.last_error, told) == (1, error, [error])
    engine.refusal = None
    clock.now_s += 5
    schedule.tick()
    assert len(engine.runs) == 1


def test_a_cancelled_one_is_neither_success_nor_failure(make, clock, engine):
    told = []
    schedule = make(after_changes=1, retry_s=5, on_end=told.append)
    schedule.note_changes(3)
    schedule.tick()
    schedule.job.cancel()
    engine.fail(SnapshotCancelledError("cancelled"))
    assert (schedule.consecutive_failures, schedule.last_error, schedule.changes_since) == (0, None, 3)
    assert schedule.next_attempt_in_s == 5
    assert told == []


def test_an_interrupt_in_the_beginning_leaves_the_next_one_possible(make, engine):
    schedule = make(after_changes=1)
    engine.refusal = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        schedule.save_now()
    engine.refusal = None
    assert schedule.save_now() is schedule.job
    assert schedule.consecutive_failures == 0


# Interrupts, and other threads.


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


# By hand.


def test_save_now_asks_neither_points_nor_back_off_and_raises_what_fails(make, clock, engine):
    schedule = make(every_s=3600, after_changes=10, max_copy="1 MiB")
    engine.refusal = OSError("no such folder")
    with pytest.raises(OSError, match="no such folder"):
        schedule.save_now()
    assert schedule.consecutive_failures == 1
    engine.refusal = None
    job = schedule.save_now()
    assert schedule.job is job
    assert engine.calls[-1] == ("dump.db", print, {"max_copy": "1 MiB"})
    engine.succeed()
    assert schedule.consecutive_failures == 0


def test_an_image_made_by_other_means_counts_from_its_moment(make, clock, engine):
    schedule = make(every_s=60, after_changes=1)
    engine.refusal = OSError("no such folder")
    with suppress(OSError):
        schedule.save_now()
    schedule.note_changes(5)
    clock.now_s += 50
    schedule.note_saved()
    assert (schedule.changes_since, schedule.consecutive_failures, schedule.last_error) == (0, 0, None)
    schedule.note_changes(1)
    assert schedule.next_attempt_in_s == 60


def test_an_older_image_that_ends_later_takes_nothing_back(make, clock, engine):
    schedule = make(after_changes=1)
    schedule.note_changes(5)
    schedule.tick()
    schedule.note_changes(5)
    schedule.note_saved()
    engine.succeed()
    assert schedule.changes_since == 0


def test_what_the_program_counts_itself_is_asked_for(make, clock, engine):
    counter = SimpleNamespace(changes=17)
    schedule = make(after_changes=3, changes=lambda: counter.changes)
    assert schedule.changes_since == 0
    counter.changes += 2
    schedule.note_changes()
    assert schedule.changes_since == 3
    assert schedule.next_attempt_in_s == 0


def test_a_count_that_begins_anew_takes_nothing_back_and_goes_on_from_there(make, clock, engine):
    counter = SimpleNamespace(changes=1000)
    schedule = make(after_changes=300, changes=lambda: counter.changes)
    counter.changes = 1200
    assert schedule.changes_since == 200
    counter.changes = 0  # a flush
    assert schedule.changes_since == 200
    counter.changes = 150
    assert schedule.changes_since == 350
    schedule.tick()
    counter.changes = 5  # another one, while the image is taken
    engine.succeed()
    assert schedule.changes_since == 5
    counter.changes = 2000
    assert schedule.changes_since == 2000
    schedule.note_saved()
    assert schedule.changes_since == 0


@pytest.mark.parametrize("flushes", [False, True])
def test_a_count_that_another_thread_reads_meanwhile_is_not_taken_for_one_that_began_anew(flushes):
    """What was read first may be used last."""
    ways, counter = [], SimpleNamespace(changes=10)

    def read():
        count = counter.changes
        if ways:
            ways.pop()()
        return count

    count = ChangeCount(read)
    assert count.total() == 10

    def meanwhile():
        counter.changes = 0 if flushes else 20
        assert count.total() == (10 if flushes else 20)
        counter.changes += 3

    ways.append(meanwhile)
    counter.changes = 12
    assert count.total() == (13 if flushes else 23)
    assert count.total() == (13 if flushes else 23)


def test_changes_of_many_threads_add_up(make):
    schedule = make(after_changes=1)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=lambda: [schedule.note_changes(2) for _ in range(20_000)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert 0 <= schedule.changes_since <= 320_000
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval_s)
    assert schedule.changes_since == 320_000


def test_the_lock_is_held_while_one_begins_and_no_longer(make, engine, monkeypatch):
    lock = threading.Lock()
    held = []
    take = engine.take

    def watching(*args, **arguments):
        held.append(lock.locked())
        return take(*args, **arguments)

    schedule = make(after_changes=1, lock=lock)
    monkeypatch.setattr(schedule, "_take", watching)
    schedule.save_now()
    assert held == [True]
    assert not lock.locked()


# What is told.


def test_the_owner_hears_of_successes_and_failures_and_a_failing_owner_is_logged(make, clock, engine, caplog):
    told = []

    def on_end(outcome):
        told.append(outcome)
        raise RuntimeError("the owner broke")

    schedule = make(after_changes=1, on_end=on_end)
    schedule.note_changes()
    schedule.tick()
    engine.succeed()
    assert told == [result()]
    assert schedule.last_result == result()
    schedule.note_changes()
    with caplog.at_level(logging.WARNING, "memsafe.snapshot"):
        schedule.tick()
        engine.fail()
    assert isinstance(told[1], SnapshotFailedError)
    assert schedule.last_result == result()
    assert "the snapshot of dump.db failed: the disk is full" in caplog.text
    assert "the owner broke" in caplog.text


def test_the_log_says_how_many_failed_in_a_row(make, engine, caplog):
    schedule = make(points=())
    with caplog.at_level(logging.WARNING, "memsafe.snapshot"):
        for _ in range(3):
            schedule.save_now()
            engine.fail()
    assert caplog.messages == [
        "the snapshot of dump.db failed: the disk is full",
        "2 snapshots of dump.db failed in a row, the last one: the disk is full",
        "3 snapshots of dump.db failed in a row, the last one: the disk is full",
    ]


def test_who_waited_for_the_job_sees_what_came_of_it(make, engine):
    """A Future wakes who waits before it calls its callbacks."""
    schedule = make(after_changes=1)
    schedule.note_changes()
    job = schedule.save_now()
    job._run.future._done_callbacks.clear()
    engine.succeed()
    job.wait()
    assert schedule.changes_since == 0
    assert schedule.job is None
    assert schedule.last_result == result()


def test_the_forecast_is_the_median_and_of_copies_the_most_of_the_last_five(make, clock, engine):
    schedule = make(after_changes=1)
    assert schedule.forecast() is None
    for number in (100, 3, 5, 1, 4, 2):
        schedule.save_now()
        engine.succeed(duration_s=number, size_bytes=number * 10, pause_s=number / 1000, peak_copy_bytes=number * 7)
    expected = SnapshotForecast(runs=5, duration_s=3, size_bytes=30, pause_s=0.003, copy_bytes=35)
    assert schedule.forecast() == expected
    assert schedule.forecast().as_dict()["copy_bytes"] == 35


def test_copies_that_nobody_measured_are_not_foretold(make, engine):
    schedule = make(after_changes=1)
    schedule.save_now()
    engine.succeed(peak_copy_bytes=None)
    assert schedule.forecast().copy_bytes is None


def test_its_state_is_plain_data(make, clock, engine):
    schedule = make(points=[(60, 5)])
    told = schedule.as_dict()
    assert (told["last_result"], told["last_error"], told["deferred_by"], told["forecast"]) == (None,) * 4
    schedule.note_changes(5)
    engine.refusal = refused("defer")
    with suppress(SnapshotRefusedError):
        schedule.save_now()
    engine.refusal = None
    schedule.save_now()
    engine.succeed()
    schedule.note_changes(7)
    schedule.save_now()
    engine.fail()
    told = json.loads(json.dumps(schedule.as_dict()))
    assert told == {
        "path": "dump.db",
        "points": [[60, 5]],
        "running": False,
        "changes_since": 7,
        "next_attempt_in_s": 60,
        "consecutive_failures": 1,
        "last_error": "the disk is full",
        "deferred_by": None,
        "last_result": json.loads(json.dumps(result().as_dict())),
        "forecast": {"runs": 1, "duration_s": 2, "size_bytes": 100, "pause_s": 0.001, "copy_bytes": 10},
    }


# What drives it.


def test_a_thread_takes_what_is_due_and_close_waits_for_it(engine):
    with SnapshotSchedule("dump.db", print, after_changes=1, take=engine.take) as schedule:
        with pytest.raises(RuntimeError, match="driven already"):
            schedule.start()
        schedule.note_changes()
        assert engine.began.wait(PATIENCE_S)
        with pytest.raises(TimeoutError):
            schedule.close(timeout_s=0)
        engine.succeed()
    schedule.close()
    assert schedule.last_result == result()
    assert [thread.name for thread in threading.enumerate() if thread.name == "memsafe-schedule"] == []
    schedule.note_changes()
    schedule.tick()
    assert len(engine.runs) == 1
    assert schedule.next_attempt_in_s is None
    for refused_now in (schedule.save_now, schedule.start):
        with pytest.raises(RuntimeError, match="closed"):
            refused_now()


def test_close_waits_no_longer_than_told_for_a_thread_that_cannot_have_the_lock(engine):
    lock, asked = threading.Lock(), threading.Event()

    class Watched:
        def __enter__(self):
            asked.set()
            lock.acquire()

        def __exit__(self, *_):
            lock.release()

    schedule = SnapshotSchedule("dump.db", print, after_changes=1, take=engine.take, lock=Watched())
    schedule.note_changes()
    lock.acquire()
    rescue = threading.Timer(PATIENCE_S, lock.release)  # of a close() that would wait for ever
    rescue.start()
    schedule.start()
    assert asked.wait(PATIENCE_S)
    with pytest.raises(TimeoutError, match="has not ended"):
        schedule.close(timeout_s=0)
    rescue.cancel()
    lock.release()
    schedule.close(timeout_s=PATIENCE_S)
    assert engine.calls == []  # it was closed by then
    assert schedule.consecutive_failures == 0


def test_close_waits_for_what_another_thread_is_just_beginning(make, engine, monkeypatch):
    inside, go_on = threading.Event(), threading.Event()
    take = engine.take

    def slow(*args, **arguments):
        inside.set()
        assert go_on.wait(PATIENCE_S)
        return take(*args, **arguments)

    schedule = make(points=())
    monkeypatch.setattr(schedule, "_take", slow)
    saving = threading.Thread(target=schedule.save_now)
    saving.start()
    assert inside.wait(PATIENCE_S)
    with pytest.raises(TimeoutError, match="has not ended"):
        schedule.close(timeout_s=0)
    go_on.set()
    saving.join()
    with pytest.raises(TimeoutError, match="still running"):
        schedule.close(timeout_s=0)
    engine.succeed()
    schedule.close(timeout_s=PATIENCE_S)
    assert schedule.last_result == result()


def test_an_event_loop_waits_for_what_another_thread_is_just_beginning(make, engine, monkeypatch):
    inside, take = threading.Event(), engine.take

    def slow(*args, **arguments):
        inside.set()
        while not schedule._closed:
            time.sleep(0.001)
        job = take(*args, **arguments)
        engine.succeed()
        return job

    schedule = make(points=())
    monkeypatch.setattr(schedule, "_take", slow)

    async def main():
        async with schedule:
            saving = asyncio.get_running_loop().run_in_executor(None, schedule.save_now)
            assert inside.wait(PATIENCE_S)
        assert schedule.last_result == result()
        await saving

    asyncio.run(main())


@pytest.mark.parametrize("within", ["lock", "changes"])
def test_a_schedule_that_is_closed_from_within_the_beginning_begins_nothing(make, engine, within):
    armed = []

    def close():
        if armed:
            armed.pop().close(timeout_s=PATIENCE_S)
        return 0

    class Lock:
        def __enter__(self):
            close()

        def __exit__(self, *_):
            pass

    schedule = make(points=(), **{within: Lock() if within == "lock" else close})
    armed.append(schedule)
    with pytest.raises(RuntimeError, match="closed"):
        schedule.save_now()
    assert (armed, engine.calls, schedule.consecutive_failures) == ([], [], 0)


def test_a_schedule_may_be_closed_from_within_take_and_on_end(make, engine, monkeypatch):
    take = engine.take

    def closing(*args, **arguments):
        schedule.close(timeout_s=PATIENCE_S)
        return take(*args, **arguments)

    schedule = make(points=(), on_end=lambda outcome: schedule.close(timeout_s=PATIENCE_S))
    monkeypatch.setattr(schedule, "_take", closing)
    schedule.save_now()
    engine.succeed()
    assert schedule.last_result == result()
    with pytest.raises(RuntimeError, match="closed"):
        schedule.save_now()


def test_close_cancels_if_told_to(make, engine):
    schedule = make(after_changes=1)
    schedule.save_now()
    with pytest.raises(TimeoutError):
        schedule.close(cancel=True, timeout_s=0)
    assert engine.runs[0].seal()  # it was cancelled
    engine.fail(SnapshotCancelledError("cancelled"))
    schedule.close()
    assert schedule.job is None


def test_a_thread_goes_on_when_the_program_s_count_fails(engine, caplog):
    looked = threading.Semaphore(0)
    works = True

    def changes():
        looked.release()
        if not works:
            raise ZeroDivisionError("counter broke")
        return 0

    schedule = SnapshotSchedule("dump.db", print, after_changes=1, changes=changes, take=engine.take)
    assert looked.acquire(timeout=PATIENCE_S)
    works = False
    with schedule:
        assert looked.acquire(timeout=PATIENCE_S)
        assert looked.acquire(timeout=PATIENCE_S)
    assert "counter broke" in caplog.text
    assert engine.calls == []


def test_an_event_loop_takes_what_is_due_on_its_own_thread(engine):
    threads = []

    def take(*args, **arguments):
        threads.append(threading.current_thread())
        return engine.take(*args, **arguments)

    async def main():
        ended = asyncio.Event()
        async with SnapshotSchedule(
            "dump.db", print, after_changes=1, take=take, on_end=lambda outcome: ended.set()
        ) as schedule:
            schedule.note_changes()
            while schedule.job is None:
                await asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(engine.succeed)
            await ended.wait()
            schedule.save_now()
            asyncio.get_running_loop().call_later(0, engine.fail)
        assert schedule.job is None
        return schedule

    schedule = asyncio.run(main())
    assert threads == [threading.main_thread()] * 2
    assert schedule.consecutive_failures == 1


def test_a_schedule_can_be_closed_without_a_bound_on_the_time(engine):
    schedule = SnapshotSchedule("dump.db", print, after_changes=1, take=engine.take)
    schedule.start()
    schedule.close(timeout_s=float("inf"))
    assert schedule.next_attempt_in_s is None
