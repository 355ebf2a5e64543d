"""The price of memory_status() and assess_fork(), beside psutil's two calls that tell a part of the same."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from benchmarks.report import Options, Outcome, Skipped, compare, main
from benchmarks.rounds import alternate, call
from memsafe import assess_fork, memory_status, run
from memsafe._kernel import cgroup
from memsafe.errors import MemsafeError

LEVELS = 3
MAPPINGS = (100, 10_000)
OURS = (("memory_status()", "≤ 250 µs"), ("assess_fork()", ""))
PEERS = ("psutil.virtual_memory()", "psutil memory_full_info()")


def measure(options: Options) -> Iterator[Outcome]:
    with ExitStack() as made:
        try:
            inner, where = made.enter_context(_nested(LEVELS)), f"{LEVELS} limited cgroups"
        except (OSError, MemsafeError) as error:
            yield Skipped(f"{LEVELS} limited cgroups, one in the other", str(error))
            inner, where = None, "no cgroup of its own"
        for count in MAPPINGS:
            # Mappings outlive what made them: each count in a process of its own.
            rounds = options.rounds(30 if count < 1000 else 10)
            command = [sys.executable, "-m", "benchmarks.status", "--mappings", str(count), str(rounds)]
            done = run(command, stdout=subprocess.PIPE, text=True, check=True, cgroup=inner)
            seconds: dict[str, list[float]] = json.loads(done.stdout)
            for ours, target in OURS:
                for peer in PEERS:
                    what = f"{ours}, {count:,} mappings, {where}"
                    yield compare(what, peer, seconds[ours], seconds[peer], target=target)


@contextmanager
def _nested(levels: int) -> Iterator[Path]:
    """Make cgroups (v1), each with a limit and in the one before; return the innermost."""
    groups = cgroup.memory_cgroups()
    if not groups or groups[0].version != 1:
        raise MemsafeError("there is no v1 memory controller: a cgroup2 with processes in it can have none below it")
    with ExitStack() as made:
        inner = Path(groups[0].directory)
        for level in range(levels):
            inner /= f"memsafe-benchmark-{os.getpid()}-{level}"
            inner.mkdir()
            made.callback(inner.rmdir)
            (inner / "memory.use_hierarchy").write_text("1")
            (inner / "memory.limit_in_bytes").write_text(str(4 * 2**30 - level))
        yield inner


def _measure_here(count: int, rounds: int) -> dict[str, list[float]]:
    held = [_mapping(number) for number in range(count)]
    contenders: dict[str, Callable[[], object]] = {
        "memory_status()": memory_status,
        "assess_fork()": assess_fork,
        "psutil.virtual_memory()": psutil.virtual_memory,
        "psutil memory_full_info()": psutil.Process().memory_full_info,
    }
    loops = {name: call(function) for name, function in contenders.items()}
    seconds = alternate(loops, rounds=rounds, at_least_s=0.005)
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
