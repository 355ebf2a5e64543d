"""memkv's store beside a plain dict: the same keys and values, and a charge that is their sum to the byte."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from examples.memkv.store import Store, StoreFullError
from memsafe import Budget

KEYS = [b"", b"a", b"b", b"long" * 200, *(b"k%d" % i for i in range(6))]
keys = st.sampled_from(KEYS)
values = st.integers(0, 700).map(bytes) | st.sampled_from([b"", b"x"])
FAR_MS = 10**14
expiries = st.none() | st.integers(FAR_MS, FAR_MS + 5)
LIMIT_BYTES = 2000


class StoreAndDict(RuleBasedStateMachine):
    """Any sequence of writes, in a budget that is often too small."""

    evicts = False

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget(LIMIT_BYTES, name="test")
        self.store = Store(self.budget, evicts=self.evicts)
        self.model: dict[bytes, tuple[bytes, int | None]] = {}

    def teardown(self) -> None:
        self.store.close()
        assert self.budget.used_bytes == 0

    def follow_evictions(self) -> None:
        """Drop from the model what was evicted; without evictions nothing may be missing."""
        gone = [key for key in self.model if self.store.peek(key) is None]
        assert not gone or self.evicts
        for key in gone:
            del self.model[key]

    @rule(key=keys, value=values, expires_at_ms=expiries, keep=st.booleans())
    def set(self, key: bytes, value: bytes, expires_at_ms: int | None, *, keep: bool) -> None:
        before = dict(self.model)
        try:
            self.store.set(key, value, expires_at_ms, keep_expiry=keep)
        except StoreFullError:
            self.follow_evictions()
            assert before == self.model or self.evicts
            return
        if keep:
            expires_at_ms = before[key][1] if key in before else None
        self.model[key] = (value, expires_at_ms)
        self.follow_evictions()

    @rule(pairs=st.dictionaries(keys, values | st.none(), max_size=4))
    def write(self, pairs: dict[bytes, bytes | None]) -> None:
        try:
            self.store.write([(key, value, None) for key, value in pairs.items()])
        except StoreFullError:
            self.follow_evictions()
            return
        for key, value in pairs.items():
            if value is None:
                self.model.pop(key, None)
            else:
                self.model[key] = (value, None)
        self.follow_evictions()
        assert all(self.store.peek(key) == value for key, value in pairs.items())

    @rule(key=keys)
    def delete(self, key: bytes) -> None:
        assert self.store.delete(key) == (self.model.pop(key, None) is not None)

    @rule(key=keys, expires_at_ms=expiries)
    def set_expiry(self, key: bytes, expires_at_ms: int | None) -> None:
        if key not in self.model:
            return
        try:
            self.store.set_expiry(key, expires_at_ms)
        except StoreFullError:
            self.follow_evictions()
            return
        self.model[key] = (self.model[key][0], expires_at_ms)
        self.follow_evictions()

    @rule(key=keys)
    def expire_now(self, key: bytes) -> None:
        if key in self.model:
            try:
                self.store.set_expiry(key, 1)
            except StoreFullError:
                self.follow_evictions()
                return
            self.model.pop(key)
            self.follow_evictions()

    @rule()
    def expire_due(self) -> None:
        assert not self.store.expire_due(budget_s=1)

    @rule(key=keys)
    def get(self, key: bytes) -> None:
        held = self.model.get(key)
        assert self.store.get(key) == (held[0] if held else None)

    @rule()
    def compact(self) -> None:
        self.store.compact()

    @invariant()
    def the_store_is_the_model(self) -> None:
        self.store.expire_due(budget_s=1)
        assert {key: (value, expiry) for key, value, expiry in self.store.items()} == self.model
        assert len(self.store) == len(self.model)
        assert self.store.expiring == sum(expiry is not None for _, expiry in self.model.values())

        self.the_charge_is_the_sum_of_the_entries()

    def the_charge_is_the_sum_of_the_entries(self) -> None:
        total = sum(self.store.memory_usage(key) or 0 for key in self.model)
        assert self.store.used_bytes == self.budget.used_bytes == total <= LIMIT_BYTES


class EvictingStoreAndDict(StoreAndDict):
    evicts = True


StoreAndDict.TestCase.settings = EvictingStoreAndDict.TestCase.settings = settings(deadline=None)
TestStore = StoreAndDict.TestCase
TestEvictingStore = EvictingStoreAndDict.TestCase


OpenStore = Callable[..., Store]


@pytest.fixture
def open_store() -> Iterator[OpenStore]:
    """Stores that are closed at the end, and leave nothing charged."""
    opened: list[tuple[Store, Budget]] = []

    def open_one(budget: Budget | int | str = "100 MiB", *, evicts: bool = False) -> Store:
        budget = budget if isinstance(budget, Budget) else Budget(budget)
        opened.append((Store(budget, evicts=evicts), budget))
        return opened[-1][0]

    yield open_one
    for store, budget in opened:
        store.close()
        assert budget.used_bytes == 0


def test_keys_go_in_the_order_in_which_they_were_last_used(open_store: OpenStore) -> None:
    store = open_store(evicts=True)
    for i in range(500):
        store.set(b"%d" % i, b"v")
    for i in range(0, 500, 7):
        store.get(b"%d" % i)
    store.set(b"1", b"w")
    order = [i for i in range(500) if i % 7 and i != 1] + list(range(0, 500, 7)) + [1]
    for i in order:
        assert store.peek(b"%d" % i) is not None
        store.evict(1)
        assert store.peek(b"%d" % i) is None


def test_peeking_is_no_use(open_store: OpenStore) -> None:
    store = open_store(evicts=True)
    store.set(b"old", b"")
    store.set(b"new", b"")
    store.peek(b"old")
    store.evict(1)
    assert b"old" not in store


def test_an_overwritten_value_may_be_smaller_when_there_is_no_room_left(open_store: OpenStore) -> None:
    budget = Budget(10_000)
    store = open_store(budget)
    store.set(b"k", bytes(9_800))
    with pytest.raises(StoreFullError):
        store.set(b"other", b"x")
    store.set(b"k", b"small")
    store.set(b"other", b"x")


def test_making_room_may_take_the_very_key_that_is_written(open_store: OpenStore) -> None:
    budget = Budget(10_000)
    store = open_store(budget, evicts=True)
    store.set(b"k", bytes(6_000))
    store.set(b"other", bytes(3_000))
    store.set(b"k", bytes(7_000))
    assert store.evicted > 0
    assert store.peek(b"k") == bytes(7_000)
    assert budget.used_bytes == sum(store.memory_usage(key) or 0 for key in (b"k", b"other"))
    store.write([(b"k", bytes(7_500), None), (b"new", bytes(1_500), None)])
    assert budget.used_bytes == sum(store.memory_usage(key) or 0 for key in (b"k", b"new", b"other"))


def test_lowering_the_budget_evicts_at_once(open_store: OpenStore) -> None:
    budget = Budget("1 MiB")
    store = open_store(budget, evicts=True)
    for i in range(500):
        store.set(b"%d" % i, bytes(1000))
    budget.limit_bytes = 100_000
    assert budget.used_bytes <= 100_000
    assert store.evicted == 500 - len(store) > 400


def test_a_reclaim_from_another_thread_leaves_the_data_alone(open_store: OpenStore) -> None:
    budget = Budget("1 MiB")
    store = open_store(budget, evicts=True)
    store.set(b"k", bytes(1000))
    thread = threading.Thread(target=budget.reclaim, args=(1000,))
    thread.start()
    thread.join()
    assert b"k" in store


def test_a_full_store_drops_what_has_expired_before_it_refuses(open_store: OpenStore) -> None:
    store = open_store(10_000)
    store.set(b"k", bytes(9_000), 1)
    store.set(b"other", bytes(9_000))
    assert len(store) == 1


def test_expiring_many_is_bounded_in_time_and_goes_on_later(open_store: OpenStore) -> None:
    store = open_store()
    past_ms = time.time_ns() // 1_000_000 - 1
    for i in range(5000):
        store.set(b"%d" % i, b"", past_ms)
    assert store.expire_due(budget_s=0)
    assert 0 < len(store) < 5000
    while store.expire_due(budget_s=0):
        pass
    assert len(store) == store.expired - 5000 == 0


def test_a_scan_returns_every_key_once_though_the_slices_are_divided_meanwhile(open_store: OpenStore) -> None:
    store = open_store()
    stays = {b"stays:%d" % i for i in range(400)}
    for key in stays:
        store.set(key, b"")
    seen: list[bytes] = []
    cursor = added = 0
    while True:
        cursor, found = store.scan(cursor, 10)
        seen += found
        if not cursor:
            break
        for _ in range(500 if added < 10_000 else 0):
            store.set(b"new:%d" % added, b"")
            added += 1
    assert len(store) > 9000
    assert sorted(key for key in seen if key in stays) == sorted(stays)


def test_scan_takes_any_number_for_a_cursor(open_store: OpenStore) -> None:
    store = open_store()
    store.set(b"k", b"")
    assert store.scan(2**64 - 1, 10) == (0, [])
    cursor, found = store.scan(2**47, 10)
    assert cursor == 0
    assert found in ([], [b"k"])


def test_a_random_key_is_one_that_is_there(open_store: OpenStore) -> None:
    store = open_store()
    assert store.random_key() is None
    store.set(b"gone", b"", 1)
    store.set(b"k", b"")
    assert {store.random_key() for _ in range(50)} == {b"k"}


def test_what_is_charged_is_near_what_is_resident() -> None:
    # In a process of its own, since what else this one allocates would count.
    script = """
import psutil
from examples.memkv.store import Store
from memsafe import Budget
store, process = Store(Budget("1 GiB")), psutil.Process()
before = process.memory_full_info().uss
for i in range(200_000):
    store.set(b"key:%012d" % i, bytes(i % 300))
print(store.used_bytes / (process.memory_full_info().uss - before))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0.85 < float(done.stdout) < 1.3
