"""What nobody holds any more: reservations, budgets, reclaimers and cycles of them."""

import gc
import sys
import threading
import weakref

import pytest

from memsafe import Budget


def test_a_reservation_that_is_garbage_collected_warns_and_gives_back():
    budget = Budget(100, name="db")
    with pytest.warns(ResourceWarning, match="10 bytes from budget 'db' was never released"):
        budget.reserve(10)
    assert budget.used_bytes == 0


def test_a_cycle_through_reclaimer_and_reservation_is_collected():
    def build():
        budget = Budget(100, name="db")

        class Cache:
            def __init__(self):
                self.reservation = budget.child("cache").reserve(0)
                self.reservation.budget.reclaimer(self.shed)

            def shed(self, need_bytes):
                return 0

        cache = Cache()
        return weakref.ref(cache), weakref.ref(budget), budget

    cache, budget, root = build()
    gc.collect()
    assert cache() is None  # although the root of the tree is alive
    del root
    gc.collect()
    assert budget() is None


@pytest.mark.usefixtures("no_collector")
def test_a_lost_cycle_with_bytes_warns_once_and_gives_back():
    root = Budget(100, name="root")
    holder = []
    holder.append(holder)
    holder.append(root.reserve(10))
    del holder
    with pytest.warns(ResourceWarning, match="never released") as told:
        gc.collect()
    assert len(told) == 1
    assert root.used_bytes == 0


def test_a_budget_lives_as_long_as_its_reservations_and_children():
    root = Budget(100, name="root")
    reservation = root.child("child").reserve(10)
    gc.collect()
    assert root.used_bytes == 10
    assert root.children[0].name == "child"
    reservation.release()
    del reservation
    assert root.children == ()


def test_a_budget_that_is_collected_gives_its_charges_back():
    root = Budget(100, name="root")
    child = root.child("child")
    child.charge(10)
    with pytest.warns(ResourceWarning, match="'root/child' was closed with 10 B"):
        del child
    assert root.used_bytes == 0


@pytest.mark.usefixtures("no_collector")
def test_a_lost_tree_is_reported_once():
    def lose():
        root = Budget(100, name="root")
        child = root.child("child")
        held = child.reserve(10)
        root.reclaimer(lambda need_bytes: held.size_bytes)
        child.charge(5)

    lose()
    with pytest.warns(ResourceWarning, match="'root") as told:
        gc.collect()
    assert len(told) == 1


def test_closing_drops_reclaimers_with_no_lock_held():
    class Owner:
        def __call__(self, need_bytes):
            return 0

        def __del__(self):
            thread = threading.Thread(target=lambda: other.child("c"))  # takes the lock of all trees
            thread.start()
            thread.join(30)
            ended.append(not thread.is_alive())

    ended = []
    other = Budget()
    first, second = Budget(), Budget()
    first.reclaimer(Owner())
    first.close()
    owner = second.reclaimer(Owner())
    second.remove_reclaimer(owner)
    del owner
    assert ended == [True, True]


def test_children_that_are_collected_while_they_are_listed_do_no_harm():
    root = Budget()
    kept = root.child("kept")
    lost = [root.child(f"c{i}") for i in range(20)]

    def lose_one(frame, event, argument):  # as the collector might, in this thread, between any two steps
        frame.f_trace_opcodes = True
        if event == "opcode" and lost:
            lost.pop()
        return lose_one

    tracer = sys.gettrace()
    sys.settrace(lose_one)
    try:
        listed = root.children
    finally:
        sys.settrace(tracer)
    assert kept in listed  # and nothing was raised, where (not in 3.12) opcodes are traced from the first call on


def test_lost_reclaimers_are_forgotten_by_their_tree():
    root = Budget()
    for i in range(1000):
        root.child(f"c{i}").reclaimer(lambda need_bytes: 0)
    assert len(root._policy.registry) <= 32
