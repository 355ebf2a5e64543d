"""What /proc/<pid> says about a process's memory (Documentation/filesystems/proc.rst)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memsafe._kernel import files
from memsafe._kernel.files import UNLIMITED, Labelled, Root
from memsafe.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Iterator

CAP_SYS_ADMIN = 21
CAP_SYS_RESOURCE = 24

# The inode that the kernel gives the first user namespace (include/uapi/linux/nsfs.h, USER_NS_INIT_INO).
_INITIAL_USER_NAMESPACE = "user:[4026531837]"

# 10,000 mappings take some 10 MB of smaps; max_map_count may be raised to any number.
_SMAPS_BYTES_MAX = 2**31


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """The lines of /proc/<pid>/status that concern memory; None where the kernel does not say (a kernel thread).

    Attributes:
        rss_bytes, anonymous_bytes, swap_bytes: Resident, resident and anonymous, swapped out.
        total_vm_bytes: All mappings: what RLIMIT_AS limits.
        data_vm_bytes: Private writable mappings: what RLIMIT_DATA limits.
        page_table_bytes: Its page tables, all levels.
        threads: How many it has.
        real_uid: Its real user.
        effective_capabilities: As a set of bits; 0 where not told.
    """

    rss_bytes: int | None
    anonymous_bytes: int | None
    swap_bytes: int | None
    total_vm_bytes: int | None
    data_vm_bytes: int | None
    page_table_bytes: int | None
    threads: int | None
    real_uid: int | None
    effective_capabilities: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Soft limits of a process; files.UNLIMITED where there is none."""

    data_bytes: int
    address_space_bytes: int
    processes: int


@dataclass(frozen=True, slots=True)
class SmapsRollup:
    """Sums over all mappings. Reading them walks the page tables: milliseconds per GiB."""

    rss_bytes: int
    pss_bytes: int
    shared_dirty_bytes: int
    private_dirty_bytes: int
    anonymous_bytes: int
    swap_bytes: int


@dataclass(frozen=True, slots=True)
class Mapping:
    """One entry of smaps.

    Attributes:
        start, end: Addresses.
        size_bytes: What it spans: Size, which is end - start.
        private: Not MAP_SHARED.
        resident_bytes, swap_bytes: In RAM; swapped out.
        anonymous_bytes: Resident and of this process alone to keep: private pages, a file's written ones included.
        flags: The two-letter VmFlags, such as ``ac`` (its commit is accounted) and ``dc`` (not copied by fork).
    """

    start: int
    end: int
    size_bytes: int
    private: bool
    resident_bytes: int
    anonymous_bytes: int
    swap_bytes: int
    flags: frozenset[str]


def status(root: Root = "/", pid: int | str = "self") -> ProcessStatus:
    """Return what /proc/<pid>/status says.

    Raises:
        KernelError: It cannot be read or makes no sense.
    """
    path = files.under(root, f"/proc/{pid}/status")
    lines = Labelled(files.read(path), path)
    uids = lines.get(b"Uid")
    return ProcessStatus(
        rss_bytes=lines.size_bytes(b"VmRSS"),
        anonymous_bytes=lines.size_bytes(b"RssAnon"),
        swap_bytes=lines.size_bytes(b"VmSwap"),
        total_vm_bytes=lines.size_bytes(b"VmSize"),
        data_vm_bytes=lines.size_bytes(b"VmData"),
        page_table_bytes=lines.size_bytes(b"VmPTE"),
        threads=lines.count(b"Threads"),
        real_uid=files.count(uids.split()[0], path) if uids else None,
        effective_capabilities=_capabilities(lines),
    )


def _capabilities(lines: Labelled) -> int:
    text = lines.get(b"CapEff")
    if text is None:
        return 0
    if not re.fullmatch(rb"[0-9a-fA-F]{1,16}", text):
        raise files.garbage(lines.path, f"CapEff is {text[:40]!r}")
    return int(text, 16)


def in_initial_user_namespace(root: Root = "/", pid: int | str = "self") -> bool:
    """Whether *pid* lives in the first user namespace, where its capabilities are worth what they say.

    A kernel without /proc/<pid>/ns/user has no user namespaces, hence only the first.

    Raises:
        KernelError: The link is there and cannot be read.
    """
    try:
        return files.read_link(files.under(root, f"/proc/{pid}/ns/user")) == _INITIAL_USER_NAMESPACE
    except KernelError as error:
        if files.is_missing(error):
            return True
        raise


def oom_score(root: Root = "/", pid: int | str = "self") -> int | None:
    """Return how likely the OOM killer is to take *pid*, or None where it is not told."""
    return files.read_count(files.under(root, f"/proc/{pid}/oom_score"))


def oom_score_adj(root: Root = "/", pid: int | str = "self") -> int | None:
    """Return the adjustment of *pid*, -1000 to 1000, or None where it is not told."""
    path = files.under(root, f"/proc/{pid}/oom_score_adj")
    text = files.read_optional(path)
    if text is None:
        return None
    text = text.strip()
    value = files.count(text.removeprefix(b"-"), path)
    return -value if text.startswith(b"-") else value


_LIMIT = re.compile(rb"^Max (data size|address space|processes) +(\S+) ", re.MULTILINE)


def limits(root: Root = "/", pid: int | str = "self") -> Limits:
    """Return the soft limits of *pid*.

    Raises:
        KernelError: /proc/<pid>/limits cannot be read, lacks one, or makes no sense.
    """
    path = files.under(root, f"/proc/{pid}/limits")
    found = dict(_LIMIT.findall(files.read(path)))
    values = []
    for name in (b"data size", b"address space", b"processes"):
        if name not in found:
            raise files.lacking(path, f"Max {name.decode()}")
        values.append(UNLIMITED if found[name] == b"unlimited" else files.limit(found[name], path))
    return Limits(*values)


def smaps_rollup(pid: int | str = "self", root: Root = "/") -> SmapsRollup:
    """Return the sums over all mappings of *pid*.

    Raises:
        KernelError: It cannot be read (another user's process, no such process) or makes no sense.
    """
    path = files.under(root, f"/proc/{pid}/smaps_rollup")
    lines = Labelled(files.read(path), path)
    return SmapsRollup(
        rss_bytes=lines.required_bytes(b"Rss"),
        pss_bytes=lines.required_bytes(b"Pss"),
        shared_dirty_bytes=lines.required_bytes(b"Shared_Dirty"),
        private_dirty_bytes=lines.required_bytes(b"Private_Dirty"),
        anonymous_bytes=lines.required_bytes(b"Anonymous"),
        swap_bytes=lines.required_bytes(b"Swap"),
    )


def pss_bytes(pid: int | str = "self", root: Root = "/") -> int:
    """Return the proportional set size of *pid*, by a walk over its page tables.

    Raises:
        KernelError: smaps_rollup cannot be read or makes no sense.
    """
    path = files.under(root, f"/proc/{pid}/smaps_rollup")
    return Labelled(files.read(path), path).required_bytes(b"Pss")


# "start-end perms …": the head of an entry; every other line begins with a capital's label.
_HEAD = re.compile(rb"^([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([r-][w-][x-][sp]) ", re.MULTILINE)


def mappings(pid: int | str = "self", root: Root = "/") -> list[Mapping]:
    """Return every mapping of *pid*, by a walk over its page tables.

    Raises:
        KernelError: smaps cannot be read or makes no sense.
    """
    path = files.under(root, f"/proc/{pid}/smaps")
    text = files.read(path, max_bytes=_SMAPS_BYTES_MAX)
    return list(_entries(text, path))


def _entries(text: bytes, path: str) -> Iterator[Mapping]:
    heads = list(_HEAD.finditer(text))
    if not heads and text.strip():
        raise files.garbage(path, "it has no mapping")
    ends = [head.start() for head in heads[1:]] + [len(text)]
    for head, end in zip(heads, ends, strict=True):
        lines = Labelled(text[head.end() : end], path)
        flags = lines.get(b"VmFlags")
        if flags is None:
            # Without it nothing can be said about the charge (it is there since Linux 3.8).
            raise files.lacking(path, "VmFlags")
        yield Mapping(
            start=int(head[1], 16),
            end=int(head[2], 16),
            size_bytes=lines.required_bytes(b"Size"),
            private=head[3].endswith(b"p"),
            resident_bytes=lines.size_bytes(b"Rss") or 0,
            anonymous_bytes=lines.size_bytes(b"Anonymous") or 0,
            swap_bytes=lines.size_bytes(b"Swap") or 0,
            flags=frozenset(flags.decode("ascii", "replace").split()),
        )
