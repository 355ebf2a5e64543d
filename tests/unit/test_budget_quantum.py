"""Budgets that draw from their ancestors in multiples of a quantum, and what they keep for later."""

import threading

import pytest

import memsafe
from memsafe import Budget, BudgetExceededError


def test_a_budget_with_a_quantum_is_exact_itself_and_seldom_asks_its_ancestors():
    root = Budget(1000, name="root")
    worker = root.child("worker", 500, quantum=100)
    with worker.reserve(10) as reservation:
        assert (worker.used_bytes, worker.slack_bytes, root.used_bytes) == (10, 90, 100)
        assert root.own_bytes == 0
        reservation.grow(90)
        assert (worker.slack_bytes, root.used_bytes) == (0, 100)
        reservation.grow(1)
        assert (worker.slack_bytes, root.used_bytes) == (99, 200)
        reservation.shrink(100)
        assert (worker.used_bytes, worker.slack_bytes, root.used_bytes) == (1, 199, 200)
        assert worker.headroom_bytes == 499
        assert root.headroom_bytes == 800
    assert (worker.used_bytes, worker.slack_bytes, root.used_bytes) == (0, 100, 100)
    worker.close()
    assert root.used_bytes == 0


def test_what_a_budget_with_a_quantum_refuses_itself_changes_nothing_above():
    root, told = Budget(name="root", soft_limit=50), []
    root.on_soft_limit(lambda budget: told.append(budget.used_bytes))
    worker = root.child("worker", 10, quantum=64)
    tight = root.child("wide", quantum=64).child("tight", 10)
    for budget in (worker, tight):
        with pytest.raises(BudgetExceededError) as refused:
            budget.reserve(20)
        assert refused.value.refused_by is budget
        assert (root.used_bytes, root.peak_bytes, budget.parent.peak_bytes) == (0, 0, 0)
    with root.reserve(60):
        assert told == [60]


def test_slack_below_a_budget_is_not_left_when_it_is_closed():
    root = Budget(name="root")
    db = root.child("db")
    workers = [db.child(name, quantum=64) for name in "ab"]
    for worker in workers:
        worker.reserve(10).release()
    assert db.used_bytes == 128
    assert db.close() == 0
    assert root.used_bytes == 0


def test_slack_refuses_nobody_and_keeps_nobody_waiting():
    root = Budget(1000, name="root")
    workers = [root.child(f"worker{i}", quantum=100) for i in range(3)]
    for worker in workers:
        worker.reserve(1).release()
    assert root.used_bytes == 300
    with root.reserve(1000):
        assert [worker.slack_bytes for worker in workers] == [0, 0, 0]
        waiting = threading.Thread(target=lambda: root.reserve(500, timeout_s=60).release())
        waiting.start()
        while not root.waiting:
            pass
        with pytest.raises(BudgetExceededError):
            workers[0].reserve(1)
    waiting.join()
    assert root.used_bytes == 0
    with root.reserve(995), workers[0].reserve(3) as last:  # where no quantum fits, it takes what it needs
        assert (root.used_bytes, workers[0].slack_bytes) == (998, 0)
        assert last.try_grow(3) is False


def test_slack_does_not_outlive_an_abort_or_a_close_above():
    root = Budget(1000, name="root")
    middle = root.child("middle")
    worker = middle.child("worker", quantum=100)
    worker.reserve(1).release()
    middle.abort("over")
    for size in (0, 1):
        with pytest.raises(memsafe.BudgetAbortedError):
            worker.reserve(size)
    middle.close()
    assert root.used_bytes == 0
    with pytest.raises(ValueError, match="quantum"):
        root.child("bad", quantum=-1)


def test_moving_out_of_and_into_a_quantum_keeps_every_level_right():
    root = Budget(1000, name="root")
    left, right = root.child("left", quantum=64), root.child("right", quantum=100)
    reservation = left.child("leaf").reserve(70)
    assert (left.used_bytes, left.slack_bytes, root.used_bytes) == (70, 58, 128)
    reservation.move_to(right)  # the root has them all the time
    assert (left.used_bytes, left.slack_bytes) == (0, 58)
    assert (right.used_bytes, right.slack_bytes, root.used_bytes) == (70, 0, 128)
    reservation.grow(1)
    assert (right.used_bytes, right.slack_bytes, root.used_bytes) == (71, 99, 228)
    reservation.move_to(root)
    assert (right.used_bytes, right.slack_bytes) == (0, 99)
    assert root.used_bytes == 71 + 58 + 99
    reservation.release()
    left.close()
    right.close()
    assert root.used_bytes == 0
