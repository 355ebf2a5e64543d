"""The made-up machine as a whole: physical memory, swap, commit."""

from __future__ import annotations

from typing import ClassVar

from memsafe._kernel import machine
from memsafe.testing.parts import PID, Number, Part, Setting, labelled


class FakeMachine(Part):
    """Physical memory, swap and the sums of commit: /proc/meminfo, and how many tasks there may be.

    Attributes:
        total, free, available, swap_total, swap_free, hugetlb, committed: As MemTotal and its sisters. A size, or None
            for a kernel that does not tell.
        commit_limit: What is set here, None for a kernel that does not tell, else what the kernel would count.
        threads, threads_max: Tasks of the whole machine, and kernel.threads-max; None: not told.
    """

    total = Setting()
    free = Setting()
    available = Setting()
    swap_total = Setting()
    swap_free = Setting()
    hugetlb = Setting()
    committed = Setting()
    commit_limit = Setting()
    threads = Number()
    threads_max = Number()

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
        self._tree.show("/proc/meminfo", labelled(labels) + "HugePages_Total:       0\n")
        threads = None if self.threads is None else f"0.00 0.00 0.00 1/{self.threads} {PID}\n"
        self._tree.show("/proc/loadavg", threads)
        self._tree.show_number("/proc/sys/kernel/threads-max", self.threads_max)


class FakeOvercommit(Part):
    """How commit is accounted: the files of /proc/sys/vm.

    Attributes:
        mode: 0 guess, 1 always, 2 never.
        ratio: Percent of RAM in CommitLimit.
        fixed: What stands in place of that share; 0: nothing (vm.overcommit_kbytes).
        admin_reserve, user_reserve: What mode 2 keeps back.
    """

    mode = Number()
    ratio = Number()
    fixed = Setting()
    admin_reserve = Setting()
    user_reserve = Setting()

    _defaults: ClassVar[dict[str, int | None]] = {
        "mode": 0, "ratio": 50, "fixed": 0, "admin_reserve": 8 << 20, "user_reserve": 128 << 20,
    }  # fmt: skip

    def _limit_bytes(self) -> int:
        """Return CommitLimit as mm/util.c's vm_commit_limit() counts it."""
        of = self._kernel.machine
        share_bytes = max(0, (of.total or 0) - (of.hugetlb or 0)) // machine.PAGE_BYTES * (self.ratio or 0) // 100
        return (self.fixed or share_bytes * machine.PAGE_BYTES) + (of.swap_total or 0)

    def _render(self) -> None:
        show = self._tree.show_number
        show("/proc/sys/vm/overcommit_memory", self.mode)
        show("/proc/sys/vm/overcommit_ratio", self.ratio)
        for name, size_bytes in (
            ("overcommit_kbytes", self.fixed),
            ("admin_reserve_kbytes", self.admin_reserve),
            ("user_reserve_kbytes", self.user_reserve),
        ):
            show(f"/proc/sys/vm/{name}", None if size_bytes is None else size_bytes // 1024)
        self._kernel.machine._render()
