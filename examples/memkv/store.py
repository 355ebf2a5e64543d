"""The data: keys and values, what they are charged, when they expire, and who goes first when there is no room.

Everything else sees only Store's methods, so that the data can move elsewhere (off the heap) without their knowing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from threading import get_ident
from typing import Final

from memsafe import Budget

# What CPython and malloc take for an entry, so that what is charged is near what is resident. A bytes object has 33
# bytes beside its content; objects up to 512 bytes are rounded to 16, larger ones have malloc's 16 bytes on top.
_TABLE_BYTES: Final = 64  # a slot's share of a dict that is between two thirds and a third full
_SPARSE_BYTES: Final = 128  # a slot's share of a dict that has lost most of its keys
_EXPIRY_BYTES: Final = 192  # the same again, an int, a heap slot and its tuple
_SMALL_BYTES: Final = 512 - 33

# Keys are spread over slices by their hash. A slice is an ordinary dict kept in order of use, so the first key of a
# slice is the one longest unused. Slices also keep every step of growing a table small, where one dict of millions
# would copy itself at once, and give SCAN a cursor that is a place among the hashes.
_POSITION_BITS: Final = 48
_POSITIONS: Final = 1 << _POSITION_BITS
_SLICE_KEYS_MAX: Final = 512
_SLICES_STEP_BITS: Final = 4
_SLICES_BITS_MAX: Final = 12

_EVICTION_STEP_BYTES: Final = 64 * 1024
_EXPIRE_FIRST_S: Final = 0.005
_CLOCK_STRIDE: Final = 64


class StoreFullError(Exception):
    """The budget refused, and nothing may or can be evicted; nothing was changed."""


class Store:
    """Keys and values under a budget: every byte held is charged first, and given back when it goes.

    Of a key that has expired no method tells anything. Not thread-safe: it belongs to the thread that made it, and so
    do its reclaimer's evictions.

    Args:
        budget: What holds the data is charged to it. Evicting is a reclaimer of it while *evicts* is true.

    Attributes:
        evicts: Whether the keys longest unused may be dropped to make room (allkeys-lru).
        changes: Keys written, removed or touched in their expiry since the store was made; as with redis-server, what
            goes by itself is none.
        hits, misses, expired, evicted: Counts since then, or since reset_stats().
    """

    def __init__(self, budget: Budget, *, evicts: bool = False) -> None:
        self.evicts = evicts
        self.changes = 0
        self.hits = self.misses = self.expired = self.evicted = 0
        self._budget = budget
        self._charged = budget.reserve(0)
        self._thread = get_ident()
        self._expires: dict[bytes, int] = {}
        self._due: list[tuple[int, bytes]] = []  # a heap; entries that _expires does not confirm are void
        self._count = 0
        self._hand = 0
        self._set_slices([{}], 0)
        budget.reclaimer(self._reclaim)

    def _set_slices(self, slices: list[dict[bytes, bytes]], bits: int) -> None:
        self._slices = slices
        self._bits = bits
        self._shift = _POSITION_BITS - bits
        self._mask = len(slices) - 1

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: bytes) -> bool:
        return self.peek(key) is not None

    @property
    def used_bytes(self) -> int:
        """What is charged for the data."""
        return self._charged.size_bytes

    @property
    def expiring(self) -> int:
        """How many keys have an expiry."""
        return len(self._expires)

    def reset_stats(self) -> None:
        """Count from zero again."""
        self.hits = self.misses = self.expired = self.evicted = 0

    # ---- one key

    def get(self, key: bytes) -> bytes | None:
        """Return the value of *key*, or None; it counts as a use."""
        if key in self._expires and self._expire_if_due(key):
            self.misses += 1
            return None
        keys = self._slices[hash(key) >> self._shift & self._mask]
        value = keys.get(key)
        if value is None:
            self.misses += 1
            return None
        self.hits += 1
        if self.evicts:
            del keys[key]
            keys[key] = value
        return value

    def peek(self, key: bytes) -> bytes | None:
        """Return the value of *key*, or None, without any trace."""
        if key in self._expires and self._expire_if_due(key):
            return None
        return self._slices[hash(key) >> self._shift & self._mask].get(key)

    def set(self, key: bytes, value: bytes, expires_at_ms: int | None = None, *, keep_expiry: bool = False) -> None:
        """Set *key* to *value*.

        Args:
            key: What it is called.
            value: What it holds.
            expires_at_ms: When it goes, in milliseconds since 1970; None: never.
            keep_expiry: An expiry that *key* has already stays, and *expires_at_ms* is not looked at.

        Raises:
            StoreFullError: There is no room; the old value stays.
        """
        if key in self._expires:
            self._expire_if_due(key)
        if keep_expiry:
            expires_at_ms = self._expires.get(key)
        # _cost_change(), written out: this is the path that every SET takes.
        size = len(value)
        grown = size + 48 & -16 if size <= _SMALL_BYTES else size + 64 & -16
        keys = self._slices[hash(key) >> self._shift & self._mask]
        old = keys.get(key)
        if old is None:
            grown += _entry_bytes(key)
        else:
            size = len(old)
            grown -= size + 48 & -16 if size <= _SMALL_BYTES else size + 64 & -16
        if self._expires or expires_at_ms is not None:
            grown += _EXPIRY_BYTES * ((expires_at_ms is not None) - (key in self._expires))
        if grown > 0:
            evicted = self.evicted
            if not self._charged.try_grow(grown):
                raise StoreFullError
            if evicted != self.evicted:  # making room may have taken this very key: see anew what it takes
                self._charged.shrink(grown)
                self.write([(key, value, expires_at_ms)])
                return
        elif grown:
            self._charged.shrink(-grown)
        self._place(key, value, expires_at_ms)

    def write(self, changes: Sequence[tuple[bytes, bytes | None, int | None]]) -> None:
        """Set or remove several keys, or do nothing: (key, value, expires_at_ms) each, value None to remove.

        Args:
            changes: No key twice.

        Raises:
            StoreFullError: There is no room for all; nothing was written, but what may be evicted may be gone.
        """
        while True:
            grown = sum(self._cost_change(*change) for change in changes)
            if grown <= 0:
                self._charged.shrink(-grown)
                break
            evicted = self.evicted
            if not self._charged.try_grow(grown):
                raise StoreFullError
            if evicted == self.evicted:
                break
            self._charged.shrink(grown)
        for key, value, expires_at_ms in changes:
            if value is None:
                self._drop(key)
            else:
                self._place(key, value, expires_at_ms)

    def _cost_change(self, key: bytes, value: bytes | None, expires_at_ms: int | None) -> int:
        """Return by how much the charge grows when *key* gets *value* and its expiry, or goes."""
        held = self.memory_usage(key) or 0
        if value is None:
            return -held
        return _entry_bytes(key) + _value_bytes(value) + _EXPIRY_BYTES * (expires_at_ms is not None) - held

    def _place(self, key: bytes, value: bytes, expires_at_ms: int | None) -> None:
        """Put what has been charged where it belongs."""
        keys = self._slices[hash(key) >> self._shift & self._mask]
        if key not in keys:
            self._count += 1
        elif self.evicts:
            del keys[key]
        keys[key] = value
        self.changes += 1
        if expires_at_ms is not None:
            if self._expires.get(key) != expires_at_ms:
                self._expires[key] = expires_at_ms
                self._schedule(expires_at_ms, key)
        elif self._expires:
            self._expires.pop(key, None)
        if len(keys) > _SLICE_KEYS_MAX and self._bits < _SLICES_BITS_MAX:
            self._spread()

    def delete(self, key: bytes) -> bool:
        """Remove *key*; return whether it was there."""
        if key in self._expires and self._expire_if_due(key):
            return False
        if not self._remove(key):
            return False
        self.changes += 1
        return True

    def memory_usage(self, key: bytes) -> int | None:
        """Return what is charged for *key*, in bytes, or None."""
        value = self.peek(key)
        if value is None:
            return None
        return _entry_bytes(key) + _value_bytes(value) + _EXPIRY_BYTES * (key in self._expires)

    def _remove(self, key: bytes) -> int:
        """Remove *key* and give its charge back; return how much that was, 0 if it was not there."""
        value, expiring = self._drop(key)
        if value is None:
            return 0
        freed = _entry_bytes(key) + _value_bytes(value) + _EXPIRY_BYTES * expiring
        self._charged.shrink(freed)
        return freed

    def _drop(self, key: bytes) -> tuple[bytes | None, bool]:
        """Remove *key*, not its charge; return the value that it had, and whether it had an expiry."""
        value = self._slices[hash(key) >> self._shift & self._mask].pop(key, None)
        if value is None:
            return None, False
        self._count -= 1
        return value, bool(self._expires) and self._expires.pop(key, None) is not None

    # ---- expiry

    def expiry(self, key: bytes) -> int | None:
        """Return when *key* expires, in milliseconds since 1970, or None."""
        return self._expires.get(key)

    def set_expiry(self, key: bytes, expires_at_ms: int | None) -> None:
        """Have *key*, which must exist, expire at *expires_at_ms*, or never.

        Raises:
            StoreFullError: There is no room to remember it.
        """
        had = self._expires.get(key)
        if expires_at_ms is None:
            if had is not None:
                del self._expires[key]
                self._charged.shrink(_EXPIRY_BYTES)
        else:
            if had is None:
                if not self._charged.try_grow(_EXPIRY_BYTES):
                    raise StoreFullError
                if key not in self:  # making room took it
                    self._charged.shrink(_EXPIRY_BYTES)
                    return
            self._expires[key] = expires_at_ms
            self._schedule(expires_at_ms, key)
        self.changes += 1

    def expire_due(self, *, budget_s: float) -> bool:
        """Remove keys whose time has come, for about *budget_s* at most; return whether there are more."""
        now_ms = time.time_ns() // 1_000_000
        until = time.perf_counter() + budget_s
        due, expires = self._due, self._expires
        looked_at = 0
        while due and due[0][0] <= now_ms:
            when_ms, key = heappop(due)
            if expires.get(key) == when_ms:
                self._remove(key)
                self.expired += 1
            looked_at += 1
            if looked_at % _CLOCK_STRIDE == 0 and time.perf_counter() > until:
                return True
        return False

    def _expire_if_due(self, key: bytes) -> bool:
        if self._expires[key] > time.time_ns() // 1_000_000:
            return False
        self._remove(key)
        self.expired += 1
        return True

    def _schedule(self, expires_at_ms: int, key: bytes) -> None:
        heappush(self._due, (expires_at_ms, key))
        if len(self._due) > 2 * len(self._expires) + 64:  # expiries that were changed leave void entries behind
            self._due = [(when_ms, key) for key, when_ms in self._expires.items()]
            heapify(self._due)

    # ---- making room

    def evict(self, need_bytes: int) -> int:
        """Drop keys, those longest unused first, until *need_bytes* are free; return the bytes that were freed.

        The order is exact up to 512 keys. Above, the slices take turns, each giving the key that it has not used for
        longest, out of 32 to 512: a better sample than the five keys of which redis-server drops the oldest.
        """
        freed = 0
        while freed < need_bytes and self._count:
            self._hand = (self._hand + 1) & self._mask
            keys = self._slices[self._hand]
            if keys:
                freed += self._remove(next(iter(keys)))
                self.evicted += 1
        return freed

    def _reclaim(self, need_bytes: int) -> int:
        if get_ident() != self._thread:
            return 0
        before = self._charged.size_bytes
        self.expire_due(budget_s=_EXPIRE_FIRST_S)
        freed = before - self._charged.size_bytes
        if freed >= need_bytes or not self.evicts or need_bytes > before:
            return freed
        # A little more than was asked, so that the next writes do not each have to ask again.
        return freed + self.evict(need_bytes - freed + min(_EVICTION_STEP_BYTES, before // 64))

    def compact(self) -> None:
        """Give back the room in tables that removed keys have left; a dict does not by itself. One slice at a time."""
        for place, keys in enumerate(self._slices):
            if keys.__sizeof__() > _SPARSE_BYTES * (len(keys) + 2):
                self._slices[place] = dict(keys)

    def clear(self) -> int:
        """Remove every key; return how many there were."""
        count = self._count
        self._set_slices([{}], 0)
        self._expires.clear()
        self._due.clear()
        self._count = 0
        self._charged.resize(0)
        self.changes += count
        return count

    def close(self) -> None:
        """Remove every key and give everything back to the budget; nothing can be written afterwards."""
        self.clear()
        self._budget.remove_reclaimer(self._reclaim)
        self._charged.release()

    # ---- all keys

    def items(self) -> Iterator[tuple[bytes, bytes, int | None]]:
        """Yield (key, value, expires_at_ms) of every key. Nothing may be written before it has ended."""
        expires = self._expires
        for keys in self._slices:
            for key, value in keys.items():
                yield key, value, expires.get(key)

    def keys(self, accept: Callable[[bytes], object]) -> list[bytes]:
        """Return every key that *accept* is true of."""
        self._expire_all()
        return [key for keys in self._slices for key in keys if accept(key)]

    def scan(self, cursor: int, count: int) -> tuple[int, list[bytes]]:
        """Return the next cursor, 0 at the end, and about *count* keys from *cursor* on.

        Whoever goes from 0 to 0 sees every key that was there all the time, once, whatever is written between.

        Args:
            cursor: 0, or what the last call returned.
            count: At least 1.
        """
        found: list[bytes] = []
        looked_at = 0
        while cursor < _POSITIONS:
            place = cursor >> self._shift
            if looked_at > 10 * count or len(found) >= count:
                return cursor, self._not_expired(found)
            ahead = sorted((p, key) for key in self._slices[place] if (p := hash(key) & _POSITIONS - 1) >= cursor)
            missing = count - len(found)
            if len(ahead) > missing:
                cursor = ahead[missing][0]
                found += [key for position, key in ahead if position < cursor]
                if cursor != ahead[missing - 1][0]:
                    return cursor, self._not_expired(found)
                # Keys of one position cannot be told apart by a cursor: they are returned together.
                found += [key for position, key in ahead if position == cursor]
                cursor += 1
            else:
                found += [key for _, key in ahead]
                cursor = (place + 1) << self._shift
            looked_at += 1
        return 0, self._not_expired(found)

    def random_key(self) -> bytes | None:
        """Return some key, or None if there is none."""
        while self._count:
            place = random.randrange(len(self._slices))
            while not self._slices[place]:
                place = (place + 1) & self._mask
            key = random.choice(list(self._slices[place]))
            if self.peek(key) is not None:
                return key
        return None

    def _not_expired(self, keys: Iterable[bytes]) -> list[bytes]:
        expires = self._expires
        return [key for key in keys if key not in expires or not self._expire_if_due(key)]

    def _expire_all(self) -> None:
        while self.expire_due(budget_s=1.0):
            pass

    def _spread(self) -> None:
        """Make sixteen slices of each, once the slices are full on average."""
        if self._count <= _SLICE_KEYS_MAX * len(self._slices):
            return
        bits = min(self._bits + _SLICES_STEP_BITS, _SLICES_BITS_MAX)
        shift, mask = _POSITION_BITS - bits, (1 << bits) - 1
        slices: list[dict[bytes, bytes]] = [{} for _ in range(1 << bits)]
        for place, keys in enumerate(self._slices):
            for key, value in keys.items():
                slices[hash(key) >> shift & mask][key] = value
            self._slices[place] = {}
        self._set_slices(slices, bits)


def _entry_bytes(key: bytes) -> int:
    return _value_bytes(key) + _TABLE_BYTES


def _value_bytes(value: bytes) -> int:
    size = len(value)
    return size + 48 & -16 if size <= _SMALL_BYTES else size + 64 & -16
