"""What is run: a cell is a program, a pace, a limit and somebody who responds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.survival.plain import Plain
from memsafe import PressureLevel, Thresholds, format_size

MIB = 1024**2

LIMITS = (64 * MIB, 256 * MIB, 1024 * MIB)
RATES = (5 * MIB, 50 * MIB, None)
BASELINES = ("none", "psutil 1 s", "psutil 100 ms", "dask")
HIGH_RATIO = 0.9

_DEMAND_RATIO = 0.8
# As fast as it can: what a slow machine does at least, to know when to lose patience.
_SLOWEST_FULL_SPEED = 40 * MIB
_TO_LOW_RATIO = 0.3


@dataclass(frozen=True)
class Cell(Plain):
    """A program to run some times over.

    Attributes:
        limit_bytes: The cgroup's memory.max, or v1's memory.limit_in_bytes.
        rate: Bytes per second that are taken behind the budget's back; None: as fast as it goes.
        responder: A name from ``responders.RESPONDERS``.
        has_high: Whether memory.high is set, at HIGH_RATIO of the limit (v2 only).
        kind: How memory is taken: a name from ``program.HOARDS``.
        runs: How often.
    """

    limit_bytes: int
    rate: int | None
    responder: str
    has_high: bool = False
    kind: str = "native"
    runs: int = 20

    def __str__(self) -> str:
        rate = "full speed" if self.rate is None else f"{format_size(self.rate)}/s"
        high = ", memory.high" if self.has_high else ""
        return f"{self.responder}: {self.kind} at {rate} in {format_size(self.limit_bytes)}{high}"

    @property
    def tight_bytes(self) -> int:
        """What is met first: memory.high, or the limit."""
        return int(self.limit_bytes * HIGH_RATIO) if self.has_high else self.limit_bytes

    @property
    def cache_bytes(self) -> int:
        return self.limit_bytes // 2

    @property
    def chunk_bytes(self) -> int:
        """What is taken at a time: small beside the limit, and at a pace some hundred times a second at the most."""
        if self.kind == "at once":
            return int(_DEMAND_RATIO * self.limit_bytes)
        chunk_bytes = self.limit_bytes // 256
        return chunk_bytes if self.rate is None else min(chunk_bytes, max(64 * 1024, self.rate // 200))

    @property
    def pace_from_bytes(self) -> int:
        """At how much left the pace begins: until then, memory is taken at full speed. Above where LOW begins."""
        return int(Thresholds().begins_at(PressureLevel.LOW, self.tight_bytes) * (1 + _TO_LOW_RATIO))

    def demand_bytes(self, left_bytes: int) -> int:
        """Return how much is taken in all where *left_bytes* are left under the tightest limit at the beginning.

        At full speed 1.3 times the limit together with the cache; at a pace, so that a run does not take minutes, a
        32nd more than the limit, which no more survives without an answer.
        """
        if self.rate is None:
            return int(_DEMAND_RATIO * self.limit_bytes)
        return left_bytes + (self.limit_bytes - self.tight_bytes) + max(4 * MIB, self.limit_bytes // 32)

    @property
    def patience_s(self) -> float:
        """Until when the demand is to be met; where it is not, the program stands still."""
        if self.rate is None:
            return 45.0 + 1.3 * self.limit_bytes / _SLOWEST_FULL_SPEED
        paced_bytes = self.demand_bytes(self.pace_from_bytes)
        return 45.0 + 2.0 * paced_bytes / self.rate


def matrix(
    responders: Iterable[str],
    *,
    limits: Iterable[int] = LIMITS,
    rates: Iterable[int | None] = RATES,
    highs: Iterable[bool] = (False,),
    kinds: Iterable[str] = ("native",),
    runs: int = 20,
) -> Iterator[Cell]:
    """Yield every combination, the hardest first."""
    for limit_bytes, has_high, kind, rate, responder in itertools.product(
        limits, highs, kinds, sorted(rates, key=lambda rate: -(rate or 1 << 60)), responders
    ):
        yield Cell(limit_bytes, rate, responder, has_high, kind, runs)
