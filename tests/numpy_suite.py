"""NumPy's own tests, with every array that they make charged to a budget: ``python -m tests.numpy_suite [NAME ...]``.

Each file runs twice in a process of its own, without memsafe and with it. Every test must end alike, and each budget at
zero. NAMEs are files of numpy/_core/tests without test_ and .py.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.ma
import numpy.random
import pytest

import memsafe

NAMES = ("multiarray", "numeric", "umath", "mem_overlap")
TESTS = Path(np.__file__).parent / "_core" / "tests"

# What NumPy makes once, when it is first asked, must not be charged to a test that happens to be first.
np.random.seed(0)


class Outcomes:
    """Notes how each test ended; with a budget, charges what each test makes, to a child of its own."""

    def __init__(self, budget: memsafe.Budget | None) -> None:
        self.budget = budget
        self.of: dict[str, str] = {}
        self.left: dict[str, int] = {}
        self.tests: dict[str, memsafe.Budget] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        if self.budget is None:
            return (yield)
        charged = self.tests[item.nodeid] = self.budget.child(str(len(self.tests)))
        with charged.numpy():
            report = yield
        item._instance = item._obj = None  # pytest keeps them
        return report

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid] = report.outcome


def run(name: str, how: str) -> dict[str, Any]:
    """Run a file in this process: how each test ended, and what is left in the budget."""
    budget = memsafe.Budget(name="suite")
    outcomes = Outcomes(budget if how == "charged" else None)
    options = ["-q", "-q", "-p", "no:cacheprovider", "-p", "no:warnings", "-c", "/dev/null", f"--rootdir={TESTS}"]
    begin_s = time.monotonic()
    status = pytest.main([*options, str(TESTS / f"test_{name}.py")], plugins=[outcomes])
    assert status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), status
    took_s = time.monotonic() - begin_s
    gc.collect()
    return {
        "outcomes": outcomes.of,
        "left_bytes": {test: one.used_bytes for test, one in outcomes.tests.items() if one.used_bytes},
        "peak_bytes": budget.peak_bytes,
        "took_s": took_s,
    }


def in_a_process(name: str, how: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.numpy_suite", "--one", name, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(name: str) -> bool:
    """Run a file without and with a budget, and print what came of it; return whether it was the same."""
    plain, charged = in_a_process(name, "plain"), in_a_process(name, "charged")
    before, after, left = plain["outcomes"], charged["outcomes"], charged["left_bytes"]
    differing = [test for test in {**before, **after} if before.get(test) != after.get(test)]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in Counter(after.values()).items())
    print(
        f"test_{name}: {counts}; {len(differing)} otherwise than without; {sum(left.values())} bytes left of a peak "
        f"of {memsafe.format_size(charged['peak_bytes'])}; {charged['took_s']:.0f} s, without {plain['took_s']:.0f} s",
        flush=True,
    )
    for test in differing:
        print(f"    {test}: {after.get(test)}, without {before.get(test)}")
    for test, left_bytes in left.items():
        print(f"    {test}: {left_bytes} bytes left")
    return not differing and not left


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print("\n" + json.dumps(run(*sys.argv[2:])))
    else:
        alike = [compare(name) for name in sys.argv[1:] or NAMES]
        sys.exit(not all(alike))
