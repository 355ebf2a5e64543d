"""Limits on the number of tasks: what makes fork() answer EAGAIN (kernel/fork.c, copy_process(); cgroup pids)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memsafe._kernel import files, machine, process
from memsafe._kernel.files import UNLIMITED
from memsafe.errors import KernelError

if TYPE_CHECKING:
    from memsafe._kernel.cgroup import Placement
    from memsafe._kernel.files import Root


def exhausted(placement: Placement, root: Root = "/") -> str | None:
    """Return which limit has no room for one more task, in words, or None.

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
    return _user_exhausted(current, root)


def _user_exhausted(all_threads: int | None, root: Root) -> str | None:
    """Return how RLIMIT_NPROC has no room for one more task, or None.

    Source: kernel/fork.c, copy_process(): the first user of the first namespace is exempt, and who may administer. The
    kernel's count is told nowhere: it is added up here, of the processes that can be seen, so it may be too low.
    """
    limit = process.limits(root).processes
    if limit is None or limit == UNLIMITED:
        return None
    if all_threads is not None and all_threads < limit:
        return None  # whoever they belong to: there is no need to look at every process
    own = process.status(root)
    uid = own.real_uid
    if uid is None:
        raise files.lacking(own.path, "Uid")
    administers = own.effective_capabilities & (1 << process.CAP_SYS_ADMIN | 1 << process.CAP_SYS_RESOURCE)
    if (uid == 0 or administers) and process.in_initial_user_namespace(root):
        return None
    current = sum(_threads_of(pid, uid, root) for pid in process.pids(root))
    if current < limit:
        return None
    return f"{current} of {limit} tasks that RLIMIT_NPROC allows to user {uid}"


def _threads_of(pid: int, uid: int, root: Root) -> int:
    try:
        status = process.status(root, pid)
        return (status.threads or 0) if status.real_uid == uid else 0
    except KernelError:
        return 0  # it ended meanwhile, or is hidden
