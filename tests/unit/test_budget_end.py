"""Budgets that were closed or aborted: what is refused, reported, and still given back."""

import threading
import warnings

import pytest

import memsafe
from memsafe import Budget
from tests.unit.budget_tree import tree, used


def test_a_closed_budget_holds_nothing():
    with pytest.warns(ResourceWarning, match="10 B still charged"), Budget(name="query") as query:
        query.charge(10)
    assert (query.used_bytes, query.stats().own_bytes, query.peak_bytes) == (0, 0, 10)


def test_the_warning_of_a_close_names_the_line_that_closed():
    budget, block = Budget(), Budget()
    budget.charge(1)
    block.charge(1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        budget.close()
        with block:
            pass
    assert [warning.filename for warning in told] == [__file__, __file__]


def test_what_is_left_at_close_is_reported_returned_and_released_without_harm():
    root = Budget(100, name="root")
    query = root.child("query")
    reservation = query.child("scan").reserve(30)
    query.charge(5)
    with pytest.warns(ResourceWarning, match=r"'root/query' was closed with 35 B still charged: root/query/scan 30 B"):
        assert query.close() == 35
    assert root.used_bytes == 0
    assert query.close() == 0
    reservation.release()
    assert root.used_bytes == 0


def test_closing_children_first_or_last_ends_at_zero():
    for order in (1, -1):
        budgets = tree(100, 100, 100)
        reservation = budgets[-1].reserve(10)
        with pytest.warns(ResourceWarning):
            assert [budget.close() for budget in budgets[::order]].count(10) == 1
        reservation.release()
        assert used(budgets[:1]) == [0]


def test_a_closed_child_refuses_by_name_and_its_siblings_go_on():
    root = Budget(100, name="root")
    closed, open_ = root.child("closed"), root.child("open")
    closed.close()
    for call in (closed.reserve, closed.try_reserve, closed.charge):
        with pytest.raises(memsafe.BudgetClosedError, match="root/closed"):
            call(1)
    with pytest.raises(memsafe.BudgetClosedError):
        closed.child("late")
    with open_.reserve(100):
        pass


def test_abort_refuses_the_subtree_with_its_reason_and_releases_still_work():
    root = Budget(100, name="root")
    query = root.child("query", 50)
    scan = query.child("scan")
    reservation = scan.reserve(10)
    query.abort("cancelled by the user")
    for call in (scan.reserve, scan.try_reserve, query.reserve, reservation.grow, reservation.try_grow):
        with pytest.raises(memsafe.BudgetAbortedError, match="'root/query' was aborted: cancelled by the user"):
            call(1)
    with pytest.raises(memsafe.BudgetAbortedError):
        scan.reserve(0)
    query.limit_bytes = 1000
    with pytest.raises(memsafe.BudgetAbortedError):
        query.reserve(1)
    reservation.release()
    assert root.used_bytes == 0
    with root.reserve(100):
        pass


def test_setting_a_limit_never_undoes_an_abort():
    native_set, entered = Budget._set_limit, threading.Event()

    class Slow(Budget):
        def _set_limit(self, limit):
            if limit >= 0:
                entered.set()
                aborting.join(0.2)  # without a lock around both, the abort comes in here
            native_set(self, limit)

    budget = Slow(100)
    aborting = threading.Thread(target=lambda: entered.wait() and budget.abort("over"))
    aborting.start()
    budget.limit_bytes = 200
    aborting.join()
    with pytest.raises(memsafe.BudgetAbortedError):
        budget.reserve(1)
