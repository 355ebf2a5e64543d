"""A part of NumPy's own tests under budgets; all of it by ``python -m tests.numpy_suite``."""

import subprocess
import sys
from pathlib import Path


def test_numpys_own_tests_end_alike_and_at_zero_when_every_array_is_charged():
    command = [sys.executable, "-m", "tests.numpy_suite", "item_selection"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "; 0 otherwise than without; 0 bytes left" in done.stdout
