"""Every system call on a snapshot's way fails once, one after the other: ``python -m tests.snapshot_faults``.

From fork_snapshot() to the result, in the calling thread, the job's thread, the child and its guard: the n-th call
fails, for n = 1, 2, 3 … until the snapshot gets through. tests/native/syscall_faults.c says which calls are spared, and
why. After each fault there must be the old file or the complete new one, one outcome of the right kind, no other file,
descriptor, thread or process, and a next snapshot must succeed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import functools
import itertools
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import memsafe
from memsafe.snapshot import meter
from tests.integration import scenario
from tests.integration.snapshots import without_tmpfile

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "native" / "syscall_faults.c"
COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]

WHERE = ("caller", "job's thread", "child", "guard", "job's thread at the end")
HOW = ("once", "that call for good", "everything for good")
KILL = 1000
ERRORS = ("EIO", "ENOMEM", "ENOSPC", "EMFILE", "EINTR")

_ASK = 0x4D534641
_PATIENCE_S = 30
_NEW = b"new" * 1000


class Fault(NamedTuple):
    """What is to fail; *named* as on a file system without O_TMPFILE."""

    where: str
    what: str  # the name of an errno, or "SIGKILL"
    how: str
    named: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.what}, {self.how}{', named file' if self.named else ''}"


QUICK = (
    Fault("job's thread at the end", "EIO", "once"),
    Fault("job's thread at the end", "EDQUOT", "that call for good", named=True),
    Fault("job's thread at the end", "SIGKILL", "once", named=True),
    Fault("child", "ENOSPC", "everything for good"),
    Fault("child", "EDQUOT", "once"),
    Fault("child", "SIGKILL", "once"),
)


def every() -> list[Fault]:
    """All of them. A call that is interrupted for good would be tried again for good; one is killed once."""
    faults = [
        Fault(where, what, how, named)
        for named in (False, True)
        for where in WHERE[:4]
        for what in (*ERRORS, "SIGKILL")
        for how in HOW
        if how == "once" or what not in ("EINTR", "SIGKILL")
    ]
    # Only the two that handle files differ by the kind of file.
    return [fault for fault in faults if not fault.named or fault.where in ("job's thread", "child")]


# In the process that is traced: one process a fault.


def _ask(where: str = "caller", n: int = 0, what: str = "EIO", how: str = "once") -> int:
    """Ask for a fault; without *n* end it, and return the number of the first call that failed, or -1."""
    code = KILL if what == "SIGKILL" else getattr(errno, what)
    return ctypes.CDLL(None).prctl(_ASK, WHERE.index(where), ctypes.c_long(n), ctypes.c_long(code), HOW.index(how)) - 1


def _write(out: memsafe.SnapshotWriter) -> None:
    out.write(_NEW[:1500])
    out.flush()
    out.progress(1, 2)
    out.write(_NEW[1500:])


def _snapshot(path: Path) -> str:
    """Take a snapshot and return its outcome in a word."""
    try:
        job = memsafe.fork_snapshot(path, _write, timeout_s=_PATIENCE_S)
        job.wait(_PATIENCE_S)
    except (memsafe.MemsafeError, OSError, MemoryError) as error:
        text = str(error).partition("\n")[0]
        return f"{type(error).__name__}: {text}"
    return "result"


def _problems(path: Path, outcome: str, number: int) -> list[str]:
    """Return what is not as it must be."""
    problems = []
    kind, _, text = outcome.partition(": ")
    content = path.read_bytes()
    if content not in (b"old", _NEW):
        problems.append(f"{len(content)} bytes are at the path")
    elif (content == _NEW) != (outcome == "result" or "may not survive a power cut" in text):
        problems.append(f"the {'new' if content == _NEW else 'old'} file after {outcome}")
    if kind == "TimeoutError" or f"after {_PATIENCE_S} s" in text:
        problems.append(f"it hung: {outcome}")
    if kind == "MemoryError" and call_names().get(number) != "mmap":
        problems.append(outcome)
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(_PATIENCE_S)
            if thread.is_alive():
                problems.append(f"a thread is left: {thread.name}")
    with contextlib.suppress(ChildProcessError):
        problems.append(f"a process is left: {os.waitpid(-1, os.WNOHANG)}")
    return problems


def _trial(path: Path, fault: Fault, n: int) -> dict[str, object]:
    before = scenario.open_files()
    died: list[str] = []
    threading.excepthook = lambda told: died.append(f"the thread died of {told.exc_value!r}")
    _ask(fault.where, n, fault.what, fault.how)
    outcome = _snapshot(path)
    number = _ask()
    problems = _problems(path, outcome, number)
    left = scenario.opened_since(before)
    if call_names().get(number) in ("fstat", "newfstatat"):
        # Whose number it is cannot be told: kept.c rather loses a descriptor than closes a stranger's.
        left = [target for target in left if not target.startswith(("/proc/", "/sys/"))]
    if left:
        problems.append(f"descriptors are left: {left}")
    if _others(path):
        problems.append(f"files are left: {_others(path)}")
    return {"number": number, "outcome": outcome, "problems": died + problems + _after(path)}


def _after(path: Path) -> list[str]:
    """A next snapshot must succeed, and remove what the dead have left."""
    outcome = _snapshot(path)
    if outcome != "result" or path.read_bytes() != _NEW or _others(path):
        return [f"the next one: {outcome}, {_others(path)}"]
    return []


def _others(path: Path) -> list[str]:
    return [name for name in os.listdir(path.parent) if name != path.name]


def _in_process(path: Path, fault: Fault, n: int) -> dict[str, object] | None:
    """Run a trial in a child; return what it reports, or None where it was killed, as the fault had it."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_fd)
        try:
            report = _trial(path, fault, n)
        except BaseException as error:
            report = {"number": _ask(), "outcome": "", "problems": [f"the trial raised {error!r}"]}
        os.write(write_fd, json.dumps(report).encode())
        os._exit(0)
    os.close(write_fd)
    heard = bool(select.select([read_fd], [], [], 2 * _PATIENCE_S)[0])
    data = os.read(read_fd, 1 << 20) if heard else b""
    os.close(read_fd)
    number = _ask() if not heard else -1
    if not heard:
        os.kill(pid, signal.SIGKILL)
    status = os.waitid(os.P_PID, pid, os.WEXITED)
    if data:
        return json.loads(data)
    killed = (status.si_code, status.si_status) == (os.CLD_KILLED, signal.SIGKILL)
    if heard and killed and fault.what == "SIGKILL":
        return None
    number = max(number, _ask())
    return {"number": number, "outcome": "", "problems": [f"it ended as {status}" if heard else "it hung"]}


def _one(folder: Path, fault: Fault, n: int) -> dict[str, object]:
    path = Path(tempfile.mkdtemp(dir=folder), "dump.db")
    path.write_bytes(b"old")
    report = _in_process(path, fault, n)
    orphan_problems = _wait_for_orphans()
    if report is None:
        number = _ask()
        content = path.read_bytes()
        problems = [] if content in (b"old", _NEW) else [f"{len(content)} bytes are at the path"]
        outcome = f"parent killed, {'new' if content == _NEW else 'old'} file, {len(_others(path))} temporary"
        report = {"number": number, "outcome": outcome, "problems": problems + _after(path)}
    report["problems"] += orphan_problems
    shutil.rmtree(path.parent)
    return report


def _wait_for_orphans() -> list[str]:
    """The children of who was killed have become ours: each must end by itself."""
    problems = []
    for pid in map(int, Path("/proc/thread-self/children").read_text().split()):
        pidfd = os.pidfd_open(pid)
        if not select.select([pidfd], [], [], _PATIENCE_S)[0]:
            problems.append("a child lives on")
            os.kill(pid, signal.SIGKILL)
        os.close(pidfd)
        os.waitpid(pid, 0)
    return problems


def _sweep(folder: Path, fault: Fault, first: int) -> None:
    """Fail the n-th call, until three in a row find none to fail: threads do not take turns in the same way always."""
    if fault.where == "job's thread":
        first = max(first, _FIRST_OF_THREAD)
    spared = 0
    for n in itertools.count(first):
        began_s = time.monotonic()
        report = _one(folder, fault, n)
        print(json.dumps({"n": n, "s": time.monotonic() - began_s, **report}), flush=True)
        spared = 0 if report["number"] >= 0 else spared + 1
        if spared == 3:
            return


# 1 is the mmap for the first Python frame of the thread. Where it fails, CPython 3.11 ends the thread without a word,
# and Thread.start() waits for ever.
_FIRST_OF_THREAD = 2


def _worker(folder: Path, fault: Fault, first: int) -> None:
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    if fault.named:
        without_tmpfile()
    if fault.where == WHERE[4]:
        meter.Meter._look_every_s = lambda _: math.inf  # type: ignore[method-assign] # the same calls each time
    call_names()
    for _ in range(2):  # what is imported and cached is so before
        memsafe.fork_snapshot(folder / "warm", _write).wait()
    _sweep(folder, fault, first)


# Who starts it.


@functools.cache
def call_names() -> dict[int, str]:
    """Names by number, from the C library's headers."""
    text = subprocess.run(
        [COMPILER, "-dM", "-E", "-include", "sys/syscall.h", "-xc", os.devnull], capture_output=True, text=True
    ).stdout
    return {int(number): name for name, number in re.findall(r"#define __NR_(\w+) (\d+)\n", text)}


def build(folder: Path) -> Path:
    """Compile the tracer."""
    tracer = folder / "syscall_faults"
    subprocess.run([COMPILER, "-std=gnu11", "-O1", "-D_GNU_SOURCE", PROGRAM, "-o", tracer], check=True)
    return tracer


def run(tracer: Path, folder: Path, fault: Fault, first: int = 1) -> list[dict]:
    """Sweep through one kind of fault; returns a report for each n."""
    work = Path(tempfile.mkdtemp(dir=folder))
    command = [tracer, sys.executable, "-m", "tests.snapshot_faults", "--worker", json.dumps(fault), str(first), work]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{fault}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    sys.stderr.write(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="only what the tests run")
    parser.add_argument("--only", default="", help="kinds of fault whose description contains this")
    parser.add_argument("--first", type=int, default=1, help="the first n")
    parser.add_argument("--verbose", action="store_true", help="show each fault and its outcome")
    arguments = parser.parse_args()
    if arguments.worker:
        fault, first, folder = arguments.worker
        _worker(Path(folder), Fault(*json.loads(fault)), int(first))
        return 0
    survived, outcomes, bad, began_s = 0, Counter(), [], time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tracer = build(folder)
        for fault in QUICK if arguments.quick else every():
            if arguments.only not in str(fault):
                continue
            reports = [
                report
                for report in run(tracer, folder, fault, arguments.first)
                if report["number"] >= 0 or report["problems"]
            ]
            good = [report for report in reports if not report["problems"]]
            print(f"{fault!s:60}{len(good):5} of {len(reports):5} survived", flush=True)
            survived += len(good)
            bad += [report for report in reports if report["problems"]]
            for report in reports:
                outcomes[report["outcome"].partition(":")[0]] += 1
                if report["problems"] or arguments.verbose:
                    call = call_names().get(report["number"], report["number"])
                    print(
                        f"    {report['n']:4} {call:20} {report['s'] * 1000:5.0f} ms  {report['outcome']}",
                        *report["problems"],
                        sep="\n         ",
                    )
    print(f"\n{survived} of {survived + len(bad)} faults survived in {time.monotonic() - began_s:.0f} s")
    for outcome, count in outcomes.most_common():
        print(f"  {count:6} {outcome}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
