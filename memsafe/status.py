"""What binds this process: every limit that can refuse it memory, throttle it or have it killed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from memsafe._kernel import cgroup, files, kept, machine, overcommit, process, psi
from memsafe._kernel.files import UNLIMITED
from memsafe._kernel.psi import Pressure, Stall
from memsafe.errors import KernelError, printable

__all__ = [
    "CommitStatus",
    "Constraint",
    "MemoryStatus",
    "Pressure",
    "ProcessMemory",
    "Stall",
    "SwapLimit",
    "SwapStatus",
    "memory_status",
]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from memsafe._kernel.cgroup import MemoryCgroup, Placement
    from memsafe._kernel.files import Root
    from memsafe._kernel.machine import MemInfo
    from memsafe._kernel.process import Limits, ProcessStatus

T = TypeVar("T")

# Of a cgroup's usage: how often it is read until two that follow one another agree, but for what the kernel charges a
# processor at a time (MEMCG_CHARGE_BATCH in include/linux/memcontrol.h).
_READINGS = 3
_TORN_BYTES = 64 * machine.PAGE_BYTES

Kind: TypeAlias = Literal[
    "memory.max", "memory.high", "memory.limit_in_bytes", "rlimit_data", "rlimit_as", "physical", "commit"
]
Consequence: TypeAlias = Literal["kill", "throttle", "refuse"]
SwapKind: TypeAlias = Literal["memory.swap.max", "memory.swap.high", "memory.memsw.limit_in_bytes"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """One limit on the memory of this process. Unlimited ones are not listed.

    Attributes:
        kind: The file or the rule that limits. A second ``memory.limit_in_bytes`` of one cgroup is v1's limit of memory
            and swap together, memory.memsw.limit_in_bytes, listed where it leaves less.
        path: The cgroup whose limit it is, None for the others.
        limit_bytes: The limit. Swap counts in ``physical``, as far as the process's cgroups may use it; the kernel's
            reserves are taken off ``commit``.
        used_bytes: What counts against it, of every process under it; None where that could not be read.
        reclaimable_bytes: The part of it that the kernel takes back without disturbing anybody: the inactive file
            cache of a cgroup; for ``physical`` what MemAvailable adds to MemFree. Never more than *used_bytes*.
        headroom_bytes: limit - used + reclaimable, at least 0; None where unknown.
        consequence: What happens beyond it: ``kill`` (the OOM killer), ``throttle`` or ``refuse`` (ENOMEM).
        active_file_bytes: File cache of a cgroup that is in use. The kernel takes it too before it kills, but then
            somebody reads it again: it is not part of the headroom.
    """

    kind: Kind
    path: str | None
    limit_bytes: int
    used_bytes: int | None
    reclaimable_bytes: int | None
    headroom_bytes: int | None
    consequence: Consequence
    active_file_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class CommitStatus:
    """How the kernel accounts for what it has promised.

    Attributes:
        mode: vm.overcommit_memory: 0 guess, 1 always, 2 never.
        limit_bytes: CommitLimit. It binds in mode 2 only.
        committed_bytes: Committed_AS: what is promised to all processes.
        headroom_bytes: In mode 2, what this process may still ask for, the reserves taken off; None in the others,
            where the sum is not compared with anything.
        request_limit_bytes: In mode 0, the largest single request that is granted: RAM and swap; None in the others.
    """

    mode: int | None
    limit_bytes: int | None
    committed_bytes: int | None
    headroom_bytes: int | None
    request_limit_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class SwapLimit:
    """A limit on what may be swapped out of one cgroup. Unlimited ones are not listed.

    Attributes:
        kind: ``memory.swap.max``: at it nothing more is swapped out, and what is there stays in RAM.
            ``memory.swap.high``: beyond it allocations are throttled. ``memory.memsw.limit_in_bytes`` (v1): of memory
            and swap together; at it the OOM killer comes.
        path: The cgroup whose limit it is.
        limit_bytes: The limit.
        used_bytes: What counts against it, of every process under it; None where that could not be read.
        headroom_bytes: limit - used, at least 0; None where unknown.
    """

    kind: SwapKind
    path: str
    limit_bytes: int
    used_bytes: int | None
    headroom_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class SwapStatus:
    """The machine's swap, and how much of it this process's cgroups may use.

    Attributes:
        total_bytes: All swap of the machine.
        free_bytes: The part of it that nobody uses.
        available_bytes: How much more of this process's cgroup can be swapped out: what is free, and what every
            ``memory.swap.max`` of it and its ancestors leaves. v1's limit does not count here: swapping out takes from
            memory what it adds to swap.
        limits: Every limit on swap, own cgroup first; none where the machine has no swap.
    """

    total_bytes: int | None
    free_bytes: int | None
    available_bytes: int | None
    limits: tuple[SwapLimit, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**asdict(self), "limits": [limit.as_dict() for limit in self.limits]}


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """This process's own memory; None stands for what could not be read.

    Attributes:
        rss_bytes: In RAM.
        anonymous_bytes: In RAM and not backed by a file: what only swap could hold.
        swap_bytes: Swapped out.
        oom_score: How likely the OOM killer is to take it, 0 to 2000.
        oom_score_adj: Its adjustment, -1000 to 1000.
    """

    rss_bytes: int | None
    anonymous_bytes: int | None
    swap_bytes: int | None
    oom_score: int | None
    oom_score_adj: int | None
    _root: Root = "/"

    @property
    def pss_bytes(self) -> int | None:
        """The proportional set size, None where it cannot be read.

        It is read when it is asked for, each time: the kernel walks the page tables for it, milliseconds per GiB.
        """
        try:
            return process.pss_bytes(root=self._root)
        except KernelError:
            return None

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data, pss_bytes included."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "_root"}
        return {**plain, "pss_bytes": self.pss_bytes}


@dataclass(frozen=True, slots=True)
class MemoryStatus:
    """What binds this process at one moment.

    Attributes:
        limit_bytes: The tightest limit; None where none could be read.
        available_bytes: How much more until something refuses, throttles or kills; None where nothing is known.
        binding: The constraint that is met first: the one with the least headroom.
        constraints: All of them: own cgroup first, then its ancestors, then rlimits, physical memory, commit.
        commit: How commit is accounted.
        swap: The machine's swap, and the limits on it.
        pressure: Of the process's own cgroup where it has PSI, else of the system; None where PSI is off.
        process: This process's own memory.
        warnings: A sentence for each fact that could not be read.
    """

    limit_bytes: int | None
    available_bytes: int | None
    binding: Constraint | None
    constraints: tuple[Constraint, ...]
    commit: CommitStatus
    swap: SwapStatus
    pressure: Pressure | None
    process: ProcessMemory
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data: what json.dumps() takes."""
        return {
            "limit_bytes": self.limit_bytes,
            "available_bytes": self.available_bytes,
            "binding": self.binding.as_dict() if self.binding else None,
            "constraints": [constraint.as_dict() for constraint in self.constraints],
            "commit": self.commit.as_dict(),
            "swap": self.swap.as_dict(),
            "pressure": self.pressure.as_dict() if self.pressure else None,
            "process": self.process.as_dict(),
            "warnings": list(self.warnings),
        }


def memory_status(*, root: Root = "/") -> MemoryStatus:
    """Return what binds this process now.

    Every ancestor of its cgroup counts with its own headroom, with the inactive file cache counted as free. What
    cannot be read becomes None with a sentence in ``warnings``; the other facts stand.

    It is made to be called often: for this machine it keeps the files open that it reads, some twenty descriptors and
    never more than a hundred, and closes those that it no longer needs, and all of them in a forked child.

    Args:
        root: The directory that stands for "/": any tree of proc and sys files.
    """
    with kept.reading(root):
        return status_once(root)


def status_once(root: Root) -> MemoryStatus:
    """Return memory_status() without keeping anything open: for who asks seldom, or keeps files of his own."""
    return _Reader(root).status()


def tightest(constraints: Iterable[Constraint]) -> Constraint | None:
    """Return the constraint with the least headroom, or None where no headroom is known."""
    known = ((constraint.headroom_bytes, constraint) for constraint in constraints)
    pairs = [(headroom_bytes, constraint) for headroom_bytes, constraint in known if headroom_bytes is not None]
    return min(pairs, key=itemgetter(0), default=(0, None))[1]


class _Reader:
    """One reading of the machine: collects facts, and a warning for each that cannot be had."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._warnings: dict[str, None] = {}  # an ordered set: a file may be asked twice

    def status(self) -> MemoryStatus:
        meminfo = self._fact(machine.meminfo, self._root)
        own = self._fact(process.status, self._root)
        placement = self._fact(cgroup.placement, self._root)
        groups = self._cgroups(placement)
        commit, reserve_bytes = self._commit(meminfo, own)
        swap = self._swap(meminfo, groups)
        constraints = (
            *chain.from_iterable(self._limits_of(group, swap) for group in groups),
            *self._rlimit_constraints(own),
            *self._physical_constraint(meminfo, swap),
            *_commit_constraint(commit, reserve_bytes),
        )
        binding = tightest(constraints)
        return MemoryStatus(
            limit_bytes=min((constraint.limit_bytes for constraint in constraints), default=None),
            available_bytes=binding.headroom_bytes if binding else None,
            binding=binding,
            constraints=constraints,
            commit=commit,
            swap=swap,
            pressure=self._pressure(placement),
            process=self._process(own),
            warnings=tuple(self._warnings),
        )

    def _fact(self, read: Callable[..., T | None], *args: object, missing: str = "") -> T | None:
        """Return what *read* returns; None, with a warning, where it cannot, and with *missing* where there is none."""
        try:
            value = read(*args)
        except KernelError as error:
            self._warn(str(error))
            return None
        if value is None and missing:
            self._warn(missing)
        return value

    def _warn(self, sentence: str) -> None:
        self._warnings[printable(sentence)] = None

    def _told(self, path: str, read: Callable[[Root], T | None]) -> T | None:
        """Return what *read* returns of a file that every machine has."""
        return self._fact(read, self._root, missing=f"{files.under(self._root, path)} does not exist")

    def _field(self, source: MemInfo | ProcessStatus | Limits | None, name: str) -> int | None:
        """Return a field of a file that parses itself when asked; None where there is no file."""
        if source is None:
            return None
        return self._fact(getattr, source, name, missing=f"{source.path} does not tell {name}")

    def _cgroups(self, placement: Placement | None) -> tuple[MemoryCgroup, ...]:
        if placement is None:
            return ()
        located = placement.locate("memory")
        if located.problem:
            self._warn(located.problem)
        return cgroup.as_memory(located)

    def _limits_of(self, group: MemoryCgroup, swap: SwapStatus) -> Iterator[Constraint]:
        limits: list[tuple[Kind, int, Consequence]] = []
        kind: Kind = "memory.max" if group.version == 2 else "memory.limit_in_bytes"
        missing = f"{group.file(kind)} does not exist: was the cgroup {group.path} removed?"
        # The root of all has no limit.
        limit_bytes = self._fact(group.limit_bytes, missing="" if group.path == "/" else missing)
        high_bytes = self._fact(group.high_bytes)
        if limit_bytes is not None and limit_bytes < UNLIMITED:
            limits.append((kind, limit_bytes, "kill"))
        if high_bytes is not None and high_bytes < UNLIMITED:
            limits.append(("memory.high", high_bytes, "throttle"))
        if not limits:
            return
        used_bytes, (inactive_bytes, active_bytes) = self._usage_of(group)
        for kind, limit, consequence in limits:
            yield _constraint(kind, group.path, limit, used_bytes, inactive_bytes, consequence, active_bytes)
        # v1's limit of memory and swap together: never below that of memory, but what is swapped out counts in it.
        for memsw in (limit for limit in swap.limits if limit.kind == "memory.memsw.limit_in_bytes"):
            if memsw.path != group.path or memsw.used_bytes is None or used_bytes is None:
                continue
            if memsw.limit_bytes - memsw.used_bytes < limits[0][1] - used_bytes:
                both_bytes = memsw.used_bytes
                yield _constraint(kind, group.path, memsw.limit_bytes, both_bytes, inactive_bytes, "kill", active_bytes)

    def _usage_of(self, group: MemoryCgroup) -> tuple[int | None, tuple[int | None, int]]:
        """Return what is charged, and the (inactive, active) file cache in it.

        The two stand in two files: cache that is dropped between the one and the other would be missing from the cache
        and still be used. So the usage is read before and after, and in doubt more is used.
        """
        silent = f"the cgroup at {group.directory} does not tell its"
        for left in reversed(range(_READINGS)):
            used_bytes = self._fact(group.usage_bytes, missing=f"{silent} usage")
            cache_bytes = self._fact(group.file_cache_bytes, missing=f"{silent} file cache in memory.stat")
            later_bytes = self._fact(partial(group.usage_bytes, again=True))
            if used_bytes is None or later_bytes is None or abs(later_bytes - used_bytes) <= _TORN_BYTES:
                break
            used_bytes = max(used_bytes, later_bytes)
            if left:
                files.renew()
        return used_bytes, cache_bytes or (None, 0)

    def _rlimit_constraints(self, own: ProcessStatus | None) -> Iterator[Constraint]:
        limits = self._fact(process.limits, self._root)
        wanted: tuple[tuple[Kind, str, str], ...] = (
            ("rlimit_data", "data_bytes", "data_vm_bytes"),
            ("rlimit_as", "address_space_bytes", "total_vm_bytes"),
        )
        for kind, limit_name, used_name in wanted:
            limit_bytes = self._field(limits, limit_name)
            if limit_bytes is not None and limit_bytes < UNLIMITED:
                yield _constraint(kind, None, limit_bytes, self._field(own, used_name), 0, "refuse")

    def _swap(self, meminfo: MemInfo | None, groups: tuple[MemoryCgroup, ...]) -> SwapStatus:
        total_bytes, free_bytes = self._field(meminfo, "swap_total_bytes"), self._field(meminfo, "swap_free_bytes")
        if total_bytes is not None and free_bytes is not None:
            free_bytes = min(free_bytes, total_bytes)
        warned = len(self._warnings)
        # Limits on swap that is not there limit nothing: their files are not even opened.
        limits = () if total_bytes == 0 else tuple(chain.from_iterable(map(self._swap_limits_of, groups)))
        available_bytes = free_bytes if len(self._warnings) == warned else None
        if available_bytes is not None:
            available_bytes = min((available_bytes, *_swap_headrooms_bytes(limits)))
        return SwapStatus(total_bytes, free_bytes, available_bytes, limits)

    def _swap_limits_of(self, group: MemoryCgroup) -> Iterator[SwapLimit]:
        limits: tuple[tuple[SwapKind, int | None], ...] = (
            ("memory.swap.max", self._fact(group.swap_limit_bytes)),
            ("memory.swap.high", self._fact(group.swap_high_bytes)),
            ("memory.memsw.limit_in_bytes", self._fact(group.memsw_limit_bytes)),
        )
        known = [(kind, limit_bytes) for kind, limit_bytes in limits if limit_bytes not in {None, UNLIMITED}]
        if not known:
            return
        usage = group.swap_usage_bytes if group.version == 2 else group.memsw_usage_bytes
        used_bytes = self._fact(usage, missing=f"the cgroup at {group.directory} does not tell its use of swap")
        for kind, limit_bytes in known:
            headroom_bytes = None if used_bytes is None else max(0, limit_bytes - used_bytes)
            yield SwapLimit(kind, group.path, limit_bytes, used_bytes, headroom_bytes)

    def _physical_constraint(self, meminfo: MemInfo | None, swap: SwapStatus) -> Iterator[Constraint]:
        total_bytes = self._field(meminfo, "total_bytes")
        if total_bytes is None:
            return
        # Swap that this process's cgroups may not use can only hold what others have in RAM, and nobody says how much.
        most_bytes = (limit.limit_bytes for limit in swap.limits if limit.kind == "memory.swap.max")
        swap_bytes = min((swap.total_bytes or 0, *most_bytes))
        swap_free_bytes = min((swap.free_bytes or 0, swap_bytes, *_swap_headrooms_bytes(swap.limits)))
        free_bytes, available_bytes = self._field(meminfo, "free_bytes"), self._field(meminfo, "available_bytes")
        limit_bytes = total_bytes + swap_bytes
        if available_bytes is None:
            yield Constraint("physical", None, limit_bytes, None, None, None, "kill")
            return
        headroom_bytes = min(available_bytes, total_bytes) + swap_free_bytes
        # MemAvailable leaves out what the kernel keeps for itself, and so may be below MemFree.
        reclaimable_bytes = max(0, available_bytes - free_bytes) if free_bytes is not None else 0
        used_bytes = limit_bytes - headroom_bytes + reclaimable_bytes
        yield Constraint("physical", None, limit_bytes, used_bytes, reclaimable_bytes, headroom_bytes, "kill")

    def _commit(self, meminfo: MemInfo | None, own: ProcessStatus | None) -> tuple[CommitStatus, int]:
        """Return the commit status, and what the kernel keeps back from this process in mode 2."""
        mode = self._told("/proc/sys/vm/overcommit_memory", machine.overcommit_mode)
        committed_bytes = self._field(meminfo, "committed_bytes")
        limit_bytes = self._fact(overcommit.commit_limit_bytes, meminfo, self._root) if meminfo else None
        headroom_bytes = request_limit_bytes = None
        reserve_bytes = 0
        if mode == overcommit.NEVER and own and limit_bytes is not None and committed_bytes is not None:
            reserves = self._fact(overcommit.reserves, own, self._root)
            if reserves is not None:
                reserve_bytes = reserves.total_bytes
                headroom_bytes = max(0, limit_bytes - reserve_bytes - committed_bytes)
        total_bytes = self._field(meminfo, "total_bytes")
        if mode == overcommit.GUESS and total_bytes is not None:
            request_limit_bytes = total_bytes + (self._field(meminfo, "swap_total_bytes") or 0)
        return CommitStatus(mode, limit_bytes, committed_bytes, headroom_bytes, request_limit_bytes), reserve_bytes

    def _pressure(self, placement: Placement | None) -> Pressure | None:
        directory = placement.unified_directory() if placement else None
        own = self._fact(psi.read_pressure, f"{directory}/memory.pressure") if directory else None
        return own or self._fact(psi.read_pressure, psi.system_path(self._root))

    def _process(self, own: ProcessStatus | None) -> ProcessMemory:
        return ProcessMemory(
            rss_bytes=self._field(own, "rss_bytes"),
            anonymous_bytes=self._field(own, "anonymous_bytes"),
            swap_bytes=self._field(own, "swap_bytes"),
            oom_score=self._told("/proc/self/oom_score", process.oom_score),
            oom_score_adj=self._told("/proc/self/oom_score_adj", process.oom_score_adj),
            _root=self._root,
        )


def _swap_headrooms_bytes(limits: tuple[SwapLimit, ...]) -> Iterator[int]:
    """Yield what each known limit on swapping out leaves."""
    for limit in limits:
        if limit.kind == "memory.swap.max" and limit.headroom_bytes is not None:
            yield limit.headroom_bytes


def _constraint(
    kind: Kind,
    path: str | None,
    limit_bytes: int,
    used_bytes: int | None,
    inactive_bytes: int | None,
    consequence: Consequence,
    active_bytes: int = 0,
) -> Constraint:
    """Return the constraint with its headroom; the counters were read one after the other and may disagree."""
    if used_bytes is None:
        return Constraint(kind, path, limit_bytes, None, inactive_bytes, None, consequence, active_bytes)
    reclaimable_bytes = None if inactive_bytes is None else min(inactive_bytes, used_bytes)
    active_bytes = min(active_bytes, used_bytes - (reclaimable_bytes or 0))
    headroom_bytes = max(0, limit_bytes - used_bytes + (reclaimable_bytes or 0))
    return Constraint(kind, path, limit_bytes, used_bytes, reclaimable_bytes, headroom_bytes, consequence, active_bytes)


def _commit_constraint(commit: CommitStatus, reserve_bytes: int) -> Iterator[Constraint]:
    if commit.mode != overcommit.NEVER or commit.limit_bytes is None:
        return
    limit_bytes = max(0, commit.limit_bytes - reserve_bytes)
    yield Constraint("commit", None, limit_bytes, commit.committed_bytes, 0, commit.headroom_bytes, "refuse")
