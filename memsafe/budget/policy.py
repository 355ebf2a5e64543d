"""What a budget knows beyond its counters. Most budgets know nothing, and share NO_POLICY."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable

    from memsafe._native import Claim
    from memsafe.budget.reclaim import ReclaimerEntry
    from memsafe.budget.report import Ranking
    from memsafe.budget.tree import Budget

    SoftLimitCallback = Callable[[Budget], object]

# The registry of a tree is cleared of lost reclaimers each time that it has doubled, from this length on.
REGISTRY_MIN = 32

# Guards the shape of all trees and all policies: who is whose child, who reclaims for whom, what was counted. One for
# all, because it is held for a few operations on dicts and never while user code runs; reentrant, because the collector
# may run __del__ inside it. Use it as policy.lock: a forked child has another one.
lock = threading.RLock()

# Which process this is, counted by forks: what another thread of the parent was in the middle of is over in the child.
generation = 0


class Policy:
    """A budget's callbacks and counts; lock guards every change.

    Attributes:
        entered: with blocks that are in the budget.
        batched: At the root only: the budgets of the tree that have a quantum.
        registry: At the root only: the reclaimers of the whole tree.
        claims: At the root only: who stands in line, and since when, in seconds of the monotonic clock.
        ranking: The top consumers of a tree too large to walk at each refusal.
    """

    abort_reason: str | None = None
    batched: weakref.WeakSet[Budget] | None = None
    entered = 0
    reclaimers: tuple[ReclaimerEntry, ...] = ()
    soft_callbacks: tuple[SoftLimitCallback, ...] = ()
    refusals = 0
    reclaims = 0
    reclaimed_bytes = 0
    waits = 0
    waited_s = 0.0
    ranking: Ranking | None = None
    registry_prune_at = REGISTRY_MIN

    def __init__(self) -> None:
        self.registry: list[weakref.ref[ReclaimerEntry]] = []
        self.claims: dict[Claim, float] = {}


NO_POLICY = Policy()


def of(budget: Budget) -> Policy:
    """Return the budget's own policy, to be changed. pre: lock is held."""
    if budget._policy is NO_POLICY:
        budget._policy = Policy()
    return budget._policy


def _renew_after_fork() -> None:
    global lock, generation
    lock = threading.RLock()
    generation += 1


os.register_at_fork(after_in_child=_renew_after_fork)
