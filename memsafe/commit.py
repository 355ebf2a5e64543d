"""What fork would be charged, whether the kernel would allow it, and whether its copies would fit."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from memsafe._kernel import cgroup, overcommit, process, tasks
from memsafe.errors import KernelError, printable
from memsafe.forecast import Forecast, ForecastSource, LastSnapshot, Observations, check_number, observations
from memsafe.sizes import format_size
from memsafe.status import Constraint, MemoryStatus, status_once

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from memsafe._kernel.files import Root

__all__ = ["ForkAssessment", "assess_fork"]

Decision: TypeAlias = Literal["admit", "defer", "refuse"]

FULL_STALL_PERCENT = 10.0
"""Memory pressure (PSI full, avg10) from which on a fork is put off: everybody waits for memory a tenth of the time."""

CHILD_NEEDS_BYTES = 2**20
"""The least that a child allocates before it writes its first byte: one arena of Python's heap."""

# Copies and page tables are memory, not address space: neither rlimits nor commit (asked apart) count them again.
_MEMORY_KINDS = frozenset({"memory.max", "memory.high", "memory.limit_in_bytes", "physical"})


@dataclass(frozen=True, slots=True)
class ForkAssessment:
    """Whether this process should fork now.

    Attributes:
        decision: ``admit``; ``defer`` when it would fit later; ``refuse`` when the kernel would, or it cannot fit.
        kernel_would_allow: What fork() itself would answer; None where a fact for that is missing.
        commit_charge_bytes: What fork() adds to Committed_AS.
        commit_headroom_bytes: What may be added in mode 2; None where the sum is not limited.
        page_table_bytes: Page tables that the child gets at once.
        private_bytes: Private writable memory of this process: more than that cannot be copied.
        copy_forecast_bytes: Copies expected while both run, as both sides write.
        headroom_bytes: What cgroups and physical memory leave for page tables and copies, half of the active file
            cache counted as free.
        binding: The constraint that decides; the one with the least headroom when the fork is admitted.
        reasons: Sentences with figures, and what would help.
        forecast_source: Where the forecast comes from: ``caller``; ``last snapshot``; ``soft-dirty`` or
            ``pagemap-scan`` (a measured rate); ``private memory``, where nothing better is known.
    """

    decision: Decision
    kernel_would_allow: bool | None
    commit_charge_bytes: int | None
    commit_headroom_bytes: int | None
    page_table_bytes: int | None
    private_bytes: int | None
    copy_forecast_bytes: int | None
    headroom_bytes: int | None
    binding: Constraint | None
    reasons: tuple[str, ...]
    forecast_source: ForecastSource

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def assess_fork(
    dirty_bytes_per_s: float | None = None,
    duration_s: float | None = None,
    *,
    root: Root = "/",
    max_copy_bytes: int | None = None,
    last_copy_bytes: int | None = None,
    reclaimable_bytes: int = 0,
) -> ForkAssessment:
    """Return whether a fork of this process, and the copies that follow, would be safe now. Nothing is forked.

    The forecast of copies is *dirty_bytes_per_s* times *duration_s* where the caller tells the rate. Else it is what
    was measured of this process last: the copies of its last snapshot, in proportion to its growth, or a rate from
    measure_dirty_rate() or a DirtyMeter of at most ten minutes ago, with what may hold Python objects added (a child
    that merely reads them writes their reference counts). Else it is all private writable memory. It is never more
    than that, nor than *max_copy_bytes*.

    Reading smaps walks the page tables: milliseconds per GiB.

    Args:
        dirty_bytes_per_s: Bytes of distinct pages that both sides together write in a second.
        duration_s: How long both run, in seconds; None: as the last snapshot, else as writing all private memory
            takes at 100 MB/s.
        root: The directory that stands for "/". What was measured of this process counts for "/" alone.
        max_copy_bytes: A bound that the caller enforces by ending the child.
        last_copy_bytes: Copies measured when this was last done, instead of what memsafe saw itself.
        reclaimable_bytes: What could be freed first, such as budgets' reclaimers would: where the fork fits only
            then, it is deferred rather than refused.

    Raises:
        ValueError: A number is negative or NaN.
    """
    numbers = (dirty_bytes_per_s, duration_s, max_copy_bytes, last_copy_bytes, reclaimable_bytes)
    names = ("dirty_bytes_per_s", "duration_s", "max_copy_bytes", "last_copy_bytes", "reclaimable_bytes")
    for name, number in zip(names, numbers, strict=True):
        check_number(name, number)
    seen = observations if os.fspath(root) == "/" else Observations()
    if last_copy_bytes is not None:
        seen = Observations()
        seen.note_snapshot(LastSnapshot(last_copy_bytes))
    return assess(dirty_bytes_per_s, duration_s, root, max_copy_bytes, reclaimable_bytes, seen)


def assess(
    dirty_bytes_per_s: float | None,
    duration_s: float | None,
    root: Root,
    max_copy_bytes: int | None,
    reclaimable_bytes: int,
    seen: Observations,
) -> ForkAssessment:
    """Return assess_fork() by what was *seen*."""
    facts = _Facts(root)
    forecast = Forecast.of(
        facts.copyable_bytes,
        dirty_bytes_per_s=dirty_bytes_per_s,
        duration_s=duration_s,
        seen=seen,
        now_s=time.monotonic(),
    )
    return _Judgement(facts, forecast, max_copy_bytes, reclaimable_bytes).assessment()


def _least(*sizes_bytes: int | None) -> int | None:
    return min((size_bytes for size_bytes in sizes_bytes if size_bytes is not None), default=None)


class _Facts:
    """What the kernel says about this process's fork; None for what it does not."""

    def __init__(self, root: Root) -> None:
        self.status: MemoryStatus = status_once(root)
        self.problems = list(self.status.warnings)
        self.charge_bytes: int | None = None
        self.largest_charge_bytes: int | None = None
        self.page_table_bytes: int | None = None
        own = self.status.process
        self.copyable_bytes = _sum(own.anonymous_bytes, own.swap_bytes)
        self.tasks_exhausted: str | None = None
        self.tasks_known = False
        self._read_mappings(root)
        self._read_tasks(root)

    def _read_mappings(self, root: Root) -> None:
        # Its own tables bound the child's from above; without them the mappings alone must do.
        with self._noting():
            self.page_table_bytes = process.status(root).page_table_bytes
        with self._noting():
            cost = overcommit.fork_cost(self.page_table_bytes, root=root)
            self.charge_bytes = cost.charge_bytes
            self.largest_charge_bytes = cost.largest_charge_bytes
            self.page_table_bytes = cost.page_table_bytes
            self.copyable_bytes = cost.copyable_bytes

    def _read_tasks(self, root: Root) -> None:
        with self._noting():
            self.tasks_exhausted = tasks.exhausted(cgroup.placement(root), root)
            self.tasks_known = True

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except KernelError as error:
            self.problems.append(str(error))


def _sum(*sizes_bytes: int | None) -> int | None:
    known = [size_bytes for size_bytes in sizes_bytes if size_bytes is not None]
    return sum(known) if known else None


class _Judgement:
    """The decision about one fork, with its reasons; the first grave finding decides, all are told."""

    def __init__(self, facts: _Facts, forecast: Forecast, max_copy_bytes: int | None, reclaimable_bytes: int) -> None:
        self._facts = facts
        self._forecast = forecast
        self._forecast_bytes = _least(forecast.copy_bytes, max_copy_bytes)
        self._bounded = max_copy_bytes is not None
        self._reclaimable_bytes = reclaimable_bytes
        self._need_bytes = _sum(facts.page_table_bytes, self._forecast_bytes)
        self._decision: Decision = "admit"
        self._binding: Constraint | None = None
        self._reasons: list[str] = []

    def assessment(self) -> ForkAssessment:
        facts = self._facts
        limits = [c for c in facts.status.constraints if c.kind in _MEMORY_KINDS]
        memory = [c for c in limits if c.headroom_bytes is not None]
        allowed = self._ask_kernel()
        self._ask_unknown(c for c in limits if c.headroom_bytes is None)
        self._ask_memory(memory)
        self._ask_rlimits()
        self._ask_pressure()
        tightest = min(memory, key=fork_headroom_bytes, default=None)
        if self._decision == "admit":
            self._say_admitted(tightest)
        if facts.problems:
            problems = "; ".join(dict.fromkeys(facts.problems))
            self._reasons.append(f"What could not be read does not count here: {problems}.")
        return ForkAssessment(
            decision=self._decision,
            kernel_would_allow=allowed,
            commit_charge_bytes=facts.charge_bytes,
            commit_headroom_bytes=facts.status.commit.headroom_bytes,
            page_table_bytes=facts.page_table_bytes,
            private_bytes=facts.copyable_bytes,
            copy_forecast_bytes=self._forecast_bytes,
            headroom_bytes=fork_headroom_bytes(tightest) if tightest else None,
            binding=self._binding or tightest,
            reasons=tuple(map(printable, self._reasons)),
            forecast_source=self._forecast.source,
        )

    def _find(self, decision: Decision, binding: Constraint | None, reason: str) -> None:
        """Note a finding; the graver decision stands, with the constraint of the first that made it."""
        if self._decision == "admit" or (self._decision == "defer" and decision == "refuse"):
            self._decision, self._binding = decision, binding
        self._reasons.append(reason)

    def _ask_kernel(self) -> bool | None:
        """Answer as fork() would, by mm/util.c's __vm_enough_memory() and the limits on tasks."""
        facts, commit = self._facts, self._facts.status.commit
        allowed: bool | None = None
        if commit.mode == overcommit.ALWAYS or facts.charge_bytes == 0:
            allowed = True
        elif commit.mode == overcommit.GUESS and commit.request_limit_bytes is not None:
            if facts.largest_charge_bytes is not None:
                allowed = self._ask_guess(facts.largest_charge_bytes, commit.request_limit_bytes)
        elif commit.headroom_bytes is not None and facts.charge_bytes is not None:
            allowed = self._ask_never(facts.charge_bytes, commit.headroom_bytes)
        if facts.tasks_exhausted:
            allowed = False
            self._find("refuse", None, f"fork() would fail with EAGAIN: there are {facts.tasks_exhausted}.")
        elif allowed and not facts.tasks_known:
            allowed = None
        if allowed is None:
            self._reasons.append("Whether fork() would be granted is not known.")
        return allowed

    def _ask_guess(self, largest_bytes: int, limit_bytes: int) -> bool:
        """Mode 0 looks at every mapping alone."""
        if largest_bytes <= limit_bytes:
            return True
        self._find(
            "refuse",
            Constraint("commit", None, limit_bytes, 0, 0, limit_bytes, "refuse"),
            f"fork() would fail with ENOMEM: one mapping of {format_size(largest_bytes)} is larger than RAM and swap "
            f"together ({format_size(limit_bytes)}), which vm.overcommit_memory=0 refuses. "
            "Mark what the child does not need with MADV_DONTFORK, or divide the mapping.",
        )
        return False

    def _ask_never(self, charge_bytes: int, headroom_bytes: int) -> bool:
        """Mode 2 looks at the sum, and wants it below what is left."""
        if charge_bytes < headroom_bytes:
            return True
        self._find(
            "refuse",
            next((c for c in self._facts.status.constraints if c.kind == "commit"), None),
            f"fork() would fail with ENOMEM: it is charged {format_size(charge_bytes)} of commit and "
            f"{format_size(headroom_bytes)} are left of CommitLimit less the reserves (vm.overcommit_memory=2). "
            "Mark what the child does not need with MADV_DONTFORK, add swap, or raise vm.overcommit_ratio.",
        )
        return False

    def _ask_unknown(self, limits: Iterable[Constraint]) -> None:
        """A limit of which nobody tells what is left may be the one that kills."""
        for limit in limits:
            where = _where(limit)
            self._find("refuse", limit, f"How much {where} ({format_size(limit.limit_bytes)}) leaves is not known.")

    def _ask_memory(self, memory: Iterable[Constraint]) -> None:
        """Find out whether page tables and copies fit under every limit: now, or ever."""
        need_bytes, known = self._need_bytes, False
        if need_bytes is None:
            self._find("refuse", None, "How much fork needs is not known.")
            return
        for constraint in sorted(memory, key=fork_headroom_bytes):
            known = True
            headroom_bytes = fork_headroom_bytes(constraint)
            if need_bytes <= headroom_bytes:
                break
            most_bytes = max(headroom_bytes, self._most_bytes(constraint))
            where = _where(constraint)
            if headroom_bytes < need_bytes <= headroom_bytes + self._reclaimable_bytes:
                self._find(
                    "defer",
                    constraint,
                    f"{self._needs()}, and {where} leaves {format_size(headroom_bytes)} of "
                    f"{format_size(constraint.limit_bytes)} now. It fits once the "
                    f"{format_size(self._reclaimable_bytes)} that can be reclaimed were; or: {self._helps()}",
                )
            elif need_bytes > most_bytes:
                self._find(
                    "refuse",
                    constraint,
                    f"{self._needs()}, and {where} ({format_size(constraint.limit_bytes)}) could never leave more than "
                    f"{format_size(most_bytes)} beside what this process holds. {self._helps()}",
                )
            else:
                self._find(
                    "defer",
                    constraint,
                    f"{self._needs()}, and {where} leaves {format_size(headroom_bytes)} of "
                    f"{format_size(constraint.limit_bytes)} now. Try again when others have freed memory, or: "
                    f"{self._helps()}",
                )
        if not known:
            self._find("refuse", None, "How much memory is left is not known.")

    def _most_bytes(self, constraint: Constraint) -> int:
        """Return what *constraint* would leave if nobody but this process used anything of it."""
        own = self._facts.status.process
        own_bytes = own.anonymous_bytes or 0
        if constraint.kind == "physical":
            own_bytes += own.swap_bytes or 0
        return max(0, constraint.limit_bytes - max(0, own_bytes - self._reclaimable_bytes))

    def _ask_rlimits(self) -> None:
        """The child inherits them with what is used: copies do not count, but what it allocates does."""
        for constraint in self._facts.status.constraints:
            left_bytes = constraint.headroom_bytes
            if not constraint.kind.startswith("rlimit") or left_bytes is None or left_bytes >= CHILD_NEEDS_BYTES:
                continue
            self._find(
                "defer",
                constraint,
                f"The child inherits {constraint.kind.upper()} of {format_size(constraint.limit_bytes)} with "
                f"{format_size(left_bytes)} left, and needs {format_size(CHILD_NEEDS_BYTES)} to begin with. Free "
                "memory of this process, or raise the limit.",
            )

    def _ask_pressure(self) -> None:
        pressure = self._facts.status.pressure
        if pressure is not None and pressure.full.avg10 >= FULL_STALL_PERCENT:
            self._find(
                "defer",
                None,
                f"Memory is short now: for {pressure.full.avg10:.0f} % of the last 10 s every task waited for it "
                f"({pressure.source}). Try again when that is below {FULL_STALL_PERCENT:.0f} %.",
            )

    def _say_admitted(self, tightest: Constraint | None) -> None:
        if tightest is None:
            return
        where = _where(tightest)
        left_bytes = fork_headroom_bytes(tightest)
        self._reasons.append(f"{self._needs()}, and {where}, the tightest, leaves {format_size(left_bytes)}.")

    def _needs(self) -> str:
        bound = ", bounded by max_copy" if self._bounded else ""
        return (
            f"Fork needs {format_size(self._facts.page_table_bytes)} of page tables and "
            f"{format_size(self._forecast_bytes)} of copies ({self._forecast.words}{bound})"
        )

    def _helps(self) -> str:
        if self._bounded:
            return "A smaller max_copy, a smaller heap or a larger limit would help."
        return "Pass max_copy=... to bound the copies; a smaller heap or a larger limit would help."


def _where(limit: Constraint) -> str:
    return f"{limit.kind} of {limit.path}" if limit.path else "physical memory and swap"


def fork_headroom_bytes(constraint: Constraint) -> int:
    """Return what *constraint* leaves for copies: its headroom and half of the file cache in use.

    The kernel counts its own MemAvailable alike (mm/show_mem.c, si_mem_available(): at least half of the page cache).
    """
    return (constraint.headroom_bytes or 0) + constraint.active_file_bytes // 2
