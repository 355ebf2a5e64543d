"""The job and the run, driven by hand as an engine without any child would."""

import asyncio
import gc
import itertools
import os
import signal
import threading
import weakref

import pytest

import memsafe
from memsafe.errors import OOMKilledError, SnapshotCancelledError, SnapshotFailedError, SnapshotOverrunError
from memsafe.snapshot.job import SnapshotJob, SnapshotProgress, SnapshotResult, SnapshotRun, SnapshotState

RESULT = SnapshotResult("dump.db", 3, 0.001, 0.5, 4096, "by hand")


class Engine:
    def __init__(self, on_progress=None):
        self.wakes = 0
        self.run = SnapshotRun("dump.db", wake=self.wake, on_progress=on_progress)
        self.job = SnapshotJob(self.run)

    def wake(self):
        self.wakes += 1

    def finish(self, outcome):
        self.run.seal()
        if isinstance(outcome, SnapshotResult):
            self.run.resolve(outcome)
        else:
            self.run.reject(outcome)


OVERRUN = SnapshotOverrunError("too much", copy_bytes=2, max_copy_bytes=1)


def test_a_new_job_is_being_prepared_and_has_reported_nothing():
    job = Engine().job
    assert not job.done()
    assert job.state is SnapshotState.PREPARING
    assert job.progress is None
    assert job.copy_bytes == 0
    assert job.path == "dump.db"
    assert "preparing" in repr(job)


def test_wait_returns_the_result_as_often_as_it_is_asked():
    engine = Engine()
    engine.run.seal()
    engine.run.resolve(RESULT)
    assert engine.job.wait() is RESULT
    assert engine.job.wait(0) is RESULT
    assert "done" in repr(engine.job)


def test_wait_raises_the_error_as_often_as_it_is_asked():
    engine = Engine()
    engine.run.seal()
    engine.run.reject(SnapshotFailedError("no"))
    for _ in range(2):
        with pytest.raises(SnapshotFailedError, match="no"):
            engine.job.wait(1)


def test_wait_that_takes_too_long_is_a_timeout_and_changes_nothing():
    engine = Engine()
    with pytest.raises(TimeoutError, match=r"dump\.db is still running"):
        engine.job.wait(0)
    assert engine.job.state is SnapshotState.PREPARING


@pytest.mark.parametrize(
    ("timeout_s", "waited_s"), [(float("inf"), None), (1e300, None), (threading.TIMEOUT_MAX, threading.TIMEOUT_MAX)]
)
def test_a_time_longer_than_a_lock_can_wait_is_for_ever(monkeypatch, timeout_s, waited_s):
    engine = Engine()
    waits = []
    monkeypatch.setattr(engine.run.future, "result", waits.append)
    engine.job.wait(timeout_s)
    assert waits == [waited_s]


def test_a_job_can_be_referred_to_weakly():
    engine = Engine()
    assert weakref.ref(engine.job)() is engine.job


FAILURE = SnapshotFailedError("the disk is full")


def dropped_before_its_end(engine, outcome):
    del engine.job
    engine.finish(outcome)


def dropped_after_its_end(engine, outcome):
    engine.finish(outcome)
    del engine.job


@pytest.mark.parametrize("drop", [dropped_before_its_end, dropped_after_its_end])
@pytest.mark.parametrize(
    ("outcome", "logged"),
    [
        (FAILURE, "memsafe.snapshot:nobody asked how this ended: the disk is full"),
        (SnapshotCancelledError("by its owner"), ""),
        (RESULT, ""),
    ],
    ids=["failed", "cancelled", "done"],
)
def test_a_failure_that_nobody_asks_for_is_logged(caplog, drop, outcome, logged):
    drop(Engine(), outcome)
    assert ":".join([caplog.records[0].name, caplog.records[0].message] if caplog.records else []) == logged


def waits(job):
    with pytest.raises(SnapshotFailedError):
        job.wait()


def awaits(job):
    async def main():
        await job

    with pytest.raises(SnapshotFailedError):
        asyncio.run(main())


def is_told(job):
    told = []
    job.add_done_callback(told.append)
    told.clear()


@pytest.mark.parametrize("ask", [waits, awaits, is_told])
def test_a_failure_that_somebody_was_told_is_not_logged(caplog, ask):
    engine = Engine()
    engine.finish(
        SnapshotFailedError("the disk is full")
    )  # its traceback leads to the job, and so may not outlive this
    ask(engine.job)
    job = weakref.ref(engine.job)
    del engine
    gc.collect()
    assert job() is None
    assert caplog.records == []


def test_a_failure_after_a_wait_that_was_too_short_is_logged(caplog):
    engine = Engine()
    with pytest.raises(TimeoutError):
        engine.job.wait(0)
    dropped_before_its_end(engine, FAILURE)
    assert "the disk is full" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_cancel_in_a_forked_child_says_no_at_once_whoever_held_the_lock():
    engine = Engine()
    engine.run.begin()
    held, release = threading.Event(), threading.Event()

    def hold():
        with engine.run._lock:
            held.set()
            release.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # not to hang where it would
        os._exit(engine.job.cancel() or engine.wakes)
    release.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_cancel_wakes_the_engine_each_time_and_is_seen_by_seal():
    engine = Engine()
    engine.run.begin()
    assert engine.job.cancel()
    assert engine.job.cancel()
    assert engine.wakes == 2
    assert engine.job.state is SnapshotState.ENDING
    assert isinstance(engine.run.seal(), SnapshotCancelledError)


def test_what_was_cancelled_before_it_began_never_runs():
    engine = Engine()
    assert engine.job.cancel()
    engine.run.begin()
    assert engine.job.state is SnapshotState.ENDING


def test_the_first_reason_to_end_stays_and_cancel_says_that_it_came_too_late():
    engine = Engine()
    engine.run.begin()
    engine.run.end(OVERRUN)
    engine.run.end(SnapshotFailedError("late"))
    assert not engine.job.cancel()
    assert engine.wakes == 0
    assert engine.run.seal() is OVERRUN


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (SnapshotCancelledError("x"), SnapshotState.CANCELLED),
        (OVERRUN, SnapshotState.OVERRUN),
        (SnapshotFailedError("x"), SnapshotState.FAILED),
        (OOMKilledError("x"), SnapshotState.FAILED),
    ],
)
def test_the_last_state_says_how_it_ended_before_anybody_who_waits_hears_of_it(error, state):
    engine = Engine()
    seen = []
    engine.job.add_done_callback(lambda job: seen.append(job.state))
    engine.run.seal()
    assert engine.job.state is SnapshotState.SETTLING
    engine.run.reject(error)
    assert seen == [state]


def in_state(state):
    engine = Engine()
    run = engine.run
    ways = {
        SnapshotState.PREPARING: [],
        SnapshotState.RUNNING: [run.begin],
        SnapshotState.ENDING: [run.begin, run.cancel],
        SnapshotState.SETTLING: [run.begin, run.seal],
        SnapshotState.DONE: [run.seal, lambda: run.resolve(RESULT)],
        SnapshotState.FAILED: [run.seal, lambda: run.reject(SnapshotFailedError("x"))],
        SnapshotState.CANCELLED: [run.cancel, run.seal, lambda: run.reject(SnapshotCancelledError("x"))],
        SnapshotState.OVERRUN: [lambda: run.end(OVERRUN), run.seal, lambda: run.reject(OVERRUN)],
    }
    for step in ways[state]:
        step()
    assert run.state is state
    return run


FINAL = {SnapshotState.DONE, SnapshotState.FAILED, SnapshotState.CANCELLED, SnapshotState.OVERRUN}


@pytest.mark.parametrize("state", sorted(set(SnapshotState) - {SnapshotState.SETTLING}, key=lambda state: state.value))
def test_an_outcome_before_the_run_was_sealed_or_a_second_one_is_a_defect_of_the_engine(state):
    run = in_state(state)
    with pytest.raises(AssertionError):
        run.resolve(RESULT)
    with pytest.raises(AssertionError):
        run.reject(SnapshotFailedError("x"))
    assert run.state is state


def test_no_image_comes_of_a_run_that_was_cancelled():
    run = in_state(SnapshotState.ENDING)
    run.seal()
    with pytest.raises(AssertionError):
        run.resolve(RESULT)


@pytest.mark.parametrize("state", sorted(FINAL, key=lambda state: state.value))
def test_nothing_moves_a_run_that_has_ended(state):
    run = in_state(state)
    run.begin()
    run.end(OVERRUN)
    assert not run.cancel()
    assert run.state is state
    with pytest.raises(AssertionError):
        run.seal()


def test_cancel_is_refused_once_sealed_and_the_engine_is_left_alone():
    engine = Engine()
    assert engine.run.seal() is None
    assert not engine.job.cancel()
    assert engine.wakes == 0
    engine.run.resolve(RESULT)
    assert not engine.job.cancel()
    assert engine.job.wait(0) is RESULT


def test_cancel_from_a_signal_handler_inside_cancel_does_not_deadlock():
    engine = Engine()

    nested = itertools.count()

    def wake():
        if next(nested) == 0:
            signal.raise_signal(signal.SIGUSR1)

    engine.run._wake = wake
    before = signal.signal(signal.SIGUSR1, lambda *_: engine.job.cancel())
    try:
        assert engine.job.cancel()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_progress_is_published_before_the_callback_hears_of_it():
    seen = []
    engine = Engine(on_progress=lambda done, total: seen.append((done, total, engine.job.progress)))
    engine.run.report_progress(1, 4)
    assert seen == [(1, 4, (1, 4))]
    assert engine.job.progress.ratio == 0.25


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, asyncio.CancelledError])
def test_a_failing_progress_callback_is_logged(caplog, error):
    def broken(done, total):
        raise error("display broke")

    Engine(on_progress=broken).run.report_progress(1, 1)
    assert "display broke" in caplog.text


def test_the_peak_of_copies_is_kept_and_unknown_before_the_first_measurement():
    run = Engine().run
    assert run.peak_copy_bytes is None
    for copy_bytes in (10, 30, 20):
        run.report_copies(copy_bytes)
    assert (run.copy_bytes, run.peak_copy_bytes) == (20, 30)


def test_the_ratio_of_nothing_to_do_is_one():
    assert SnapshotProgress(0, 0).ratio == 1


def test_await_gives_the_result_of_an_engine_on_another_thread():
    engine = Engine()

    engine.run.seal()

    async def main():
        threading.Thread(target=engine.run.resolve, args=[RESULT]).start()
        return await engine.job

    assert asyncio.run(main()) is RESULT


def test_cancelling_a_waiting_task_leaves_the_job_running():
    engine = Engine()

    async def wait():
        await engine.job

    async def main():
        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert not engine.job.done()
    assert engine.job.state is SnapshotState.PREPARING
    engine.run.seal()
    engine.run.resolve(RESULT)
    assert engine.job.wait() is RESULT


def test_done_callbacks_get_the_job_before_and_after_the_end():
    engine = Engine()
    seen = []
    engine.job.add_done_callback(seen.append)
    engine.run.seal()
    engine.run.reject(SnapshotCancelledError("x"))
    engine.job.add_done_callback(seen.append)
    assert seen == [engine.job, engine.job]


def test_a_result_is_plain_data_and_frozen():
    assert RESULT.as_dict() == {
        "path": "dump.db",
        "size_bytes": 3,
        "pause_s": 0.001,
        "duration_s": 0.5,
        "peak_copy_bytes": 4096,
        "method": "by hand",
        "warnings": [],
        "content_bytes": None,
        "checksum": None,
    }
    with pytest.raises(AttributeError):
        RESULT.size_bytes = 4


def test_the_public_names_are_reachable_from_the_package():
    assert memsafe.SnapshotJob is SnapshotJob
    assert memsafe.SnapshotResult is SnapshotResult
    assert memsafe.SnapshotState is SnapshotState
    assert callable(memsafe.fork_snapshot)
