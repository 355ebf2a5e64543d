"""The budget tree against a plain model: whatever is done in whatever order, the counters are the sums, and those
who stand in line are served as the model says."""

import threading
import warnings

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from memsafe import Budget, BudgetClosedError, BudgetExceededError, ReservationClosedError

SIZES = st.integers(min_value=0, max_value=120)
LIMITS = st.none() | st.integers(min_value=0, max_value=150)


class Model:
    """One budget as the model sees it: what it holds itself, its limit, its place."""

    def __init__(self, budget, parent, limit):
        self.budget, self.parent, self.limit = budget, parent, limit
        self.children, self.own, self.closed, self.peak = [], 0, False, 0
        if parent:
            parent.children.append(self)

    def used(self):
        return self.own + sum(child.used() for child in self.children if not child.closed)

    def path(self):
        return [self, *(self.parent.path() if self.parent else [])]

    def full(self, size, above=()):
        """The budgets of the path that *size* does not fit into, topmost last."""
        path = [m for m in self.path() if m not in above]
        return [m for m in path if size and m.limit is not None and m.used() + size > m.limit]

    def too_small(self, size):
        return any(m.limit is not None and size > m.limit for m in self.path())

    def is_closed(self):
        return any(m.closed for m in self.path())

    def subtree(self):
        return [self, *(m for child in self.children for m in child.subtree())]


class Held:
    def __init__(self, reservation, owner, size):
        self.reservation, self.owner, self.size = reservation, owner, size


class Waiting:
    def __init__(self, claim, owner, size):
        self.claim, self.owner, self.size = claim, owner, size
        self.state, self.held_up = "in line", None


class BudgetTree(RuleBasedStateMachine):
    budgets = Bundle("budgets")
    reservations = Bundle("reservations")
    waiting = Bundle("waiting")

    def __init__(self):
        super().__init__()
        self.all, self.names, self.line = [], 0, []

    def serve(self):
        """Look along the lines, which are one here: trees do not meet."""
        full = []
        for each in self.line:
            before = [m for m in each.owner.path() if m in full]
            if each.owner.is_closed() or each.owner.too_small(each.size):
                each.state = "failed"
            elif before:
                each.held_up = before[-1]
            elif refusers := each.owner.full(each.size):
                each.held_up = refusers[-1]
                full.append(refusers[-1])
            else:
                each.state = "granted"
                each.owner.own += each.size
                self.note_peaks()
        self.line = [each for each in self.line if each.state == "in line"]

    def would_take(self, model, size, above):
        held_up = [each.held_up for each in self.line]
        waits = size and any(m in held_up for m in model.path() if m not in above)
        return not waits and not model.full(size, above)

    def note_peaks(self):
        for model in self.all:
            if not model.closed:
                model.peak = max(model.peak, model.used())

    def expect(self, model, size, call, above=()):
        """Run *call*; say whether it was taken, as the model foretells."""
        if model.is_closed():
            with pytest.raises(BudgetClosedError):
                call()
            return False
        if not self.would_take(model, size, above):
            with pytest.raises(BudgetExceededError) as caught:
                call()
            assert caught.value.requested_bytes == size
            assert caught.value.refused_by.limit_bytes is not None
            return False
        self.result = call()
        return True

    @initialize(target=budgets)
    def a_tree(self):
        root = self.root(100)
        return multiple(root, self.child(root, 60), self.child(root, None))

    @rule(target=budgets, limit=LIMITS)
    def root(self, limit):
        self.all.append(Model(Budget(limit, name="root"), None, limit))
        return self.all[-1]

    @rule(target=budgets, parent=budgets, limit=LIMITS)
    def child(self, parent, limit):
        self.names += 1
        if parent.is_closed():
            with pytest.raises(BudgetClosedError):
                parent.budget.child(f"b{self.names}", limit)
            return parent
        self.all.append(Model(parent.budget.child(f"b{self.names}", limit), parent, limit))
        return self.all[-1]

    @rule(target=reservations, model=budgets, size=SIZES)
    def reserve(self, model, size):
        if self.expect(model, size, lambda: model.budget.reserve(size)):
            model.own += size
            self.note_peaks()
            return Held(self.result, model, size)
        return Held(None, model, 0)

    @rule(held=reservations, size=SIZES)
    def grow(self, held, size):
        if held.reservation is None:
            return
        if held.reservation.released:
            with pytest.raises(ReservationClosedError):
                held.reservation.grow(size)
        elif self.expect(held.owner, size, lambda: held.reservation.grow(size)):
            held.size += size
            held.owner.own += size
            self.note_peaks()

    @rule(held=reservations, size=SIZES)
    def shrink(self, held, size):
        if held.reservation is None or held.reservation.released:
            return
        if size > held.size:
            with pytest.raises(ValueError, match="cannot shrink"):
                held.reservation.shrink(size)
            return
        held.reservation.shrink(size)
        held.size -= size
        if not held.owner.closed:
            held.owner.own -= size

    @rule(target=reservations, held=reservations, size=SIZES)
    def split(self, held, size):
        if held.reservation is None or held.reservation.released or size > held.size:
            return Held(None, held.owner, 0)
        held.size -= size
        return Held(held.reservation.split(size), held.owner, size)

    @rule(held=reservations, target_model=budgets)
    def move(self, held, target_model):
        if held.reservation is None or held.reservation.released:
            return
        source = held.owner
        if source is target_model:
            held.reservation.move_to(source.budget)  # changes nothing, closed or not
            return
        common = [] if source.is_closed() else [m for m in source.path() if m in target_model.path()]
        if self.expect(target_model, held.size, lambda: held.reservation.move_to(target_model.budget), common):
            if not source.closed:
                source.own -= held.size
            target_model.own += held.size
            held.owner = target_model
            self.note_peaks()

    @rule(held=consumes(reservations))
    def release(self, held):
        if held.reservation is None or held.reservation.released:
            return
        held.reservation.release()
        held.reservation.release()
        if not held.owner.closed:
            held.owner.own -= held.size

    @rule(model=budgets, limit=LIMITS)
    def set_limit(self, model, limit):
        model.budget.limit_bytes = limit
        model.limit = limit

    @rule(target=waiting, model=budgets, size=SIZES | st.integers(40, 60))
    def stand_in_line(self, model, size):
        self.line.append(Waiting(model.budget._stand_in_line(size, 0, 0), model, size))
        each = self.line[-1]
        self.serve()
        return each

    @rule(each=consumes(waiting))
    def leave_the_line(self, each):
        each.claim.__exit__()
        if each.state == "granted" and not each.owner.closed:
            each.owner.own -= each.size
        if each in self.line:
            self.line.remove(each)

    @rule(target=reservations, each=consumes(waiting))
    def take_what_was_granted(self, each):
        reservation = each.claim.take()
        assert (reservation is not None) == (each.state == "granted")
        if each in self.line:
            self.line.remove(each)
        return Held(reservation, each.owner, each.size if reservation else 0)

    @rule(model=budgets, size=SIZES)
    def charge_and_uncharge(self, model, size):
        if model.is_closed():
            return
        model.budget.charge(size)
        model.own += size
        self.note_peaks()
        model.budget.uncharge(size)
        model.own -= size

    @rule(model=budgets)
    def close(self, model):
        left = 0 if model.closed else model.used()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            assert model.budget.close() == left
        for each in model.subtree():
            each.closed = True

    @invariant()
    def the_line_is_served_and_counters_are_the_sums(self):
        self.serve()
        for each in self.line:
            assert each.claim.in_line
            level, need = each.claim.shortfall()
            assert need > 0
            assert each.owner.path()[level].limit is not None
        for model in self.all:
            if not model.is_closed():
                assert model.budget.used_bytes == model.used()
                assert model.budget.peak_bytes == model.peak
                left = [max(0, m.limit - m.used()) for m in model.path() if m.limit is not None]
                assert model.budget.headroom_bytes == (min(left) if left else None)

    @rule(each=waiting)
    def look(self, each):
        assert each.claim.in_line == (each.state == "in line")

    def teardown(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            for model in self.all:
                model.budget.close()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "wait", "grow", "shrink", "release", "move", "split"]),
        st.integers(0, 3),
        st.integers(0, 60),
    ),
    max_size=30,
)


@settings(max_examples=40, deadline=None)
@given(programs=st.lists(STEPS, min_size=2, max_size=4), limits=st.lists(st.integers(20, 120), min_size=3, max_size=3))
def test_threads_hold_what_they_were_given_and_nothing_else(programs, limits):
    root = Budget(100, name="root")
    budgets = [root, *(root.child(f"c{i}", limit) for i, limit in enumerate(limits))]
    held = [[] for _ in programs]

    def work(program, mine):
        for step, which, size in program:
            try:
                if step == "reserve":
                    mine.append(budgets[which].reserve(size))
                elif step == "wait":
                    mine.append(budgets[which].reserve(size, timeout_s=0.001))
                elif not mine:
                    continue
                elif step == "grow":
                    mine[-1].grow(size)
                elif step == "shrink":
                    mine[-1].shrink(min(size, mine[-1].size_bytes))
                elif step == "release":
                    mine.pop(which % len(mine)).release()
                elif step == "move":
                    mine[-1].move_to(budgets[which])
                else:
                    mine.append(mine[-1].split(mine[-1].size_bytes // 2))
            except BudgetExceededError:
                pass

    threads = [threading.Thread(target=work, args=pair) for pair in zip(programs, held, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reservations = [reservation for mine in held for reservation in mine]
    for budget in budgets[1:]:
        assert budget.used_bytes == sum(r.size_bytes for r in reservations if r.budget is budget)
    assert root.used_bytes == sum(r.size_bytes for r in reservations) <= 100
    for reservation in reservations:
        reservation.release()
    assert [(budget.used_bytes, budget.waiting) for budget in budgets] == [(0, 0)] * 4


TestBudgetTree = BudgetTree.TestCase
TestBudgetTree.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
