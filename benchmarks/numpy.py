"""The price of an array that is charged to a budget, beside plain NumPy: made and freed, in three sizes."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

from benchmarks.report import Options, Outcome, compare, main
from benchmarks.rounds import Loop, alternate, statement
from memsafe import Budget

LIMIT_BYTES = 1 << 40
SIZES = (("80 B", 10, "ratio ≤ 1.10"), ("8 KB", 1000, "ratio ≤ 1.05"), ("8 MB", 1_000_000, "ratio ≤ 1.01"))
STATEMENTS = (("np.empty", "empty(n)"), ("np.ones", "ones(n)"), ("a + b", "a + a"))


def charged(budget: Budget, loop: Loop) -> Loop:
    def run(loops: int) -> float:
        with budget.numpy():
            return loop(loops)

    return run


def measure(options: Options) -> Iterator[Outcome]:
    budget = Budget(LIMIT_BYTES, name="root").child("engine", LIMIT_BYTES).child("query", LIMIT_BYTES)
    for size, count, target in SIZES:
        for what, text in STATEMENTS:
            loop = statement(text, {"empty": np.empty, "ones": np.ones, "a": np.ones(count), "n": count})
            seconds = alternate(
                {"ours": charged(budget, loop), "plain": loop},
                rounds=options.rounds(100),
                at_least_s=0.002 if options.quick else 0.02,
            )
            yield compare(
                f"{what} of {size} under budget.numpy()",
                "plain NumPy",
                seconds["ours"],
                seconds["plain"],
                target=target,
            )


if __name__ == "__main__":
    sys.exit(main({"numpy": measure}))
