"""A request that was refused: by whom, why, and what would have helped."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memsafe.budget import policy
from memsafe.budget.report import Waiter, ranking_of
from memsafe.errors import BudgetExceededError
from memsafe.sizes import MAX_SIZE_BYTES, format_size

if TYPE_CHECKING:
    from memsafe.budget.tree import Budget

_WAITERS_TOLD = 5


@dataclass(slots=True)  # not frozen: try_reserve() makes many, and that would triple the price
class Refusal:
    """The outcome of a request that nobody could make room for.

    Attributes:
        waited_s: How long it waited; None: it did not.
        remark: What else the error should say, a sentence; "" for nothing.
    """

    budget: Budget
    refused_by: Budget
    requested_bytes: int
    waited_s: float | None = None
    remark: str = ""

    def count(self) -> Refusal:
        """Count it at the budget that refused; returns itself."""
        with policy.lock:
            policy.of(self.refused_by).refusals += 1
        return self

    def error(self) -> BudgetExceededError:
        """Return what to raise."""
        limit = self.refused_by.limit_bytes
        limit_bytes = MAX_SIZE_BYTES if limit is None else limit
        waiters = waiters_for(self.refused_by)
        # It was less than what was asked for, whatever other threads have released since; unless others come first.
        available_bytes = limit_bytes - self.refused_by.used_bytes
        if not waiters:
            available_bytes = min(available_bytes, self.requested_bytes - 1)
        available_bytes = max(0, available_bytes)
        ranking = ranking_of(self.refused_by)
        held = ", ".join(f"{path} {format_size(used_bytes)}" for path, used_bytes in ranking.consumers) or "nobody"
        when = f" ({ranking.age_s:.1f} s ago)" if ranking.age_s >= 0.1 else ""
        waited = "" if self.waited_s is None else f" within {self.waited_s:.2f} s"
        sentences = [
            f"budget {self.budget.path!r} cannot reserve {format_size(self.requested_bytes)}{waited}: "
            f"{self.refused_by.path!r} has {format_size(available_bytes)} of {format_size(limit_bytes)} left; "
            f"held by {held}{when}.",
            *_who_waits(waiters, self.waited_s),
            *([self.remark] if self.remark else []),
            f"To help: {self._remedy(limit_bytes)}.",
        ]
        return BudgetExceededError(
            " ".join(sentences),
            requested_bytes=self.requested_bytes,
            budget=self.budget,
            refused_by=self.refused_by,
            available_bytes=available_bytes,
            top_consumers=ranking.consumers,
            waited_s=self.waited_s,
            waiters=waiters,
        )

    def _remedy(self, limit_bytes: int) -> str:
        if self.requested_bytes > limit_bytes:
            return "ask for less, or raise the limit"
        return "release reservations, raise the limit, or register a reclaimer"


def waiters_for(budget: Budget) -> tuple[Waiter, ...]:
    """Return who stands in line at and below a budget, first come first."""
    now_s = time.monotonic()
    with policy.lock:
        known = budget._root()._policy.claims
        claims = list(known.items())
        for claim, _ in claims:
            if not claim.in_line:
                known.pop(claim)  # it may have left without a word, by an exception from a signal handler
    return tuple(
        Waiter(claim.budget.path, claim.size_bytes, now_s - since_s, claim.budget.used_bytes)
        for claim, since_s in claims
        if claim.in_line and any(above is budget for above in claim.budget._upwards())
    )


def _who_waits(waiters: tuple[Waiter, ...], waited_s: float | None) -> list[str]:
    if not waiters:
        return []
    told = ", ".join(
        f"{waiter.path} for {format_size(waiter.requested_bytes)} since {waiter.waited_s:.2f} s, "
        f"while it holds {format_size(waiter.held_bytes)}"
        for waiter in waiters[:_WAITERS_TOLD]
    )
    more = f" and {len(waiters) - _WAITERS_TOLD} more" if len(waiters) > _WAITERS_TOLD else ""
    sentences = [f"In line there: {told}{more}."]
    if waited_s is not None and any(waiter.held_bytes for waiter in waiters):
        sentences.append("Who waits while it holds what others wait for is deadlocked with them: release first.")
    return sentences
