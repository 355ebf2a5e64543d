"""Every public call of budgets, a thousand times: no object, no block of malloc and no descriptor is left."""

import asyncio
import contextlib
import ctypes
import gc
import os
import sys
import threading
import warnings

import numpy
import pytest

from memsafe import (
    Budget,
    BudgetAbortedError,
    BudgetExceededError,
    ProcessBudget,
    Reservation,
    current_budget,
)

ROUNDS = 300

runner = asyncio.Runner()  # one for all rounds: a loop leaves something behind by itself


@pytest.fixture(scope="module", autouse=True)
def close_the_runner():
    yield
    runner.close()


def call(target, *names):
    """Read the properties and call the methods without arguments."""
    for name in names:
        value = getattr(target, name)
        if callable(value):
            value()


def tree():
    root = Budget(1000, name="root", soft_limit=900)
    return root, root.child("child", 500)


def budget_reads():
    root, child = tree()
    call(child, "path", "children", "limit_bytes", "soft_limit_bytes", "used_bytes", "peak_bytes", "own_bytes")
    call(child, "charged_bytes", "closed", "aborted", "waiting", "headroom_bytes", "over_bytes", "reclaimable_bytes")
    root.child("batched", quantum=64).reserve(1).release()
    call(root, "slack_bytes", "parent", "name", "stats", "report", "top_consumers", "__repr__")
    str(root.report())
    root.report().as_dict()


def budget_takes_and_gives():
    root, child = tree()
    child.reserve(10).release()
    child.try_reserve("10 B").release()
    child.reserve(10, timeout_s=1).release()
    child.charge(10)
    child.uncharge(10)
    with Budget().map(1):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        child.reserve(10)
        root.close()


def budget_settings():
    root, child = tree()
    child.limit_bytes = 10**6
    child.soft_limit_bytes = 5
    child.on_soft_limit(lambda budget: None)
    child.reserve(10).release()
    root.limit_bytes = None


def reclaiming():
    root, child = tree()
    held = [child.reserve(500)]
    shed = child.reclaimer(lambda need_bytes: held[0].shrink(need_bytes) or need_bytes, reclaimable=lambda: 5)
    child.reserve(10).release()
    root.reclaim(10)
    child.remove_reclaimer(shed)
    held[0].release()


def refusals():
    _root, child = tree()
    with child.reserve(500) as held:
        for attempt in (child.reserve, held.grow, lambda n: child.reserve(n, timeout_s=0.0001)):
            with pytest.raises(BudgetExceededError):
                attempt(1)
        assert child.try_reserve(1) is None
        assert not held.try_grow(1)


def reservation_changes():
    root, child = tree()
    with child.reserve(10) as held:
        held.grow(10)
        held.try_grow(10)
        held.shrink(10)
        held.resize(50)
        held.merge(held.split(20))
        held.move_to(root)
        call(held, "size_bytes", "budget", "released", "__repr__")
    held.release()


def blocks():
    with Budget() as budget, budget:
        assert current_budget() is budget


def aborts():
    root, child = tree()
    child.abort("over")
    with pytest.raises(BudgetAbortedError):
        child.reserve(1)
    root.close()


def waiting_threads():
    root, child = tree()
    held = root.reserve(1000)
    thread = threading.Thread(target=lambda: child.reserve(10, timeout_s=60).release())
    thread.start()
    while not root.waiting:
        pass
    held.release()
    thread.join()


def waiting_tasks():
    async def main():
        root, child = tree()
        held = root.reserve(1000)
        tasks = [asyncio.ensure_future(child.reserve_async(10, timeout_s=60)) for _ in range(2)]
        while root.waiting < 2:
            await asyncio.sleep(0)
        tasks[0].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await tasks[0]
        held.release()
        (await tasks[1]).release()

    runner.run(main())


def memory_of_its_own():
    root, child = tree()
    root.limit_bytes = child.limit_bytes = "1 MiB"
    with child.map(100_000, committed=False) as region:
        region.commit(0, 8192)
        region.view(0, 10)[0] = 1
        region.advise("random")
        region.decommit(4096, 4096)
        with contextlib.suppress(BudgetExceededError):
            child.map("2 MiB")
    with child.map(1, shared=True, guard_pages=True) as region:
        region.fileno()


def arrays():
    _root, child = tree()
    with child.numpy():
        array = numpy.ones(10)
        array.resize(20, refcheck=False)
        with contextlib.suppress(MemoryError):
            numpy.ones(1000)
        with contextlib.suppress(MemoryError):
            array.resize(1000, refcheck=False)


def processes():
    budget = Budget.for_process()
    call(budget, "explain", "fraction", "limit_bytes")
    budget.child("child").reserve(1).release()


CASES = {
    budget_reads: 1, budget_takes_and_gives: 1, budget_settings: 1, reclaiming: 1, refusals: 0.3,
    reservation_changes: 1, blocks: 1, aborts: 1, waiting_threads: 0.3, waiting_tasks: 0.3, processes: 0.1,
    memory_of_its_own: 1, arrays: 1,
}  # fmt: skip


class MallocInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "given"]
    ]
    _fields_ += [("free", ctypes.c_size_t), ("keep", ctypes.c_size_t)]


def held():
    """Objects, bytes of malloc and descriptors that are in use."""
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallocInfo
    return sys.getallocatedblocks(), mallinfo2().given, len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_nothing_is_left(case):
    rounds = int(ROUNDS * CASES[case])
    for _ in range(10):  # caches of the interpreter fill
        case()
    allowed = (rounds // 2, rounds * 24, 0)  # 24: the smallest block that malloc gives
    for _ in range(10):  # what the interpreter keeps for once, and other threads for a moment, is no leak
        before = held()
        for _ in range(rounds):
            case()
        grown = [after - then for then, after in zip(before, held(), strict=True)]
        if all(left <= most for left, most in zip(grown, allowed, strict=True)):
            return
    pytest.fail(f"blocks, bytes and descriptors left by {rounds} rounds: {grown}")


def test_every_public_name_is_in_a_case():
    used = {name for case in CASES for code in codes(case.__code__) for name in (*code.co_names, *code.co_consts)}
    for kind in (Budget, Reservation, ProcessBudget):
        public = {name for name in dir(kind) if not name.startswith("_")}
        assert public <= used, kind


def codes(code):
    yield code
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            yield from codes(constant)
