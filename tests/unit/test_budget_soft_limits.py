"""Soft limits: told once a crossing, by whoever passed it."""

import threading

import pytest

from memsafe import Budget
from tests.unit.budget_line import in_line


def test_the_soft_limit_is_told_once_a_crossing_with_hysteresis():
    budget, told = Budget(1000, name="db", soft_limit=100), []
    budget.on_soft_limit(told.append)
    with budget.child("a").reserve(100) as reservation:
        assert told == []
        reservation.grow(1)
        assert told == [budget]
        reservation.shrink(5)
        reservation.grow(5)
        assert len(told) == 1  # did not fall to 90
        reservation.shrink(11)
        reservation.grow(20)
        assert len(told) == 2
        budget.soft_limit_bytes = "1 KiB"
        reservation.grow(100)
        assert len(told) == 2


def test_an_interrupt_in_a_soft_limit_callback_passes_through():
    budget = Budget(soft_limit=5)

    @budget.on_soft_limit
    def interrupted(_):
        raise KeyboardInterrupt

    for call in (budget.reserve, budget.try_reserve, budget.charge):
        with pytest.raises(KeyboardInterrupt):
            call(10)
        assert (budget.used_bytes, budget.charged_bytes) == (0, 0)
    with budget.reserve(1) as reservation, pytest.raises(KeyboardInterrupt):
        reservation.grow(10)
    assert budget.used_bytes == 0


def test_an_interrupt_in_a_soft_limit_callback_leaves_a_reservation_as_large_as_it_was():
    db = Budget(100, name="db", soft_limit=50)
    reservation = db.reserve(10)

    @db.on_soft_limit
    def interrupt(budget):
        raise KeyboardInterrupt

    for change, size in ((reservation.grow, 80), (reservation.resize, 90), (reservation.grow, "80")):
        with pytest.raises(KeyboardInterrupt):
            change(size)
        assert (reservation.size_bytes, db.used_bytes) == (10, 10)
    reservation.release()


def test_a_failing_soft_limit_callback_is_logged_and_the_reservation_stands(caplog):
    budget, told = Budget(1000, soft_limit=10), []

    @budget.on_soft_limit
    def fail(budget):
        raise RuntimeError("broken")

    budget.on_soft_limit(told.append)
    with budget.reserve(11):
        assert told == [budget]
    assert "broken" in caplog.text


def test_a_soft_limit_that_was_passed_by_what_nobody_took_is_told_by_the_next():
    db, told = Budget(100, name="db", soft_limit=50), []
    db.on_soft_limit(lambda budget: told.append(budget.used_bytes))
    held = [db.reserve(25), db.reserve(25), db.reserve(0)]
    with db._stand_in_line(40, 0, 0):  # granted at once, and never taken
        assert db.used_bytes == 90
    assert told == []
    held[2].grow(10)
    assert told == [60]
    for each in held:
        each.release()


def test_the_soft_limit_is_told_by_who_waited():
    budget, told = Budget(100, soft_limit=50), []
    budget.on_soft_limit(lambda each: told.append((each, threading.current_thread())))
    held = budget.reserve(40)
    waiting = in_line(budget, 70)
    held.release()
    waiting.outcome().release()
    assert told == [(budget, waiting)]
