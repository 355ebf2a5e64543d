"""The budget tree against a plain model: whatever is done in whatever order, the counters are the sums."""

import warnings

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

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

    def fits(self, size, above=()):
        return size == 0 or all(m.limit is None or m.used() + size <= m.limit for m in self.path() if m not in above)

    def is_closed(self):
        return any(m.closed for m in self.path())

    def subtree(self):
        return [self, *(m for child in self.children for m in child.subtree())]


class Held:
    def __init__(self, reservation, owner, size):
        self.reservation, self.owner, self.size = reservation, owner, size


class BudgetTree(RuleBasedStateMachine):
    budgets = Bundle("budgets")
    reservations = Bundle("reservations")

    def __init__(self):
        super().__init__()
        self.all, self.names = [], 0

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
        if not model.fits(size, above):
            with pytest.raises(BudgetExceededError) as caught:
                call()
            assert caught.value.requested_bytes == size
            assert caught.value.refused_by.limit_bytes is not None
            return False
        self.result = call()
        return True

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
    def counters_are_the_sums(self):
        for model in self.all:
            if not model.is_closed():
                assert model.budget.used_bytes == model.used()
                assert model.budget.peak_bytes == model.peak
                left = [max(0, m.limit - m.used()) for m in model.path() if m.limit is not None]
                assert model.budget.headroom_bytes == (min(left) if left else None)

    def teardown(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            for model in self.all:
                model.budget.close()


TestBudgetTree = BudgetTree.TestCase
TestBudgetTree.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
