"""What is done about pressure, by this machine's kernel: in small cgroups, full ones, and without taking memory."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest

from memsafe import Budget, PressureLevel, PressureMonitor
from memsafe._kernel import cgroup
from memsafe.pressure.reserve import RESERVE_BYTES, BlockReserve
from tests.integration import scenario
from tests.integration.sealed import seal
from tests.integration.test_pressure_kernel import NO_POLLING, SEALED, Filler, join, v1_group, without_stalls

__all__ = ["v1_group"]

MIB = 1024**2
NORMAL, LOW, CRITICAL = PressureLevel
LIMIT = 128 * MIB


# --- budgets --------------------------------------------------------------------------------------------------------


class MappedCache:
    """16 MiB off the heap."""

    def __init__(self, budget, priority):
        self._region = budget.map("16 MiB")
        with self._region.view() as view:
            view[:] = b"x" * len(view)
        budget.reclaimer(self.drop, priority=priority)

    @property
    def is_full(self):
        return not self._region.closed

    def drop(self, need_bytes):
        self._region.close()
        return 16 * MIB


class HeapCache:
    """16 MiB in blocks of the C library, which keeps them when they are freed."""

    BLOCK_BYTES = 64 * 1024

    def __init__(self, budget, priority):
        self._held = budget.reserve("16 MiB")
        self.blocks = []
        budget.reclaimer(self.drop, priority=priority)

    @property
    def is_full(self):
        return bool(self.blocks)

    def drop(self, need_bytes):
        self.blocks.clear()
        self._held.release()
        return 16 * MIB

    @classmethod
    def fill(cls, caches):
        for _ in range(16 * MIB // cls.BLOCK_BYTES):  # side by side, so that none lies at the end of the heap
            for cache in caches:
                cache.blocks.append(b"x" * (cls.BLOCK_BYTES - 64))


def sheds_what_it_must(group, on_heap):
    join(group)
    (own, *_) = cgroup.memory_cgroups()
    db, filler = Budget(name="db"), Filler()
    caches = [(HeapCache if on_heap else MappedCache)(db.child(name), n) for n, name in enumerate("abc")]
    if on_heap:
        HeapCache.fill(caches)
    full = []
    with PressureMonitor(db, thresholds=NO_POLLING) as monitor:
        for level in (NORMAL, LOW, LOW):
            monitor.check()  # what the last one left to a quiet moment is done
            if level:
                # Counted beforehand: what is shed on the way is not to be filled again.
                used_bytes = own.usage_bytes() - sum(own.file_cache_bytes())
                for _ in range((LIMIT - NO_POLLING.begins_at(LOW, LIMIT) - used_bytes) // MIB + 2):
                    filler.take()
            assert monitor.check() == level
            full.append([cache.is_full for cache in caches])
    for cache in caches:
        cache.drop(0)
    return {"full": full}


@pytest.mark.parametrize("on_heap", [False, True], ids=["mapped", "on the heap"])
def test_only_so_many_caches_are_shed_as_headroom_needs(v1_group, on_heap):
    found = scenario.run(sheds_what_it_must, v1_group, on_heap)
    assert found["full"] == [[True, True, True], [False, True, True], [False, False, True]]


# --- in a full cgroup -----------------------------------------------------------------------------------------------

FULL = 64 * MIB

# Nothing is heard before the limit itself.
AT_THE_LIMIT = without_stalls(low_ratio=0, low_bytes_min=0, low_bytes_max=0, critical_ratio=0, critical_bytes_min=0)


CACHE_BYTES = 24 * MIB


class Cache:
    """*CACHE_BYTES*, which a reclaimer or a callback drops."""

    def __init__(self, budget):
        self._region = budget.map(CACHE_BYTES)
        self.drops = 0

    def fill(self):
        self._region.commit()
        touch(self._region.view())

    def drop(self, _):
        self._region.decommit()
        self.drops += 1
        return CACHE_BYTES

    def close(self):
        self._region.close()


def touch(memory):
    """Write every page, without the GIL: whoever is to help may need it while this thread stands still."""
    place = (ctypes.c_char * len(memory)).from_buffer(memory)
    ctypes.memset(place, 1, len(memory))


def fill(size_bytes):
    pages = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    touch(pages)
    pages.close()


def acts_where_nothing_is_left(group, by, rounds):
    # Nobody is killed: whoever wants one page more stands still until somebody else gives some back.
    Path(group, "memory.oom_control").write_text("1")
    join(group)
    Path(group, "memory.limit_in_bytes").write_text(str(FULL))
    (own, *_) = cgroup.memory_cgroups()
    budget = Budget(name="db")
    cache = Cache(budget)
    with PressureMonitor(budget, thresholds=AT_THE_LIMIT) as monitor:
        if by == "reclaimer":
            budget.reclaimer(cache.drop)
        else:
            monitor.on(CRITICAL, cache.drop)
        for _ in range(rounds):
            # By what is left beside the cache, which any cause may empty at any time: an OOM of the last round, say,
            # that is heard of only now. Who then takes what nobody can give waits for ever.
            wanted_bytes = FULL - own.usage_bytes() - CACHE_BYTES + 8 * MIB
            cache.fill()
            monitor.check()
            fill(wanted_bytes)
            monitor.simulate(NORMAL)
    cache.close()
    return {"drops": cache.drops, "peak": int(Path(group, "memory.max_usage_in_bytes").read_text())}


@pytest.mark.parametrize("by", ["reclaimer", "callback"])
def test_handlers_run_twenty_times_where_not_a_page_is_left(v1_group, by):
    found = scenario.run(acts_where_nothing_is_left, v1_group, by, 20)
    assert found["drops"] >= 20
    assert found["peak"] == FULL


def survives_at_its_limit(group, rounds):
    join(group)
    Path(group, "memory.limit_in_bytes").write_text(str(FULL))
    limit = Path(group, "memory.limit_in_bytes")
    budget = Budget(name="db")
    cache = Cache(budget)
    budget.reclaimer(cache.drop)
    with PressureMonitor(budget, thresholds=NO_POLLING, reserve="1 MiB") as monitor:
        for _ in range(rounds):
            cache.fill()
            monitor.check()
            limit.write_text(Path(group, "memory.usage_in_bytes").read_text())
            monitor.check()
            limit.write_text(str(FULL))
            monitor.simulate(NORMAL)
    cache.close()
    return {"drops": cache.drops}


def test_a_process_whose_limit_falls_to_what_it_uses_survives_twenty_times(v1_group):
    assert scenario.run(survives_at_its_limit, v1_group, 20)["drops"] >= 20


# --- what the way from the wake-up to the callbacks takes -----------------------------------------------------------


def walk(monitor):
    """All that may happen under pressure: looks, rises, reclaiming, callbacks, trims, the fall."""
    for level in (LOW, CRITICAL, NORMAL):
        monitor.check()
        monitor.simulate(level)


def monitored(db, cache, heard, **options):
    db.reclaimer(cache.drop)
    monitor = PressureMonitor(db, thresholds=NO_POLLING, reserve="1 MiB", **options).start()
    for level in (LOW, NORMAL):
        monitor.on(level, heard.append)
    return monitor


def takes_no_memory_from_the_kernel(how):
    db, heard = Budget(name="db"), []
    cache = Cache(db)
    cache.fill()
    monitor = monitored(db, cache, heard)
    for _ in range(3):
        walk(monitor)
    heard.clear()
    hoarded = []
    if how == "a callback that does":
        monitor.on(CRITICAL, lambda event: hoarded.append(bytearray(MIB)))
    monitor.simulate(NORMAL)
    seal(memory=True)
    monitor.simulate(LOW)
    monitor.simulate(CRITICAL)
    assert [event.level for event in heard] == [LOW, CRITICAL]
    os._exit(SEALED)


def test_from_the_wake_up_to_the_last_callback_no_memory_is_taken_from_the_kernel():
    scenario.run(takes_no_memory_from_the_kernel, "", returncode=SEALED)
    scenario.run(takes_no_memory_from_the_kernel, "a callback that does", returncode=-signal.SIGSYS)


def stands_in_without_memory():
    db, seen = Budget(name="db", soft_limit="1 MiB"), []
    inside, charged = threading.Semaphore(0), threading.Semaphore(0)
    monitor = PressureMonitor(db, thresholds=NO_POLLING).start()

    @monitor.on(NORMAL)
    def wait_for_low(event):
        inside.release()
        assert charged.acquire(timeout=30)
        while monitor.level == NORMAL:  # until the deputy has heard of it
            pass
        seen.append(monitor.level)

    for _ in range(3):
        if len(seen) == 2:
            seal(memory=True)
        monitor.simulate(LOW)
        with contextlib.suppress(TimeoutError):
            monitor.simulate(NORMAL, timeout_s=0)
        assert inside.acquire(timeout=30)
        db.charge(2 * MIB)
        charged.release()
        monitor.check()
        db.uncharge(2 * MIB)
    assert seen == [LOW] * 3
    os._exit(SEALED)


def test_who_looks_while_a_callback_runs_takes_no_memory_from_the_kernel_either():
    scenario.run(stands_in_without_memory, returncode=SEALED)


def counts_what_is_allocated(holds_blocks):
    if not holds_blocks:
        BlockReserve.take = lambda self: None
    db, peaks, before = Budget(name="db"), [], []
    cache = Cache(db)
    monitor = monitored(db, cache, [])
    monitor.on(LOW, lambda event: peaks.append(tracemalloc.get_traced_memory()[1]))
    monitor.on(NORMAL, lambda event: peaks.append(tracemalloc.get_traced_memory()[1]))
    walk(monitor)
    peaks.clear()
    tracemalloc.start()
    for _ in range(5):
        for level in (LOW, CRITICAL, NORMAL):
            monitor.check()
            tracemalloc.reset_peak()
            before.append(tracemalloc.get_traced_memory()[0])
            monitor.simulate(level)
    tracemalloc.stop()
    monitor.close()
    cache.close()
    return {"peaks": [peak - base for peak, base in zip(peaks, before, strict=True)][3:]}


def test_what_is_allocated_on_the_way_is_little_and_was_held_for_it():
    alone = scenario.run(counts_what_is_allocated, False)["peaks"]
    print("\nheld at once, at the most, from the wake-up to the callback:", max(alone), "bytes", file=sys.stderr)
    assert 0 < max(alone) < RESERVE_BYTES / 8
    held = scenario.run(counts_what_is_allocated, True)["peaks"]
    assert max(held) < max(alone) / 2, "what was held for it is given back first; the rest is the drill's own request"
