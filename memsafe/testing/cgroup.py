"""Made-up cgroups, in the hierarchies that a kernel may have."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal, TypeAlias

from memsafe._kernel.files import UNLIMITED
from memsafe.testing.parts import Number, Part, Setting, stalls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from memsafe.testing.kernel import FakeKernel

Layout: TypeAlias = Literal["v2", "v1", "hybrid"]

# What a v1 kernel with pages of 4 KiB prints for "no limit" (mm/page_counter.c, PAGE_COUNTER_MAX).
_V1_UNLIMITED = 2**63 - 4096

MOUNTS: dict[Layout, tuple[str, ...]] = {
    "v2": ("30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate",),
    "v1": (
        "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory",
        "36 31 0:33 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids",
    ),
}
MOUNTS["hybrid"] = (*MOUNTS["v1"], "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw")


class FakeCgroup(Part):
    """A memory cgroup; made by FakeKernel.cgroup(). What is set of it shows at once, also to an open descriptor.

    Attributes:
        path: Its path in the hierarchy.
        limit, high: memory.max (v1: memory.limit_in_bytes) and memory.high; None: unlimited.
        usage, inactive_file, active_file, swap: What it and those below hold; until it is set, what those below do.
        swap_limit, swap_high: memory.swap.max (v1: what the memsw limit leaves beyond the limit) and memory.swap.high;
            None: unlimited.
        ooms, oom_kills: How often it ran out of memory, and how many processes it lost for that; the ancestors'
            memory.events count them too.
        pids, pids_limit: Its tasks, and how many it may have; None: not told, and unlimited.
    """

    limit = Setting()
    high = Setting()
    usage = Setting()
    inactive_file = Setting()
    active_file = Setting()
    swap = Setting()
    swap_limit = Setting()
    swap_high = Setting()
    ooms = Number()
    oom_kills = Number()
    pids = Number()
    pids_limit = Number()

    def __init__(self, kernel: FakeKernel, path: str) -> None:
        super().__init__(kernel)
        self.path = path
        self._exists = False
        self._stalls: str | None = None

    def join(self) -> Self:
        """Put the process into it, in every hierarchy; returns itself."""
        lines = [] if self._kernel.layout == "v2" else [f"5:pids:{self.path}", f"4:memory:{self.path}", "1:cpu:/"]
        if self._kernel.layout != "v1":
            lines.append(f"0::{self.path}")
        self._tree.show_again("/proc/self/cgroup", "".join(f"{line}\n" for line in lines))
        return self

    def stall(self, some: float = 0.0, full: float = 0.0, *, some_us: int = 0, full_us: int = 0) -> None:
        """Have its tasks wait for memory; as FakeKernel.stall(). Where memory is on v1, the cgroup2 beside shows it."""
        self._stalls = stalls(some, full, some_us, full_us)
        self._render()

    def remove(self) -> None:
        """Let it vanish, with all below it, in one moment. A process that is in it is still told to be."""
        for group in list(self._kernel._cgroups.values()):
            if _within(group.path, self.path) is not None:
                group._exists = False
        for base in _hierarchies(self._kernel.layout):
            self._tree.remove_folder(self._folder(base))

    def restore(self) -> None:
        """Make it anew under the same name, as it was set last; those below it stay away until they are restored."""
        self._appear()

    def file(self, name: str) -> str:
        """Return the path of its file *name*, for FakeKernel.write() and its sisters."""
        base = "/sys/fs/cgroup" if self._kernel.layout == "v2" else "/sys/fs/cgroup/memory"
        return f"{self._folder(base)}/{name}"

    def _folder(self, base: str) -> str:
        """Return the folder that shows it in the hierarchy at *base*: one out of sight is kept out of sight."""
        seen = _within(self.path, self._kernel.visible_from)
        return f"/out-of-sight{base}{self.path}" if seen is None else f"{base}{seen}"

    def _get(self, name: str) -> int | None:
        if name in {"usage", "inactive_file", "active_file", "swap"} and name not in self._values:
            return sum(getattr(child, name) or 0 for child in self._children())
        return super()._get(name)

    def _children(self) -> Iterator[FakeCgroup]:
        return (group for group in self._kernel._cgroups.values() if group._exists and group._parent() is self)

    def _total(self, name: str) -> int:
        own: int = getattr(self, name) or 0
        return own + sum(child._total(name) for child in self._children())

    def _render(self) -> None:
        if not self._exists:
            return
        for folder, texts in self._folders():
            for name, text in texts.items():
                self._tree.show(f"{folder}/{name}", text)
        parent = self._parent()
        if parent is not None:
            parent._render()  # what this one holds is in what its ancestors hold

    def _appear(self) -> None:
        if self._exists:
            return
        parent = self._parent()
        if parent is not None:
            parent._appear()
        folders = list(self._folders())
        if any(self._tree.at(folder).is_file() for folder, _ in folders):
            raise ValueError(f"a file of the cgroup above has that name already: {self.path!r}")
        self._exists = True
        for folder, texts in folders:
            self._tree.add_folder(folder, texts)
        self._render()

    def _parent(self) -> FakeCgroup | None:
        return None if self.path == "/" else self._kernel._cgroups[str(PurePosixPath(self.path).parent)]

    def _folders(self) -> Iterator[tuple[str, dict[str, str | None]]]:
        """Give each folder that shows it, with its files; None where there is no such file."""
        at = self._folder
        pids = {
            "pids.max": "max\n" if self.pids_limit is None else f"{self.pids_limit}\n",
            "pids.current": None if self.pids is None else f"{self.pids}\n",
        }
        stalls = {"memory.pressure": self._stalls}
        if self._kernel.layout == "v2":
            # The root of all has no limit and tells no usage; one with settings is a namespace's.
            memory = {} if self.path == "/" and not self._values else {**self._v2_files(), **pids}
            controllers = {"cgroup.controllers": "cpu io memory pids\n", "cgroup.procs": ""}
            yield at("/sys/fs/cgroup"), {**controllers, **memory, **stalls}
            return
        yield at("/sys/fs/cgroup/memory"), {"cgroup.procs": "", **self._v1_files()}
        yield at("/sys/fs/cgroup/pids"), pids
        if self._kernel.layout == "hybrid":
            yield at("/sys/fs/cgroup/unified"), {"cgroup.controllers": "\n", "cgroup.procs": "", **stalls}

    def _v2_files(self) -> dict[str, str | None]:
        def events(ooms: int, oom_kills: int) -> str:
            return f"low 0\nhigh 0\nmax 0\noom {ooms}\noom_kill {oom_kills}\n"

        return {
            "memory.max": _limit(self.limit),
            "memory.high": _limit(self.high),
            "memory.current": f"{self.usage or 0}\n",
            "memory.stat": f"anon 1\ninactive_file {self.inactive_file or 0}\nactive_file {self.active_file or 0}\n",
            "memory.swap.max": _limit(self.swap_limit),
            "memory.swap.high": _limit(self.swap_high),
            "memory.swap.current": f"{self.swap or 0}\n",
            "memory.events": events(self._total("ooms"), self._total("oom_kills")),
            "memory.events.local": events(self.ooms or 0, self.oom_kills or 0),
        }

    def _v1_files(self) -> dict[str, str | None]:
        limit_bytes = _V1_UNLIMITED if self.limit is None else self.limit
        both_bytes = _V1_UNLIMITED if self.swap_limit is None else min(limit_bytes + self.swap_limit, _V1_UNLIMITED)
        return {
            "memory.limit_in_bytes": f"{limit_bytes}\n",
            "memory.usage_in_bytes": f"{self.usage or 0}\n",
            "memory.memsw.limit_in_bytes": f"{both_bytes}\n",
            "memory.memsw.usage_in_bytes": f"{(self.usage or 0) + (self.swap or 0)}\n",
            "memory.use_hierarchy": "1\n",
            "memory.oom_control": f"oom_kill_disable 0\nunder_oom 0\noom_kill {self.oom_kills or 0}\n",
            "memory.stat": (
                f"inactive_file 0\nactive_file 0\ntotal_inactive_file {self.inactive_file or 0}\n"
                f"total_active_file {self.active_file or 0}\ntotal_swap {self.swap or 0}\n"
            ),
        }


def _hierarchies(layout: Layout) -> tuple[str, ...]:
    if layout == "v2":
        return ("/sys/fs/cgroup",)
    return tuple(line.split()[4] for line in MOUNTS[layout])


def cgroup_path(path: str) -> str:
    names = [name for name in path.split("/") if name]
    # The kernel makes no cgroup with a newline in its name (kernel/cgroup/cgroup.c, cgroup_mkdir()).
    if not path.startswith("/") or {".", ".."} & set(names) or "\n" in path:
        raise ValueError(f"a cgroup's path begins with a slash and has no '.', '..' or newline: {path!r}")
    return "/" + "/".join(names)


def _within(path: str, top: str) -> str | None:
    """Return *path* as it is seen from *top*: "" for *top* itself, None outside of it."""
    base = top.rstrip("/")
    if path != top and not path.startswith(base + "/"):
        return None
    return path[len(base) :].rstrip("/")


def _limit(size_bytes: int | None) -> str:
    return "max\n" if size_bytes is None or size_bytes >= UNLIMITED else f"{size_bytes}\n"
