"""Run the demo: python -m examples.demo."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import signal
import socket
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil
import redis

from examples.demo import acts, corpus
from examples.demo.acts import MIB, Stage
from examples.demo.cgroup import own_cgroup
from examples.demo.processes import DemoError, memkv
from examples.demo.show import Report
from memsafe import MemsafeError, format_size
from memsafe.status import memory_status

_ACTS = (acts.load, acts.refuse, acts.evict, acts.press, acts.snapshots, acts.kill, acts.restore)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal asked the demo to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(slots=True)
class Leftovers:
    """What must be gone at the end."""

    directories: list[str] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)

    def found(self) -> list[str]:
        """Return what is still there: folders, listening ports, and processes that name one of the folders."""
        found = [path for path in self.directories if Path(path).exists()]
        found += [f"port {port}" for port in self.ports if _listens(port)]
        found += [f"process {child.pid}" for child in psutil.Process().children(recursive=True)]
        for process in psutil.process_iter(["cmdline"]):  # a saving child that outlived the store has its command line
            if any(path in argument for argument in process.info["cmdline"] or () for path in self.directories):
                found.append(f"process {process.pid}")
        return found


def main(arguments: list[str] | None = None) -> int:
    """Run every act; return 0 if every promise was kept and nothing is left, 1 if not, 128 + n after signal n."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the library's sources without its tests")
    parser.add_argument("--no-cgroup", action="store_true", help="under a budget alone, as where no cgroup may be made")
    options = parser.parse_args(arguments)
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    report, left, stack = Report(), Leftovers(), ExitStack()
    status = 0
    try:
        _run(report, left, stack, quick=options.quick, cgroup=not options.no_cgroup)
    except Interrupted as interrupted:
        status = 128 + interrupted.number
        report.warn(f"{interrupted}: cleaning up")
    except (DemoError, MemsafeError, redis.RedisError, OSError) as error:
        report.promise("the demo runs to its end", kept=False, detail=f"{type(error).__name__}: {error}")
    finally:
        for number in _SIGNALS:  # what follows is bounded, and must not be left half done
            signal.signal(number, signal.SIG_IGN)
        stack.close()
    _judge_leftovers(report, left)
    if not status:
        report.table()
    return status or (0 if report.all_kept else 1)


def _run(report: Report, left: Leftovers, stack: ExitStack, *, quick: bool, cgroup: bool) -> None:
    report.phase(
        "stage", f"Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} processors"
    )
    files = corpus.standard_library(quick=quick)
    size_bytes = sum(map(len, files.values()))
    limit_bytes = size_bytes * 5 // 4 + 64 * MIB
    cgroup_bytes = 4 * size_bytes + 256 * MIB
    available_bytes = memory_status().available_bytes
    if available_bytes is not None and available_bytes < cgroup_bytes + 2 * size_bytes:
        needed = format_size(cgroup_bytes + 2 * size_bytes)
        raise DemoError(f"needs {needed} of memory, and {format_size(available_bytes)} is available; try --quick")
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memsafe-demo-")))
    left.directories.append(str(directory))
    own = stack.enter_context(own_cgroup(cgroup_bytes)) if cgroup else "not wanted"
    if isinstance(own, str):
        report.say(f"no cgroup of its own ({own}): under a budget alone")
    else:
        left.directories.append(own.directory)
        report.say(f"a cgroup v{own.version} of its own, {format_size(cgroup_bytes)}: {own.directory}")
    within = None if isinstance(own, str) else own
    store = memkv(directory, limit_bytes, cgroup=within.directory if within else None)
    stack.callback(store.close)
    left.ports.append(store.port)
    report.say(f"memkv, process {store.process.pid}, port {store.port}, budget {format_size(limit_bytes)}")
    report.numbers(
        f"memkv under a budget of {format_size(limit_bytes)}"
        + (f" in a cgroup v{within.version} of {format_size(cgroup_bytes)}" if within else " alone")
    )
    stage = Stage(report, files, directory, limit_bytes, within, store, stack)
    try:
        for act in _ACTS:
            act(stage)
    except redis.RedisError as error:
        raise DemoError(f"{type(error).__name__}: {error}; {store.obituary()}") from error


def _judge_leftovers(report: Report, left: Leftovers) -> None:
    report.phase("leave", "end every process, remove the cgroup and the folder")
    found = left.found()
    report.promise("nothing is left behind", not found, ", ".join(found))
    report.numbers("nothing left behind" if not found else f"left: {', '.join(found)}")


def _listens(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.connect(("127.0.0.1", port))
        return True
    return False


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


if __name__ == "__main__":
    sys.exit(main())
