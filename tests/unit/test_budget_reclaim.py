"""Reclaimers: who is asked, in which order, and what is made of the answer."""

import threading

import pytest

from memsafe import Budget, BudgetExceededError


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
