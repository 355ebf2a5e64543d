"""The price of ``with budget.reserve(n)`` three levels deep, beside plain Python that does the same."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from benchmarks.report import Options, Outcome, compare, main
from benchmarks.rounds import alternate, statement
from memsafe import Budget

LIMIT_BYTES = 1 << 40
TARGET = "ratio ≤ 0.35"


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
        for level in self.budget.path:
            with level.lock:
                level.used -= self.n


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
    contenders = {
        name: statement("with reserve(4096): pass", {"reserve": budget.reserve})
        for name, budget in (("ours", ours), ("plain", plain))
    }
    what, against = "with budget.reserve(n), 3 levels", "plain Python, a lock and a counter a level"
    seconds = alternate(contenders, rounds=options.rounds(50), at_least_s=0.005 if options.quick else 0.02)
    yield compare(what, against, seconds["ours"], seconds["plain"], target=TARGET)
    # A round has to be many turns of the GIL long.
    at_least_s = 10 * sys.getswitchinterval() * (1 if options.quick else 10)
    with busy_threads(4):
        seconds = alternate(contenders, rounds=options.rounds(15), at_least_s=at_least_s)
    yield compare(f"{what}, 4 busy threads", against, seconds["ours"], seconds["plain"], target=TARGET)


if __name__ == "__main__":
    sys.exit(main({"budget": measure}))
