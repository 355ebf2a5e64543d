"""Headroom that the native thread polls by itself: a few numbers, read without Python until they matter."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memsafe._kernel import cgroup, files, notify
from memsafe._kernel.descriptors import Owned
from memsafe.errors import KernelError, UnsupportedError
from memsafe.pressure import levels
from memsafe.pressure.levels import PressureLevel
from memsafe.pressure.sources import Source, Unavailable
from memsafe.pressure.waiter import Reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memsafe._kernel.cgroup import MemoryCgroup
    from memsafe._kernel.files import Root
    from memsafe.pressure.levels import Thresholds
    from memsafe.pressure.waiter import Waiter
    from memsafe.status import Constraint, MemoryStatus, SwapStatus

# What counts: a file, what its line begins with, and what to multiply the number by; see waiter.Reading.
_Terms = tuple[tuple[str, bytes, int], ...]

Limit = tuple[str, str | None, int]


@dataclass(frozen=True, slots=True)
class Sum:
    """What is left by one way of counting: *base_bytes* and the terms. Of several, the least is what is left.

    Attributes:
        swap_path: The cgroup whose limit on swap it counts, which must not be passed already; None: it counts none.
        held: What processes have of it that is no cache: in a file of the terms, and left out of the sum.
    """

    base_bytes: int
    terms: _Terms
    swap_path: str | None = None
    held: _Terms = ()


class Gauge(Source):
    """What is left under one limit, as levels.available_bytes() has it; the waiter reads it while its timer runs.

    Attributes:
        limit: The limit that it stands for, as of limits().
    """

    def __init__(self, limit: Limit, constraint: Constraint, sums: tuple[Sum, ...]) -> None:
        where = f" of {constraint.path}" if constraint.path else ""
        purpose = f"polls what is left under {limit[0]}{where} without Python, the oftener the less there is"
        super().__init__(f"headroom.{limit[0]}", sums[0].terms[0][0], purpose)
        self.limit = limit
        self._sums = sums
        self._fds: dict[str, Owned] = {}

    @property
    def key(self) -> tuple[object, ...]:
        return (*super().key, self.limit)

    @property
    def is_intact(self) -> bool:
        return all(owned.is_ours() for owned in self._fds.values())

    def readings(
        self, constraint: Constraint, thresholds: Thresholds, swap: SwapStatus, *, rests: bool = False
    ) -> Iterator[Reading]:
        """Yield what is to be read until the next level begins; nothing where there is none above.

        Args:
            constraint: As of the last look.
            thresholds: Where the levels begin.
            swap: As of the last look.
            rests: The kernel tells by itself.
        """
        left_bytes = levels.available_bytes(constraint)
        if left_bytes is None:
            return
        tell_bytes = levels.next_level_bytes(left_bytes, thresholds, constraint.limit_bytes)
        if tell_bytes is None:
            return
        give_bytes = thresholds.begins_at(PressureLevel.CRITICAL, constraint.limit_bytes)
        yield from self.readings_until(tell_bytes, give_bytes, constraint, swap, token=self.token, rests=rests)

    def readings_until(
        self,
        tell_bytes: int,
        give_bytes: int,
        constraint: Constraint,
        swap: SwapStatus,
        *,
        token: int,
        rests: bool = False,
        held: bool = False,
    ) -> Iterator[Reading]:
        """Yield what is to be read to see when no more is left than *tell_bytes*, and than *give_bytes*.

        With *held*, what processes have that is no cache is read too.
        """
        # Where more is swapped out than may be by now, nothing is left of that, not less than nothing.
        spent = {limit.path for limit in swap.limits if limit.headroom_bytes == 0}
        for each in self._sums:
            is_spent = each.swap_path in spent
            yield Reading(
                token=token,
                base_bytes=0 if is_spent else each.base_bytes,
                tell_bytes=tell_bytes,
                give_bytes=give_bytes,
                added_bytes=(constraint.reclaimable_bytes or 0) + constraint.active_file_bytes,
                terms=self._opened(each.terms[: 1 if is_spent else None]),
                rests=rests,
                held=self._opened(each.held if held else ()),
            )

    def _opened(self, terms: _Terms) -> tuple[tuple[int, bytes, int], ...]:
        return tuple((self._fds[path].fd, key, scale) for path, key, scale in terms)

    def open_files(self) -> None:
        """Open what it reads: for who reads it by himself. For a waiter, open() does it.

        Raises:
            KernelError: A file cannot be read.
        """
        try:
            for path in (path for each in self._sums for path, _, _ in each.terms):
                if path not in self._fds:
                    self._fds[path] = Owned(notify.open_read(path))
                    _read_once(self._fds[path].fd, path)
        except BaseException:
            self.close_files()
            raise

    def close_files(self) -> None:
        """Close what open_files() opened. Twice is a no-op."""
        while self._fds:
            self._fds.popitem()[1].close()

    def _arm(self) -> int:
        self.open_files()
        return self._fds[self._sums[0].terms[0][0]].fd

    def _attach(self, native: Waiter, token: int) -> None:
        """Nothing: it is read, not waited for."""

    def _detach(self, native: Waiter) -> None:
        native.drop_gauges()

    def _close_fd(self) -> None:
        self._fd = -1
        self.close_files()


class CpuTime(Source):
    """The gauges, read by the native thread that follows the CPU time; without it they are as time passes."""

    def __init__(self) -> None:
        super().__init__("cpu_time", None, "polls what is left after so much CPU time as filling it would take")

    @property
    def is_intact(self) -> bool:
        return True

    def _arm(self) -> int:
        return -1  # it is the waiter's own: there is nothing to wait for

    def _attach(self, native: Waiter, token: int) -> None:
        del token  # nothing is reported under it
        native.require_cpu_time()

    def _detach(self, native: Waiter) -> None:
        """Nothing: it ends with the waiter."""

    def _close_fd(self) -> None:
        """Nothing: it has none."""


def _read_once(fd: int, path: str) -> None:
    """Have the kernel allocate now what it does at a file's first read, which may come when the cgroup is full."""
    try:
        os.pread(fd, 1, 0)
    except OSError as error:
        raise KernelError(error.errno or 0, f"read {path}") from error


def limits(status: MemoryStatus) -> Iterator[tuple[Limit, Constraint]]:
    """Yield every constraint with what tells its limit from the others: what is limited, the cgroup, and how much."""
    seen = set()
    for constraint in status.constraints:
        what: str = constraint.kind
        if (what, constraint.path) in seen:
            what = "memory.memsw.limit_in_bytes"  # see Constraint.kind
        seen.add((what, constraint.path))
        yield (what, constraint.path, constraint.limit_bytes), constraint


def choose(root: Root, status: MemoryStatus) -> Iterator[Source]:
    """Yield a gauge for each limit on the process, not yet open, or why there is none."""
    if os.fspath(root) != "/":
        yield Unavailable("headroom", None, "a copy of a machine's files may be replaced behind a descriptor's back")
    else:
        yield from of(root, status)
        yield CpuTime()


def of(root: Root, status: MemoryStatus) -> Iterator[Source]:
    """Yield what choose() does, on any tree of files."""
    try:
        groups = {group.path: group for group in cgroup.memory_cgroups(root)}
    except KernelError:
        groups = {}
    for limit, constraint in limits(status):
        try:
            yield Gauge(limit, constraint, tuple(_sums(root, limit, status, groups)))
        except UnsupportedError as error:
            yield Unavailable(f"headroom.{limit[0]}", None, str(error))
    if status.commit.mode is not None and not any(each.kind == "commit" for each in status.constraints):
        reason = f"the sum of commit is not limited where vm.overcommit_memory is {status.commit.mode}"
        yield Unavailable("headroom.commit", None, reason)


def _sums(root: Root, limit: Limit, status: MemoryStatus, groups: dict[str, MemoryCgroup]) -> Iterator[Sum]:
    """Yield the ways of counting what is left under a limit.

    Raises:
        UnsupportedError: A few numbers do not tell it.
    """
    what, path, limit_bytes = limit
    meminfo, own = files.under(root, "/proc/meminfo"), files.under(root, "/proc/self/status")
    match what:
        case "commit":
            yield Sum(limit_bytes, ((meminfo, b"Committed_AS", -1024),))
        case "rlimit_data":
            yield Sum(limit_bytes, ((own, b"VmData", -1024),))
        case "rlimit_as":
            yield Sum(limit_bytes, ((own, b"VmSize", -1024),))
        case "physical":
            available = (meminfo, b"MemAvailable", 1024)
            held = ((meminfo, b"AnonPages:", 1024), (meminfo, b"Shmem:", 1024))
            yield Sum(0, (available, (meminfo, b"SwapFree", 1024)), held=held)
            for swap in status.swap.limits:
                if swap.kind == "memory.swap.max":
                    current = _group(groups, swap.path).file("memory.swap.current")
                    yield Sum(swap.limit_bytes, (available, (current, b"", -1)), swap.path, held)
        case _:
            group = _group(groups, path)
            stat, total = group.file("memory.stat"), b"" if group.version == 2 else b"total_"
            cache = ((stat, total + b"inactive_file", 1), (stat, total + b"active_file", 1))
            anonymous = b"anon " if group.version == 2 else b"total_rss "
            held = ((stat, anonymous, 1), (stat, total + b"shmem ", 1))
            yield Sum(limit_bytes, ((group.file(_USAGES[what]), b"", -1), *cache), held=held)


_USAGES = {
    "memory.max": "memory.current",
    "memory.high": "memory.current",
    "memory.limit_in_bytes": "memory.usage_in_bytes",
    "memory.memsw.limit_in_bytes": "memory.memsw.usage_in_bytes",
}


def _group(groups: dict[str, MemoryCgroup], path: str | None) -> MemoryCgroup:
    if (group := groups.get(path or "")) is None:
        raise UnsupportedError("it is told only by a look at all files")
    return group
