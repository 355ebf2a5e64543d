"""Limits on the number of tasks: what makes fork() answer EAGAIN (kernel/fork.c, copy_process(); cgroup pids)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memsafe._kernel import files, machine
from memsafe._kernel.files import UNLIMITED

if TYPE_CHECKING:
    from memsafe._kernel.cgroup import Placement
    from memsafe._kernel.files import Root


def exhausted(placement: Placement, root: Root = "/") -> str | None:
    """Return which limit has no room for one more task, in words, or None.

    RLIMIT_NPROC is not looked at: the kernel's count of a user's tasks is not told anywhere.

    Raises:
        KernelError: A file cannot be read or makes no sense.
    """
    for group in placement.locate("pids").cgroups:
        limit, current = files.read_limit(group.file("pids.max")), files.read_count(group.file("pids.current"))
        if limit is not None and current is not None and limit < UNLIMITED and current >= limit:
            return f"{current} of {limit} tasks that pids.max allows in the cgroup {group.path}"
    limit, current = machine.sysctl("kernel/threads-max", root), machine.threads(root)
    if limit is not None and current is not None and current >= limit:
        return f"{current} of {limit} tasks that kernel.threads-max allows on this machine"
    return None
