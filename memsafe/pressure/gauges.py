"""Headroom that the native thread polls by itself: a few numbers, read without Python until they matter."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from memsafe._kernel import cgroup, files, notify
from memsafe._kernel.descriptors import Owned
from memsafe.errors import KernelError, UnsupportedError
from memsafe.pressure import levels
from memsafe.pressure.sources import Source, Unavailable
from memsafe.pressure.waiter import Reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memsafe._kernel.cgroup import MemoryCgroup
    from memsafe._kernel.files import Root
    from memsafe.pressure.levels import Thresholds
    from memsafe.pressure.waiter import Waiter
    from memsafe.status import Constraint, MemoryStatus

# What counts: a file, what its line begins with, and what to multiply the number by; see waiter.Reading.
_Terms = tuple[tuple[str, bytes, int], ...]


class Gauge(Source):
    """What is left under one limit, as levels.available_bytes() has it; the waiter reads it while its timer runs.

    Attributes:
        limit: The limit that it stands for, as of limit_of().
    """

    def __init__(self, constraint: Constraint, base_bytes: int, terms: _Terms) -> None:
        where = f" of {constraint.path}" if constraint.path else ""
        purpose = f"polls what is left under {constraint.kind}{where} without Python, the oftener the less there is"
        super().__init__(f"headroom.{constraint.kind}", terms[0][0], purpose)
        self.limit = limit_of(constraint)
        self._base_bytes = base_bytes
        self._terms = terms
        self._fds: dict[str, Owned] = {}

    @property
    def key(self) -> tuple[object, ...]:
        return (*super().key, self.limit)

    @property
    def is_intact(self) -> bool:
        return all(owned.is_ours() for owned in self._fds.values())

    def reading(self, constraint: Constraint, thresholds: Thresholds) -> Reading | None:
        """Return what is to be read until the next level begins; None where there is none above."""
        left_bytes = levels.available_bytes(constraint)
        if left_bytes is None:
            return None
        tell_bytes = levels.next_level_bytes(left_bytes, thresholds, constraint.limit_bytes)
        if tell_bytes is None:
            return None
        terms = tuple((self._fds[path].fd, key, scale) for path, key, scale in self._terms)
        cache_bytes = (constraint.reclaimable_bytes or 0) + constraint.active_file_bytes
        return Reading(self._base_bytes, tell_bytes, cache_bytes, terms)

    def _arm(self) -> int:
        try:
            for path, _, _ in self._terms:
                if path not in self._fds:
                    self._fds[path] = Owned(notify.open_read(path))
        except KernelError:
            self._close_fd()
            raise
        return self._fds[self._terms[0][0]].fd

    def _attach(self, native: Waiter, token: int) -> None:
        """Nothing: it is read, not waited for."""

    def _detach(self, native: Waiter) -> None:
        native.drop_gauges()

    def _close_fd(self) -> None:
        self._fd = -1
        while self._fds:
            self._fds.popitem()[1].close()


def limit_of(constraint: Constraint) -> tuple[object, ...]:
    """Return what tells a limit from the others."""
    return (constraint.kind, constraint.path, constraint.limit_bytes)


def choose(root: Root, status: MemoryStatus) -> Iterator[Source]:
    """Yield a gauge for each limit on the process, not yet open, or why there is none."""
    if os.fspath(root) != "/":
        yield Unavailable("headroom", None, "a copy of a machine's files may be replaced behind a descriptor's back")
    else:
        yield from of(root, status)


def of(root: Root, status: MemoryStatus) -> Iterator[Source]:
    """Yield what choose() does, on any tree of files."""
    try:
        groups = {group.path: group for group in cgroup.memory_cgroups(root)}
    except KernelError:
        groups = {}
    seen = set()
    for constraint in status.constraints:
        try:
            if (constraint.kind, constraint.path) in seen:
                raise UnsupportedError("memory and swap together are told only by a look at all files")
            seen.add((constraint.kind, constraint.path))
            yield Gauge(constraint, *_terms(root, constraint, status, groups))
        except UnsupportedError as error:
            yield Unavailable(f"headroom.{constraint.kind}", None, str(error))
    if status.commit.mode is not None and not any(each.kind == "commit" for each in status.constraints):
        reason = f"the sum of commit is not limited where vm.overcommit_memory is {status.commit.mode}"
        yield Unavailable("headroom.commit", None, reason)


def _terms(
    root: Root, constraint: Constraint, status: MemoryStatus, groups: dict[str, MemoryCgroup]
) -> tuple[int, _Terms]:
    """Return the base and the terms of a gauge.

    Raises:
        UnsupportedError: A few numbers do not tell it.
    """
    meminfo = files.under(root, "/proc/meminfo")
    if constraint.kind == "commit":
        return constraint.limit_bytes, ((meminfo, b"Committed_AS", -1024),)
    if constraint.kind == "physical":
        if status.swap.limits:
            raise UnsupportedError("what a cgroup may use of the swap is told only by a look at all files")
        return 0, ((meminfo, b"MemAvailable", 1024), (meminfo, b"SwapFree", 1024))
    group = groups.get(constraint.path or "")
    if group is None:
        raise UnsupportedError("it is told only by a look at all files")
    stat, total = group.file("memory.stat"), b"" if group.version == 2 else b"total_"
    usage = group.file("memory.current" if group.version == 2 else "memory.usage_in_bytes")
    return constraint.limit_bytes, (
        (usage, b"", -1),
        (stat, total + b"inactive_file", 1),
        (stat, total + b"active_file", 1),
    )
