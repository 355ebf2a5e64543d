"""What memsafe adds to a child: the cgroups it joins, its limits, and what tells that the OOM killer ended it."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from contextlib import closing
from operator import index
from typing import TYPE_CHECKING, Literal, TypeAlias

from memsafe._kernel import child_cgroup
from memsafe._kernel.oom import JOIN_TEXT, KillLog, check_score_adj, join_path, score_adj_path
from memsafe._native import lib
from memsafe.errors import KernelError, UnsupportedError
from memsafe.sizes import Size, format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from memsafe._kernel.cgroup import MemoryCgroup
    from memsafe._kernel.child_cgroup import ChildCgroup
    from memsafe.spawn.arguments import StrOrBytesPath

MemoryLimitBy: TypeAlias = Literal["auto", "cgroup", "rlimit"]

_WAYS = ("auto", "cgroup", "rlimit")
_RLIMIT_MIN, _RLIMIT_MAX = -1, 2**64 - 1  # RLIM_INFINITY is either
_CGROUP_NEEDS = (
    "needs a cgroup's folder whose cgroup.procs, and that of the common ancestor, this process may write; in v2, one "
    "without controllers in its cgroup.subtree_control"
)


class Limits:
    """The limits of one child, checked: the files it writes, its rlimits, its niceness, a cgroup made for it.

    Attributes:
        writes: Files that the child writes, and what; those of cgroups first.
        birthplace: The cgroup v2 that the first of them joins, for a child that can be born there.
        rlimits, nice: As the native call takes them.
        made: The cgroup that prepare() made, until the child has ended.
    """

    def __init__(
        self,
        oom_score_adj: int | None,
        memory_limit: Size | None,
        memory_limit_by: MemoryLimitBy,
        cgroup: StrOrBytesPath | Iterable[StrOrBytesPath] | None,
        rlimits: Mapping[int, int | tuple[int, int]] | None,
        nice: int,
    ) -> None:
        self.writes: list[tuple[bytes, bytes]] = []
        self.birthplace: bytes | None = None
        self.made: ChildCgroup | None = None
        self._groups: tuple[MemoryCgroup, ...] = ()
        if cgroup is not None:
            folders = [cgroup] if isinstance(cgroup, (str, bytes, os.PathLike)) else cgroup
            self._groups = tuple(child_cgroup.at(_folder(each)) for each in folders)
        if oom_score_adj is not None:
            check_score_adj(oom_score_adj)
            self.writes.append((os.fsencode(score_adj_path()), b"%d" % oom_score_adj))
        self.rlimits = [(which, *_soft_and_hard(which, value)) for which, value in (rlimits or {}).items()]
        self.nice = index(nice)
        if memory_limit_by not in _WAYS:
            raise ValueError(f"memory_limit_by must be one of {', '.join(_WAYS)}: {memory_limit_by!r}")
        self._memory_bytes = None if memory_limit is None else _memory_bytes(memory_limit)
        self._by = "rlimit" if self._groups and memory_limit_by == "auto" else memory_limit_by
        if self._memory_bytes is None:
            return
        if self._by == "cgroup" and self._groups:
            raise ValueError("memory_limit_by='cgroup' puts the child into one of its own: give it or cgroup, not both")
        if self._by != "cgroup" and any(which == resource.RLIMIT_DATA for which, *_ in self.rlimits):
            raise ValueError("memory_limit sets RLIMIT_DATA: give it or rlimits[RLIMIT_DATA], not both")

    def prepare(self) -> None:
        """Limit the memory by a cgroup or an rlimit, and note when, and how often the OOM killer came before.

        Raises:
            UnsupportedError: It must be a cgroup, and none can be made here.
        """
        self._prepared_s = time.monotonic()  # the log is read when the child was killed: opening it costs a start
        if self._memory_bytes is not None and self._by != "rlimit":
            try:
                self.made = child_cgroup.make(self._memory_bytes)
                self._groups = (self.made.cgroup,)
            except (UnsupportedError, KernelError):
                if self._by == "cgroup":
                    raise
        if self._memory_bytes is not None and self.made is None:
            self.rlimits.append((resource.RLIMIT_DATA, *_data_limit(self._memory_bytes)))
        if self._groups:
            self._join()

    def _join(self) -> None:
        for group in self._groups:
            if group.is_frozen():
                detail = "frozen: the child would stand still before its program begins, and this process with it"
                raise KernelError(errno.EBUSY, f"join {group.directory}", detail)
        self._groups = tuple(sorted(self._groups, key=lambda group: -group.version))  # the birthplace comes first
        self._kills_before = _kills(self._groups)
        self.writes[:0] = [(os.fsencode(join_path(group.directory)), JOIN_TEXT) for group in self._groups]
        if self._groups[0].version == 2:
            self.birthplace = os.fsencode(self._groups[0].directory)

    def release(self) -> None:
        """Remove the cgroup that was made."""
        if self.made is not None:
            made, self.made = self.made, None
            made.remove()

    def was_oom_killed(self, pid: int, returncode: int) -> bool | None:
        """Return whether the OOM killer ended the child *pid*, which has ended with *returncode*; None: nothing tells.

        In the cgroup that was made for it there is nobody else, so a kill was the child or one that it started. In
        another it was somebody, while the child ran; that it was the child needs its SIGKILL besides, and the kernel's
        log says who it was. It also says so of a child without a cgroup.
        """
        counted = self._counted(returncode)
        if returncode != -signal.SIGKILL or (self.made is not None and counted is not None):
            return counted
        with closing(KillLog(since_s=self._prepared_s)) as log:
            # No need to wait for it: the kernel holds the victim's task_lock, without which none of its threads gets
            # past exit_mm(), from the signal until it has logged it (__oom_kill_process()).
            named = log.names(pid)
            silent = named is None or not (named or log.victims)  # if another was counted, the log names it
        return counted if silent and counted is not None else named

    def _counted(self, returncode: int) -> bool | None:
        """Return what the counters of the child's cgroups say; None: it is in none, or they do not count."""
        if not self._groups:
            return None
        grew = [
            after > before
            for before, after in zip(self._kills_before, _kills(self._groups), strict=True)
            if before is not None and after is not None
        ]
        if not grew:
            return None
        return any(grew) and (self.made is not None or returncode == -signal.SIGKILL)

    def scarcity(self) -> str | None:
        """Return what a limit of the child's has to do with it where there was no memory for its program."""
        if self._memory_bytes is None:
            return None
        return f"the child's memory_limit, {format_size(self._memory_bytes)}, holds before its program begins"

    def error(self, code: int, step: int, at: int) -> KernelError:
        """Return what to raise when the kernel refused the *at*-th limit of *step*."""
        if step == lib.MS_SPAWN_WRITE:
            path, text = self.writes[at]
            call = f"write {text.decode()} to {os.fsdecode(path)}"
            needs = _CGROUP_NEEDS if at < len(self._groups) else "below what it inherits needs CAP_SYS_RESOURCE"
        elif step == lib.MS_SPAWN_RLIMIT:
            call, needs = f"setrlimit{self.rlimits[at]}", "raising a hard limit needs CAP_SYS_RESOURCE"
            if code == errno.EINVAL:
                needs = "the soft limit is above the hard one, or there is no such limit"
        else:
            call, needs = f"nice({self.nice})", "less than this process has needs CAP_SYS_NICE"
        return KernelError(code, call, f"by the child, which was not started; {needs}")


def _folder(cgroup: StrOrBytesPath) -> str:
    folder = os.fsdecode(cgroup)
    if not folder:
        raise ValueError("a cgroup's folder must not be empty: that would be the current directory")
    if "\0" in folder:
        raise ValueError(f"embedded null byte in a cgroup's folder: {folder!r}")
    return os.path.abspath(folder)  # noqa: PTH100


def _kills(groups: tuple[MemoryCgroup, ...]) -> list[int | None]:
    """Return how often the OOM killer came to each of *groups*; None where that is not told."""
    counts: list[int | None] = []
    for group in groups:
        try:
            counts.append(group.oom_kills())
        except KernelError:
            counts.append(None)
    return counts


def _memory_bytes(memory_limit: Size) -> int:
    limit_bytes = parse_size(memory_limit, what="memory_limit")
    if limit_bytes == 0:
        raise ValueError("memory_limit must be above 0: no program starts without memory")
    return limit_bytes


def _soft_and_hard(which: int, value: int | tuple[int, int]) -> tuple[int, int]:
    try:
        soft, hard = map(index, value if isinstance(value, (tuple, list)) else (value, value))
        if all(_RLIMIT_MIN <= limit <= _RLIMIT_MAX for limit in (soft, hard)):
            return soft, hard
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"rlimits[{which!r}] must be a number or (soft, hard), each from 0 to 2**64 - 1 or RLIM_INFINITY: {value!r}"
    )


def _data_limit(limit_bytes: int) -> tuple[int, int]:
    _, hard_bytes = resource.getrlimit(resource.RLIMIT_DATA)
    if hard_bytes != resource.RLIM_INFINITY:
        limit_bytes = min(limit_bytes, hard_bytes)
    return limit_bytes, limit_bytes


__all__ = ["Limits", "MemoryLimitBy"]
