"""The price of a reservation three levels deep, beside plain Python that does the same; and of a large tree."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from pyperf import perf_counter

from benchmarks.report import Options, Outcome, Result, compare, main
from benchmarks.rounds import alternate, statement
from memsafe import Budget, current_budget

LIMIT_BYTES = 1 << 40
PLAIN = "plain Python, a lock and a counter a level"
TREE = 100_000


class PlainBudget:
    """What one would write without memsafe: a counter, a limit and a lock a level; root first, undo on refusal."""

    __slots__ = ("limit", "lock", "path", "used")

    def __init__(self, limit: int, parent: PlainBudget | None = None) -> None:
        self.limit, self.used, self.lock = limit, 0, threading.Lock()
        self.path: tuple[PlainBudget, ...] = (*parent.path, self) if parent else (self,)

    def reserve(self, n: int) -> PlainReservation:
        for depth, level in enumerate(self.path):
            with level.lock:
                if level.used <= level.limit - n:
                    level.used += n
                    continue
            for charged in self.path[:depth]:
                with charged.lock:
                    charged.used -= n
            raise MemoryError(f"{n} bytes asked of {level}")
        return PlainReservation(self, n)


class PlainReservation:
    __slots__ = ("budget", "n")

    def __init__(self, budget: PlainBudget, n: int) -> None:
        self.budget, self.n = budget, n

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shrink(self.n)

    def grow(self, n: int) -> None:
        self.n += self.budget.reserve(n).n

    def shrink(self, n: int) -> None:
        for level in self.budget.path:
            with level.lock:
                level.used -= n
        self.n -= n


@contextmanager
def busy_threads(count: int) -> Iterator[None]:
    """Run *count* threads that never let go of the GIL but when they must."""
    stop = False

    def spin() -> None:
        while not stop:
            pass

    threads = [threading.Thread(target=spin, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop = True
        for thread in threads:
            thread.join()


def measure(options: Options) -> Iterator[Outcome]:
    ours = Budget(LIMIT_BYTES, name="root").child("engine", LIMIT_BYTES).child("query", LIMIT_BYTES)
    plain = PlainBudget(LIMIT_BYTES, PlainBudget(LIMIT_BYTES, PlainBudget(LIMIT_BYTES)))
    with ours.reserve(0) as held, plain.reserve(0) as plainly_held:
        jobs = (
            ("with budget.reserve(n)", "with it.reserve(4096): pass", ours, plain, "ratio ≤ 0.2"),
            ("grow(n), shrink(n)", "it.grow(4096); it.shrink(4096)", held, plainly_held, "ratio ≤ 0.15"),
        )
        for what, text, mine, peers, target in jobs:
            yield from side_by_side(options, f"{what}, 3 levels", text, mine, peers, target)
    yield from current(options)
    yield from tree(1000 if options.quick else TREE)


def side_by_side(options: Options, what: str, text: str, mine: object, peers: object, target: str) -> Iterator[Outcome]:
    """Measure one statement alone and with four busy threads beside it."""
    contenders = {name: statement(text, {"it": it}) for name, it in (("ours", mine), ("plain", peers))}
    alone = alternate(contenders, rounds=options.rounds(50), at_least_s=0.005 if options.quick else 0.02)
    yield compare(what, PLAIN, alone["ours"], alone["plain"], target=target)
    # A round has to be many turns of the GIL long.
    at_least_s = 10 * sys.getswitchinterval() * (1 if options.quick else 10)
    with busy_threads(4):
        beside = alternate(contenders, rounds=options.rounds(15), at_least_s=at_least_s)
    yield compare(f"{what}, 4 busy threads", PLAIN, beside["ours"], beside["plain"], target="1.5 of that alone")


def current(options: Options) -> Iterator[Outcome]:
    with Budget():
        contenders = {
            "ours": statement("current_budget()", {"current_budget": current_budget}),
            "empty": statement("empty()", {"empty": lambda: None}),
        }
        seconds = alternate(contenders, rounds=options.rounds(50), at_least_s=0.005)
    yield compare("current_budget()", "an empty function", seconds["ours"], seconds["empty"], target="60 ns")


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


class PlainNode:
    """What one would write for a node of a tree of budgets: a dict of children, a lock, three numbers."""

    __slots__ = ("children", "limit", "lock", "name", "parent", "peak", "used")

    def __init__(self, name: str, limit: int, parent: PlainNode | None) -> None:
        self.name, self.limit, self.parent = name, limit, parent
        self.used = self.peak = 0
        self.lock, self.children = threading.Lock(), dict[str, PlainNode]()
        if parent:
            parent.children[name] = self

    def child(self, name: str, limit: int) -> PlainNode:
        return PlainNode(name, limit, self)


def tree(size: int) -> Iterator[Outcome]:
    """Build, charge, report and close a tree of *size* budgets, a hundred children to a parent."""
    # Both are kept to the end: what one frees, the other would be built in.
    _plain, plain_s, plain_bytes = grown(PlainNode("root", LIMIT_BYTES, None).child, size)
    root = Budget(name="root")
    budgets, build_s, bytes_each = grown(root.child, size)
    seconds = {
        "build": build_s,
        "charge": timed(lambda: [budget.charge(10) for budget in budgets]),
        "report": timed(root.report),
        "uncharge": timed(lambda: [budget.uncharge(10) for budget in budgets]),
        "close": timed(root.close),
    }
    each = f"{size:,} budgets, a hundred to a parent"
    yield Result(f"{each}: bytes a budget", "PlainNode's bytes", bytes_each, plain_bytes, "B", "400 B", 1)
    for what, took_s in seconds.items():
        yield Result(f"{each}: {what}", "building PlainNodes", took_s, plain_s, "s", "", 1)


def grown(child: Callable[[str, int], Budget | PlainNode], size: int) -> tuple[list[Any], float, float]:
    """Return *size* nodes below a root, the seconds it took to make them, and the bytes each."""
    nodes: list[Any] = [None] * size
    gc.collect()
    before_bytes, began_s = resident_bytes(), perf_counter()
    for i in range(size):
        if i % 101 == 0:
            parent = nodes[i] = child(f"p{i}", LIMIT_BYTES)
        else:
            nodes[i] = parent.child(f"n{i}", LIMIT_BYTES)
    took_s = perf_counter() - began_s
    return nodes, took_s, (resident_bytes() - before_bytes) / size


def timed(work: Callable[[], object]) -> float:
    began_s = perf_counter()
    work()
    return perf_counter() - began_s


if __name__ == "__main__":
    sys.exit(main({"budget": measure}))
