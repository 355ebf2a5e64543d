"""What is fuzzed: every reader of the kernel's files, with what must hold whatever the file says.

A target is one file of a made-up machine and what reads it. The contract: a MemsafeError that names the file, or an
answer that makes sense; nothing else is raised.
"""

from __future__ import annotations

import json
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from memsafe._kernel import cgroup, files, machine, oom, overcommit, process, psi, tasks
from memsafe.commit import assess_fork
from memsafe.errors import MemsafeError
from memsafe.sizes import MAX_SIZE_BYTES, parse_size
from memsafe.status import memory_status
from memsafe.testing import FakeKernel, FakeMapping
from tests.unit.proc_tree import only_memsafe_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GROUP = "/sys/fs/cgroup/pod/app"


@dataclass(frozen=True)
class Target:
    """Attributes:
    path: The file that holds the input.
    read: Reads it, under a root, and asserts that the answer makes sense.
    """

    path: str
    read: Callable[[Path], None]

    def check(self, bench: Bench, data: bytes) -> None:
        with bench.v2.holding(self.path, data), only_memsafe_errors(naming=self.path):
            self.read(bench.v2.kernel.root)


class Machine:
    """A made-up machine on which one file at a time holds the input, and all others are sound."""

    def __init__(self, root: Path, layout: Literal["v2", "hybrid"]) -> None:
        self.kernel = made_up_machine(root, layout)
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        self.sound = {f"/{path.relative_to(root)}": path.read_bytes() for path in paths}

    @contextmanager
    def holding(self, path: str, data: bytes) -> Iterator[None]:
        self.kernel.write(path, data)
        try:
            yield
        finally:
            self.kernel.write(path, self.sound[path])


class Bench:
    """What the targets are run on."""

    def __init__(self, root: Path) -> None:
        self.v2, self.hybrid = Machine(root / "v2", "v2"), Machine(root / "hybrid", "hybrid")

    def seeds(self, name: str) -> list[bytes]:
        """Inputs to begin with: what a sound file holds."""
        if name in WHOLE:
            sound = WHOLE[name](self).sound
            return [bytes([number]) + text for number, text in enumerate(sound.values())]
        if name == "size":
            return [b"64 MiB", b"1.5GB", b"65536"]
        return [self.v2.sound[TARGETS[name].path]]


WHOLE: dict[str, Callable[[Bench], Machine]] = {
    "whole": lambda bench: bench.v2,
    "whole_hybrid": lambda bench: bench.hybrid,
}


def made_up_machine(root: Path, layout: Literal["v2", "hybrid"]) -> FakeKernel:
    """A machine on which every file that a target writes is there to begin with, and sound."""
    kernel = FakeKernel(root, layout=layout)
    kernel.cgroup("/pod", limit="2 GiB", pids_limit=50)
    group = kernel.cgroup("/pod/app", limit="1 GiB", high="900 MiB", usage="300 MiB", inactive_file=4096).join()
    group.set(active_file=8192, swap_limit="1 MiB", swap_high="64 KiB", swap=4096)
    group.set(pids=5, pids_limit=100, oom_kills=1)
    group.stall(12.5, 3.25, some_us=123456)
    kernel.stall(1.5, 0.5)
    kernel.machine.set(threads=100, threads_max=1000, swap_total="1 GiB", swap_free="1 MiB")
    kernel.overcommit.mode = 2
    kernel.process.set(data_limit="64 MiB", address_space_limit="1 GiB", processes_limit=100, oom_score_adj=-17)
    kernel.process.mappings = [
        FakeMapping("2 MiB", "1 MiB", swap="4 KiB"),
        FakeMapping("1 GiB", "4 KiB", flags="rd wr mr mw me ac dc"),
        FakeMapping("4 MiB", "64 KiB", permissions="r--s", flags="rd mr sh"),
    ]
    kernel.write("/proc/self/stat", "7 (a) b (c)) S 1 7 7 0 -1 4194304 1234 0 0 0\n")
    kernel.write(f"{GROUP}/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    kernel.write("/proc/vmstat", "nr_free_pages 100\noom_kill 3\n")
    return kernel


def not_negative(*numbers: float | None) -> None:
    for number in numbers:
        assert number is None or number >= 0, number


def fields(thing: Any, *names: str) -> None:
    """Read fields that parse themselves when they are asked for; one that makes no sense leaves the others."""
    for name in names:
        with suppress(MemsafeError):
            not_negative(getattr(thing, name))
    for name in names:
        getattr(thing, name)


def smaps(root: Path) -> None:
    cost = overcommit.fork_cost(root=root)
    not_negative(cost.charge_bytes, cost.largest_charge_bytes, cost.page_table_bytes, cost.copyable_bytes)
    assert cost.largest_charge_bytes <= cost.charge_bytes


def smaps_rollup(root: Path) -> None:
    rollup = process.smaps_rollup(root=root)
    not_negative(rollup.rss_bytes, rollup.pss_bytes, rollup.private_dirty_bytes, process.pss_bytes(root=root))


def status(root: Path) -> None:
    names = (
        "rss_bytes", "anonymous_bytes", "swap_bytes", "total_vm_bytes", "data_vm_bytes", "page_table_bytes",
        "real_uid", "effective_capabilities",
    )  # fmt: skip
    own = process.status(root)
    fields(own, *names)
    not_negative(overcommit.reserves(own, root).total_bytes)


def limits(root: Path) -> None:
    fields(process.limits(root), "data_bytes", "address_space_bytes", "processes")


def meminfo(root: Path) -> None:
    told = machine.meminfo(root)
    with suppress(MemsafeError):
        not_negative(overcommit.commit_limit_bytes(told, root))
    names = ("total_bytes", "free_bytes", "available_bytes", "swap_total_bytes", "swap_free_bytes", "hugetlb_bytes")
    fields(told, *names, "commit_limit_bytes", "committed_bytes")


def cgroups(root: Path) -> None:
    placement = cgroup.placement(root)
    for controller in ("memory", "pids"):
        located = placement.locate(controller)
        assert located.cgroups or located.problem
        for group in located.cgroups:
            assert group.directory.startswith(str(root))
            assert ".." not in group.directory.removeprefix(str(root)).split("/")[4:]
    placement.unified_directory()
    for group in cgroup.as_memory(placement.locate("memory")):
        with suppress(MemsafeError):
            not_negative(group.limit_bytes(), group.usage_bytes())


def own_group(root: Path) -> cgroup.MemoryCgroup:
    return cgroup.memory_cgroups(root)[0]


def memory_stat(root: Path) -> None:
    not_negative(*(own_group(root).file_cache_bytes() or ()))
    stat = own_group(root).stat()
    assert stat is not None
    assert all(value >= 0 for value in stat.as_dict().values())


def pressure(root: Path) -> None:
    told = psi.read_pressure(psi.system_path(root))
    assert told is not None
    for stall in (told.some, told.full):
        not_negative(stall.avg10, stall.avg60, stall.avg300, stall.total_us)


TARGETS = {
    "smaps": Target("/proc/self/smaps", smaps),
    "smaps_rollup": Target("/proc/self/smaps_rollup", smaps_rollup),
    "status": Target("/proc/self/status", status),
    "limits": Target("/proc/self/limits", limits),
    "stat": Target("/proc/self/stat", lambda root: not_negative(process.minor_faults(root=root))),
    "oom_score": Target("/proc/self/oom_score", lambda root: not_negative(process.oom_score(root))),
    "oom_score_adj": Target("/proc/self/oom_score_adj", lambda root: (process.oom_score_adj(root), None)[1]),
    "cgroup": Target("/proc/self/cgroup", cgroups),
    "mountinfo": Target("/proc/self/mountinfo", cgroups),
    "meminfo": Target("/proc/meminfo", meminfo),
    "loadavg": Target("/proc/loadavg", lambda root: not_negative(machine.threads(root))),
    "vmstat": Target("/proc/vmstat", lambda root: not_negative(oom.machine_kills(root))),
    "pressure": Target("/proc/pressure/memory", pressure),
    "overcommit_memory": Target(
        "/proc/sys/vm/overcommit_memory", lambda root: not_negative(machine.overcommit_mode(root))
    ),
    "memory.swap.max": Target(
        f"{GROUP}/memory.swap.max", lambda root: not_negative(own_group(root).swap_limit_bytes())
    ),
    "cgroup.controllers": Target(f"{GROUP}/cgroup.controllers", cgroups),
    "memory.max": Target(f"{GROUP}/memory.max", lambda root: not_negative(own_group(root).limit_bytes())),
    "memory.stat": Target(f"{GROUP}/memory.stat", memory_stat),
    "memory.events": Target(f"{GROUP}/memory.events", lambda root: not_negative(own_group(root).oom_kills())),
    "memory.oom_control": Target(
        f"{GROUP}/memory.oom_control",
        lambda root: not_negative(cgroup.MemoryCgroup(1, "/", files.under(root, GROUP)).oom_kills()),
    ),
    "pids.max": Target(f"{GROUP}/pids.max", lambda root: (tasks.exhausted(cgroup.placement(root), root), None)[1]),
}


def check_whole(machine: Machine, data: bytes) -> None:
    """The first byte chooses the file, the others are what it holds: the public functions answer and never raise."""
    paths = list(machine.sound)
    with machine.holding(paths[data[0] % len(paths)] if data else paths[0], data[1:]):
        fork = assess_fork(root=machine.kernel.root)
        told = memory_status(root=machine.kernel.root)
    not_negative(told.available_bytes, told.limit_bytes, fork.headroom_bytes, fork.commit_charge_bytes)
    not_negative(fork.page_table_bytes, fork.copy_forecast_bytes)
    for constraint in told.constraints:
        not_negative(constraint.headroom_bytes, constraint.used_bytes, constraint.reclaimable_bytes)
    not_negative(told.swap.available_bytes, *(limit.headroom_bytes for limit in told.swap.limits))
    json.dumps([told.as_dict(), fork.as_dict()])
    # A sentence that cannot be printed is no warning.
    "\n".join((*told.warnings, *fork.reasons)).encode()


def check_size(bench: Bench, data: bytes) -> None:
    """A string is a size, or a ValueError."""
    with suppress(ValueError):
        assert 0 <= parse_size(data.decode("utf-8", "replace")) <= MAX_SIZE_BYTES


CHECKS: dict[str, Callable[[Bench, bytes], None]] = {
    **{name: target.check for name, target in TARGETS.items()},
    **{name: (lambda bench, data, of=of: check_whole(of(bench), data)) for name, of in WHOLE.items()},
    "size": check_size,
}
