"""What is run: a cell is an engine, a share of the limit that its data takes, and a pace of writing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.survival.plain import Plain
from memsafe import format_size

MIB = 1024**2

LIMIT = 112 * MIB
SHARES = (0.4, 0.5, 0.7)
RATES = (50 * MIB, None)

# Each image takes at least so long, as on a slow disk: a writer at 50 MiB/s has rewritten all of the data by then.
IMAGE_S = 1.2
# For what is done at a pace before each snapshot, and for a machine that is busy.
_PATIENCE_S_EACH = 12.0


@dataclass(frozen=True)
class Cell(Plain):
    """A program to run some times over.

    Attributes:
        limit_bytes: The cgroup's memory.max, or v1's memory.limit_in_bytes.
        share: How much of the limit the data takes.
        rate: Bytes per second that are rewritten during a snapshot; None: as fast as it goes.
        engine: A name from ``program.ENGINES``, or "redis BGSAVE".
        snapshots: How many are taken in a run.
        runs: How often.
    """

    limit_bytes: int
    share: float
    rate: int | None
    engine: str
    snapshots: int = 20
    runs: int = 20

    def __str__(self) -> str:
        return f"{self.engine}: {format_size(self.data_bytes)} of {format_size(self.limit_bytes)} at {self.pace}"

    @property
    def pace(self) -> str:
        return "full speed" if self.rate is None else f"{format_size(self.rate)}/s"

    @property
    def data_bytes(self) -> int:
        """Whole MiB."""
        return round(self.share * self.limit_bytes / MIB) * MIB

    @property
    def patience_s(self) -> float:
        return 30.0 + self.snapshots * _PATIENCE_S_EACH


def matrix(
    engines: Iterable[str],
    *,
    limits: Iterable[int] = (LIMIT,),
    shares: Iterable[float] = SHARES,
    rates: Iterable[int | None] = RATES,
    snapshots: int = 20,
    runs: int = 20,
) -> Iterator[Cell]:
    """Yield every combination; engines side by side, as they are to be compared."""
    for limit_bytes, share, rate, engine in itertools.product(limits, shares, rates, engines):
        yield Cell(limit_bytes, share, rate, engine, snapshots, runs)
