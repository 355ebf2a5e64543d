"""Reclaimers of tasks: coroutine functions, and what only returns an awaitable."""

import asyncio
import functools

import memsafe
from memsafe import Budget
from memsafe.budget import reclaim


class AsyncCache:
    def __init__(self, budget, size):
        self.reservation, self.calls, self.gate = budget.reserve(size), [], None
        budget.reclaimer(self.shed)

    async def shed(self, need_bytes):
        self.calls.append(need_bytes)
        if self.gate:
            await self.gate.wait()
        await asyncio.sleep(0)
        freed_bytes = min(need_bytes, self.reservation.size_bytes)
        self.reservation.shrink(freed_bytes)
        return freed_bytes


def test_async_reclaimers_are_asked_by_reserve_async_only():
    async def main():
        db = Budget(100)
        cache = AsyncCache(db, 100)
        assert db.try_reserve(10) is None
        assert db.reclaim(10) == 0
        with await db.reserve_async(10):
            assert cache.calls == [10]
        cache.reservation.release()

    asyncio.run(main())


def test_tasks_that_reclaim_at_once_share_the_work():
    async def main():
        db = Budget(100)
        cache = AsyncCache(db, 100)
        cache.gate = asyncio.Event()
        tasks = [asyncio.create_task(db.reserve_async(10)) for _ in range(5)]
        while db.waiting < 5:
            await asyncio.sleep(0)
        cache.gate.set()
        for task in tasks:
            (await task).release()
        assert len(cache.calls) < 5
        assert cache.calls[0] == 10
        assert db.stats().refusals == 0
        cache.reservation.release()

    asyncio.run(main())


def test_a_task_that_is_cancelled_in_a_reclaimer_leaves_it_to_the_others():
    async def main():
        db = Budget(100)
        cache = AsyncCache(db, 100)
        cache.gate = asyncio.Event()
        first = asyncio.create_task(db.reserve_async(10))
        while not cache.calls:
            await asyncio.sleep(0)
        second = asyncio.create_task(db.reserve_async(20))
        while db.waiting < 2:
            await asyncio.sleep(0)
        first.cancel()
        cache.gate.set()
        with await second:
            assert cache.calls == [10, 20]
        assert db.used_bytes == 80
        cache.reservation.release()

    asyncio.run(main())


def test_a_plain_function_that_returns_an_awaitable_is_awaited_for_a_task():
    db = Budget(100, name="db")
    hoard = db.reserve(100)

    async def shed(need_bytes):
        hoard.shrink(need_bytes)
        return need_bytes

    db.reclaimer(lambda need_bytes: shed(need_bytes))

    async def main():
        with await db.reserve_async(10):
            assert hoard.size_bytes == 90

    asyncio.run(main())
    hoard.release()


def test_coroutine_functions_are_known_in_every_guise():
    class Callable:
        async def __call__(self, need_bytes):
            return 0

        async def method(self, need_bytes):
            return 0

    async def function(extra, need_bytes):
        return 0

    def plain(need_bytes):
        return 0

    for guise in (Callable(), Callable().method, functools.partial(function, 1), functools.partial(Callable().method)):
        assert reclaim.is_coroutine_function(guise)
    for guise in (plain, functools.partial(plain, 1), len, int, object(), memsafe.trim, [].append):
        assert not reclaim.is_coroutine_function(guise)
