"""Save points by a manual clock, with an engine that is driven by hand: no process is forked, nothing sleeps."""

import json
import logging
import sys
import threading
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
from tests.unit.hand_driven import refused, result

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
