"""What drives a schedule, a thread or an event loop, and how it is closed."""

import asyncio
import threading

import pytest

from memsafe.errors import SnapshotCancelledError
from memsafe.snapshot import SnapshotSchedule
from tests.unit.hand_driven import PATIENCE_S, result


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
        assert schedule._stopped.wait(PATIENCE_S)
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
