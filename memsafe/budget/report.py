"""What budgets hold and did: for people, for programs, and for the text of a refusal."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from memsafe._kernel import process
from memsafe.budget import policy
from memsafe.errors import KernelError
from memsafe.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memsafe.budget.tree import Budget

TOP_CONSUMERS = 5

# A ranking is used again until the walk that made it is no more than this share of the time: a program that is refused
# a thousand times a second must not walk a hundred thousand budgets each time. Small trees are always walked.
_WALK_RATIO = 0.02
_SMALL_TREE = 256


class Consumer(NamedTuple):
    """One budget's own part of what an ancestor holds."""

    path: str
    used_bytes: int


class Waiter(NamedTuple):
    """A request that stands in line; held_bytes is what its budget holds meanwhile."""

    path: str
    requested_bytes: int
    waited_s: float
    held_bytes: int


class Ranking(NamedTuple):
    """The top consumers of a budget at one moment, and until when they are good enough."""

    consumers: tuple[Consumer, ...]
    made_at_s: float
    good_until_s: float

    @property
    def age_s(self) -> float:
        """How old it is."""
        return time.monotonic() - self.made_at_s


@dataclass(frozen=True, slots=True)
class BudgetStats:
    """What a budget held and did, at one moment.

    Attributes:
        own_bytes: The part of used_bytes that is not in a child.
        over_bytes: By how much used_bytes is beyond the limit: after charge(), or after the limit was lowered.
        headroom_bytes: Until this budget or an ancestor refuses; None where nothing is limited.
        refusals: Requests that this budget's limit refused, in itself and below, after reclaiming and waiting.
        reclaims: Calls of reclaimers that are registered here.
        reclaimed_bytes: What they gave back, by their own word.
        waiting: Requests that wait for this budget's limit now.
        waits: Requests that had to.
        waited_s: How long, all together, those that have ended.
    """

    path: str
    used_bytes: int
    own_bytes: int
    peak_bytes: int
    limit_bytes: int | None
    soft_limit_bytes: int | None
    over_bytes: int
    headroom_bytes: int | None
    refusals: int
    reclaims: int
    reclaimed_bytes: int
    waiting: int
    waits: int
    waited_s: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        limit = "no limit" if self.limit_bytes is None else f"of {format_size(self.limit_bytes)}"
        text = f"{format_size(self.used_bytes):>10} {limit:<13} peak {format_size(self.peak_bytes)}"
        if self.over_bytes:
            text += f", {format_size(self.over_bytes)} over"
        if self.refusals:
            text += f", refused {self.refusals}"
        if self.reclaims:
            text += f", reclaimed {format_size(self.reclaimed_bytes)} in {self.reclaims}"
        if self.waits:
            text += f", waited {self.waited_s:.3g} s in {self.waits}"
        if self.waiting:
            text += f", {self.waiting} waiting"
        return text


@dataclass(frozen=True, slots=True)
class Drift:
    """How far the accounting of a tree is from the process that it accounts for.

    Attributes:
        charged_bytes: What the whole tree holds.
        anonymous_bytes: The process's anonymous memory, in RAM and swapped out.
    """

    charged_bytes: int
    anonymous_bytes: int

    @property
    def unaccounted_bytes(self) -> int:
        """What the process has and the tree does not count: the interpreter itself, and whatever was never charged.

        Negative where memory was charged and not touched yet, or lies in files or shared memory.
        """
        return self.anonymous_bytes - self.charged_bytes

    def as_dict(self) -> dict[str, int]:
        """Return it as plain data."""
        return {**asdict(self), "unaccounted_bytes": self.unaccounted_bytes}

    def __str__(self) -> str:
        escaped = self.unaccounted_bytes
        judgement = (
            f"{format_size(escaped)} not accounted for" if escaped >= 0 else f"{format_size(-escaped)} untouched"
        )
        return (
            f"charged {format_size(self.charged_bytes)} beside {format_size(self.anonymous_bytes)} of anonymous memory "
            f"in this process: {judgement}"
        )


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """A tree of budgets at one moment, largest first. ``str()`` of it is for people, rich prints it as a tree.

    Attributes:
        drift: Of the whole tree, in the report of its root; None elsewhere, and where the kernel does not tell.
        notes: What else there is to say of this budget, in sentences.
    """

    name: str
    stats: BudgetStats
    children: tuple[BudgetReport, ...]
    drift: Drift | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the tree as plain data."""
        return {
            "name": self.name,
            **self.stats.as_dict(),
            "drift": self.drift.as_dict() if self.drift else None,
            "notes": list(self.notes),
            "children": [child.as_dict() for child in self.children],
        }

    def __str__(self) -> str:
        rows = [("  " * depth + report.name, report) for depth, report in self._rows(0)]
        width = max(len(label) for label, _ in rows)
        lines = [f"{label:<{width}}  {report.stats}" for label, report in rows]
        return "\n".join([*lines, *self._remarks()])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text
        from rich.tree import Tree

        def grow(report: BudgetReport) -> Tree:
            tree = Tree(Text.assemble((report.name, "bold"), "  ", str(report.stats).strip()))
            tree.children += [grow(child) for child in report.children]
            return tree

        return Group(grow(self), *map(Text, self._remarks()))

    def _rows(self, depth: int) -> Iterator[tuple[int, BudgetReport]]:
        yield depth, self
        for child in self.children:
            yield from child._rows(depth + 1)

    def _remarks(self) -> list[str]:
        return [*([str(self.drift)] if self.drift else []), *self.notes]


def stats_of(budget: Budget, path: str, children: tuple[Budget, ...]) -> BudgetStats:
    """Return what one budget holds and did; the caller has its path and its children at hand."""
    counts = budget._policy
    return BudgetStats(
        path=path,
        used_bytes=budget.used_bytes,
        own_bytes=budget._own_bytes(children),
        peak_bytes=budget.peak_bytes,
        limit_bytes=budget.limit_bytes,
        soft_limit_bytes=budget.soft_limit_bytes,
        over_bytes=budget.over_bytes,
        headroom_bytes=budget.headroom_bytes,
        refusals=counts.refusals,
        reclaims=counts.reclaims,
        reclaimed_bytes=counts.reclaimed_bytes,
        waiting=budget.waiting,
        waits=counts.waits,
        waited_s=counts.waited_s,
    )


def report_of(budget: Budget, path: str) -> BudgetReport:
    """Return the tree at and below a budget."""
    children = budget.children
    reports = [report_of(child, f"{path}/{child.name}") for child in children]
    reports.sort(key=lambda report: -report.stats.used_bytes)
    drift = None if budget.parent else drift_of(budget)
    return BudgetReport(budget.name, stats_of(budget, path, children), tuple(reports), drift, budget._notes())


def drift_of(root: Budget) -> Drift | None:
    """Compare what a tree holds with what the kernel says of the process."""
    try:
        own = process.status(root._kernel_root)
        anonymous_bytes = None if own is None else own.anonymous_bytes
        swap_bytes = None if own is None else own.swap_bytes
    except KernelError:
        return None
    if anonymous_bytes is None:
        return None
    return Drift(root.used_bytes, anonymous_bytes + (swap_bytes or 0))


def top_consumers(budget: Budget, count: int) -> tuple[Consumer, ...]:
    """Return the largest holders at and below a budget, now."""
    largest = sorted(_holders(budget), key=lambda holder: -holder[0])[:count]
    return tuple(Consumer(holder.path, own_bytes) for own_bytes, holder in largest)


def ranking_of(budget: Budget) -> Ranking:
    """Return the top consumers for a refusal's text: as they are, or in a large tree as they were a moment ago."""
    known, now_s = budget._policy.ranking, time.monotonic()
    if known and now_s < known.good_until_s:
        return known
    consumers = top_consumers(budget, TOP_CONSUMERS)
    made_at_s = time.monotonic()
    ranking = Ranking(consumers, made_at_s, made_at_s + (made_at_s - now_s) / _WALK_RATIO)
    if _is_large(budget):
        with policy.lock:
            policy.of(budget).ranking = ranking
    return ranking


def _is_large(budget: Budget) -> bool:
    seen, pending = 0, [budget]
    while pending and seen < _SMALL_TREE:
        children = pending.pop().children
        seen += len(children)
        pending += children
    return seen >= _SMALL_TREE


def _holders(budget: Budget) -> Iterator[tuple[int, Budget]]:
    """Yield the budgets at and below this one that hold something themselves, each after its own_bytes."""
    pending: list[Budget] = [budget]
    while pending:
        holder = pending.pop()
        children = holder.children
        if own_bytes := holder._own_bytes(children):
            yield own_bytes, holder
        pending += children
