"""Every file that a look at the machine reads, with everything that can be wrong with it.

The contract: nothing is raised; what the file would have told becomes None, or goes missing, with a warning that names
it; all other facts stand as they were; and no fork is admitted more lightly than before without saying so.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from memsafe import ForkAssessment, MemoryStatus, assess_fork, memory_status
from memsafe.status import tightest
from memsafe.testing import FakeKernel, FakeMapping

Facts = dict[str, object]

# Without these a kernel is older, or built without a feature, or the process is in the first user namespace.
MAY_BE_ABSENT = (
    "memory.high", "memory.pressure", "memory.swap.max", "memory.swap.high", "memory.memsw.limit_in_bytes",
    "memory.use_hierarchy", "cgroup.controllers", "pids.max", "pids.current", "pressure/memory", "ns/user",
    "threads-max", "loadavg", "overcommit_ratio", "overcommit_kbytes", "admin_reserve_kbytes", "user_reserve_kbytes",
)  # fmt: skip


def made_up(root: Path, layout: Literal["v2", "v1", "hybrid"], visible_from: str = "/") -> FakeKernel:
    """A machine on which every file counts: nested limits, rlimits, swap, mode 2, pressure, tasks."""
    kernel = FakeKernel(root, layout=layout, visible_from=visible_from)
    kernel.machine.set(swap_total="4 GiB", swap_free="3 GiB", threads=300, threads_max=1000)
    kernel.overcommit.mode = 2
    kernel.process.set(
        data_limit="1 GiB", address_space_limit="2 GiB", processes_limit=100, anonymous="64 MiB", swap="4 KiB",
        user_namespace=4026532301, capabilities=1 << 21,
    )  # fmt: skip
    kernel.process.mappings = [FakeMapping("80 MiB", "64 MiB", swap="4 KiB"), FakeMapping("1 MiB", permissions="r--p")]
    kernel.cgroup("/pod", limit="1 GiB", swap_limit="2 GiB", pids=20, pids_limit=50)
    app = kernel.cgroup("/pod/app", limit="512 MiB", high="400 MiB", usage="100 MiB", swap="1 MiB").join()
    app.set(inactive_file="10 MiB", active_file="8 MiB", swap_limit="1 GiB", swap_high="512 MiB")
    app.set(pids=5, pids_limit=100)
    app.stall(12.5, 3.25)
    kernel.stall(1.5, 0.5)
    return kernel


@pytest.fixture(params=["v2", "v1", "hybrid", "container"])
def kernel(request: pytest.FixtureRequest, tmp_path: Path) -> FakeKernel:
    if request.param == "container":
        return made_up(tmp_path, "v2", "/pod")
    return made_up(tmp_path, request.param)


@dataclass(frozen=True)
class Look:
    """What both public functions said at once."""

    status: MemoryStatus
    fork: ForkAssessment
    facts: Facts

    @classmethod
    def at(cls, kernel: FakeKernel) -> Look:
        status, fork = memory_status(root=kernel.root), assess_fork(root=kernel.root)
        assert status.binding == tightest(status.constraints)
        assert status.limit_bytes == min((c.limit_bytes for c in status.constraints), default=None)
        return cls(status, fork, facts_of(status, fork))


def facts_of(status: MemoryStatus, fork: ForkAssessment) -> Facts:
    facts: Facts = {f"{c.kind} {c.path}": c for c in status.constraints}
    for name in ("mode", "limit_bytes", "committed_bytes", "headroom_bytes", "request_limit_bytes"):
        facts[f"commit.{name}"] = getattr(status.commit, name)
    for name in ("total_bytes", "free_bytes", "available_bytes"):
        facts[f"swap.{name}"] = getattr(status.swap, name)
    facts |= {f"swap.{limit.kind} {limit.path}": limit for limit in status.swap.limits}
    facts |= {f"process.{name}": value for name, value in status.process.as_dict().items()}
    for name in ("commit_charge_bytes", "page_table_bytes", "private_bytes", "copy_forecast_bytes"):
        facts[f"fork.{name}"] = getattr(fork, name)
    facts["pressure"] = status.pressure
    return facts


def may_tell(path: str) -> tuple[str, ...]:
    """How the names of the facts begin that the file at *path* tells, or helps to tell."""
    name = path.removeprefix("/proc/").removeprefix("self/")
    if path.startswith("/sys/fs/cgroup"):
        return ("memory.", "swap.", "physical", "pressure")
    return {
        "meminfo": ("physical", "commit", "swap."),
        "status": ("process.", "rlimit", "commit", "fork."),
        "limits": ("rlimit",),
        "cgroup": ("memory.", "swap.", "physical", "pressure"),
        "mountinfo": ("memory.", "swap.", "physical", "pressure"),
        "ns/user": ("commit",),
        "smaps": ("fork.",),
        "smaps_rollup": ("process.pss_bytes",),
        "oom_score": ("process.oom_score",),
        "oom_score_adj": ("process.oom_score_adj",),
        "pressure/memory": ("pressure",),
    }.get(name, ("commit",) if name.startswith("sys/vm/") else ())


def replace(kernel: FakeKernel, path: str, change: Callable[[Path], None]) -> None:
    at = kernel.root / path.lstrip("/")
    at.unlink()
    change(at)


def holding(text: Callable[[bytes], bytes]) -> Callable[[FakeKernel, str], None]:
    def spoil(kernel: FakeKernel, path: str) -> None:
        at = kernel.root / path.lstrip("/")
        if not at.is_symlink():
            kernel.write(path, text(at.read_bytes()))

    return spoil


FAULTS: dict[str, Callable[[FakeKernel, str], None]] = {
    "absent": lambda kernel, path: kernel.remove(path),
    "unreadable": lambda kernel, path: kernel.make_unreadable(path),
    # Opening succeeds and reading does not: address 0 of this process.
    "EIO": lambda kernel, path: replace(kernel, path, lambda at: at.symlink_to("/proc/self/mem")),
    "dangling": lambda kernel, path: replace(kernel, path, lambda at: at.symlink_to("nowhere")),
    "directory": lambda kernel, path: replace(kernel, path, Path.mkdir),
    "fifo": lambda kernel, path: replace(kernel, path, os.mkfifo),
    "empty": holding(lambda _: b""),
    "garbage": holding(lambda _: b"\xff\xfe %n 9e9 -1\n:=\n"),
    "nul": holding(lambda sound: sound.replace(b" ", b"\0").replace(b"\n", b"\0") or b"\0"),
    "truncated": holding(lambda sound: sound[: len(sound) // 2]),
    "cut short": holding(lambda sound: sound[:1]),
    "huge": holding(lambda sound: sound + b"\n" + b"9" * 2**21),
    "huge line": holding(lambda sound: b"9" * 2**21 + sound),
}


def paths_of(kernel: FakeKernel) -> list[str]:
    return [
        f"/{path.relative_to(kernel.root)}"
        for path in sorted(kernel.root.rglob("*"))
        if (path.is_symlink() or path.is_file()) and "out-of-sight" not in path.parts
    ]


def check(
    kernel: FakeKernel, path: str, before: Look, after: Look, *, silent: bool = False, once: bool = False
) -> None:
    """Hold what was said with a fault in *path* against what was said before; *once*: one of the two did not see it."""
    changed = {
        name for name in before.facts.keys() | after.facts.keys() if before.facts.get(name) != after.facts.get(name)
    }
    strange = {name for name in changed if not name.startswith(may_tell(path))}
    assert not strange, f"{path} has nothing to do with {strange}"
    folder = os.path.dirname(path)
    named = [warning for warning in after.status.warnings if path in warning or folder in warning]
    # A membership or a mount that only looks right leads to files that are not there, and they are named as well.
    leads = path in {"/proc/self/cgroup", "/proc/self/mountinfo"} and named
    assert leads or len(named) == len(after.status.warnings), after.status.warnings
    if changed and not silent and not all(name.startswith(("fork.", "process.pss")) for name in changed):
        assert named, changed
    if after.fork.decision == "admit" and after.status.warnings and not once:
        assert any(path in reason or folder in reason for reason in after.fork.reasons)
    assert silent or after.fork.kernel_would_allow in {before.fork.kernel_would_allow, None}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_file_at_a_time(kernel: FakeKernel, fault: str) -> None:
    before = Look.at(kernel)
    assert (before.status.warnings, before.fork.decision, before.fork.kernel_would_allow) == ((), "admit", True)
    for path in paths_of(kernel):
        link = (kernel.root / path.lstrip("/")).readlink() if path.endswith("ns/user") else None
        FAULTS[fault](kernel, path)
        check(kernel, path, before, Look.at(kernel), silent=makes_sense(path, fault))
        restore(kernel, path, link)
    assert Look.at(kernel) == before


def makes_sense(path: str, fault: str) -> bool:
    if fault in {"absent", "dangling"}:
        return path.endswith(MAY_BE_ABSENT)
    if fault in {"empty", "fifo"}:
        return path.endswith("cgroup.controllers")  # no controller is on there
    return fault in {"truncated", "cut short"}  # what is left of a number, or of a list


def restore(kernel: FakeKernel, path: str, link: Path | None) -> None:
    at = kernel.root / path.lstrip("/")
    if at.is_dir() and not at.is_symlink():
        at.rmdir()
    else:
        at.unlink(missing_ok=True)
    if link is None:
        kernel.repair(path)
    else:
        at.symlink_to(link)


class Calls:
    """Counts the system calls by which files below a folder are read, and does something at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, below: Path) -> None:
        self._below = str(below)
        self._opened: dict[int, str] = {}
        self.count = 0
        self.at: Callable[[int, str], bool] = lambda number, path: False
        self.act: Callable[[str], None] = lambda path: None
        for name in ("open", "read", "readlink", "listdir"):
            monkeypatch.setattr(os, name, self._watching(getattr(os, name)))

    def begin(self, at: Callable[[int, str], bool], act: Callable[[str], None]) -> None:
        self.count, self.at, self.act = 0, at, act

    def _watching(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(what: Any, *rest: Any, **named: Any) -> Any:
            path = self._opened.get(what, "") if isinstance(what, int) else os.fspath(what)
            if not isinstance(path, str) or not path.startswith(self._below):
                return call(what, *rest, **named)
            self.count += 1
            if self.at(self.count, path):
                self.act(path.removeprefix(self._below))
            done = call(what, *rest, **named)
            if call.__name__ == "open":
                self._opened[done] = path
            return done

        return watched


@pytest.mark.parametrize(("number", "for_good"), [(errno.EACCES, False), (errno.EIO, False), (errno.EMFILE, True)])
def test_the_nth_call_fails(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, number: int, for_good: bool) -> None:
    before, calls = Look.at(kernel), Calls(monkeypatch, kernel.root)
    failed: list[str] = []

    def fail(path: str) -> None:
        failed.append(path)
        raise OSError(number, os.strerror(number))

    for nth in range(1, 1000):
        failed.clear()
        calls.begin(lambda count, _, nth=nth: count >= nth if for_good else count == nth, fail)  # type: ignore[misc]
        after = Look.at(kernel)
        if not failed:
            break
        if for_good:
            assert set(after.status.warnings) <= {w for w in after.status.warnings if any(p in w for p in failed)}
            assert after.fork.kernel_would_allow in {None, before.fork.kernel_would_allow}
        else:
            check(kernel, failed[0], before, after, silent=failed[0].endswith(STEERING), once=True)
    assert nth > 60, "it went through all of them"
    assert after == before


# Only steer the search for the cgroup that is charged: the files of the cgroup itself have the last word.
STEERING = ("cgroup.controllers", "memory.use_hierarchy")


@pytest.mark.parametrize(("kernel", "returns"), [("v2", False), ("v1", True)], indirect=["kernel"])
def test_the_cgroup_vanishes_before_the_nth_call(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, returns: bool
) -> None:
    before, calls = Look.at(kernel), Calls(monkeypatch, kernel.root)
    app = kernel.cgroup("/pod/app")
    for nth in range(1, 1000):
        gone: list[str] = []

        def vanish(path: str, gone: list[str] = gone) -> None:
            gone.append(path)
            app.remove()
            if returns:
                app.restore()

        calls.begin(lambda count, _, nth=nth: count == nth, vanish)  # type: ignore[misc]
        after = Look.at(kernel)
        app.restore()
        if not gone:
            break
        changed = {name for name in before.facts if before.facts[name] != after.facts.get(name)}
        own = [name for name in changed if name.endswith("/app")]
        assert changed <= {*own, "physical None", "swap.available_bytes", "pressure"}
        assert after.facts.keys() <= before.facts.keys()
        assert all("/app" in warning for warning in after.status.warnings)
        assert after.status.warnings or not [name for name in own if "high" not in name]
    assert nth > 60
    assert after == before
