"""Runs cells of benchmarks.survival in a process that may fork, and returns what became of each run."""

import json
import subprocess
import sys
from collections import Counter


def outcomes(folder, *arguments):
    """Counts of outcomes by responder: ``outcomes(tmp_path, "--rate", "full")``."""
    path = folder / "runs"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.survival", "--json", str(path), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = {}
    for line in map(json.loads, path.read_text().splitlines()):
        told.setdefault(line["cell"]["responder"], Counter())[line["outcome"]] += 1
    return told
