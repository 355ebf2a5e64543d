"""The tightest cell as one of the benchmarks: in how many runs the program survived all its snapshots."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.report import Options, Outcome, Result, Skipped
from benchmarks.survival.measure import UnavailableError, run_apart

_ENGINE = "memsafe"
_PEERS = ("os.fork", "redis BGSAVE")
_SNAPSHOTS = 3


def measure(options: Options) -> Iterator[Outcome]:
    runs = options.rounds(10)
    what = f"snapshot_survival: programs of {runs} that lived through {_SNAPSHOTS} snapshots, half of the limit is data"
    command = ["benchmarks.snapshot_survival", "--share", "0.5", "--rate", "full", "--snapshots", str(_SNAPSHOTS)]
    for peer in _PEERS:
        try:
            lines = run_apart([*command, "--engine", _ENGINE, peer, "--runs", str(runs)])
        except UnavailableError as error:
            yield Skipped(f"{what}, beside {peer}", str(error))
            continue
        survived = {_ENGINE: 0, peer: 0}
        for line in lines:
            survived[line["cell"]["engine"]] += line["outcome"] == "survived"
        yield Result(what, peer, survived[_ENGINE], survived[peer], unit="runs", target="every run", rounds=runs)
