"""A few seconds of the soak; ``python -m tests.soak`` runs it for ten minutes."""

import subprocess
import sys

from tests import soak


def test_a_few_seconds_of_everything_at_once_end_at_zero():
    command = [sys.executable, "-m", "tests.soak", "--seconds", "3", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "ended at zero" in done.stdout
    for what in soak.EXPECTED:
        assert f"{what} " in done.stdout
