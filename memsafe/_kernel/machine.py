"""The machine as a whole: physical memory, swap, commit (proc(5), Documentation/mm/overcommit-accounting.rst)."""

from __future__ import annotations

import os

from memsafe._kernel import files
from memsafe._kernel.files import Labelled, Root

PAGE_BYTES = os.sysconf("SC_PAGESIZE")


class MemInfo(Labelled):
    """The lines of /proc/meminfo that memsafe needs; None where the kernel does not say.

    A line is looked at when it is asked for, so that garbage in one leaves the others readable.
    """

    __slots__ = ()

    @property
    def total_bytes(self) -> int | None:
        """RAM that the kernel manages."""
        return self.size_bytes(b"MemTotal")

    @property
    def free_bytes(self) -> int | None:
        """RAM that nobody uses for anything."""
        return self.size_bytes(b"MemFree")

    @property
    def available_bytes(self) -> int | None:
        """RAM that could be had without swapping: free, and the caches that can be dropped."""
        return self.size_bytes(b"MemAvailable")

    @property
    def swap_total_bytes(self) -> int | None:
        """All swap."""
        return self.size_bytes(b"SwapTotal")

    @property
    def swap_free_bytes(self) -> int | None:
        """Swap that is not used."""
        return self.size_bytes(b"SwapFree")

    @property
    def hugetlb_bytes(self) -> int | None:
        """RAM held by the huge page pools of every size (since Linux 4.16)."""
        return self.size_bytes(b"Hugetlb")

    @property
    def commit_limit_bytes(self) -> int | None:
        """What may be promised to all processes together, in mode 2."""
        return self.size_bytes(b"CommitLimit")

    @property
    def committed_bytes(self) -> int | None:
        """What is promised to all processes together."""
        return self.size_bytes(b"Committed_AS")


def meminfo(root: Root = "/") -> MemInfo:
    """Return /proc/meminfo.

    Raises:
        KernelError: It cannot be read.
    """
    path = files.under(root, "/proc/meminfo")
    return MemInfo(files.read(path), path)


def anonymous_bytes(root: Root = "/") -> int:
    """Return what all processes together have in RAM and in no file: a page that several have, once.

    Raises:
        KernelError: /proc/vmstat cannot be read or does not tell.
    """
    path = files.under(root, "/proc/vmstat")
    pages = files.Flat(files.read(path), path).get(b"nr_anon_pages")
    if pages is None:
        raise files.garbage(path, "there is no nr_anon_pages")
    return pages * PAGE_BYTES


def unfaulted_bytes(root: Root = "/") -> int:
    """Return how much all processes together got, since boot, in huge pages and from swap: not a page a fault.

    Raises:
        KernelError: A file cannot be read or makes no sense.
    """
    path = files.under(root, "/proc/vmstat")
    happened = files.Flat(files.read(path), path)
    huge_pages = sum(happened.get(key) or 0 for key in _HUGE_PAGES)
    swapped_pages = sum(happened.get(key) or 0 for key in _SWAPPED_PAGES)
    huge_bytes = files.read_count(files.under(root, f"{_HUGE_PAGE_FOLDER}/hpage_pmd_size")) if huge_pages else None
    return huge_pages * (huge_bytes or 0) + swapped_pages * PAGE_BYTES


_HUGE_PAGE_FOLDER = "/sys/kernel/mm/transparent_hugepage"
_HUGE_PAGES = (b"thp_fault_alloc", b"thp_collapse_alloc")
_SWAPPED_PAGES = (b"pswpin", b"zswpin", b"swpin_zero")


def may_have_medium_pages(root: Root = "/") -> bool:
    """Whether a fault may give anonymous memory of a size between a page and a huge page (since Linux 6.8).

    Raises:
        KernelError: A file cannot be read.
    """
    folder = files.under(root, _HUGE_PAGE_FOLDER)
    if not files.is_directory(folder):
        return False
    huge_bytes = files.read_count(f"{folder}/hpage_pmd_size") or 0
    for name in files.names(folder):
        if name.startswith("hugepages-") and name != f"hugepages-{huge_bytes // 1024}kB":
            chosen = files.read_optional(f"{folder}/{name}/enabled")  # some sizes are of files alone
            if chosen is not None and b"[never]" not in chosen:
                return True
    return False


def overcommit_mode(root: Root = "/") -> int | None:
    """Return vm.overcommit_memory: 0 guess, 1 always, 2 never; None where it is not told.

    Raises:
        KernelError: The file cannot be read or holds another number.
    """
    path = files.under(root, "/proc/sys/vm/overcommit_memory")
    mode = files.read_count(path)
    if mode is not None and mode > 2:
        raise files.garbage(path, f"{mode} is no mode")
    return mode


def sysctl(name: str, root: Root = "/") -> int | None:
    """Return the number in /proc/sys/<name>, or None where there is no such file.

    Raises:
        KernelError: The file cannot be read or holds no number.
    """
    return files.read_count(files.under(root, f"/proc/sys/{name}"))


def threads(root: Root = "/") -> int | None:
    """Return how many threads all processes have together, or None where it is not told.

    Raises:
        KernelError: /proc/loadavg cannot be read or makes no sense.
    """
    path = files.under(root, "/proc/loadavg")
    text = files.read_optional(path)
    if text is None:
        return None
    words = text.split()
    if len(words) < 4:
        raise files.garbage(path, f"{text[:40]!r} is no load average")
    return files.count(words[3].partition(b"/")[2], path)
