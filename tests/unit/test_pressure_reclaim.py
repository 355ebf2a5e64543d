"""What a monitor's budget is asked to give when memory is short, until when, and what follows."""

from __future__ import annotations

import threading

import pytest

from memsafe import Budget
from memsafe.pressure.sources import BudgetWatermark
from tests.unit.small_machine import CRITICAL, LIMIT, LOW, MIB, NORMAL, QUIET, leave, listen, monitored


class Cache:
    """Holds bytes of a budget and gives back what it is asked for."""

    def __init__(self, budget, size, priority=0):
        self.held = budget.reserve(size)
        self.asked = []
        budget.reclaimer(self.shed, priority=priority)

    def shed(self, need_bytes):
        self.asked.append(need_bytes)
        freed_bytes = min(need_bytes, self.held.size_bytes)
        self.held.shrink(freed_bytes)
        return freed_bytes


@pytest.fixture
def budget():
    with Budget("64 MiB", name="db", soft_limit="20 MiB") as made:
        yield made


def missing_bytes(left_bytes):
    return int(QUIET.begins_at(LOW, LIMIT) * QUIET.clear_ratio) + 1 - left_bytes


def test_at_low_a_budget_is_reclaimed_to_its_soft_limit(machine, clock, budget, monkeypatch):
    monkeypatch.setattr(BudgetWatermark, "standing", lambda source: None)  # else LOW is in force already
    cache = Cache(budget, "30 MiB")
    with monitored(machine, clock, budget) as monitor:
        monitor.simulate(LOW)
    assert (cache.asked, budget.used_bytes) == ([10 * MIB], 20 * MIB)
    cache.held.release()


def test_low_by_the_soft_limit_ends_where_a_reclaimer_gives_exactly_what_is_asked(machine, clock, budget):
    cache = Cache(budget, "30 MiB")
    with monitored(machine, clock, budget) as monitor:
        assert monitor.check() == LOW
        assert (cache.asked, budget.used_bytes) == ([12 * MIB], 18 * MIB)
        clock.now_s += 11
        assert monitor.check() == NORMAL
    cache.held.release()


def test_at_low_a_budget_without_soft_limit_gives_what_is_missing(machine, clock):
    budget = Budget(name="db")
    cache = Cache(budget, "30 MiB")
    with monitored(machine, clock, budget) as monitor:
        monitor.simulate(LOW)
        assert cache.asked == []
        leave(machine, 18 * MIB)
        monitor.simulate(NORMAL)
        monitor.check()
    assert cache.asked == [missing_bytes(18 * MIB)]
    cache.held.release()


def test_at_critical_a_budget_is_reclaimed_as_far_as_it_goes(machine, clock, budget):
    first, second = Cache(budget.child("a"), "8 MiB", priority=2), Cache(budget.child("b"), "12 MiB", priority=1)
    with monitored(machine, clock, budget) as monitor:
        monitor.simulate(CRITICAL)
    assert (second.asked, first.asked) == ([20 * MIB], [8 * MIB])
    assert budget.used_bytes == 0
    first.held.release(), second.held.release()


class RealCache(Cache):
    """Also takes memory of the machine, which has it back when it is shed."""

    def __init__(self, machine, budget, size, priority):
        super().__init__(budget, size, priority)
        self.machine = machine

    def shed(self, need_bytes):
        freed_bytes = super().shed(need_bytes)
        self.machine.cgroup("/app").usage -= freed_bytes
        return freed_bytes


@pytest.fixture
def caches(machine):
    """Three of 20 MiB, the cheapest first."""
    with Budget(name="db") as db:
        made = [RealCache(machine, db.child(name), "20 MiB", priority) for priority, name in enumerate("abc")]
        yield made
        for cache in made:
            cache.held.release()


def test_at_low_only_so_much_is_shed_as_is_missing_by_priority(machine, clock, caches):
    leave(machine, 7 * MIB)
    with monitored(machine, clock, caches[0].held.budget.parent) as monitor:
        assert monitor.check() == LOW
    assert [cache.asked for cache in caches] == [[missing_bytes(7 * MIB)], [], []]


def test_at_critical_each_gives_all_it_has_until_the_headroom_is_back(machine, clock, caches):
    leave(machine, 1 * MIB)
    with monitored(machine, clock, caches[0].held.budget.parent) as monitor:
        heard = listen(monitor, CRITICAL)
        assert monitor.check() == CRITICAL
    assert [cache.asked for cache in caches] == [[60 * MIB], [40 * MIB], []], "21 MiB left are too few, 41 enough"
    assert [cache.held.size_bytes for cache in caches] == [0, 0, 20 * MIB]
    assert heard[0].available_bytes == 1 * MIB, "what it was when it was decided"


def test_a_cache_that_frees_nothing_is_passed_over(machine, clock, caches):
    budget = caches[0].held.budget.parent
    budget.reclaimer(lambda need_bytes: 0, priority=-1)
    leave(machine, 15 * MIB)
    with monitored(machine, clock, budget) as monitor:
        monitor.check()
    assert [cache.asked for cache in caches] == [[missing_bytes(15 * MIB)], [], []]


def test_above_its_soft_limit_a_budget_keeps_what_headroom_does_not_need(machine, clock, caches):
    budget = caches[0].held.budget.parent
    leave(machine, 15 * MIB)
    with monitored(machine, clock, budget) as monitor:
        monitor.check()
        assert budget.used_bytes == 60 * MIB - missing_bytes(15 * MIB)
        budget.soft_limit_bytes = 10 * MIB
        monitor.check()
        assert budget.used_bytes == 9 * MIB, "passing it is a cause of its own, which lasts until there"


def test_a_shortage_that_comes_again_is_answered_at_once_though_the_level_never_fell(machine, clock, caches):
    with monitored(machine, clock, caches[0].held.budget.parent) as monitor:
        for _ in range(2):
            leave(machine, 1 * MIB)
            assert monitor.check() == CRITICAL
        assert [cache.held.size_bytes for cache in caches] == [0, 0, 0]


def test_low_that_could_not_be_met_does_not_delay_critical(machine, clock):
    asked = []
    with Budget(name="db") as budget, budget.reserve("30 MiB"), monitored(machine, clock, budget) as monitor:
        budget.reclaimer(lambda need_bytes: asked.append(need_bytes) or 0)
        leave(machine, 1 * MIB)
        monitor.check()
        leave(machine, 15 * MIB)
        monitor.check()  # a look that began by itself, which may have seen the megabyte, is over before it is due again
        clock.now_s += 1
        assert monitor.check() == CRITICAL, "it has not cooled down, but it is LOW that is answered"
        leave(machine, 1 * MIB)
        monitor.check()
        monitor.check()
    assert asked == [30 * MIB, missing_bytes(15 * MIB), 30 * MIB]


@pytest.mark.parametrize("error", [OSError("no"), SystemExit(3)])
def test_a_reclaimer_that_fails_does_not_end_the_thread_or_keep_callbacks_from_running(
    machine, clock, budget, caplog, error
):
    @budget.reclaimer
    def fail(need_bytes):
        raise error

    with budget.reserve("30 MiB"), monitored(machine, clock, budget) as monitor:
        heard = listen(monitor, CRITICAL)
        monitor.simulate(CRITICAL)
        monitor.simulate(NORMAL)
        monitor.simulate(CRITICAL)
        assert len(heard) == 2
    assert "fail" in caplog.text


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()])
def test_a_reclaimer_that_fails_keeps_no_other_from_making_room(machine, clock, caplog, error):
    budget = Budget(name="db")
    cache = Cache(budget, "30 MiB", priority=2)

    @budget.reclaimer(priority=1)
    def fail(need_bytes):
        raise error

    with monitored(machine, clock, budget) as monitor:
        monitor.simulate(CRITICAL)
    assert (cache.asked, budget.used_bytes) == ([30 * MIB], 0)
    assert "fail" in caplog.text
    cache.held.release()


def test_a_budget_is_reclaimed_before_the_callbacks_and_trimmed_after_them(machine, clock, budget, monkeypatch):
    order = []
    cache = Cache(budget, "30 MiB")
    budget.reclaimer(lambda need_bytes: order.append("reclaim") or 0, priority=-1)
    monkeypatch.setattr("memsafe.pressure.responder.give_back", lambda **_: order.append("trim"))
    monitor = monitored(machine, clock, budget)
    monitor.on(LOW, lambda event: order.append("callback"))
    with monitor:
        assert monitor.check() == LOW, "the budget is over its soft limit"
        assert order == ["reclaim", "callback", "trim"]
        cache.held.shrink("5 MiB")
        monitor.simulate(NORMAL)
        monitor.simulate(CRITICAL)
        monitor.simulate(LOW)  # a fall: nothing is reclaimed
    assert order == ["reclaim", "callback", "trim"] * 2 + ["callback"]
    cache.held.release()


def test_a_budget_is_asked_again_while_the_cause_lasts(machine, clock, budget):
    cache = Cache(budget, "30 MiB")
    leave(machine, 15 * MIB)
    with monitored(machine, clock, budget) as monitor:
        monitor.check()
        cache.held.grow("5 MiB")
        monitor.check()
        missing = missing_bytes(15 * MIB)
        assert cache.asked == [missing]
        clock.now_s += 1
        monitor.check()
        assert cache.asked == [missing, 15 * MIB - missing], "the soft limit is met first this time"
    cache.held.release()


def test_a_budget_is_asked_again_at_once_where_much_less_is_left_than_after_the_last_time(machine, clock):
    budget = Budget(name="db")
    cache = Cache(budget, "60 MiB")
    with monitored(machine, clock, budget) as monitor:
        leave(machine, 15 * MIB)
        monitor.check()
        leave(machine, 14 * MIB)
        monitor.check()
        assert cache.asked == [missing_bytes(15 * MIB)], "a little less is no reason"
        leave(machine, 10 * MIB)
        monitor.check()
        assert cache.asked == [missing_bytes(15 * MIB), missing_bytes(10 * MIB)]
    cache.held.release()


def test_passing_the_soft_limit_of_the_budget_raises_low_without_a_look_by_the_clock(machine, clock, budget):
    heard = threading.Event()
    with monitored(machine, clock, budget) as monitor:
        monitor.check()
        monitor.on(LOW, lambda event: event.source == "budget.soft_limit" and heard.set())
        with budget.reserve("20 MiB"):
            assert monitor.check() == NORMAL, "at its soft limit it is not over it"
        with budget.reserve("21 MiB"):
            assert heard.wait(30)
            assert monitor.level == LOW


def test_the_cause_lasts_until_nine_tenths_of_the_soft_limit(machine, clock, budget):
    with monitored(machine, clock, budget) as monitor, budget.reserve("21 MiB") as held:
        assert monitor.check() == LOW
        clock.now_s += 11
        held.resize(18 * MIB + 1)
        assert monitor.check() == LOW
        clock.now_s += 11
        held.resize(18 * MIB)
        assert monitor.check() == LOW
        clock.now_s += 11
        assert monitor.check() == NORMAL
        budget.soft_limit_bytes = None
        held.resize(60 * MIB)
        assert monitor.check() == NORMAL
        budget.soft_limit_bytes = 59 * MIB
        assert monitor.check() == LOW


def test_a_monitor_leaves_nothing_in_a_budget_that_outlives_it(machine, clock, budget):
    before = len(budget._policy.soft_callbacks)
    for _ in range(3):
        with monitored(machine, clock, budget) as monitor:
            assert any(source.used for source in monitor.sources if source.name == "budget.soft_limit")
            assert len(budget._policy.soft_callbacks) == before + 1
    assert len(budget._policy.soft_callbacks) == before
    budget.reserve("30 MiB").release()


# --- what fills up meanwhile ----------------------------------------------------------------------------------------


def test_what_fills_up_during_an_answer_is_answered_without_another_wake_up(machine, monitor):
    heard = listen(monitor, LOW)
    monitor.on(LOW, lambda event: event.level == LOW and leave(machine, 2 * MIB))
    leave(machine, 15 * MIB)
    monitor.check()
    assert [event.level for event in heard] == [LOW, CRITICAL]


def test_a_reclaimer_is_asked_again_while_what_it_gives_shows_and_is_eaten_up(machine, clock):
    budget, left_bytes, asked = Budget(name="db"), 15 * MIB, []
    held = budget.reserve("30 MiB")

    @budget.reclaimer
    def drop(need_bytes):
        nonlocal left_bytes
        asked.append(need_bytes)
        held.shrink(need_bytes)
        left_bytes += need_bytes // 2 if len(asked) < 3 else need_bytes
        leave(machine, left_bytes)
        return need_bytes

    leave(machine, left_bytes)
    with monitored(machine, clock, budget) as monitor:
        monitor.check()
    missing = missing_bytes(15 * MIB)
    assert asked == [missing, missing - missing // 2, missing - missing // 2 - (missing - missing // 2) // 2]
    held.release()


def test_garbage_is_collected_in_a_quiet_moment_not_while_memory_fills_up(machine, clock, monkeypatch):
    collections = []
    monkeypatch.setattr("memsafe.pressure.responder.give_back", lambda *, collects=True: collections.append(collects))
    monkeypatch.setattr("memsafe.pressure.monitor._QUIET_S", 3600.0)
    with Budget("64 MiB", name="db") as budget, monitored(machine, clock, budget) as monitor:
        cache = Cache(budget, "30 MiB")
        monitor.check()  # the look at the start is over: from here on it looks when it is told to
        leave(machine, 15 * MIB)
        monitor.check()
        assert cache.asked
        assert True not in collections
        monitor.check()
        assert collections.count(True) == 1
        monitor.check()
        assert collections.count(True) == 1
        cache.held.release()


def test_where_nothing_else_helps_garbage_is_collected_at_once(machine, clock, budget, monkeypatch):
    collections = []
    monkeypatch.setattr("memsafe.pressure.responder.give_back", lambda *, collects=True: collections.append(collects))
    leave(machine, 2 * MIB)
    with monitored(machine, clock, budget) as monitor:
        monitor.check()
        assert collections.count(True) == 1
