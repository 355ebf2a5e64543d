"""With blocks: which budget is current, and which block is the last."""

import asyncio

import pytest

import memsafe
from memsafe import Budget, BudgetExceededError, current_budget


def test_a_with_block_makes_its_budget_current_and_closes_it():
    assert memsafe.current_budget() is None
    with Budget(100, name="query") as query:
        assert memsafe.current_budget() is query
        with query.child("scan") as scan:
            assert memsafe.current_budget() is scan
        assert memsafe.current_budget() is query
        assert scan.closed
    assert memsafe.current_budget() is None
    with pytest.raises(memsafe.BudgetClosedError, match="query"):
        query.reserve(1)
    with pytest.raises(memsafe.BudgetClosedError), query:
        pass


def test_a_budget_is_closed_by_the_last_of_its_blocks():
    with Budget(name="outer") as outer:
        with Budget(name="shared") as shared:
            with shared:
                assert current_budget() is shared
            assert current_budget() is shared
            shared.reserve(1).release()
        assert shared.closed
        assert current_budget() is outer
    assert current_budget() is None


def test_tasks_that_enter_one_budget_each_find_their_own_way_out():
    shared = Budget(name="shared")

    async def use(mine_entered, others_entered):
        with Budget(name="own") as own:
            with shared:
                mine_entered.set()
                await others_entered.wait()
                assert current_budget() is shared
                shared.reserve(1).release()
            assert current_budget() is own
        assert current_budget() is None

    async def both():
        first, second = asyncio.Event(), asyncio.Event()
        await asyncio.gather(use(first, second), use(second, first))

    asyncio.run(both())
    assert shared.closed


def test_blocks_that_end_out_of_order_leave_no_closed_budget_current():
    def block(name):
        with Budget(name=name) as budget:
            yield budget

    first, second = block("first"), block("second")
    next(first)
    inner = next(second)
    first.close()
    assert current_budget() is inner
    second.close()
    assert current_budget() is None


def test_an_error_that_ends_a_block_is_not_hidden_by_the_report_of_what_is_left():
    query = Budget(100)
    held = query.reserve(60)
    with pytest.raises(BudgetExceededError), query:
        query.reserve(60)  # and warnings are errors here
    held.release()
    with pytest.raises(ResourceWarning), Budget(100) as query:
        query.charge(1)
