"""The kernel's arithmetic of commit: what it promises before it says no.

Source: mm/util.c, __vm_enough_memory() and vm_commit_limit(); Documentation/mm/overcommit-accounting.rst.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memsafe._kernel import files, machine, process
from memsafe._native import ffi, lib
from memsafe.errors import KernelError

if TYPE_CHECKING:
    from memsafe._kernel.files import Root
    from memsafe._kernel.machine import MemInfo
    from memsafe._kernel.process import ProcessStatus

GUESS, ALWAYS, NEVER = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Reserves:
    """What mode 2 keeps back from a process, in bytes."""

    admin_bytes: int
    user_bytes: int

    @property
    def total_bytes(self) -> int:
        """Both together."""
        return self.admin_bytes + self.user_bytes


@dataclass(frozen=True, slots=True)
class ForkCost:
    """What fork() asks of the kernel for a set of mappings.

    Attributes:
        charge_bytes: The commit charge of all of them.
        largest_charge_bytes: The largest charge of one of them: mode 0 looks at each alone.
        page_table_bytes: Page tables that the child gets at once.
        copyable_bytes: Private writable memory, resident or swapped, of which a write by either side makes a copy.
    """

    charge_bytes: int
    largest_charge_bytes: int
    page_table_bytes: int
    copyable_bytes: int


def fork_cost(page_table_bytes: int | None = None, *, root: Root = "/", pid: int | str = "self") -> ForkCost:
    """Return what fork() would ask for, by a walk over the page tables of *pid*: see memsafe_native/src/smaps.c.

    Args:
        page_table_bytes: What the process's own page tables take, where known: the child's take no more.
        root: The directory that stands for "/".
        pid: The process that would fork.

    Raises:
        KernelError: smaps cannot be read, makes no sense, or has no VmFlags (there since Linux 3.8).
    """
    path = files.under(root, f"/proc/{pid}/smaps")
    if "\0" in path:
        raise KernelError(errno.EINVAL, f"open {path!r}", "the path holds a NUL byte")
    sums, line = ffi.new("ms_smaps *"), ffi.new("uint64_t *")
    result = lib.ms_smaps_read(os.fsencode(path), machine.PAGE_BYTES, sums, line)
    if result == -errno.EBADMSG:
        raise files.garbage(path, f"line {line[0]} makes no sense" if line[0] else "it has no mapping")
    if result == -errno.ENODATA:
        raise files.lacking(path, f"Size or no VmFlags for the mapping before line {line[0]}")
    if result < 0:
        raise KernelError(-result, f"read {path}")
    tables_bytes = sums.table_pages * machine.PAGE_BYTES
    if page_table_bytes is not None:
        tables_bytes = min(tables_bytes, page_table_bytes)
    return ForkCost(sums.charge_bytes, sums.largest_charge_bytes, tables_bytes, sums.copyable_bytes)


def commit_limit_bytes(meminfo: MemInfo, root: Root = "/") -> int | None:
    """Return CommitLimit as the kernel prints it, else as it would count it; None where a term of it is missing.

    Raises:
        KernelError: A file cannot be read or makes no sense.
    """
    if (told_bytes := meminfo.commit_limit_bytes) is not None:
        return told_bytes
    swap_bytes = meminfo.swap_total_bytes or 0
    if kbytes := machine.sysctl("vm/overcommit_kbytes", root):
        return _whole_pages(kbytes * 1024) + swap_bytes
    ratio, total_bytes = machine.sysctl("vm/overcommit_ratio", root), meminfo.total_bytes
    if ratio is None or total_bytes is None:
        return None
    pages = max(0, total_bytes - (meminfo.hugetlb_bytes or 0)) // machine.PAGE_BYTES
    return pages * ratio // 100 * machine.PAGE_BYTES + swap_bytes


def reserves(status: ProcessStatus, root: Root = "/", pid: int | str = "self") -> Reserves:
    """Return what mode 2 keeps back from *pid*: the admin's reserve, and a part of its own size.

    Raises:
        KernelError: A file cannot be read or makes no sense.
    """
    admin_bytes = _whole_pages((machine.sysctl("vm/admin_reserve_kbytes", root) or 0) * 1024)
    if is_admin(status, root, pid):
        admin_bytes = 0
    user_bytes = _whole_pages((machine.sysctl("vm/user_reserve_kbytes", root) or 0) * 1024)
    total_vm_bytes = status.total_vm_bytes
    if total_vm_bytes is not None:
        pages = total_vm_bytes // machine.PAGE_BYTES
        user_bytes = min(pages // 32 * machine.PAGE_BYTES, user_bytes)
    return Reserves(admin_bytes, user_bytes)


def is_admin(status: ProcessStatus, root: Root = "/", pid: int | str = "self") -> bool:
    """Whether *pid* has CAP_SYS_ADMIN where it counts, in the first user namespace.

    Raises:
        KernelError: A file cannot be read or makes no sense.
    """
    held = status.effective_capabilities >> process.CAP_SYS_ADMIN & 1
    return bool(held) and process.in_initial_user_namespace(root, pid)


def _whole_pages(size_bytes: int) -> int:
    return size_bytes - size_bytes % machine.PAGE_BYTES
