"""Run a benchmark in a process of its own that holds so many bytes resident, in pages of 4 KiB."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.report import Options, Skipped
from memsafe import format_size, memory_status

GIB = 1 << 30
# A forked copy is never written to here; what remains is the page tables and everybody else.
SPARE_BYTES = 1 * GIB
WORKER = "--resident"


def sizes(options: Options) -> tuple[int, ...]:
    return (0, GIB // 4) if options.quick else (0, GIB, 4 * GIB)


def refusal(what: str, size_bytes: int, *, processes: int = 1) -> Skipped | None:
    """Return why *processes* cannot hold *size_bytes* each here, or None."""
    available_bytes = memory_status().available_bytes
    needed_bytes = processes * (size_bytes + size_bytes // 4) + SPARE_BYTES
    if available_bytes is None or needed_bytes <= available_bytes:
        return None
    return Skipped(what, f"needs {format_size(needed_bytes)}, and {format_size(available_bytes)} are available")


def measure_in_worker(module: str, size_bytes: int, rounds: int) -> dict[str, list[float]]:
    """Return what ``python -m module --resident SIZE ROUNDS`` prints: seconds, round by round, by contender."""
    command = [sys.executable, "-m", module, WORKER, str(size_bytes), str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    seconds: dict[str, list[float]] = json.loads(done.stdout)
    return seconds


def worker_arguments() -> tuple[int, int] | None:
    """Return (size_bytes, rounds) where this process is such a worker."""
    if WORKER not in sys.argv:
        return None
    size, rounds = sys.argv[sys.argv.index(WORKER) + 1 :]
    return int(size), int(rounds)


@contextmanager
def held(size_bytes: int, advice: int = mmap.MADV_NOHUGEPAGE) -> Iterator[mmap.mmap]:
    """Hold *size_bytes* of private memory, every page of it written."""
    with mmap.mmap(-1, max(size_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(advice)
        for offset in range(0, size_bytes, mmap.PAGESIZE):
            memory[offset] = 1
        yield memory
