"""The lead as one of the benchmarks: how long before the limit the first response comes."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import Options, Outcome, Result, Skipped

_WHAT = "survival: first response before the limit of 64 MiB, at 50 MiB/s"
_PEER = "psutil 100 ms"


def measure(options: Options) -> Iterator[Outcome]:
    runs = options.rounds(10)
    # In a process of its own: it forks, and what it has in memory is what each child begins with.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs"
        command = [sys.executable, "-m", "benchmarks.survival", "--limit", "64MiB", "--rate", "50MiB"]
        command += ["--responder", "memsafe", _PEER, "--runs", str(runs), "--baseline-runs", str(runs)]
        done = subprocess.run(
            [*command, "--json", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            yield Skipped(_WHAT, done.stderr.strip().splitlines()[-1])
            return
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    leads_s: dict[str, list[float]] = {"memsafe": [], _PEER: []}
    for line in lines:
        leads_s[line["cell"]["responder"]].append((line["lead_ms"] or 0.0) / 1e3)
    ours, peer = (statistics.median(each) for each in leads_s.values())
    yield Result(_WHAT, _PEER, ours, peer, target="ratio ≥ 1", rounds=runs)
