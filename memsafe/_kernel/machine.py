"""The machine as a whole: physical memory, swap, commit (proc(5), Documentation/mm/overcommit-accounting.rst)."""

from __future__ import annotations

import os
from dataclasses import dataclass

from memsafe._kernel import files
from memsafe._kernel.files import Labelled, Root

PAGE_BYTES = os.sysconf("SC_PAGESIZE")


@dataclass(frozen=True, slots=True)
class MemInfo:
    """The lines of /proc/meminfo that memsafe needs; None where the kernel does not say.

    Attributes:
        total_bytes, free_bytes, available_bytes: MemTotal, MemFree, MemAvailable.
        swap_total_bytes, swap_free_bytes: Swap.
        hugetlb_bytes: Held by huge page pools of every size.
        commit_limit_bytes, committed_bytes: CommitLimit and Committed_AS.
    """

    total_bytes: int | None
    free_bytes: int | None
    available_bytes: int | None
    swap_total_bytes: int | None
    swap_free_bytes: int | None
    hugetlb_bytes: int | None
    commit_limit_bytes: int | None
    committed_bytes: int | None


def meminfo(root: Root = "/") -> MemInfo:
    """Return what /proc/meminfo says.

    Raises:
        KernelError: It cannot be read or makes no sense.
    """
    path = files.under(root, "/proc/meminfo")
    lines = Labelled(files.read(path), path)
    return MemInfo(
        total_bytes=lines.size_bytes(b"MemTotal"),
        free_bytes=lines.size_bytes(b"MemFree"),
        available_bytes=lines.size_bytes(b"MemAvailable"),
        swap_total_bytes=lines.size_bytes(b"SwapTotal"),
        swap_free_bytes=lines.size_bytes(b"SwapFree"),
        hugetlb_bytes=lines.size_bytes(b"Hugetlb"),
        commit_limit_bytes=lines.size_bytes(b"CommitLimit"),
        committed_bytes=lines.size_bytes(b"Committed_AS"),
    )


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
