"""Tasks that wait: in one line with threads, and without blocking their loop."""

import asyncio
import gc
import math
import os
import subprocess
import sys

import pytest

import memsafe
from memsafe import Budget, BudgetExceededError
from memsafe.budget import wait
from tests.unit.budget_line import FOR_EVER_S, LOOPS, in_line, run, tasks_in_line


@LOOPS
def test_a_task_waits_without_blocking_its_loop(loop_factory):
    async def main():
        budget = Budget(100)
        with await budget.reserve_async(60):
            waiting = asyncio.create_task(budget.reserve_async(70, timeout_s=FOR_EVER_S))
            await tasks_in_line(budget, 1)
        with await waiting as reservation:
            assert (reservation.size_bytes, budget.used_bytes) == (70, 70)
        assert budget.used_bytes == 0

    run(main(), loop_factory)
    assert not wait._mailboxes


@LOOPS
def test_tasks_and_threads_stand_in_one_line(loop_factory):
    async def main():
        budget, order = Budget(100), []
        held = budget.reserve(100)

        async def task(size):
            with await budget.reserve_async(size, timeout_s=math.inf):
                order.append(size)

        first = asyncio.create_task(task(91))
        await tasks_in_line(budget, 1)
        second = await asyncio.to_thread(in_line, budget, 92)
        third = asyncio.create_task(task(93))
        await tasks_in_line(budget, 3)
        await asyncio.to_thread(held.release)  # from another thread
        await first
        with await asyncio.to_thread(second.outcome):
            order.append(92)
        await third
        assert order == [91, 92, 93]

    run(main(), loop_factory)


@LOOPS
def test_a_cancelled_task_holds_nothing_even_if_it_was_granted_just_then(loop_factory):
    async def main():
        budget = Budget(100)
        for granted_first in (False, True):
            held = budget.reserve(100)
            waiting = asyncio.create_task(budget.reserve_async(50, timeout_s=FOR_EVER_S))
            await tasks_in_line(budget, 1)
            if granted_first:
                held.release()
                assert budget.used_bytes == 50  # charged to the task, which does not know it yet
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            held.release()
            assert budget.used_bytes == 0
        with budget.reserve(100):
            pass

    run(main(), loop_factory)


@LOOPS
def test_a_task_times_out_like_a_thread_and_by_asyncio_too(loop_factory):
    async def main():
        budget = Budget(100)
        with budget.reserve(100):
            with pytest.raises(BudgetExceededError, match="within"):
                await budget.reserve_async(1, timeout_s=0.001)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(budget.reserve_async(1, timeout_s=math.inf), 0.001)
            with pytest.raises(BudgetExceededError):
                await budget.reserve_async(1)
        with await budget.reserve_async("100 B"):
            pass

    run(main(), loop_factory)


def test_a_loop_that_ends_with_tasks_in_line_leaves_nothing_behind():
    budget = Budget(100)
    before = set(os.listdir("/proc/self/fd"))
    with budget.reserve(100):
        loop = asyncio.new_event_loop()
        task = loop.create_task(budget.reserve_async(10, timeout_s=FOR_EVER_S))
        loop.run_until_complete(tasks_in_line(budget, 1))
        task.cancel()
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()
    assert budget.waiting == 0
    assert not wait._mailboxes
    assert set(os.listdir("/proc/self/fd")) <= before


@LOOPS
def test_tasks_that_are_dropped_with_their_closed_loop_leave_the_line(loop_factory, capsys):
    db, errors = Budget(100, name="db"), []
    held = db.reserve(90)

    @db.reclaimer
    async def stay(need_bytes):
        await asyncio.get_running_loop().create_future()

    async def main():
        tasks = [asyncio.ensure_future(db.reserve_async(50, timeout_s=math.inf)) for _ in range(3)]
        await tasks_in_line(db, len(tasks))
        return tasks

    loop = loop_factory()
    loop.set_exception_handler(lambda loop, context: errors.append(context["message"]))
    tasks = loop.run_until_complete(main())
    loop.close()  # nobody cancelled them
    del tasks, loop
    gc.collect()
    assert errors == ["Task was destroyed but it is pending!"] * 3
    assert not db._policy.claims
    assert not wait._mailboxes
    held.release()
    with db.reserve(100):
        pass


def test_a_thousand_tasks_in_line_share_one_descriptor():
    async def main():
        budget = Budget(1000)
        held = budget.reserve(1000)
        descriptors = len(os.listdir("/proc/self/fd"))

        async def one():
            with await budget.reserve_async(1, timeout_s=math.inf):
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(one()) for _ in range(1000)]
        await tasks_in_line(budget, 1000)
        assert len(os.listdir("/proc/self/fd")) == descriptors + 1
        held.release()
        await asyncio.gather(*tasks)
        assert budget.used_bytes == 0

    run(main())


def test_abort_wakes_tasks():
    async def main():
        budget = Budget(100)
        with budget.reserve(100):
            waiting = asyncio.create_task(budget.reserve_async(1, timeout_s=math.inf))
            await tasks_in_line(budget, 1)
            budget.abort("over")
            with pytest.raises(memsafe.BudgetAbortedError, match="over"):
                await waiting

    run(main())


def test_a_loop_without_a_descriptor_left_is_told_and_holds_nothing():
    script = """
import asyncio, errno, memsafe, os, resource
async def main():
    db = memsafe.Budget(100, name="db")
    with db.reserve(100):
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        try:
            await db.reserve_async(1, timeout_s=60)
        except memsafe.KernelError as error:
            assert error.errno == errno.EMFILE and error.call == "eventfd"
            assert db.waiting == 0
            print("told")
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "told\n", "")
