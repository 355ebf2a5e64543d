"""The price of memory_status() and assess_fork(), beside psutil's two calls that tell a part of the same."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from collections.abc import Callable, Iterator

import psutil

from benchmarks.report import Options, Outcome, compare, main
from benchmarks.rounds import alternate, call
from memsafe import assess_fork, memory_status

MAPPINGS = (100, 10_000)
OURS: dict[str, Callable[[], object]] = {"memory_status()": memory_status, "assess_fork()": assess_fork}


def measure(options: Options) -> Iterator[Outcome]:
    for count in MAPPINGS:
        # Mappings outlive what made them: each count in a process of its own.
        rounds = options.rounds(30 if count < 1000 else 10)
        command = [sys.executable, "-m", "benchmarks.status", "--mappings", str(count), str(rounds)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds: dict[str, list[float]] = json.loads(done.stdout)
        for ours in OURS:
            for peer in (name for name in seconds if name not in OURS):
                yield compare(f"{ours}, {count:,} mappings", peer, seconds[ours], seconds[peer])


def _measure_here(count: int, rounds: int) -> dict[str, list[float]]:
    held = [_mapping(number) for number in range(count)]
    peers: dict[str, Callable[[], object]] = {
        "psutil.virtual_memory()": psutil.virtual_memory,
        "psutil memory_full_info()": psutil.Process().memory_full_info,
    }
    contenders = {name: call(function) for name, function in {**OURS, **peers}.items()}
    seconds = alternate(contenders, rounds=rounds, at_least_s=0.005)
    for mapping in held:
        mapping.close()
    return seconds


def _mapping(number: int) -> mmap.mmap:
    """Return two pages, every second time written: neighbours with other permissions are not merged."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if number % 2 else 0)
    mapping = mmap.mmap(-1, 2 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, protection)
    if number % 2:
        mapping[:] = b"x" * len(mapping)
    return mapping


if __name__ == "__main__":
    if sys.argv[1:2] == ["--mappings"]:
        print(json.dumps(_measure_here(int(sys.argv[2]), int(sys.argv[3]))))
    else:
        sys.exit(main({"status": measure}))
