"""The lead as one of the benchmarks: how long before the limit the first response comes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import Options, Outcome, Result, Skipped

_WHAT = "survival: first response before the limit of 64 MiB, at 50 MiB/s"
_PEER = "psutil 100 ms"


class UnavailableError(Exception):
    """It cannot be run here; says why."""


def run_apart(command: list[str]) -> list[dict[str, Any]]:
    """Run a module of benchmarks that forks, in a process of its own: what it has in memory each child begins with.

    Raises:
        UnavailableError: It ended with an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs"
        done = subprocess.run(
            [sys.executable, "-m", *command, "--json", str(path)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UnavailableError(done.stderr.strip().splitlines()[-1])
        return [json.loads(line) for line in path.read_text().splitlines()]


def measure(options: Options) -> Iterator[Outcome]:
    runs = options.rounds(10)
    command = ["benchmarks.survival", "--limit", "64MiB", "--rate", "50MiB", "--responder", "memsafe", _PEER]
    try:
        lines = run_apart([*command, "--runs", str(runs), "--baseline-runs", str(runs)])
    except UnavailableError as error:
        yield Skipped(_WHAT, str(error))
        return
    leads_s: dict[str, list[float]] = {"memsafe": [], _PEER: []}
    for line in lines:
        leads_s[line["cell"]["responder"]].append((line["lead_ms"] or 0.0) / 1e3)
    ours, peer = (statistics.median(each) for each in leads_s.values())
    yield Result(_WHAT, _PEER, ours, peer, target="ratio ≥ 1", rounds=runs)
