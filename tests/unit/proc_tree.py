"""A tree of proc and sys files that stands in for a machine."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from memsafe.errors import MemsafeError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GIB_KB = 1024 * 1024
MIB = 1024 * 1024
GIB = 1024 * MIB

LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max data size             {data}            unlimited            bytes
Max processes             {processes}                96365                processes
Max address space         {address_space}            unlimited            bytes
"""

V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
HYBRID_MOUNT = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"


@contextmanager
def only_memsafe_errors(*, naming: str) -> Iterator[None]:
    """Let a MemsafeError pass if it names what failed, and nothing else."""
    try:
        yield
    except MemsafeError as error:
        if naming not in str(error):
            raise AssertionError(f"it does not name {naming}: {error}") from error


class ProcTree:
    """A machine of 16 GiB, 8 GiB of it available, no swap, overcommit mode 0, one process in no cgroup."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._meminfo = {
            "MemTotal": 16 * GIB_KB,
            "MemFree": 6 * GIB_KB,
            "MemAvailable": 8 * GIB_KB,
            "SwapTotal": 0,
            "SwapFree": 0,
            "CommitLimit": 8 * GIB_KB,
            "Committed_AS": 4 * GIB_KB,
            "Hugetlb": 0,
        }
        self.meminfo()
        self.overcommit(0)
        self.write("/proc/self/cgroup", "0::/\n")
        self.mounts()
        self.status()
        self.rlimits()
        self.write("/proc/self/oom_score", "666\n")
        self.write("/proc/self/oom_score_adj", "-17\n")
        self.write("/proc/self/smaps_rollup", "00400000-7fff0000 ---p 00000000 00:00 0  [rollup]\nPss:     2048 kB\n")
        self.smaps()

    def write(self, path: str, text: str) -> Path:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def remove(self, path: str) -> None:
        (self.root / path.lstrip("/")).unlink()

    def meminfo(self, **kilobytes: int | None) -> None:
        self._meminfo |= kilobytes
        lines = (f"{name}:  {kb} kB\n" for name, kb in self._meminfo.items() if kb is not None)
        self.write("/proc/meminfo", "".join(lines) + "HugePages_Total:       0\n")

    def overcommit(self, mode: int, *, ratio: int = 50, kbytes: int = 0, admin_kb: int = 0, user_kb: int = 0) -> None:
        settings = {
            "overcommit_memory": mode,
            "overcommit_ratio": ratio,
            "overcommit_kbytes": kbytes,
            "admin_reserve_kbytes": admin_kb,
            "user_reserve_kbytes": user_kb,
        }
        for name, value in settings.items():
            self.write(f"/proc/sys/vm/{name}", f"{value}\n")

    def mounts(self, *lines: str) -> None:
        self.write("/proc/self/mountinfo", "".join(f"{line}\n" for line in lines))

    def status(
        self, *, vm_kb: int = 65536, anon_kb: int = 4096, pte_kb: int = 1024, swap_kb: int = 0, caps: int = 0
    ) -> None:
        self.write(
            "/proc/self/status",
            f"Name:\tpython\nUid:\t1000\t1000\t1000\t1000\nVmSize:\t{vm_kb} kB\nVmRSS:\t  8192 kB\n"
            f"RssAnon:\t{anon_kb} kB\nVmData:\t 32768 kB\nVmPTE:\t {pte_kb} kB\nVmSwap:\t {swap_kb} kB\nThreads:\t1\n"
            f"CapEff:\t{caps:016x}\n",
        )

    def rlimits(self, data: str = "unlimited", address_space: str = "unlimited", processes: str = "unlimited") -> None:
        self.write("/proc/self/limits", LIMITS.format(data=data, address_space=address_space, processes=processes))

    def smaps(self, *entries: str) -> None:
        """Write smaps from entries of ``kB permissions flags [anonymous_kb]``; one small heap where there are none."""
        text, address = "", 0x7F0000000000
        for entry in entries or ("2048 rw-p rd,wr,mr,mw,me,ac 1024",):
            size_kb, permissions, flags, anonymous_kb = (*entry.split(), "0")[:4]
            end = address + int(size_kb) * 1024
            text += (
                f"{address:x}-{end:x} {permissions} 00000000 00:00 0 \nSize:   {size_kb} kB\n"
                f"Rss:    {anonymous_kb} kB\nAnonymous:    {anonymous_kb} kB\nSwap:    0 kB\n"
                f"VmFlags: {flags.replace(',', ' ')} \n"
            )
            address = end + 2**30
        self.write("/proc/self/smaps", text)

    def v2(self, path: str) -> None:
        """Put the process into a cgroup of a plain cgroup2 machine."""
        self.write("/proc/self/cgroup", f"0::{path}\n")
        self.mounts(V2_MOUNT)
        self.write("/sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n")

    def v1(self, path: str) -> None:
        """Put the process into a memory cgroup of a hybrid machine; its cgroup2 is the root."""
        self.write("/proc/self/cgroup", f"4:memory:{path}\n1:cpu:/\n0::/\n")
        self.mounts(V1_MOUNT, HYBRID_MOUNT)
        (self.root / "sys/fs/cgroup/unified").mkdir(parents=True, exist_ok=True)

    def v2_group(
        self, path: str, limit: int | str = "max", used: int = 0, *, high: int | str = "max", inactive: int = 0,
        active: int = 0, controllers: str = "memory pids",
    ) -> None:  # fmt: skip
        base = f"/sys/fs/cgroup{path}"
        self.write(f"{base}/cgroup.controllers", controllers + "\n")
        self.write(f"{base}/memory.max", f"{limit}\n")
        self.write(f"{base}/memory.high", f"{high}\n")
        self.write(f"{base}/memory.current", f"{used}\n")
        self.write(f"{base}/memory.stat", f"anon 1\ninactive_file {inactive}\nactive_file {active}\n")

    def v1_group(self, path: str, limit: int, used: int = 0, *, inactive: int = 0, active: int = 0) -> None:
        base = f"/sys/fs/cgroup/memory{path}"
        self.write(f"{base}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{base}/memory.usage_in_bytes", f"{used}\n")
        stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file {active}\n"
        self.write(f"{base}/memory.stat", stat)
