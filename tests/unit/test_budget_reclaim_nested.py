"""Reclaimers that reserve themselves: how far they may go, and that they never recurse or wait."""

import asyncio

import pytest

from memsafe import Budget, BudgetExceededError


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
