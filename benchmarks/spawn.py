"""Starting /bin/true from small and large processes: memsafe.run beside subprocess.run, with and without what makes
it fork, and beside os.posix_spawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import memsafe
from benchmarks import resident
from benchmarks.report import Options, Outcome, compare, main
from benchmarks.rounds import alternate, call

PROGRAM = "/bin/true"

OURS = "memsafe.run"
OURS_ADJUSTED = "memsafe.run(oom_score_adj=500)"
PLAIN = "subprocess.run"
FORKING = "subprocess.run(preexec_fn=...)"
BESIDE_FORKING = "memsafe.run, between those"
BARE = "os.posix_spawn, waitpid"


def _posix_spawn() -> None:
    os.waitpid(os.posix_spawn(PROGRAM, [PROGRAM], os.environ), 0)


def _nothing() -> None:
    pass


CONTENDERS: dict[str, Callable[[], object]] = {
    OURS: lambda: memsafe.run([PROGRAM]),
    OURS_ADJUSTED: lambda: memsafe.run([PROGRAM], oom_score_adj=500),
    PLAIN: lambda: subprocess.run([PROGRAM]),
    FORKING: lambda: subprocess.run([PROGRAM], preexec_fn=_nothing),
    BARE: _posix_spawn,
}


def work(size_bytes: int, rounds: int) -> dict[str, list[float]]:
    """A fork leaves page faults behind for whoever comes next, so those that fork are measured apart."""
    with resident.held(size_bytes):
        contenders = {name: call(function) for name, function in CONTENDERS.items()}
        sharing = alternate({name: contenders[name] for name in (OURS, OURS_ADJUSTED, PLAIN, BARE)}, rounds=rounds)
        forking = alternate({name: contenders[name] for name in (OURS, FORKING)}, rounds=rounds // 3)
        return {**sharing, FORKING: forking[FORKING], BESIDE_FORKING: forking[OURS]}


def measure(options: Options) -> Iterator[Outcome]:
    empty: list[float] = []
    for size_bytes in resident.sizes(options):
        what = f"spawn at {memsafe.format_size(size_bytes)}"
        if (skipped := resident.refusal(what, size_bytes)) is not None:
            yield skipped
            continue
        seconds = resident.measure_in_worker("benchmarks.spawn", size_bytes, options.rounds(60))
        yield compare(what, PLAIN, seconds[OURS], seconds[PLAIN], target="ratio ≤ 1.05")
        yield compare(what, FORKING, seconds[BESIDE_FORKING], seconds[FORKING])
        yield compare(what, BARE, seconds[OURS], seconds[BARE])
        yield compare(
            f"{what}, oom_score_adj set",
            "without",
            seconds[OURS_ADJUSTED],
            seconds[OURS],
            target="ratio ≤ 1.1",
        )
        if size_bytes:
            yield compare(what, "memsafe.run at 0 B, another process", seconds[OURS], empty, target="ratio ≤ 1.15")
        else:
            empty = seconds[OURS]


if __name__ == "__main__":
    if (arguments := resident.worker_arguments()) is not None:
        print(json.dumps(work(*arguments)))
    else:
        sys.exit(main({"spawn": measure}))
