"""How a schedule of snapshots stands: one value, so that what belongs together changes in one step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from memsafe.errors import SnapshotCancelledError, SnapshotInProgressError, SnapshotRefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from memsafe.snapshot.job import SnapshotJob, SnapshotResult

_RUNS_REMEMBERED = 5


@dataclass(frozen=True, slots=True)
class SnapshotForecast:
    """What the next snapshot will take, by the last few that succeeded.

    Attributes:
        runs: How many those are.
        duration_s, size_bytes, pause_s: Their medians.
        copy_bytes: The most that any of them copied, as a bound must hold for the worst; None where none was measured.
    """

    runs: int
    duration_s: float
    size_bytes: int
    pause_s: float
    copy_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)


class News(NamedTuple):
    """What came of an attempt, and how many had failed in a row by then."""

    outcome: SnapshotResult | Exception
    failures: int


@dataclass(frozen=True, slots=True)
class Standing:
    """What a schedule knows of its snapshots. Frozen: each step gives another one.

    Attributes:
        saved_changes: How many of all changes the last image has.
        saved_at_s: When that was complete, or the schedule was made.
        not_before_s: When another attempt may be made.
        job: The snapshot that is running, or None.
        job_changes: How many of all changes its image will have.
        runs: The last few that succeeded, oldest first.
        last_error: What ended the last one that failed; None after a success.
        consecutive_failures: How many failed since the last success.
        deferred_by: Why the last attempt was put off; None after one that was not.
        untold: What the owner was not told yet, oldest first.
    """

    saved_changes: int
    saved_at_s: float
    not_before_s: float
    job: SnapshotJob | None = None
    job_changes: int = 0
    runs: tuple[SnapshotResult, ...] = ()
    last_error: Exception | None = None
    consecutive_failures: int = 0
    deferred_by: Exception | None = None
    untold: tuple[News, ...] = ()

    def began(self, job: SnapshotJob, changes: int) -> Standing:
        """Return how it stands with *job* running, whose image has *changes*."""
        return replace(self, job=job, job_changes=changes, deferred_by=None)

    def ended(
        self, job: SnapshotJob, outcome: SnapshotResult | Exception, now_s: float, wait_s: Callable[[int], float]
    ) -> Standing:
        """Return how it stands after *job*; as it is where somebody else has taken that in already."""
        if self.job is not job:
            return self
        without = replace(self, job=None)
        if isinstance(outcome, Exception):
            return without.failed(outcome, now_s, wait_s)
        runs = (*self.runs, outcome)[-_RUNS_REMEMBERED:]
        return replace(without.saved(self.job_changes, now_s), runs=runs, untold=(*self.untold, News(outcome, 0)))

    def saved(self, changes: int, now_s: float) -> Standing:
        """Return how it stands when an image with *changes* is complete; an older one takes nothing back."""
        return replace(
            self,
            saved_changes=max(changes, self.saved_changes),
            saved_at_s=now_s,
            not_before_s=now_s,
            last_error=None,
            consecutive_failures=0,
            deferred_by=None,
        )

    def failed(self, error: Exception, now_s: float, wait_s: Callable[[int], float]) -> Standing:
        """Return how it stands after an attempt without an image; *wait_s* is told how many failed in a row."""
        failures, last_error, deferred_by = self.consecutive_failures, self.last_error, None
        wait_failures = 1
        if is_deferral(error):
            deferred_by = error
        elif not isinstance(error, SnapshotCancelledError):
            last_error = error
            wait_failures = failures = failures + 1
        return replace(
            self,
            not_before_s=now_s + wait_s(wait_failures),
            last_error=last_error,
            consecutive_failures=failures,
            deferred_by=deferred_by,
            untold=(*self.untold, News(error, failures)),
        )

    def told(self) -> Standing:
        """Return how it stands when the owner is told of what is first in *untold*."""
        return replace(self, untold=self.untold[1:])

    def forecast(self) -> SnapshotForecast | None:
        """Return what the next snapshot will take; None before the first that succeeded."""
        if not self.runs:
            return None
        copies = [run.peak_copy_bytes for run in self.runs if run.peak_copy_bytes is not None]
        return SnapshotForecast(
            runs=len(self.runs),
            duration_s=_median([run.duration_s for run in self.runs]),
            size_bytes=_median([run.size_bytes for run in self.runs]),
            pause_s=_median([run.pause_s for run in self.runs]),
            copy_bytes=max(copies, default=None),
        )


def is_deferral(error: Exception) -> bool:
    """Whether *error* means that another time will do."""
    if isinstance(error, SnapshotRefusedError):
        return error.assessment.decision == "defer"
    return isinstance(error, SnapshotInProgressError)


_Number = TypeVar("_Number", int, float)


def _median(numbers: list[_Number]) -> _Number:
    return sorted(numbers)[len(numbers) // 2]  # of an even number the upper one: a forecast errs upwards
