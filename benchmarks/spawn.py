"""Starting /bin/true from small and large processes: memsafe.run beside subprocess.run, with and without what makes
it fork, and beside os.posix_spawn. The processes of all sizes stand side by side and measure in turns."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import IO

import memsafe
from benchmarks import resident
from benchmarks.report import Options, Outcome, compare, main
from benchmarks.rounds import alternate, call

PROGRAM = "/bin/true"
TURNS = 8
FORKS_A_TURN = 3  # a fork of 8 GiB takes a second

OURS = "memsafe.run"
OURS_ADJUSTED = "memsafe.run(oom_score_adj=500)"
OURS_LIMITED = "memsafe.run(memory_limit=...)"
OURS_AWAITED = "memsafe.run_async"
PLAIN = "subprocess.run"
FORKING = "subprocess.run(preexec_fn=...)"
BESIDE_FORKING = "memsafe.run, between those"
BARE = "os.posix_spawn, waitpid"
AWAITED = "asyncio.create_subprocess_exec, wait"


def _posix_spawn() -> None:
    os.waitpid(os.posix_spawn(PROGRAM, [PROGRAM], os.environ), 0)


def _nothing() -> None:
    pass


async def _asyncio_spawn() -> None:
    await (await asyncio.create_subprocess_exec(PROGRAM)).wait()


SHARING: dict[str, Callable[[], object]] = {
    OURS: lambda: memsafe.run([PROGRAM]),
    OURS_ADJUSTED: lambda: memsafe.run([PROGRAM], oom_score_adj=500),
    PLAIN: lambda: subprocess.run([PROGRAM]),
    BARE: _posix_spawn,
}
COPYING: dict[str, Callable[[], object]] = {
    BESIDE_FORKING: SHARING[OURS],
    FORKING: lambda: subprocess.run([PROGRAM], preexec_fn=_nothing),
}


def work(rounds: int) -> dict[str, list[float]]:
    """A fork leaves page faults behind for whoever comes next, so those that fork are measured apart."""
    sharing = alternate({name: call(function) for name, function in SHARING.items()}, rounds=rounds)
    copying = alternate({name: call(function) for name, function in COPYING.items()}, rounds=FORKS_A_TURN)
    return {**sharing, **copying}


def serve(size_bytes: int, rounds: int) -> None:
    """Measure once for each line of stdin, in a process of *size_bytes*."""
    with resident.held(size_bytes):
        for _ in sys.stdin:
            print(json.dumps(work(rounds)), flush=True)


def in_turns(sizes: list[int], rounds: int) -> dict[int, dict[str, list[float]]]:
    """Return the seconds, by size and contender, of processes that hold so much and take turns."""
    turns = min(TURNS, rounds)
    seconds: dict[int, dict[str, list[float]]] = {size_bytes: {} for size_bytes in sizes}
    with ExitStack() as stack:
        workers = {}
        for size_bytes in sizes:
            command = [sys.executable, "-m", "benchmarks.spawn", resident.WORKER, str(size_bytes), str(rounds // turns)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            workers[size_bytes] = stack.enter_context(subprocess.Popen(command, text=True, **pipes))
        for _ in range(turns):
            for size_bytes, worker in workers.items():
                for name, some in _ask(worker.stdin, worker.stdout).items():
                    seconds[size_bytes].setdefault(name, []).extend(some)
    return seconds


def _ask(stdin: IO[str], stdout: IO[str]) -> dict[str, list[float]]:
    print(file=stdin, flush=True)
    seconds: dict[str, list[float]] = json.loads(stdout.readline())
    return seconds


def measure(options: Options) -> Iterator[Outcome]:
    sizes: list[int] = []
    for size_bytes in (0, resident.GIB // 4) if options.quick else (0, *(resident.GIB * n for n in (1, 4, 8))):
        what = f"spawn at {memsafe.format_size(size_bytes)}"
        if (skipped := resident.refusal(what, sum(sizes) + size_bytes)) is None:
            sizes.append(size_bytes)
        else:
            yield skipped
    by_size = in_turns(sizes, options.rounds(1000))
    for size_bytes, seconds in by_size.items():
        what = f"spawn at {memsafe.format_size(size_bytes)}"
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
            small = by_size[0][OURS]
            yield compare(what, "memsafe.run at 0 B, in turns", seconds[OURS], small, target="ratio ≤ 1.15")
    yield from _measure_the_rest(options)


def _measure_the_rest(options: Options) -> Iterator[Outcome]:
    with asyncio.Runner() as runner:
        contenders: dict[str, Callable[[], object]] = {
            OURS: SHARING[OURS],
            OURS_LIMITED: lambda: memsafe.run([PROGRAM], memory_limit="1 GiB"),
            OURS_AWAITED: lambda: runner.run(memsafe.run_async([PROGRAM])),
            AWAITED: lambda: runner.run(_asyncio_spawn()),
        }
        seconds = alternate({name: call(function) for name, function in contenders.items()}, rounds=options.rounds(400))
    yield compare("spawn, memory_limit set", "without", seconds[OURS_LIMITED], seconds[OURS])
    yield compare("spawn, awaited", AWAITED, seconds[OURS_AWAITED], seconds[AWAITED])


if __name__ == "__main__":
    if (arguments := resident.worker_arguments()) is not None:
        serve(*arguments)
    else:
        sys.exit(main({"spawn": measure}))
