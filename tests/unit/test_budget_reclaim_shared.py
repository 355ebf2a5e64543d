"""Reclaimers that several ask at once: they share the work, and who gets what it frees."""

import contextvars
import functools
import threading
import time

import pytest

from memsafe import Budget, BudgetExceededError
from memsafe.budget import wait


def stranger(function):
    """A thread that is no part of the reclaimer that starts it; some builds have threads inherit the context."""
    return threading.Thread(target=contextvars.Context().run, args=(function,))


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
