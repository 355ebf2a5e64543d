"""A few seconds of the soak; ``python -m tests.soak`` runs it for ten minutes."""

import subprocess
import sys


def test_a_few_seconds_of_everything_at_once_end_at_zero():
    command = [sys.executable, "-m", "tests.soak", "--seconds", "3", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "ended at zero" in done.stdout
    for what in ("task ", "reclaim ", "reserve_and_wait ", "query ", "move ", "overdraft "):
        assert what in done.stdout
