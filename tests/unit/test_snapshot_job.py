"""The job and the run, driven by hand as an engine without any child would."""

import asyncio
import signal
import threading

import pytest

import memsafe
from memsafe.errors import SnapshotCancelledError, SnapshotFailedError
from memsafe.snapshot.job import SnapshotJob, SnapshotProgress, SnapshotResult, SnapshotRun

RESULT = SnapshotResult("dump.db", 3, 0.001, 0.5, 4096, "by hand")


class Engine:
    def __init__(self, on_progress=None):
        self.wakes = 0
        self.run = SnapshotRun("dump.db", wake=self.wake, on_progress=on_progress)
        self.job = SnapshotJob(self.run)

    def wake(self):
        self.wakes += 1


def test_a_new_job_runs_and_has_reported_nothing():
    job = Engine().job
    assert not job.done()
    assert job.progress is None
    assert job.copy_bytes == 0
    assert job.path == "dump.db"
    assert "running" in repr(job)


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
    assert not engine.run.cancelling


def test_cancel_wakes_the_engine_once_and_is_seen_by_seal():
    engine = Engine()
    assert engine.job.cancel()
    assert engine.job.cancel()
    assert engine.wakes == 1
    assert engine.run.cancelling
    assert engine.run.seal()


def test_cancel_is_refused_once_sealed_and_the_engine_is_left_alone():
    engine = Engine()
    assert not engine.run.seal()
    assert not engine.job.cancel()
    assert engine.wakes == 0
    engine.run.resolve(RESULT)
    assert not engine.job.cancel()
    assert engine.job.wait(0) is RESULT


def test_cancel_from_a_signal_handler_inside_cancel_does_not_deadlock():
    engine = Engine()

    def wake():
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


def test_a_failing_progress_callback_is_logged(caplog):
    def broken(done, total):
        raise RuntimeError("display broke")

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
    assert not engine.run.cancelling
    engine.run.resolve(RESULT)
    assert engine.job.wait() is RESULT


def test_done_callbacks_get_the_job_before_and_after_the_end():
    engine = Engine()
    seen = []
    engine.job.add_done_callback(seen.append)
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
    assert callable(memsafe.fork_snapshot)
