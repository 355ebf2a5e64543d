"""The interpreter's own tests of subprocess, on memsafe: see tests/subprocess_suite.py."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("test.test_subprocess") is None, reason="this Python has no tests")
def test_the_interpreters_own_tests_of_subprocess_end_as_they_do_without_memsafe():
    command = [sys.executable, "-m", "tests.subprocess_suite"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert " of them by name" in done.stdout
