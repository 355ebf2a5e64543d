"""How much later than a bare thread in C, which only waits, a monitor's native thread hears what the kernel tells.

    python -m benchmarks.pressure_notice [--lab [KERNEL ...]]

Both have a descriptor of their own of the same kind, in one process and one run: of a v1 usage threshold here; of a v2
cgroup's memory.events, and a trigger of its memory.pressure, in virtual machines. A second process of the cgroup grows
and shrinks. The kernel judges each trigger of PSI by a window of its own, which begins when the trigger is made.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.survival import place
from memsafe import PressureMonitor
from memsafe._kernel import cgroup, notify
from memsafe.pressure.sources import Source, StallTrigger, UsageThreshold
from tests.kernel.lab import image, kernels
from tests.kernel.lab.machine import Machine

MIB = 1024**2
LIMIT_BYTES = 128 * MIB
PATIENCE_S = 10.0
GUEST_S = 900
ROUNDS = {"usage.low": 200, "memory.events": 30, "psi.some": 5}

# Grows by so many bytes for a line with a number, and shrinks for an empty one.
FILL = """
import mmap, sys
memory = mmap.mmap(-1, 256 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
print(flush=True)
for line in sys.stdin:
    if line.strip():
        for at in range(0, int(line), mmap.PAGESIZE):
            memory[at] = 1
    else:
        memory.madvise(mmap.MADV_DONTNEED)
    print(flush=True)
"""


def compiled() -> bytes:
    """The bare thread, as a library."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "notice.so")
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-pthread", source, "-o", library], check=True)
        return library.read_bytes()


class Filler:
    """A process that grows by so many bytes, and shrinks again."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", FILL]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.await_done()

    def begin(self, additional_bytes: int | None) -> None:
        """Grow, or with None shrink."""
        assert self._process.stdin is not None
        print("" if additional_bytes is None else additional_bytes, file=self._process.stdin, flush=True)

    def await_done(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def end(self) -> None:
        self._process.communicate()


def same_as(source: Source) -> int:
    """Return a descriptor of the kind that *source* waits for."""
    if isinstance(source, UsageThreshold):
        return notify.arm_usage_threshold(source.group.directory, source.usage_bytes)
    assert source.path is not None
    if isinstance(source, StallTrigger):
        return notify.arm_stall_trigger(source.path, "some", source._stall_us)
    return notify.open_watched(source.path)


def measure(name: str, library: str) -> dict[str, Any]:
    """Run in a process of its own, which moves to a new cgroup: how much later, in ms, each time."""
    group = make_group("memory.limit_in_bytes" if name == "usage.low" else "memory.high")
    (group / "cgroup.procs").write_text("0")
    own = cgroup.memory_cgroups()[0]
    bare = ctypes.CDLL(library)
    bare.notice_first_after.restype = ctypes.c_int64
    bare.notice_first_after.argtypes = [ctypes.c_int64]
    filler, heard_ns = Filler(), list[int]()
    later_ms, missed = [], 0
    with PressureMonitor() as monitor:
        assert monitor._hub is not None
        source = next(each for each in monitor._hub._chosen if each.name == name and each.used)
        hear = monitor._hub.hear
        monitor._hub.hear = lambda reports: (  # type: ignore[method-assign]
            heard_ns.extend(each.first_ns for each in reports if each.token == source.token) or hear(reports)
        )
        mark_bytes = source.usage_bytes if isinstance(source, UsageThreshold) else LIMIT_BYTES
        if bare.notice_start(same_as(source), int(name != "usage.low")):
            sys.exit("the bare thread cannot be started")
        for _ in range(ROUNDS[name]):
            began_ns = time.monotonic_ns()
            heard_ns.clear()
            filler.begin(mark_bytes + 4 * MIB - (own.usage_bytes() or 0))
            give_up_s = time.monotonic() + PATIENCE_S
            while time.monotonic() < give_up_s and not (heard_ns and bare.notice_first_after(began_ns)):
                time.sleep(0.001)
            if heard_ns and (bare_ns := bare.notice_first_after(began_ns)):
                later_ms.append((heard_ns[0] - bare_ns) / 1e6)
            else:
                missed += 1
            filler.await_done()
            filler.begin(None)
            filler.await_done()
            time.sleep(0.02)  # what else it brings about has come
    filler.end()
    return {"name": name, "later_ms": later_ms, "missed": missed, "group": str(group)}


def make_group(limited: str) -> Path:
    """Make a cgroup with that limit."""
    version, parent = place._parent()
    if (version == 1) != (limited == "memory.limit_in_bytes"):
        sys.exit(f"{limited} cannot be had in cgroup v{version}")
    group = Path(parent, f"memsafe-notice-{os.getpid()}")
    group.mkdir()
    (group / limited).write_text(str(LIMIT_BYTES))
    return group


def run(name: str, library: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(library)
        file.flush()
        code = (
            "import json, sys; from benchmarks import pressure_notice as p; print(json.dumps(p.measure(*sys.argv[1:])))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, name, file.name], check=True, stdout=subprocess.PIPE, text=True
        )
    found: dict[str, Any] = json.loads(done.stdout)
    time.sleep(0.1)
    Path(found["group"]).rmdir()
    return found


def in_the_lab(kernel: str, library: bytes) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.pressure_notice", "--guest"]
    with Machine(kernels.find(kernel), command, base64.b64encode(library).decode()) as machine:
        machine.allow(GUEST_S)
        for message in machine:
            if isinstance(message, str):
                print(message, file=sys.stderr)
            elif "name" in message:
                yield message
            else:
                return


def guest() -> None:
    """Run in a virtual machine."""
    from tests.kernel.lab.inside import Channel

    channel = Channel()
    library = base64.b64decode(json.loads(Path(image.TASK).read_text()))
    try:
        for name in ("memory.events", "psi.some"):
            channel.tell("found", **run(name, library))
    finally:
        channel.tell("end")


def show(where: str, found: dict[str, Any]) -> None:
    values = found["later_ms"]
    if not values:
        print(f"{where:20} {found['name']:16} nothing was heard by both")
        return
    p99 = statistics.quantiles(values, n=100)[-1] if len(values) > 1 else values[0]
    figures = f"{statistics.median(values):9.3f} {p99:9.3f} {min(values):9.3f} {max(values):9.3f}"
    print(f"{where:20} {found['name']:16} {figures} {len(values):6} {found['missed']:6}", flush=True)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--lab", nargs="*", metavar="KERNEL")
    options.add_argument("--guest", action="store_true")
    chosen = options.parse_args()
    if chosen.guest:
        guest()
        return
    library = compiled()
    print(f"ms later, load {os.getloadavg()[0]:.1f}:  median, p99, least, most, how many, not heard by both")
    if chosen.lab is None:
        show(os.uname().release, run("usage.low", library))
        return
    for kernel in chosen.lab or kernels.names():
        for found in in_the_lab(kernel, library):
            show(kernel, found)


if __name__ == "__main__":
    main()
