"""CPython's own test.test_subprocess with memsafe.Popen and memsafe.run in their place: ``python -m
tests.subprocess_suite [CLASS ...]``.

Each of its classes runs twice in a process of its own, without memsafe and with it. Every test must end alike, but for
those that are named here with a reason, each of which must not. It is the interpreter's own test: with another
interpreter it is another one.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
import unittest
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any

import memsafe

MODULE = "test.test_subprocess"
WAYS = ("plain", "memsafe")
AT_ONCE = 4  # they wait for timeouts most of the time

_PREEXEC = "preexec_fn, which is a ValueError by name: it needs a fork"
_INSIDE = "replaces a function inside subprocess and asserts that it was called"
DIFFERENT = {
    "POSIXProcessTestCase.test_close_fds_after_preexec": _PREEXEC,
    "POSIXProcessTestCase.test_preexec": _PREEXEC,
    "POSIXProcessTestCase.test_preexec_errpipe_does_not_double_close_pipes": _PREEXEC,
    "POSIXProcessTestCase.test_preexec_exception": _PREEXEC,
    "POSIXProcessTestCase.test_preexec_fork_failure": _PREEXEC,
    "POSIXProcessTestCase.test_preexec_gc_module_failure": _PREEXEC,
    "POSIXProcessTestCase.test_surrogates_error_message": _PREEXEC,
    "POSIXProcessTestCase.test_exception_errpipe_bad_data": _INSIDE,
    "POSIXProcessTestCase.test_exception_errpipe_normal": _INSIDE,
    "POSIXProcessTestCase.test__use_vfork": _INSIDE,
    "ProcessTestCase.test__use_vfork": _INSIDE,
    "ProcessTestCaseNoPoll.test__use_vfork": _INSIDE,
    "MiscTests.test_run_keyboardinterrupt_no_kill": "replaces subprocess.Popen and asserts that run() uses it",
}


class Outcomes(unittest.TestResult):
    """Notes how each test ended."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, str] = {}
        self.why: dict[str, str] = {}

    def _note(self, test: unittest.TestCase, outcome: str, error: Any = None) -> None:
        name = test.id().removeprefix(f"{MODULE}.")
        self.of[name] = outcome
        if error is not None:
            self.why[name] = self._exc_info_to_string(error, test)

    def addSuccess(self, test):  # noqa: N802
        self._note(test, "passed")

    def addFailure(self, test, err):  # noqa: N802
        self._note(test, "failed", err)

    def addError(self, test, err):  # noqa: N802
        self._note(test, "failed", err)

    def addSkip(self, test, reason):  # noqa: N802
        self._note(test, "skipped")

    def addExpectedFailure(self, test, err):  # noqa: N802
        self._note(test, "failed as expected")

    def addUnexpectedSuccess(self, test):  # noqa: N802
        self._note(test, "passed unexpectedly")

    def addSubTest(self, test, subtest, err):  # noqa: N802
        if err is not None:
            self._note(test, "failed", err)


def classes() -> list[str]:
    """The classes of tests that this interpreter's module has."""
    module = import_module(MODULE)
    return [name for name, found in vars(module).items() if isinstance(found, type) and _has_tests(found)]


def _has_tests(found: type) -> bool:
    return issubclass(found, unittest.TestCase) and bool(unittest.defaultTestLoader.getTestCaseNames(found))


def run(name: str, how: str) -> dict[str, Any]:
    """Run a class in this process: how each test ended, and why."""
    if how == "memsafe":
        subprocess.Popen, subprocess.run = memsafe.Popen, memsafe.run  # type: ignore[misc]
    outcomes = Outcomes()
    tests = unittest.defaultTestLoader.loadTestsFromName(f"{MODULE}.{name}")
    with TemporaryDirectory() as folder, chdir(folder):  # the tests make folders of fixed names where they are
        tests.run(outcomes)
    return {"of": outcomes.of, "why": outcomes.why}


def in_a_process(name: str, how: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.subprocess_suite", "--one", name, how]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(names: list[str]) -> bool:
    """Run classes both ways, and print what came of it; return whether all ended as they must."""
    begin_s = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = list(pool.map(in_a_process, *zip(*itertools.product(names, WAYS), strict=True)))
    plain = {test: how for one in runs[::2] for test, how in one["of"].items()}
    ours = {test: how for one in runs[1::2] for test, how in one["of"].items()}
    why = {test: text for one in runs for test, text in one["why"].items()}
    differing = {test for test in {**plain, **ours} if plain.get(test) != ours.get(test)}
    named = differing & DIFFERENT.keys()
    wrong = differing - named | {test for test in DIFFERENT.keys() - named if plain.get(test) == "passed"}
    counts = ", ".join(f"{count} {outcome}" for outcome, count in Counter(ours.values()).items())
    print(
        f"{MODULE} of Python {sys.version.split()[0]}: {counts}; {len(differing)} otherwise than without, "
        f"{len(named)} of them by name; {time.monotonic() - begin_s:.0f} s"
    )
    for test in sorted(named):
        print(f"    {test}: {DIFFERENT[test]}")
    for test in sorted(wrong):
        print(f"    WRONG {test}: {ours.get(test)}, without {plain.get(test)}\n{why.get(test, '')}")
    return not wrong


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print("\n" + json.dumps(run(*sys.argv[2:])))
    else:
        sys.exit(not compare(sys.argv[1:] or classes()))
