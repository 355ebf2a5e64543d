"""A made-up machine, for tests of code that asks memsafe how much memory is left.

FakeKernel writes the files of /proc, /sys and cgroups that memsafe reads into a folder of its own. Whatever takes
``root=`` takes that folder for the machine. Nothing of it touches the real kernel, needs a privilege or a mock.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from memsafe._kernel import machine
from memsafe._kernel.files import UNLIMITED
from memsafe.sizes import Size, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

__all__ = ["FakeCgroup", "FakeKernel", "FakeMachine", "FakeMapping", "FakeOvercommit", "FakeProcess"]

Layout: TypeAlias = Literal["v2", "v1", "hybrid"]

# What a v1 kernel with pages of 4 KiB prints for "no limit" (mm/page_counter.c, PAGE_COUNTER_MAX).
_V1_UNLIMITED = 2**63 - 4096

_PID = 4242
"""The number of the made-up process."""

_MOUNTS: dict[Layout, tuple[str, ...]] = {
    "v2": ("30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate",),
    "v1": (
        "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory",
        "36 31 0:33 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids",
    ),
}
_MOUNTS["hybrid"] = (*_MOUNTS["v1"], "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw")


class _Setting:
    """A number of a made-up part of the machine; setting it rewrites the files that show it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, part: _Part, owner: type) -> int | None:
        return part._get(self._name)

    def __set__(self, part: _Part, value: Size | None) -> None:
        part._values[self._name] = None if value is None else self._checked(value)
        part._render()

    def _checked(self, value: Size) -> int:
        return parse_size(value, what=self._name)


class _Number(_Setting):
    """As _Setting, for what is not a size."""

    def _checked(self, value: Size) -> int:
        number = int(value)
        if number < 0:
            raise ValueError(f"{self._name} must not be negative: {value}")
        return number


class _Signed(_Setting):
    """As _Number, for what may be negative."""

    def _checked(self, value: Size) -> int:
        return int(value)


class _Part(ABC):
    """Something of the machine that has settings."""

    _defaults: ClassVar[dict[str, int | None]] = {}

    def __init__(self, kernel: FakeKernel) -> None:
        self._kernel = kernel
        self._values: dict[str, int | None] = dict(self._defaults)

    def set(self, **settings: Any) -> Self:
        """Change several settings in one go, or none; returns itself.

        Raises:
            TypeError: There is no such setting.
            ValueError: A value makes no sense.
        """
        values: dict[str, int | None] = {}
        for name, value in settings.items():
            setting = next((vars(kind)[name] for kind in type(self).__mro__ if name in vars(kind)), None)
            if not isinstance(setting, _Setting):
                raise TypeError(f"{type(self).__name__} has no setting {name!r}")
            values[name] = None if value is None else setting._checked(value)
        self._values.update(values)
        self._render()
        return self

    def _get(self, name: str) -> int | None:
        return self._values.get(name)

    @abstractmethod
    def _render(self) -> None:
        """Write the files that the settings are in."""


class FakeMachine(_Part):
    """Physical memory, swap and the sums of commit: /proc/meminfo, and how many tasks there may be.

    Attributes:
        total, free, available, swap_total, swap_free, hugetlb, committed: As MemTotal and its sisters. A size, or None
            for a kernel that does not tell.
        commit_limit: What is set here, None for a kernel that does not tell, else what the kernel would count.
        threads, threads_max: Tasks of the whole machine, and kernel.threads-max; None: not told.
    """

    total = _Setting()
    free = _Setting()
    available = _Setting()
    swap_total = _Setting()
    swap_free = _Setting()
    hugetlb = _Setting()
    committed = _Setting()
    commit_limit = _Setting()
    threads = _Number()
    threads_max = _Number()

    _defaults: ClassVar[dict[str, int | None]] = {
        "total": 16 << 30, "free": 6 << 30, "available": 8 << 30, "swap_total": 0, "swap_free": 0, "hugetlb": 0,
        "committed": 4 << 30, "threads": None, "threads_max": None,
    }  # fmt: skip

    def _get(self, name: str) -> int | None:
        if name == "commit_limit" and name not in self._values:
            return self._kernel.overcommit._limit_bytes()
        return super()._get(name)

    def _render(self) -> None:
        labels = {
            "MemTotal": self.total, "MemFree": self.free, "MemAvailable": self.available,
            "SwapTotal": self.swap_total, "SwapFree": self.swap_free, "CommitLimit": self.commit_limit,
            "Committed_AS": self.committed, "Hugetlb": self.hugetlb,
        }  # fmt: skip
        self._kernel._show("/proc/meminfo", _labelled(labels) + "HugePages_Total:       0\n")
        threads = None if self.threads is None else f"0.00 0.00 0.00 1/{self.threads} {_PID}\n"
        self._kernel._show("/proc/loadavg", threads)
        self._kernel._show_number("/proc/sys/kernel/threads-max", self.threads_max)


class FakeOvercommit(_Part):
    """How commit is accounted: the files of /proc/sys/vm.

    Attributes:
        mode: 0 guess, 1 always, 2 never.
        ratio: Percent of RAM in CommitLimit.
        fixed: What stands in place of that share; 0: nothing (vm.overcommit_kbytes).
        admin_reserve, user_reserve: What mode 2 keeps back.
    """

    mode = _Number()
    ratio = _Number()
    fixed = _Setting()
    admin_reserve = _Setting()
    user_reserve = _Setting()

    _defaults: ClassVar[dict[str, int | None]] = {
        "mode": 0, "ratio": 50, "fixed": 0, "admin_reserve": 8 << 20, "user_reserve": 128 << 20,
    }  # fmt: skip

    def _limit_bytes(self) -> int:
        """Return CommitLimit as mm/util.c's vm_commit_limit() counts it."""
        of = self._kernel.machine
        share_bytes = max(0, (of.total or 0) - (of.hugetlb or 0)) // machine.PAGE_BYTES * (self.ratio or 0) // 100
        return (self.fixed or share_bytes * machine.PAGE_BYTES) + (of.swap_total or 0)

    def _render(self) -> None:
        show = self._kernel._show_number
        show("/proc/sys/vm/overcommit_memory", self.mode)
        show("/proc/sys/vm/overcommit_ratio", self.ratio)
        for name, size_bytes in (
            ("overcommit_kbytes", self.fixed),
            ("admin_reserve_kbytes", self.admin_reserve),
            ("user_reserve_kbytes", self.user_reserve),
        ):
            show(f"/proc/sys/vm/{name}", None if size_bytes is None else size_bytes // 1024)
        self._kernel.machine._render()


@dataclass(frozen=True, slots=True)
class FakeMapping:
    """A mapping of the made-up process: an entry of /proc/self/smaps.

    Attributes:
        size: What it spans.
        anonymous: How much of it is in RAM and private.
        permissions: As in smaps; ``p`` is private, ``s`` shared.
        flags: VmFlags: ``ac`` is charged for, ``dc`` is MADV_DONTFORK, ``wf`` is MADV_WIPEONFORK.
        swap: How much of it is swapped out.
    """

    size: Size
    anonymous: Size = 0
    permissions: str = "rw-p"
    flags: str = "rd wr mr mw me ac"
    swap: Size = 0

    def _text(self, start: int) -> tuple[str, int]:
        sizes = [parse_size(size) for size in (self.size, self.anonymous, self.swap)]
        size_kb, anonymous_kb, swap_kb = (size_bytes // 1024 for size_bytes in sizes)
        end = start + sizes[0]
        text = (
            f"{start:x}-{end:x} {self.permissions} 00000000 00:00 0 \nSize:   {size_kb} kB\n"
            f"Rss:    {anonymous_kb} kB\nAnonymous:    {anonymous_kb} kB\nSwap:    {swap_kb} kB\n"
            f"VmFlags: {self.flags} \n"
        )
        return text, end


class FakeProcess(_Part):
    """The process itself: what /proc/self tells of it.

    Attributes:
        rss, anonymous, swap, pss, total_vm, data_vm, page_tables: Its sizes.
        data_limit, address_space_limit: RLIMIT_DATA and RLIMIT_AS, the soft ones; None: unlimited.
        processes_limit: RLIMIT_NPROC; None: unlimited.
        threads: How many it has: with RLIMIT_NPROC, what its user may have more.
        uid, capabilities, oom_score, oom_score_adj: As in its status; ``1 << 21`` is CAP_SYS_ADMIN.
        user_namespace: The number of its user namespace; None: the first, where capabilities are worth what they say.
    """

    rss = _Setting()
    anonymous = _Setting()
    swap = _Setting()
    pss = _Setting()
    total_vm = _Setting()
    data_vm = _Setting()
    page_tables = _Setting()
    data_limit = _Setting()
    address_space_limit = _Setting()
    processes_limit = _Number()
    threads = _Number()
    uid = _Number()
    capabilities = _Number()
    oom_score = _Number()
    oom_score_adj = _Signed()
    user_namespace = _Number()

    _defaults: ClassVar[dict[str, int | None]] = {
        "rss": 8 << 20, "anonymous": 4 << 20, "swap": 0, "pss": 2 << 20, "total_vm": 64 << 20, "data_vm": 32 << 20,
        "page_tables": 1 << 20, "threads": 1, "uid": 1000, "capabilities": 0, "oom_score": 666, "oom_score_adj": 0,
    }  # fmt: skip

    def __init__(self, kernel: FakeKernel) -> None:
        super().__init__(kernel)
        self._mappings: tuple[FakeMapping, ...] = (FakeMapping(2 << 20, 1 << 20),)

    @property
    def mappings(self) -> tuple[FakeMapping, ...]:
        """Its mappings; set them to any sequence of FakeMapping."""
        return self._mappings

    @mappings.setter
    def mappings(self, mappings: tuple[FakeMapping, ...] | list[FakeMapping]) -> None:
        self._mappings = tuple(mappings)
        self._render()

    def _render(self) -> None:
        sizes = {
            "VmSize": self.total_vm, "VmRSS": self.rss, "RssAnon": self.anonymous, "VmData": self.data_vm,
            "VmPTE": self.page_tables, "VmSwap": self.swap,
        }  # fmt: skip
        show = self._kernel._show
        uids = "" if self.uid is None else "Uid:" + f"\t{self.uid}" * 4 + "\n"
        text = (
            f"Name:\tpython\n{uids}{_labelled(sizes)}Threads:\t{self.threads or 0}\n"
            f"CapEff:\t{self.capabilities or 0:016x}\n"
        )
        for name in ("self", _PID):
            show(f"/proc/{name}/status", text)
        namespace = None if self.user_namespace is None else f"user:[{self.user_namespace}]"
        self._kernel._show_link("/proc/self/ns/user", namespace)
        show("/proc/self/limits", self._limits())
        self._kernel._show_number("/proc/self/oom_score", self.oom_score)
        self._kernel._show_number("/proc/self/oom_score_adj", self.oom_score_adj)
        sums = {
            "Rss": self.rss, "Pss": self.pss, "Shared_Dirty": 0, "Private_Dirty": self.anonymous,
            "Anonymous": self.anonymous, "Swap": self.swap,
        }  # fmt: skip
        head = "00400000-7fff0000 ---p 00000000 00:00 0  [rollup]\n"
        show("/proc/self/smaps_rollup", head + _labelled(sums))
        smaps, start = "", 0x7F0000000000
        for mapping in self._mappings:
            text, end = mapping._text(start)
            smaps += text
            start = end + 2**30  # neighbours would be one mapping
        show("/proc/self/smaps", smaps)

    def _limits(self) -> str:
        lines = [f"{'Limit':<25} {'Soft Limit':<20} {'Hard Limit':<20} {'Units':<10}"]
        for name, value, unit in (
            ("data size", self.data_limit, "bytes"),
            ("processes", self.processes_limit, "processes"),
            ("address space", self.address_space_limit, "bytes"),
        ):
            soft = "unlimited" if value is None else str(value)
            lines.append(f"{f'Max {name}':<25} {soft:<20} {'unlimited':<20} {unit:<10}")
        return "\n".join(lines) + "\n"


class FakeCgroup(_Part):
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

    limit = _Setting()
    high = _Setting()
    usage = _Setting()
    inactive_file = _Setting()
    active_file = _Setting()
    swap = _Setting()
    swap_limit = _Setting()
    swap_high = _Setting()
    ooms = _Number()
    oom_kills = _Number()
    pids = _Number()
    pids_limit = _Number()

    def __init__(self, kernel: FakeKernel, path: str) -> None:
        super().__init__(kernel)
        self.path = path
        self._exists = False
        self._stalls: str | None = None

    def join(self) -> Self:
        """Put the process into it; returns itself."""
        self._kernel._place(self.path)
        return self

    def stall(self, some: float = 0.0, full: float = 0.0, *, some_us: int = 0, full_us: int = 0) -> None:
        """Have its tasks wait for memory; as FakeKernel.stall(). Where memory is on v1, the cgroup2 beside shows it."""
        self._stalls = _stalls(some, full, some_us, full_us)
        self._render()

    def remove(self) -> None:
        """Let it vanish, with all below it, in one moment. A process that is in it is still told to be."""
        for group in list(self._kernel._cgroups.values()):
            if _within(group.path, self.path) is not None:
                group._exists = False
        for base in self._kernel._hierarchies():
            self._kernel._remove_folder(self._folder(base))

    def restore(self) -> None:
        """Make it anew under the same name, as it was set last; those below it stay away until they are restored."""
        self._appear()

    def file(self, name: str) -> str:
        """Return the path of its file *name*, for FakeKernel.write() and its sisters."""
        return f"{self._folder(self._kernel._memory_base())}/{name}"

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
                self._kernel._show(f"{folder}/{name}", text)
        parent = self._parent()
        if parent is not None:
            parent._render()  # what this one holds is in what its ancestors hold

    def _appear(self) -> None:
        if self._exists:
            return
        parent = self._parent()
        if parent is not None:
            parent._appear()
        self._exists = True
        for folder, texts in self._folders():
            self._kernel._add_folder(folder, texts)
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


class FakeKernel:
    """A machine of files: 16 GiB, 8 GiB of it available, no swap, overcommit mode 0, one process in the root cgroup.

    Everything can be changed while a test runs; the files change at once, each in one moment, so that a monitor that
    polls beside never sees half a number. What signals in a real kernel (memory.events, PSI triggers) does not here:
    PressureMonitor polls, or is told to look by its check().

    As a context manager it removes the folder at the end if it made it.

    Args:
        root: The folder to fill, such as pytest's tmp_path; by default a new temporary one.
        layout: ``v2``: one cgroup2. ``v1``: the memory controller on v1. ``hybrid``: the same with a cgroup2 beside,
            which has memory.pressure alone.
        visible_from: The cgroup that is mounted as the root: a container that is shown its own cgroup and those below
            it, by their paths on the host. What lies above limits it as well, but cannot be seen.

    Attributes:
        root: What to pass as ``root=``.
        layout, visible_from: As given.
        machine: Physical memory, swap and commit (FakeMachine).
        overcommit: The mode and the reserves (FakeOvercommit).
        process: The process itself (FakeProcess).

    Raises:
        ValueError: *layout* is none of the three, or *visible_from* no path of a cgroup.
    """

    def __init__(
        self, root: str | os.PathLike[str] | None = None, *, layout: Layout = "v2", visible_from: str = "/"
    ) -> None:
        if layout not in _MOUNTS:
            raise ValueError(f"layout must be one of {', '.join(_MOUNTS)}: {layout!r}")
        visible_from = _cgroup_path(visible_from)
        self._own = root is None
        self.root = Path(tempfile.mkdtemp(prefix="memsafe-kernel-") if root is None else root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.layout: Layout = layout
        self.visible_from = visible_from
        self._shown: dict[str, str | None] = {}
        self._cgroups: dict[str, FakeCgroup] = {}
        self.machine = FakeMachine(self)
        self.overcommit = FakeOvercommit(self)
        self.process = FakeProcess(self)
        for part in (self.overcommit, self.process):
            part._render()
        self.mounts(*(line.replace(" / ", f" {_escaped(visible_from)} ", 1) for line in _MOUNTS[layout]))
        self.cgroup(visible_from).join()

    def cgroup(self, path: str, **settings: Any) -> FakeCgroup:
        """Return the cgroup at *path*, with *settings* changed; it and its ancestors are made where they are not there.

        Args:
            path: From the root of the hierarchy, such as ``/pod/app``.
            settings: Attributes of FakeCgroup.

        Raises:
            ValueError: *path* is no path of a cgroup, or a value makes no sense.
            TypeError: There is no such setting.
        """
        path = _cgroup_path(path)
        if path != "/":
            self.cgroup(str(PurePosixPath(path).parent))
        group = self._cgroups.get(path) or FakeCgroup(self, path)
        group.set(**settings)
        self._cgroups[path] = group
        group._appear()
        return group

    def stall(self, some: float = 0.0, full: float = 0.0, *, some_us: int = 0, full_us: int = 0) -> None:
        """Have the machine's tasks wait for memory. Until then it has no PSI.

        Args:
            some: Percent of the time that some task waits, in all three averages.
            full: Percent of the time that every task waits.
            some_us: The total of what some task waited, in microseconds.
            full_us: The total of what every task waited, in microseconds.
        """
        self._show_again("/proc/pressure/memory", _stalls(some, full, some_us, full_us))

    def mounts(self, *lines: str) -> None:
        """Replace /proc/self/mountinfo by *lines*."""
        self._show_again("/proc/self/mountinfo", "".join(f"{line}\n" for line in lines))

    def write(self, path: str, content: str | bytes) -> Path:
        """Have the file at *path* hold *content*, garbage included, until a setting that it shows is changed.

        Returns:
            Where it is.
        """
        data = os.fsencode(content) if isinstance(content, str) else content
        file = self._at(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink() or not file.is_file():
            aside = self._aside(data)
            aside.replace(file)
        else:
            _rewrite(file, data)
        return file

    def remove(self, path: str) -> None:
        """Remove the file at *path*: this kernel does not have it, until a setting that it shows is changed."""
        self._at(path).unlink()

    def make_unreadable(self, path: str) -> None:
        """Have every reading of the file at *path* fail, root's too, until a setting that it shows is changed.

        The error is ELOOP: of what a file can answer, it alone also stops those whom no permission stops.
        """
        file = self._at(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.symlink_to(file.name)

    def repair(self, path: str) -> None:
        """Have the file at *path* show the settings again, after write(), remove() or make_unreadable().

        Raises:
            KeyError: No setting is shown there.
        """
        self._show_again(path, self._shown[path])

    def close(self) -> None:
        """Remove the folder, if it was made here."""
        if self._own:
            shutil.rmtree(self.root, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _place(self, path: str) -> None:
        """Put the process into the cgroup at *path* of every hierarchy."""
        lines = [] if self.layout == "v2" else [f"5:pids:{path}", f"4:memory:{path}", "1:cpu:/"]
        if self.layout != "v1":
            lines.append(f"0::{path}")
        self._show_again("/proc/self/cgroup", "".join(f"{line}\n" for line in lines))

    def _memory_base(self) -> str:
        return "/sys/fs/cgroup" if self.layout == "v2" else "/sys/fs/cgroup/memory"

    def _hierarchies(self) -> tuple[str, ...]:
        if self.layout == "v2":
            return ("/sys/fs/cgroup",)
        return tuple(line.split()[4] for line in _MOUNTS[self.layout])

    def _at(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def _show(self, path: str, text: str | None) -> None:
        """Write a file that shows settings, None for no file, if what it shows has changed."""
        if path in self._shown and self._shown[path] == text:
            return
        if text is None:
            self._at(path).unlink(missing_ok=True)
        else:
            self.write(path, text)
        self._shown[path] = text

    def _show_again(self, path: str, text: str | None) -> None:
        """As _show(), also where something else was written over it since."""
        self._shown.pop(path, None)
        self._show(path, text)

    def _show_link(self, path: str, target: str | None) -> None:
        """Have a symbolic link lead to *target*, None for no link."""
        link = self._at(path)
        link.unlink(missing_ok=True)
        if target is not None:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)

    def _show_number(self, path: str, value: int | None) -> None:
        self._show(path, None if value is None else f"{value}\n")

    def _aside(self, data: bytes) -> Path:
        """Return a new file out of sight, to be moved to its place when it is whole."""
        descriptor, name = tempfile.mkstemp(prefix=".new-", dir=self.root)
        with open(descriptor, "wb") as file:
            file.write(data)
        return Path(name)

    def _add_folder(self, path: str, texts: dict[str, str | None]) -> None:
        """Have a folder with its files appear in one moment."""
        folder = self._at(path)
        if folder.exists():
            for name, text in texts.items():
                self._show(f"{path}/{name}", text)
            return
        aside = Path(tempfile.mkdtemp(prefix=".new-", dir=self.root))
        aside.chmod(0o755)
        for name, text in texts.items():
            if text is not None:
                (aside / name).write_text(text)
            self._shown[f"{path}/{name}"] = text
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside.rename(folder)

    def _remove_folder(self, path: str) -> None:
        """Have a folder with its files vanish in one moment."""
        folder = self._at(path)
        if folder.exists():
            aside = Path(tempfile.mkdtemp(prefix=".old-", dir=self.root))
            folder.rename(aside / "gone")
            shutil.rmtree(aside)
        for shown in [shown for shown in self._shown if shown.startswith(path.rstrip("/") + "/")]:
            del self._shown[shown]


def _rewrite(file: Path, data: bytes) -> None:
    """Replace what *file* holds in place, as the kernel does: a descriptor that was kept open sees the change.

    Newlines, which every reader passes over, fill what the old and the new text differ in length: between the calls
    there is never half a number.
    """
    with open(file, "r+b", buffering=0) as raw:
        before_bytes = os.fstat(raw.fileno()).st_size
        if len(data) > before_bytes:
            os.pwrite(raw.fileno(), b"\n" * (len(data) - before_bytes), before_bytes)
        os.pwrite(raw.fileno(), data.ljust(before_bytes, b"\n"), 0)
        os.ftruncate(raw.fileno(), len(data))


def _cgroup_path(path: str) -> str:
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


def _escaped(path: str) -> str:
    """Return *path* as mountinfo writes it."""
    return "".join(f"\\{ord(char):03o}" if char in " \t\n\\" else char for char in path)


def _labelled(sizes: dict[str, int | None]) -> str:
    return "".join(
        f"{label}:\t{size_bytes // 1024:8} kB\n" for label, size_bytes in sizes.items() if size_bytes is not None
    )


def _limit(size_bytes: int | None) -> str:
    return "max\n" if size_bytes is None or size_bytes >= UNLIMITED else f"{size_bytes}\n"


def _stalls(some: float, full: float, some_us: int, full_us: int) -> str:
    return "".join(
        f"{kind} avg10={percent:.2f} avg60={percent:.2f} avg300={percent:.2f} total={total_us}\n"
        for kind, percent, total_us in (("some", some, some_us), ("full", full, full_us))
    )
