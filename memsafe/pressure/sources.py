"""The sources of warnings: each a small class with the same face, chosen by trying it.

A signal of most sources is a wake-up only: what decides is the look at the headroom that follows. A stall and an OOM
raise a level by themselves.
"""

from __future__ import annotations

import errno
import os
import threading
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from memsafe._kernel import cgroup, notify, psi, systemd
from memsafe._kernel.descriptors import Owned
from memsafe.errors import KernelError, UnsupportedError
from memsafe.pressure import waiter
from memsafe.pressure.levels import Cause, Needs, PressureLevel, Thresholds
from memsafe.pressure.waiter import How
from memsafe.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memsafe._kernel.cgroup import MemoryCgroup
    from memsafe._kernel.files import Root
    from memsafe.budget import Budget
    from memsafe.pressure.waiter import Waiter
    from memsafe.status import MemoryStatus


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """One source of warnings, and whether it is used.

    Attributes:
        name: What it is, as in PressureEvent.source.
        path: The file that it stands on; None where it is none.
        used: Whether it is waited for now.
        reason: Why it is not used; what it does where it is.
    """

    name: str
    path: str | None
    used: bool
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


class Source(ABC):
    """A descriptor to wait for, and what its signal means. Used by one thread at a time.

    Attributes:
        name, path: As of SourceStatus.
        key: Sources with the same key are the same.
        how: How the waiter must wait for it.
        reads: The files that hear() reads.
        reopens: Whether it is tried again when it was lost.
        purpose: What it does, for people.
        stands_in_for: The keys of better sources; this one is opened only where none of them can be had.
    """

    how = How.COUNTER
    reads: tuple[str, ...] = ()
    reopens = True

    def __init__(self, name: str, path: str | None, purpose: str) -> None:
        self.name = name
        self.path = path
        self.purpose = purpose
        self.token = 0
        self.stands_in_for: frozenset[tuple[object, ...]] = frozenset()
        self._fd = -1
        self._used = False
        self._owned: Owned | None = None
        self._reason = "not tried yet"

    @property
    def key(self) -> tuple[object, ...]:
        return (self.name, self.path)

    @property
    def used(self) -> bool:
        return self._used

    @property
    def is_intact(self) -> bool:
        """Whether its descriptor is still its own: a signal of one that somebody else has closed never comes."""
        return self._owned is not None and self._owned.is_ours()

    @property
    def status(self) -> SourceStatus:
        return SourceStatus(self.name, self.path, self.used, self.purpose if self.used else self._reason)

    def open(self, native: Waiter, token: int) -> None:
        """Begin to wait for it under *token*; where it cannot be had, keep the reason."""
        try:
            self.require(native, token)
        except KernelError as error:
            self._reason = _explain(error)
        except UnsupportedError as error:
            self._reason = str(error)

    def require(self, native: Waiter, token: int) -> None:
        """Begin to wait for it under *token*.

        Raises:
            KernelError: It cannot be had, or no descriptor for it.
            UnsupportedError: This machine does not have it.
        """
        self._fd = self._arm()
        try:
            self._owned = Owned(self._fd)
            self._attach(native, token)
        except BaseException:
            self._close_fd()
            raise
        self.token, self._used = token, True

    def skip(self) -> None:
        """Leave it closed because the better source is used."""
        self._reason = "not needed: a better source of the same kind is used"

    def close(self, native: Waiter | None, reason: str = "closed") -> None:
        """Wait for it no longer; *native* is None in a forked child, whose waiter is the parent's."""
        if not self.used:
            return
        if native is not None:
            self._detach(native)
        self._close_fd()
        self._used, self._reason = False, reason

    def hear(self) -> Cause | None:
        """Return what its signal says by itself.

        Raises:
            KernelError: What it stands on cannot be read.
        """
        return None

    def _attach(self, native: Waiter, token: int) -> None:
        native.add(self._fd, self.how, token)

    def _detach(self, native: Waiter) -> None:
        native.remove(self.token)

    @abstractmethod
    def _arm(self) -> int:
        """Return the descriptor, ready to signal."""

    def _close_fd(self) -> None:
        self._fd = -1
        if self._owned is not None:
            self._owned.close()


class Unavailable(Source):
    """A source that this machine does not have; listed with the reason."""

    def __init__(self, name: str, path: str | None, reason: str) -> None:
        super().__init__(name, path, "")
        self._reason = reason

    def _arm(self) -> int:
        raise UnsupportedError(self._reason)


class CgroupEvents(Source):
    """memory.events of a v2 cgroup: its limits were hit, or somebody in it was killed."""

    how = How.KERNFS

    def __init__(self, group: MemoryCgroup) -> None:
        super().__init__("memory.events", group.file("memory.events"), "wakes when a limit of the cgroup is met")
        self._group = group
        self._before: dict[bytes, int] = {}
        self.reads = (group.file("memory.events.local"), group.file("memory.events"))

    def hear(self) -> Cause | None:
        counts = self._counts()
        grown = {key: value - self._before.get(key, 0) for key, value in counts.items()}
        self._before = counts
        told = ", ".join(f"{key.decode()} +{growth}" for key, growth in grown.items() if growth > 0)
        return Cause(PressureLevel.CRITICAL, self.name, f"{told} in {self._group.path}") if told else None

    def _arm(self) -> int:
        fd = notify.open_watched(self._group.file("memory.events"))
        try:
            self._before = self._counts()
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _counts(self) -> dict[bytes, int]:
        # memory.events of an ancestor also counts what happened under limits of other descendants, which do not bind
        # this process. Kernels before 5.2 have no local file.
        events = self._group.events(local=True) or self._group.events()
        if events is None:
            raise KernelError(errno.ENOENT, f"read {self.path}")
        return {key: events.get(key) or 0 for key in (b"oom", b"oom_kill")}


class UsageThreshold(Source):
    """The usage of a v1 cgroup passing the point at which a level begins if none of it is file cache."""

    def __init__(self, group: MemoryCgroup, level: PressureLevel, usage_bytes: int) -> None:
        name = f"usage.{level.name.lower()}"
        super().__init__(name, group.file("memory.usage_in_bytes"), f"wakes when the usage passes {usage_bytes} bytes")
        self.group = group
        self.usage_bytes = usage_bytes

    @property
    def key(self) -> tuple[object, ...]:
        return (*super().key, self.usage_bytes)

    def _arm(self) -> int:
        return notify.arm_usage_threshold(self.group.directory, self.usage_bytes)


class ReclaimNotice(Source):
    """memory.pressure_level of a v1 cgroup: the kernel looks for pages to free, and finds few.

    Not its ``low``: that is page cache being recycled, as it is all the time in a cgroup that reads files. Its
    ``critical`` means little more while there is room, since pages that are being written back cannot be freed either;
    where LOW has begun by the headroom, it means that the cache that was counted as free is not.
    """

    def __init__(self, group: MemoryCgroup, level: str) -> None:
        counts = level == "critical"
        purpose = "raises CRITICAL from LOW when next to nothing" if counts else "wakes when little"
        name = f"pressure_level.{level}"
        super().__init__(name, group.file("memory.pressure_level"), f"{purpose} can be reclaimed")
        self._group = group
        self._level = level
        self._counts = counts
        if counts:
            self.reads = (group.file("memory.usage_in_bytes"),)

    def hear(self) -> Cause | None:
        # The eventfd is signalled once more when the cgroup is removed.
        if not self._counts or self._group.usage_bytes() is None:
            return None
        detail = f"next to nothing can be reclaimed in {self._group.path}"
        return Cause(PressureLevel.CRITICAL, self.name, detail, Needs.LOW)

    def _arm(self) -> int:
        return notify.arm_pressure_level(self._group.directory, self._level)


class OomNotice(Source):
    """A v1 cgroup, or an ancestor of it, ran out of memory: somebody is about to be killed."""

    def __init__(self, group: MemoryCgroup) -> None:
        super().__init__(
            "oom_control", group.file("memory.oom_control"), "raises CRITICAL when the OOM killer is called"
        )
        self._group = group
        self.reads = (group.file("memory.oom_control"),)

    def hear(self) -> Cause | None:
        kills = self._group.oom_kills()
        if kills is None:
            # The eventfd is signalled once more when the cgroup is removed; that is no OOM.
            return None
        detail = f"out of memory in {self._group.path} or above, {kills} killed in it so far"
        return Cause(PressureLevel.CRITICAL, self.name, detail)

    def _arm(self) -> int:
        return notify.arm_oom_notice(self._group.directory)


class StallTrigger(Source):
    """A PSI trigger: tasks stood still for memory."""

    how = How.TRIGGER

    def __init__(self, path: str, kind: str, level: PressureLevel, stall_us: int) -> None:
        purpose = f"raises {level.name} when {kind} tasks stall for {stall_us // 1000} ms in 2 s"
        super().__init__(f"psi.{kind}", path, purpose)
        self._file = path
        self.kind = kind
        self._level = level
        self._stall_us = stall_us
        self._before_us = 0
        self.reads = (path,)

    @property
    def key(self) -> tuple[object, ...]:
        return (*super().key, self._stall_us)

    def hear(self) -> Cause | None:
        total_us = self._total_us()
        growth_us, self._before_us = total_us - self._before_us, total_us
        if growth_us < self._stall_us:
            # The first signal of an unprivileged trigger may be for all stall since boot, and the second too: the
            # kernel's sliding window remembers that growth for one more window (seen on 6.18).
            return None
        detail = f"{self.kind} tasks stood still for {growth_us // 1000} ms ({self._file})"
        return Cause(self._level, self.name, detail, Needs.SHORT_HEADROOM)

    def _arm(self) -> int:
        self._before_us = self._total_us()
        return notify.arm_stall_trigger(self._file, self.kind, self._stall_us)

    def _total_us(self) -> int:
        pressure = psi.read_pressure(self._file)
        if pressure is None:
            raise KernelError(errno.EOPNOTSUPP, f"read {self._file}")
        return (pressure.some if self.kind == "some" else pressure.full).total_us


class ManagedStall(StallTrigger):
    """The pressure file that the service manager wants watched, with the trigger that it wants."""

    def __init__(self, path: str, trigger: bytes, kind: str, stall_us: int) -> None:
        super().__init__(path, kind, PressureLevel.LOW, stall_us)
        self.name = "systemd"
        self.purpose = f"raises LOW as the service manager asks: {kind} tasks stall for {stall_us // 1000} ms"
        self._trigger = trigger

    def _arm(self) -> int:
        # Whatever the environment says: no file but the kernel's is parsed, or written to.
        os.close(notify.open_watched(self._file))
        self._before_us = self._total_us()
        return notify.arm_trigger(self._file, self._trigger)


class ManagedStream(Source):
    """The FIFO or socket on which the service manager says that memory is short; what it writes is nothing to us."""

    how = How.STREAM
    reopens = False  # who accepts and hangs up at once would keep the monitor busy

    def __init__(self, path: str, data: bytes) -> None:
        super().__init__("systemd", path, "raises LOW when the service manager writes to it")
        self._file = path
        self._data = data

    def hear(self) -> Cause | None:
        return Cause(PressureLevel.LOW, self.name, f"the service manager says so ({self._file})")

    def _arm(self) -> int:
        return systemd.open_stream(self._file, self._data)


WATERMARK = "budget.soft_limit"


class BudgetWatermark(Source):
    """The soft limit of a budget: passing it is a cause that lasts until the use has fallen to nine tenths of it."""

    def __init__(self, budget: Budget) -> None:
        super().__init__(WATERMARK, None, f"raises LOW while budget {budget.path!r} is over its soft limit")
        self._budget = budget
        self._is_over = False
        self._lock = threading.Lock()  # the descriptor must not be another's when it is written to

    def close(self, native: Waiter | None, reason: str = "closed") -> None:
        if native is None:
            self._lock = threading.Lock()  # the parent's may be held for ever
        super().close(native, reason)

    def standing(self) -> Cause | None:
        """Return the cause while it lasts; it is looked for in each look, signal or not."""
        used_bytes, soft_bytes = self._budget.used_bytes, self._budget.soft_limit_bytes
        if soft_bytes is None:
            self._is_over = False
            return None
        # As the budget itself: it tells again only after that.
        self._is_over = used_bytes > (soft_bytes - soft_bytes // 10 if self._is_over else soft_bytes)
        if not self._is_over:
            return None
        detail = (
            f"budget {self._budget.path!r} holds {format_size(used_bytes)}, its soft limit is {format_size(soft_bytes)}"
        )
        return Cause(PressureLevel.LOW, self.name, detail)

    def _arm(self) -> int:
        fd = notify.open_eventfd()
        try:
            self._budget.on_soft_limit(self._passed)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _close_fd(self) -> None:
        self._budget._forget_soft_limit_callback(self._passed)
        with self._lock:
            super()._close_fd()

    def _passed(self, _: Budget) -> None:
        with self._lock:
            if self._fd >= 0 and self.is_intact:
                os.eventfd_write(self._fd, 1)


class Polling(Source):
    """A timer for the next look at the headroom."""

    def __init__(self) -> None:
        super().__init__("polling", None, "looks at the headroom, the oftener the less there is")

    @property
    def timer_fd(self) -> int:
        """The timer, for waiter.Look."""
        return self._fd

    def _arm(self) -> int:
        return waiter.open_timer()


def choose(root: Root, status: MemoryStatus, thresholds: Thresholds) -> list[Source]:
    """Return every source that could be had for this process, not yet open."""
    return [*_cgroup_sources(root, status, thresholds), *_stall_sources(root, thresholds)]


def _cgroup_sources(root: Root, status: MemoryStatus, thresholds: Thresholds) -> Iterator[Source]:
    try:
        groups = cgroup.memory_cgroups(root)
    except KernelError as error:
        groups, reason = (), str(error)
    else:
        reason = "no memory cgroup of this process is visible"
    version = groups[0].version if groups else None
    for name, needed in (("memory.events", 2), ("usage", 1), ("pressure_level", 1), ("oom_control", 1)):
        if version != needed:
            yield Unavailable(name, None, f"the memory controller is on cgroup v{version}" if version else reason)
    if version == 1 and not any(constraint.kind == "memory.limit_in_bytes" for constraint in status.constraints):
        yield Unavailable("usage", None, "neither the process's memory cgroup nor an ancestor has a limit")
    for group in groups:
        if group.version == 2:
            # A root cgroup has no such file, and no limit.
            if os.path.lexists(group.file("memory.events")):
                yield CgroupEvents(group)
        else:
            yield from _usage_sources(group, status, thresholds)
            yield ReclaimNotice(group, "medium")
            yield ReclaimNotice(group, "critical")
    if version == 1:
        yield OomNotice(groups[0])


def _usage_sources(group: MemoryCgroup, status: MemoryStatus, thresholds: Thresholds) -> Iterator[Source]:
    for constraint in status.constraints:
        if constraint.kind == "memory.limit_in_bytes" and constraint.path == group.path:
            for level in (PressureLevel.LOW, PressureLevel.CRITICAL):
                left_bytes = thresholds.begins_at(level, constraint.limit_bytes)
                yield UsageThreshold(group, level, constraint.limit_bytes - left_bytes)
            return  # a second one is memory and swap together, which the usage of memory does not tell of


def _stall_sources(root: Root, thresholds: Thresholds) -> Iterator[Source]:
    managed, is_wanted = _managed_source(root, thresholds)
    yield managed
    try:
        own_path = psi.cgroup_path(root)
    except KernelError:
        own_path = None
    for kind, level, stall_us in (
        ("some", PressureLevel.LOW, thresholds.some_stall_us),
        ("full", PressureLevel.CRITICAL, thresholds.full_stall_us),
    ):
        if not is_wanted:
            yield Unavailable(f"psi.{kind}", None, "the service manager wants no watch on stalls")
            continue
        better = {managed.key} if isinstance(managed, ManagedStall) and managed.kind == kind else set()
        if own_path is not None:
            # What stalls in another cgroup is not this process's shortage: its own cgroup's stalls are the better ones.
            own = StallTrigger(own_path, kind, level, stall_us)
            own.stands_in_for = frozenset(better)
            better.add(own.key)
            yield own
        system = StallTrigger(psi.system_path(root), kind, level, stall_us)
        system.stands_in_for = frozenset(better)
        yield system


def _managed_source(root: Root, thresholds: Thresholds) -> tuple[Source, bool]:
    """Return what the service manager wants watched, and whether it wants stalls watched at all."""
    try:
        watch = systemd.watch(os.environ, root)
        if watch is None:
            return Unavailable("systemd", None, f"{systemd.WATCH} is not set"), True
        if watch.is_off:
            return Unavailable("systemd", watch.path, f"{systemd.WATCH} is {watch.path}: it is turned off"), False
        if systemd.is_stream(watch.path):
            return ManagedStream(watch.path, watch.data), True
        trigger = watch.data or f"some {thresholds.some_stall_us} {notify.PSI_WINDOW_US}".encode()
        return ManagedStall(watch.path, trigger, *systemd.stall_of(trigger)), True
    except KernelError as error:
        return Unavailable("systemd", None, _explain(error)), True


_EXPLANATIONS = {
    errno.EOPNOTSUPP: "PSI is off: boot with psi=1",
    errno.EBUSY: "somebody else has a trigger on it",
    errno.EROFS: "the file system is read-only here",
    errno.EACCES: "this user may not open it for writing",
    errno.EINVAL: "the kernel refuses the window (it must be a multiple of 2 s without CAP_SYS_RESOURCE)",
    errno.ENOSPC: "too many sources",
}


def _explain(error: KernelError) -> str:
    explanation = _EXPLANATIONS.get(error.errno or 0)
    return f"{error}: {explanation}" if explanation else str(error)
