"""Requests that wait: first come first served, woken by what was freed, and nothing lost on the way."""

import math
import threading

import pytest

import memsafe
from memsafe import Budget, BudgetExceededError
from memsafe._native import ffi, lib
from tests.unit.budget_line import FOR_EVER_S, in_line, run


def test_a_request_waits_until_enough_is_released():
    budget = Budget(100)
    first, second = budget.reserve(60), budget.reserve(40)
    waiting = in_line(budget, 70)
    second.release()
    assert waiting.is_alive()
    first.shrink(10)
    assert waiting.is_alive()
    first.release()
    with waiting.outcome() as reservation:
        assert (reservation.size_bytes, budget.used_bytes) == (70, 70)
    stats = budget.stats()
    assert (stats.waits, stats.refusals, stats.waiting) == (1, 0, 0)
    assert stats.waited_s > 0


def test_what_fits_at_once_does_not_wait():
    with Budget(100).reserve(100, timeout_s=0.0), Budget(100).reserve("100", timeout_s=math.inf):
        pass


def test_first_come_first_served_and_small_ones_do_not_starve_a_large_one():
    budget = Budget(100)
    held = budget.reserve(80)
    large = in_line(budget, 90)
    small = in_line(budget, 10)
    assert budget.try_reserve(10) is None  # 20 are free, and promised
    assert budget.headroom_bytes == 20
    with budget.reserve(0):
        pass
    held.release()
    with large.outcome(), small.outcome():
        assert budget.used_bytes == 100


def test_who_gives_up_no_longer_holds_up_those_behind():
    budget = Budget(100)
    with budget.reserve(80):
        large = in_line(budget, 90, timeout_s=2)  # so long that both are in line before
        with in_line(budget, 10).outcome():
            with pytest.raises(BudgetExceededError):
                large.outcome()
            assert budget.used_bytes == 90


def test_who_waits_at_one_level_does_not_hold_up_those_who_do_not_go_through_it():
    root = Budget(100)
    tight, wide = root.child("tight", 10), root.child("wide")
    held = tight.reserve(10)
    waiting = in_line(tight, 5)
    with wide.reserve(90):
        held.release()
        with waiting.outcome():
            assert root.used_bytes == 95


def test_a_claim_moves_on_to_the_next_level_that_is_full():
    root = Budget(100)
    child = root.child("child", 50)
    others, mine = root.reserve(60), child.reserve(40)
    waiting = in_line(child, 50)
    others.shrink(1)
    mine.release()
    assert waiting.is_alive()
    assert root.try_reserve(1) is None
    others.shrink(9)
    with waiting.outcome():
        assert (root.used_bytes, child.used_bytes) == (100, 50)
    others.release()


def test_raising_a_limit_and_uncharging_serve_who_waits():
    root = Budget(100)
    child = root.child("child", 10)
    root.charge(95)
    waiting = in_line(child, 20 - 10)
    child_waiting = in_line(root, 50)
    root.uncharge(50)
    with waiting.outcome():
        root.limit_bytes = 200
        with child_waiting.outcome():
            assert root.used_bytes == 105
    root.uncharge(45)


def test_closing_a_tree_serves_nobody_who_waits_in_it():
    host = Budget(name="host")
    db = host.child("db", 100)
    held = db.child("first").reserve(51)
    waiter = in_line(db.child("second"), 50)
    with pytest.warns(ResourceWarning, match="51 B still charged: host/db/first 51 B"):
        assert db.close() == 51
    with pytest.raises(memsafe.BudgetClosedError):
        waiter.outcome()
    assert host.used_bytes == host.peak_bytes - 51 == 0
    held.release()
    assert host.used_bytes == 0


def test_closing_a_sibling_serves_who_waits():
    root = Budget(100)
    sibling = root.child("sibling")
    sibling.charge(100)
    waiting = in_line(root, 30)
    with pytest.warns(ResourceWarning):
        sibling.close()
    waiting.outcome().release()


def test_grow_waits_too():
    budget = Budget(100)
    held = budget.reserve(50)
    with budget.reserve(30) as reservation:
        waiting = in_line(budget, 40, call=reservation.grow)
        held.release()
        assert waiting.outcome() is None
        assert reservation.size_bytes == 70


def test_a_reservation_that_was_released_or_moved_while_it_waited_to_grow():
    root = Budget(name="root")
    budget, other = root.child("budget", 100), root.child("other", 100)
    for change in ("release", "move", "move to no room"):
        held, reservation = budget.reserve(50), budget.reserve(30)
        waiting = in_line(budget, 40, call=reservation.grow)
        other.limit_bytes = 60 if change == "move to no room" else 100
        if change == "release":
            reservation.release()
        else:
            reservation.move_to(other)
        held.release()
        if change == "release":
            with pytest.raises(memsafe.ReservationClosedError):
                waiting.outcome()
        elif change == "move":
            waiting.outcome()
            assert (reservation.size_bytes, other.used_bytes) == (70, 70)
        else:
            with pytest.raises(BudgetExceededError):
                waiting.outcome()
            assert (reservation.size_bytes, other.used_bytes) == (30, 30)
        reservation.release()
        assert root.used_bytes == 0


def test_a_timeout_is_a_refusal_that_says_how_long_who_holds_and_who_waits():
    budget = Budget(100, name="db")
    left, right = budget.child("left"), budget.child("right")
    with left.reserve(50), right.reserve(40):
        other = in_line(left, 30)
        with pytest.raises(BudgetExceededError, match=r"within \d+\.\d\d s") as caught:
            right.reserve(20, timeout_s=0.01)
        error = caught.value
        assert "In line there: db/left for 30 B since" in str(error)
        assert "while it holds 50 B" in str(error)
        assert "deadlocked" in str(error)
        assert [(waiter.path, waiter.requested_bytes, waiter.held_bytes) for waiter in error.waiters] == [
            ("db/left", 30, 50)
        ]
        assert (error.refused_by, error.available_bytes, error.waited_s >= 0.01) == (budget, 10, True)
        assert error.top_consumers == (("db/left", 50), ("db/right", 40))
        assert budget.stats().refusals == 1
        assert other.is_alive()
    other.outcome().release()
    assert budget.used_bytes == 0


def test_who_may_not_wait_is_refused_with_those_before_it_named():
    budget = Budget(100, name="db")
    held = budget.reserve(90)
    waiting = in_line(budget, 50)
    with pytest.raises(BudgetExceededError, match="In line there: db for 50 B") as caught:
        budget.reserve(10)
    assert caught.value.available_bytes == 10
    held.release()
    waiting.outcome().release()


def test_what_can_never_fit_does_not_wait_even_if_a_limit_is_lowered_meanwhile():
    root = Budget(100, name="root")
    child = root.child("child", 50)
    with pytest.raises(BudgetExceededError) as caught:
        child.reserve(51, timeout_s=FOR_EVER_S)
    assert caught.value.refused_by is child
    with child.reserve(20):
        waiting = in_line(child, 40)
        child.limit_bytes = 39
        with pytest.raises(BudgetExceededError, match="ask for less"):
            waiting.outcome()


@pytest.mark.parametrize("bad", [-1, math.nan, "1", object(), -math.inf])
def test_a_bad_timeout_is_a_value_error(bad):
    budget = Budget(10)
    with budget.reserve(10) as reservation:
        for call in (budget.reserve, reservation.grow):
            with pytest.raises(ValueError, match="timeout_s must be a number"):
                call(1, timeout_s=bad)
        with pytest.raises(ValueError, match="timeout_s must be a number"):
            run(budget.reserve_async(1, timeout_s=bad))


def test_abort_wakes_who_waits_at_once_and_leaves_the_others():
    root = Budget(100, name="root")
    query, other = root.child("query"), root.child("other")
    held = root.reserve(100)
    inside, outside = in_line(query.child("scan"), 10), in_line(other, 20)
    query.abort("cancelled by the user")
    with pytest.raises(memsafe.BudgetAbortedError, match="cancelled by the user"):
        inside.outcome()
    assert outside.is_alive()
    held.release()
    outside.outcome().release()
    query.abort("again")
    with pytest.raises(memsafe.BudgetAbortedError, match="cancelled by the user"):
        query.reserve(0, timeout_s=1)


def test_close_wakes_who_waits():
    root = Budget(100)
    child = root.child("child")
    with root.reserve(100):
        waiting = in_line(child, 10)
        child.close()
        with pytest.raises(memsafe.BudgetClosedError):
            waiting.outcome()


def test_closing_a_tree_grants_nothing_of_what_its_children_give_back():
    root = Budget(100)
    child = root.child("child")
    child.charge(60)
    waiting = in_line(root, 50)
    with pytest.warns(ResourceWarning):
        assert root.close() == 60
    assert child.closed
    with pytest.raises(memsafe.BudgetClosedError):
        waiting.outcome()


def test_many_threads_that_wait_never_pass_the_limit_and_end_at_zero():
    root = Budget(100)
    leaves = [root.child(f"leaf{i}", 70) for i in range(4)]
    over = []

    def work(number):
        for i in range(300):
            with leaves[number % 4].reserve(1 + (i * (7 + number)) % 69, timeout_s=FOR_EVER_S) as reservation:
                if root.used_bytes > 100:
                    over.append(root.used_bytes)
                if i % 3 == 0:
                    reservation.shrink(1)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert over == []
    assert (root.used_bytes, root.waiting, root.peak_bytes <= 100) == (0, 0, True)
    assert not root._policy.claims


def test_what_is_missing_does_not_count_those_who_wait_elsewhere():
    db = Budget(name="db")
    left, right = db.child("left", 50), db.child("right", 50)
    with left.reserve(50), right.reserve(50), left._stand_in_line(30, 0, 0), right._stand_in_line(10, 0, 0) as claim:
        assert claim.shortfall() == (0, 10)


def test_a_claim_that_has_left_is_in_no_mail():
    db, token = Budget(100, name="db"), ffi.new("uint64_t *")
    mailbox = ffi.gc(lib.ms_mailbox_new(), lib.ms_mailbox_free)
    with db._stand_in_line(10, int(ffi.cast("uintptr_t", mailbox)), 7) as claim:  # granted at once, which is told
        assert not claim.in_line
    assert not lib.ms_mailbox_take(mailbox, token)
