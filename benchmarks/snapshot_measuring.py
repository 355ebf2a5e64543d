"""What measuring a snapshot takes, and how much is copied until a bound on copies ends the child.

    python -m benchmarks.snapshot_measuring [--rounds N] [duty] [bound]

Each figure comes from a process of its own, with 1 GiB of state in pages of 4 KiB and a `max_copy` of 32 MiB.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import memsafe

MIB = 1024**2
STATE_BYTES = 1024 * MIB
MAX_COPY_BYTES = 32 * MIB
MARKS_S = (1, 2, 6, 20)
BEFORE_S = 3.0

_libc = ctypes.CDLL(None)  # its calls give the GIL away: the writer stands in nobody's way


class Memory:
    """Private memory in pages of 4 KiB, written MiB by MiB."""

    def __init__(self, size_bytes: int) -> None:
        self._map = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.mib = size_bytes // MIB

    def write(self, index: int) -> None:
        """Write the MiB of that number."""
        _libc.memset(ctypes.c_void_p(self._address + index * MIB), 1 + index % 7, MIB)


def state() -> Memory:
    made = Memory(STATE_BYTES)
    for index in range(made.mib):
        made.write(index)
    return made


# What a program does, one MiB at a time.


def copies(written: Memory, _: float) -> Callable[[int], object]:
    return lambda index: written.write(index % written.mib)


def fresh(_: Memory, most_mib: float) -> Callable[[int], object]:
    return Memory((int(most_mib) + 1) * MIB).write


def churn(*_: object) -> Callable[[int], object]:
    """What was taken is given back at once."""

    def take(_: int) -> None:
        Memory(MIB).write(0)

    return take


KINDS = {"copies": copies, "fresh": fresh, "churn": churn}


def go_on(kind: str, written: Memory, mib_per_s: float, seconds: float, is_over: Callable[[], bool]) -> int:
    """Do it at that rate, for so long or until it is over; return how many MiB that were."""
    take = KINDS[kind](written, mib_per_s * seconds)
    began_s = time.monotonic()
    for index in itertools.count():
        now_s = time.monotonic() - began_s
        if now_s >= seconds or is_over():
            return index
        take(index)
        if (ahead_s := (index + 1) / mib_per_s - (time.monotonic() - began_s)) > 0:
            time.sleep(ahead_s)
    raise AssertionError("unreachable")


def snapshot(folder: str) -> memsafe.SnapshotJob:
    """Take one that lasts, after a small one, so that no forecast stands in its way."""
    memsafe.fork_snapshot(f"{folder}/image", lambda out: out.write(b"1"), max_copy=MAX_COPY_BYTES).wait()
    return memsafe.fork_snapshot(f"{folder}/image", lambda _: time.sleep(60), max_copy=MAX_COPY_BYTES)


def spent_s() -> dict[str, float]:
    """The run time of each thread but the first, which is the program."""
    tasks = (task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid()))
    return {task.name: int((task / "schedstat").read_text().split()[0]) / 1e9 for task in tasks}


def duty(kind: str, mib_per_s: float, folder: str) -> dict[str, float]:
    """Return which share of a core measuring took from the start until each mark."""
    written, shares = state(), {}
    job = snapshot(folder)
    began_s, before = time.monotonic(), spent_s()

    def note() -> bool:
        passed_s = time.monotonic() - began_s
        for mark in MARKS_S:
            if passed_s >= mark and str(mark) not in shares and not job.done():
                now = spent_s()
                shares[str(mark)] = sum(now[task] - before[task] for task in now.keys() & before.keys()) / passed_s
        return job.done()

    if kind == "idle":
        while not note() and time.monotonic() - began_s < MARKS_S[-1] + 0.1:
            time.sleep(0.05)
    else:
        go_on(kind, written, mib_per_s, MARKS_S[-1] + 0.1, note)
    job.cancel()
    return shares


def bound(before: str, mib_per_s: float, folder: str) -> dict[str, float]:
    """Return what was told, and written, in MiB, when the child was ended.

    Args:
        before: What the program did for 3 s: nothing, or a kind at a rate; "beside": and does on; "fork": there was no
            such time, it writes from the fork on.
        mib_per_s: How fast it then writes to its state.
        folder: Where to put the image.
    """
    written = state()
    job = snapshot(folder)
    match before.split():
        case ["fork"]:
            pass
        case ["nothing"]:
            time.sleep(BEFORE_S)
        case ["beside", kind, rate]:
            meanwhile = (kind, written, float(rate), 2 * BEFORE_S, job.done)
            threading.Thread(target=go_on, args=meanwhile, daemon=True).start()
            time.sleep(BEFORE_S)
        case [kind, rate]:
            go_on(kind, written, float(rate), BEFORE_S, job.done)
    mib = go_on("copies", written, mib_per_s, STATE_BYTES / MIB / mib_per_s, job.done)
    job.cancel()
    try:
        job.wait()
    except memsafe.SnapshotOverrunError as error:
        return {"told": error.copy_bytes / MIB, "written": mib}
    except memsafe.SnapshotCancelledError:
        pass
    return {"told": float("inf"), "written": mib}


DUTIES = (("idle", 0.0), ("fresh", 150.0), ("fresh", 60.0), ("churn", 150.0))
BOUNDS = tuple(
    (before, rate)
    for before in ("fork", "nothing", "fresh 200", "beside fresh 100", "churn 200")
    for rate in (150.0, 1000.0)
)


def apart(work: str, what: str, mib_per_s: float) -> dict[str, float]:
    """Do *work* in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        call = f"own.{work}(*{(what, mib_per_s, folder)!r})"
        code = f"import json\nfrom benchmarks import snapshot_measuring as own\nprint(json.dumps({call}))"
        done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def duty_lines(rounds: int) -> Iterator[str]:
    yield f"{'of a core, from the start until':34}" + "".join(f"{mark:>20} s" for mark in MARKS_S)
    for kind, rate in DUTIES:
        found = [apart("duty", kind, rate) for _ in range(rounds)]
        columns = (sorted(each[str(mark)] for each in found if str(mark) in each) for mark in MARKS_S)
        what = kind if kind == "idle" else f"{kind}, {rate:.0f} MiB/s"
        yield f"{what:34}" + "".join(f"{' '.join(f'{share:.2%}' for share in column):>22}" for column in columns)


def bound_lines(rounds: int) -> Iterator[str]:
    yield f"{'MiB, copied at MiB/s after':34}{'told at the end':>30}{'written until then':>30}"
    for before, rate in BOUNDS:
        found = [apart("bound", before, rate) for _ in range(rounds)]
        told, written = (
            " ".join(f"{n:.0f}" for n in sorted(each[key] for each in found)) for key in ("told", "written")
        )
        yield f"{f'{rate:.0f} after {before}':34}{told:>30}{written:>30}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("what", nargs="*", help="duty, bound; both where none is named")
    arguments = parser.parse_args()
    tables = {"duty": duty_lines, "bound": bound_lines}
    if unknown := set(arguments.what) - set(tables):
        parser.error(f"there are duty and bound, and not {', '.join(sorted(unknown))}")
    for name, lines in tables.items():
        if not arguments.what or name in arguments.what:
            print(f"a load of {os.getloadavg()[0]:.1f}")
            for line in lines(arguments.rounds):
                print(line, flush=True)


if __name__ == "__main__":
    main()
