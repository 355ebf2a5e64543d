"""Reclaimers: who is asked, in which order, alone, and who gets what they free."""

import asyncio
import contextvars
import functools
import threading
import time

import pytest

import memsafe
from memsafe import Budget, BudgetExceededError
from memsafe.budget import reclaim, wait


def stranger(function):
    """A thread that is no part of the reclaimer that starts it; some builds have threads inherit the context."""
    return threading.Thread(target=contextvars.Context().run, args=(function,))


class Cache:
    """A cache that holds a reservation and gives back on request."""

    def __init__(self, budget, size, *, priority=0, log=None, step=None):
        self.reservation = budget.reserve(size)
        self.name = budget.name
        self.log = [] if log is None else log
        self.step = step
        budget.reclaimer(self.shed, priority=priority)

    def shed(self, need_bytes):
        freed = min(need_bytes, self.reservation.size_bytes, self.step or need_bytes)
        self.log.append((self.name, need_bytes))
        self.reservation.shrink(freed)
        return freed


def test_reclaimers_make_room_before_a_refusal():
    budget = Budget(100, name="db")
    cache = Cache(budget.child("cache"), 90)
    with budget.reserve(50) as reservation:
        assert reservation.size_bytes == 50
        assert cache.log == [("cache", 40)]
    assert budget.stats().refusals == 0
    assert budget.children[0].stats().reclaims == 1
    cache.reservation.release()


def test_reclaimers_are_asked_by_priority_then_size_then_the_requesters_own():
    db, log = Budget(100, name="db"), []
    own = db.child("own")
    caches = [
        Cache(own, 10, priority=-1, log=log),
        Cache(db.child("late"), 20, priority=10, log=log),
        Cache(db.child("small"), 10, log=log),
        Cache(db.child("large"), 20, log=log),
    ]
    with own.reserve(95):
        assert log == [("large", 55), ("small", 35), ("late", 25), ("own", 5)]
    for cache in caches:
        cache.reservation.release()


def test_reclaimers_that_free_in_steps_are_asked_again_but_not_those_that_free_nothing():
    db, log = Budget(100, name="db"), []
    steps = Cache(db.child("steps"), 90, log=log, step=20)
    useless = []

    @db.child("useless").reclaimer
    def nothing(need_bytes):
        useless.append(need_bytes)
        return 0

    with db.reserve(60):
        assert len(log) == 3
        assert len(useless) == 0  # its budget was collected: nobody holds it
    steps.reservation.release()


def test_a_reclaimer_of_nothing_is_asked_once_a_request():
    db, asked = Budget(100, name="db"), []

    @db.reclaimer(priority=-5)
    def nothing(need_bytes):
        asked.append(need_bytes)
        return 0

    cache = Cache(db.child("cache"), 90, step=30)
    with db.reserve(70):
        assert asked == [30]  # the requester's own comes last, whatever its priority
    cache.reservation.release()


def test_a_failing_or_lying_reclaimer_is_survived_and_the_next_is_asked(caplog):
    db = Budget(100, name="db")
    first, second, third = db.child("a"), db.child("b"), db.child("c")

    @first.reclaimer(priority=-2)
    def fail(need_bytes):
        raise RuntimeError("broken")

    @second.reclaimer(priority=-1)
    def lie(need_bytes):
        return need_bytes * 10

    cache = Cache(third, 90)
    with db.reserve(50):
        pass
    assert "broken" in caplog.text
    second.limit_bytes = 0
    with pytest.raises(BudgetExceededError):
        second.reserve(1)  # it lies for ever; the rounds are bounded
    cache.reservation.release()


def test_reclaimers_outside_of_the_refusing_subtree_are_not_asked():
    db, log = Budget(100, name="db"), []
    other = Cache(db.child("other"), 50, log=log)
    tight = db.child("tight", 10)
    assert tight.try_reserve(11) is None
    with tight.reserve(10):
        assert tight.try_reserve(1) is None
    assert log == []
    other.reservation.release()


def test_no_reclaimer_is_asked_for_what_can_never_fit():
    budget, log = Budget(100), []
    cache = Cache(budget, 50, log=log)
    assert budget.try_reserve(101) is None
    assert log == []
    cache.reservation.release()


def test_a_reclaimer_may_reserve_but_not_recurse():
    db, depth = Budget(100, name="db"), []
    hoard = db.reserve(90)

    @db.reclaimer
    def spill(need_bytes):
        depth.append(need_bytes)
        assert db.try_reserve(50) is None  # would ask this very function
        with db.reserve(10):
            pass
        hoard.shrink(need_bytes)
        return need_bytes

    with db.reserve(40):
        assert depth == [30]
    hoard.release()


def test_no_lock_is_held_while_a_reclaimer_runs():
    db = Budget(100, name="db")
    hoard = db.reserve(100)

    @db.reclaimer
    def spill(need_bytes):
        def elsewhere():
            db.child("made-meanwhile").close()
            hoard.shrink(need_bytes)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return need_bytes

    with db.reserve(10):
        pass
    hoard.release()


def test_lowering_the_limit_asks_reclaimers_for_the_difference():
    budget = Budget(100)
    cache = Cache(budget, 80)
    budget.limit_bytes = 30
    assert cache.log == [("budget", 50)]
    assert budget.used_bytes == 30
    cache.reservation.release()


def test_resize_ends_at_its_target_though_a_reclaimer_shrinks_that_very_reservation():
    budget = Budget(100)
    other = budget.reserve(40)
    with budget.reserve(50) as reservation:

        @budget.reclaimer
        def evict(need_bytes):
            if other.size_bytes:
                reservation.shrink(10)
                other.shrink(20)
            return need_bytes

        reservation.resize(75)
        assert reservation.size_bytes == 75
        with pytest.raises(BudgetExceededError):
            reservation.resize("200 B")
        assert reservation.size_bytes == 75
    other.release()


def test_reclaim_returns_what_was_really_freed():
    budget = Budget(100)
    cache = Cache(budget, 80)
    assert budget.reclaim(30) == 30
    assert budget.reclaim("1 KiB") == 50
    budget.remove_reclaimer(cache.shed)
    with pytest.raises(ValueError, match="not a reclaimer"):
        budget.remove_reclaimer(cache.shed)
    cache.reservation.release()


def test_try_reserve_and_grow_ask_reclaimers_too():
    budget = Budget(100)
    cache = Cache(budget.child("cache"), 100)
    with budget.try_reserve(10) as reservation:
        reservation.grow(10)
        assert reservation.try_grow(10) is True
        assert cache.reservation.size_bytes == 70
    cache.reservation.release()


# ---------------------------------------------------------------------------------------------------- by the contract


def test_what_can_free_most_is_asked_first_where_reclaimers_tell():
    db, asked = Budget(100, name="db"), []

    def cache(name, held_bytes, **options):
        budget = db.child(name)
        reservation = budget.reserve(held_bytes)

        def shed(need_bytes):
            asked.append(name)
            freed_bytes = min(need_bytes, 5, reservation.size_bytes)
            reservation.shrink(freed_bytes)
            return freed_bytes

        budget.reclaimer(shed, **options)
        return reservation

    pinned = cache("pinned", 40, reclaimable=lambda: 1)
    warm = cache("warm", 30, reclaimable=lambda: 25)
    silent = cache("silent", 20)
    broken = cache("broken", 10, reclaimable=lambda: 1 // 0)
    with db.reserve(20):
        assert asked == ["warm", "silent", "broken", "pinned"]
    assert db.reclaimable_bytes == 26
    assert db.children[1].reclaimable_bytes == 25
    for reservation in (pinned, warm, silent, broken):
        reservation.release()


def test_freed_bytes_go_to_the_requester_and_to_no_thief_in_between(monkeypatch):
    monkeypatch.setattr(wait, "_JOIN_MAX_S", 0.01)
    db = Budget(100, name="db")
    hoard, stolen = db.reserve(100), []

    @db.child("cache").reclaimer
    def nobody(need_bytes):
        return 0

    @db.reclaimer
    def shed(need_bytes):
        hoard.shrink(need_bytes)

        def thief():
            stolen.append(db.try_reserve(1))

        thread = stranger(thief)
        thread.start()
        thread.join()
        return need_bytes

    with db.reserve(60) as reservation:
        assert (reservation.size_bytes, stolen) == (60, [None])
    hoard.release()


def test_who_waits_is_served_before_a_requester_that_reclaims_and_both_are_reckoned_for():
    db, needs = Budget(100, name="db"), []
    hoard = db.reserve(100)
    waiting = threading.Thread(target=lambda: db.reserve(30, timeout_s=60).release())
    waiting.start()
    while not db.waiting:
        time.sleep(0.001)

    @db.reclaimer
    def shed(need_bytes):
        needs.append(need_bytes)
        hoard.shrink(need_bytes)
        return need_bytes

    with db.reserve(20):
        assert needs == [50]
    waiting.join()
    hoard.release()


def what_is_asked_for_two(db, hoard, give):
    """Have two threads want 30 bytes, the second while a reclaimer is asked for the first; what that was asked for."""
    calls = []
    inside, both_in_line = threading.Event(), threading.Event()

    @db.reclaimer
    def shed(need_bytes):
        calls.append(need_bytes)
        inside.set()
        assert both_in_line.wait(60)
        freed_bytes = give(need_bytes)
        hoard.shrink(freed_bytes)
        return freed_bytes

    first, second = (threading.Thread(target=lambda: db.reserve(30).release()) for _ in range(2))
    first.start()
    assert inside.wait(60)
    second.start()
    while db.waiting < 2:
        time.sleep(0.001)
    both_in_line.set()
    first.join()
    second.join()
    return calls


def test_two_threads_that_reclaim_at_once_share_the_work():
    db = Budget(100, name="db")
    with db.reserve(100) as hoard:
        assert what_is_asked_for_two(db, hoard, lambda need_bytes: 60) == [30]  # one run was enough for both
        assert db.stats().reclaims == 1
        assert db.stats().refusals == 0


def test_a_second_requester_asks_again_for_what_the_first_run_did_not_free():
    db = Budget(100, name="db")
    with db.reserve(100) as hoard:
        assert what_is_asked_for_two(db, hoard, lambda need_bytes: need_bytes)[0] == 30
        assert db.stats().refusals == 0


def test_waiting_for_a_reclaimer_that_waits_for_oneself_ends(monkeypatch):
    monkeypatch.setattr(wait, "_JOIN_MAX_S", 0.05)
    db, refused = Budget(100, name="db"), []
    hoard = db.reserve(100)

    @db.reclaimer
    def hands_on(need_bytes):
        def elsewhere():
            try:
                db.reserve(10)
            except BudgetExceededError as error:
                refused.append(str(error))

        thread = stranger(elsewhere)
        thread.start()
        thread.join()
        hoard.shrink(need_bytes)
        return need_bytes

    with db.reserve(10):
        pass
    assert "Reclaimers are still at work in db" in refused[0]
    hoard.release()


def busy_reclaimer(db, count=1):
    """Have another thread run a reclaimer of *db* that does not come back; returns what ends that."""
    go_on, began = threading.Event(), threading.Event()

    def stay(need_bytes):
        began.set()
        go_on.wait()
        return 0

    def end():
        go_on.set()
        for thread in threads:
            thread.join()

    threads = []
    for _ in range(count):
        began.clear()
        db.reclaimer(functools.partial(stay))
        threads.append(threading.Thread(target=db.reclaim, args=(1,)))
        threads[-1].start()
        assert began.wait(60)
    return end


@pytest.mark.parametrize("timeout_s", [0, 0.05])
def test_who_has_a_timeout_joins_a_reclaimer_no_longer_than_that(timeout_s, monkeypatch):
    monkeypatch.setattr(wait, "_JOIN_MAX_S", 3600.0)
    db = Budget(100, name="db")
    with db.reserve(100):
        end = busy_reclaimer(db)
        with pytest.raises(BudgetExceededError) as refused:
            db.reserve(10, timeout_s=timeout_s)  # else this hangs
        end()
    assert refused.value.waited_s is None if timeout_s == 0 else refused.value.waited_s >= timeout_s


def test_who_has_no_timeout_joins_all_reclaimers_together_only_so_long(monkeypatch):
    deadlines, join = [], wait._join
    monkeypatch.setattr(wait, "_JOIN_MAX_S", 0.05)
    monkeypatch.setattr(
        wait, "_join", lambda entry, claim, until_s: deadlines.append(until_s) or join(entry, claim, until_s)
    )
    db = Budget(100, name="db")
    with db.reserve(100):
        end = busy_reclaimer(db, 3)
        assert db.try_reserve(10) is None
        end()
    assert len(deadlines) == 3
    assert len(set(deadlines)) == 1


def test_what_a_reclaimer_says_that_it_could_free_may_itself_reserve_but_not_recurse():
    db, asked = Budget(100, name="db"), []
    hoard = db.reserve(100)

    def reclaimable():
        asked.append(db.try_reserve(10))  # which must not ask reclaimable() again
        return 5

    for _ in range(3):
        db.reclaimer(lambda need_bytes: 0, reclaimable=reclaimable)
    assert db.try_reserve(50) is None
    assert asked == [None] * 6  # once each in the two rounds
    assert db.reclaimable_bytes == 15
    assert asked == [None] * 9
    hoard.release()


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


def test_a_reclaimer_may_overdraw_a_sixteenth_of_small_limits_and_all_share_it():
    db, granted = Budget(160, name="db"), []
    hoard = db.reserve(160)

    @db.reclaimer
    def spill(need_bytes):
        for size in (6, 5, 4, 1):
            buffer = db.try_reserve(size)
            granted.append((size, buffer is not None))
            if buffer:
                hoard.shrink(0)
                buffers.append(buffer)
        for buffer in buffers:
            buffer.release()
        hoard.shrink(need_bytes)
        return need_bytes

    buffers = []
    with db.reserve(16):
        assert granted == [(6, True), (5, False), (4, True), (1, False)]
        assert (db.used_bytes, db.peak_bytes) == (160, 170)
    hoard.release()


@pytest.mark.parametrize(
    ("limit", "overdraft"),
    [("16 MiB", "1 MiB"), ("64 MiB", "1 MiB"), ("640 MiB", "10 MiB"), ("4 GiB", "64 MiB"), ("1 TiB", "64 MiB")],
)
def test_the_overdraft_is_a_64th_within_bounds(limit, overdraft):
    db, seen = Budget(limit), []
    hoard = db.reserve(limit)

    @db.reclaimer
    def spill(need_bytes):
        with db.reserve(overdraft):
            seen.append(db.try_reserve(1))
        return 0

    assert db.try_reserve(1) is None
    assert seen == [None]
    hoard.release()


def test_a_reclaimer_may_not_wait_on_its_own_tree():
    db, refusals = Budget(100, name="db"), []
    hoard = db.reserve(100)
    other = Budget(10)

    @db.reclaimer
    def spill(need_bytes):
        with pytest.raises(BudgetExceededError, match="inside a reclaimer") as caught:
            db.reserve(50, timeout_s=60)
        refusals.append(caught.value)
        with other.reserve(10, timeout_s=60):  # another tree is no concern of this one's
            pass
        hoard.shrink(need_bytes)
        return need_bytes

    with db.reserve(10):
        assert refusals[0].refused_by is db
    assert db.reclaim(5) == 5
    hoard.release()


def test_reclaimers_of_two_trees_that_need_each_other_do_not_recurse():
    first, second, depth = Budget(100, name="first"), Budget(100, name="second"), []
    hoards = [first.reserve(100), second.reserve(100)]

    @first.reclaimer
    def spill_first(need_bytes):
        depth.append("first")
        second.try_reserve(20)
        hoards[0].shrink(need_bytes)
        return need_bytes

    @second.reclaimer
    def spill_second(need_bytes):
        depth.append("second")
        first.try_reserve(20)
        return 0

    with first.reserve(10):
        assert depth == ["first", "second"]
    for hoard in hoards:
        hoard.release()


@pytest.mark.parametrize("answer", [-1, 1.5, "nonsense", None, 2**63, True])
def test_an_answer_that_is_no_size_is_logged_and_counts_as_nothing(answer, caplog):
    db = Budget(100, name="db")
    with db.reserve(100):
        db.reclaimer(lambda need_bytes: answer)
        assert db.try_reserve(1) is None
    assert "failed; the next one is asked" in caplog.text
    assert db.stats().reclaimed_bytes == 0


def test_a_boast_is_logged_and_whoever_frees_nothing_is_asked_once_whatever_it_says(caplog):
    db, asked = Budget(100, name="db"), []

    @db.reclaimer
    def boast(need_bytes):
        asked.append(need_bytes)
        return 10**9

    with db.reserve(100):
        assert db.try_reserve(1) is None
    assert asked == [1]
    assert "says it freed 953.7 MiB, of 100 B in use" in caplog.text
    assert db.stats().reclaimed_bytes == 100


def test_an_interrupt_in_a_reclaimer_passes_through_and_the_reclaimer_can_be_asked_again():
    db, ways = Budget(100, name="db"), [KeyboardInterrupt]
    hoard = db.reserve(100)

    @db.reclaimer
    def shed(need_bytes):
        if ways:
            raise ways.pop()
        hoard.shrink(need_bytes)
        return need_bytes

    with pytest.raises(KeyboardInterrupt):
        db.reserve(10)
    assert (db.used_bytes, db.waiting, len(db._policy.claims)) == (100, 0, 0)
    with db.reserve(10):
        pass
    hoard.release()


def test_move_to_asks_reclaimers_of_the_target():
    root = Budget(name="root")
    source, target = root.child("source"), root.child("target", 100)
    cache = Cache(target, 90)
    reservation = source.reserve(50)
    reservation.move_to(target)
    assert (target.used_bytes, source.used_bytes, cache.reservation.size_bytes) == (100, 0, 50)
    with source.reserve(200) as other, pytest.raises(BudgetExceededError):
        other.move_to(target)
    reservation.release()
    cache.reservation.release()


def test_lowering_a_limit_reports_what_is_still_over():
    budget = Budget(100)
    cache, pinned = Cache(budget, 50), budget.reserve(40)
    budget.limit_bytes = 30
    assert cache.reservation.size_bytes == 0
    assert (budget.over_bytes, budget.stats().over_bytes) == (10, 10)
    assert "10 B over" in str(budget.report())
    pinned.release()
    assert budget.over_bytes == 0
    cache.reservation.release()


# ---------------------------------------------------------------------------------------------------- asyncio


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


def test_what_a_reclaimer_starts_is_a_reclaimer_only_as_long_as_it_runs():
    async def main():
        db, later = Budget(160), []
        hoard = db.reserve(160)

        async def background(started, go):
            started.set_result(db.try_reserve(10) is not None)
            await go.wait()
            later.append(db.try_reserve(10))

        go = asyncio.Event()

        @db.reclaimer
        async def spill(need_bytes):
            started = asyncio.get_running_loop().create_future()
            tasks.append(asyncio.create_task(background(started, go)))
            assert await started
            hoard.shrink(need_bytes + 10)
            return need_bytes

        tasks = []
        with pytest.warns(ResourceWarning, match="never released"):
            reservation = await db.reserve_async(10)
        hoard.grow(db.headroom_bytes)
        db.remove_reclaimer(spill)
        go.set()
        await tasks[0]
        assert later == [None]
        reservation.release()
        hoard.release()

    asyncio.run(main())


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
        assert reclaim._is_coroutine_function(guise)
    for guise in (plain, functools.partial(plain, 1), len, int, object(), memsafe.trim, [].append):
        assert not reclaim._is_coroutine_function(guise)
