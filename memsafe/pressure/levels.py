"""What the levels mean, what raises them, and when they fall again. Nothing here reads or waits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum, IntEnum
from numbers import Real
from typing import TYPE_CHECKING, Any, SupportsIndex

from memsafe.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from memsafe.status import Constraint, MemoryStatus

LOOK_S_MIN = 0.1
"""A look at everything takes some 300 microseconds: no oftener, by the timer, than this."""

RECOVERY_S = 1.0
"""How often to look whether a level may fall, where its rise is told by somebody else."""

MIB = 1024**2
GIB = 1024**3

# What the native thread can count with: nanoseconds and bytes in 63 bits. A year is more than enough.
_POLL_S_MOST = 366 * 86_400
_BOUNDS = (
    ("clear_ratio", 1, 1_000_000),
    ("stall_headroom_ratio", 0, 1),
    ("cooldown_s", 0, math.inf),
    ("some_stall_us", 1, 2_000_000),  # the window of a trigger
    ("full_stall_us", 1, 2_000_000),
    ("fill_bytes_per_s", 1, 2**63 - 1),
)
_WHOLE = (
    *("low_bytes_min", "low_bytes_max", "critical_bytes_min", "critical_bytes_max"),
    *("some_stall_us", "full_stall_us", "fill_bytes_per_s"),
)


class PressureLevel(IntEnum):
    """How short memory is.

    NORMAL: no cause to act. LOW: give back what can be had again. CRITICAL: give back all that can be spared; the next
    large request may be the last.
    """

    NORMAL = 0
    LOW = 1
    CRITICAL = 2


@dataclass(frozen=True, slots=True)
class PressureEvent:
    """A change of level.

    Attributes:
        level, previous: What it is now, and what it was.
        source: Which source said so: a name from ``PressureMonitor.sources``, or ``simulate``.
        available_bytes: What was left under the limit that decided, all file cache counted as free; None if unknown.
        limit_bytes: That limit; None if unknown.
        at_s: When it was decided, by the monitor's clock: time.monotonic() unless it was given another.
        detail: Why, for people.
    """

    level: PressureLevel
    previous: PressureLevel
    source: str
    available_bytes: int | None
    limit_bytes: int | None
    at_s: float
    detail: str

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data, the levels by name."""
        return {**asdict(self), "level": self.level.name, "previous": self.previous.name}


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What sets a level. The defaults are meant for a container of 64 MiB as for a host of 1 TiB.

    Each limit on the process (its cgroups', rlimits, physical memory, commit in mode 2) is judged by itself, by what is
    available under it; all file cache is counted as available, so that page cache alone never raises a level.

    Attributes:
        low_ratio, low_bytes_min, low_bytes_max: LOW begins when no more is available than this share of the limit, but
            at least and at most so many bytes, and never above a quarter of the limit.
        critical_ratio, critical_bytes_min, critical_bytes_max: CRITICAL, likewise, and never above half of LOW.
        clear_ratio: A level's cause has passed when this many times its threshold is available.
        cooldown_s: How long the cause must have passed before the level falls. Longer than a PSI window of 2 s.
        some_stall_us, full_stall_us: LOW, or CRITICAL, when some, or all, tasks stood still for memory for so long
            within 2 s.
        stall_headroom_ratio: Stalls count only while less than this share of some limit is available: with more, what
            stalls is the recycling of file cache, or a neighbour in a cgroup of its own.
        poll_s_min, poll_s_max: Bounds of the polling interval. A few numbers are read so often as *poll_s_min* by the
            native thread; all files, which takes Python, ten times a second at the most.
        fill_bytes_per_s: The fastest plausible growth. The next poll comes before it could reach the next threshold.

    Raises:
        ValueError: One of them is out of bounds, infinite, or not a number.
    """

    low_ratio: float = 0.15
    low_bytes_min: int = 16 * MIB
    low_bytes_max: int = 2 * GIB
    critical_ratio: float = 0.05
    critical_bytes_min: int = 6 * MIB
    critical_bytes_max: int = 512 * MIB
    clear_ratio: float = 1.25
    cooldown_s: float = 3.0
    some_stall_us: int = 200_000
    full_stall_us: int = 400_000
    stall_headroom_ratio: float = 0.5
    poll_s_min: float = 0.001
    poll_s_max: float = 5.0
    fill_bytes_per_s: int = 4 * GIB

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, Real):
                raise ValueError(f"{field.name} must be a number, not {value!r}")
        for name in ("low", "critical"):
            ratio = getattr(self, f"{name}_ratio")
            least, most = getattr(self, f"{name}_bytes_min"), getattr(self, f"{name}_bytes_max")
            if not 0 <= ratio <= 1 or not 0 <= least <= most:
                raise ValueError(f"{name}: the ratio must be 0 to 1 and 0 <= min <= max, not {ratio}, {least}, {most}")
        if not 0 < self.poll_s_min <= self.poll_s_max <= _POLL_S_MOST:
            raise ValueError(
                f"0 < poll_s_min <= poll_s_max <= {_POLL_S_MOST} must hold, not {self.poll_s_min}, {self.poll_s_max}"
            )
        for name, least, most in _BOUNDS:
            value = getattr(self, name)
            if not (least <= value <= most and value < math.inf):
                raise ValueError(f"{name} must be finite and from {least} to {most}, not {value}")
        for name in _WHOLE:
            if not isinstance(getattr(self, name), SupportsIndex):
                raise ValueError(f"{name} must be a whole number, not {getattr(self, name)!r}")

    def begins_at(self, level: PressureLevel, limit_bytes: int) -> int:
        """Return the available bytes at which *level*, LOW or CRITICAL, begins under a limit."""
        low_bytes = min(
            max(int(limit_bytes * self.low_ratio), self.low_bytes_min), self.low_bytes_max, limit_bytes // 4
        )
        if level <= PressureLevel.LOW:
            return low_bytes
        critical_bytes = max(int(limit_bytes * self.critical_ratio), self.critical_bytes_min)
        return min(critical_bytes, self.critical_bytes_max, low_bytes // 2)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


class Needs(Enum):
    """What the headroom must say for a cause to count."""

    NOTHING = "nothing"
    SHORT_HEADROOM = "less than stall_headroom_ratio of some limit"
    LOW = "LOW under some limit"


@dataclass(frozen=True, slots=True)
class Cause:
    """What raises a level by itself: a stall, an OOM, a drill; whatever the headroom says, but for what it *needs*."""

    level: PressureLevel
    source: str
    detail: str
    needs: Needs = Needs.NOTHING


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one look at the machine says.

    Attributes:
        raised: The level to go up to at once.
        held: The highest level whose cause has not passed, under any limit; at least *raised*.
        source: The cause's, or None where the headroom decided.
        available_bytes, limit_bytes: Of the constraint that decided, else of the one that is met first.
        shortage_bytes: What is missing until every level's cause has passed, under every limit.
    """

    raised: PressureLevel
    held: PressureLevel
    source: str | None
    available_bytes: int | None
    limit_bytes: int | None
    shortage_bytes: int
    detail: str


def available_bytes(constraint: Constraint) -> int | None:
    """Return what is left under a constraint with all file cache counted as free, None where unknown."""
    if constraint.headroom_bytes is None:
        return None
    return min(constraint.limit_bytes, constraint.headroom_bytes + constraint.active_file_bytes)


def judge(status: MemoryStatus, thresholds: Thresholds, causes: Collection[Cause] = ()) -> Judgement:
    """Return what *status*, and what was heard since the last look, mean."""
    judged = [
        _judge_headroom(constraint, left_bytes, thresholds)
        for constraint in status.constraints
        if (left_bytes := available_bytes(constraint)) is not None
    ]
    decides = max(judged, key=lambda each: (each.raised, each.held, -(each.available_bytes or 0)), default=_UNKNOWN)
    # What lasts may be another constraint's: the one that decides may be the first to recover.
    judgement = replace(
        decides,
        held=max((each.held for each in judged), default=decides.held),
        shortage_bytes=max((each.shortage_bytes for each in judged), default=0),
    )
    met = {
        Needs.NOTHING: True,
        Needs.SHORT_HEADROOM: any(_ratio(each) < thresholds.stall_headroom_ratio for each in judged) or not judged,
        Needs.LOW: judgement.raised >= PressureLevel.LOW,
    }
    loudest = max((cause for cause in causes if met[cause.needs]), key=lambda each: each.level, default=None)
    if loudest is None or loudest.level <= judgement.raised:
        return judgement
    return replace(
        judgement,
        raised=loudest.level,
        held=max(loudest.level, judgement.held),
        source=loudest.source,
        detail=f"{loudest.detail}; {judgement.detail}",
    )


_UNKNOWN = Judgement(
    PressureLevel.NORMAL, PressureLevel.NORMAL, None, None, None, 0, "how much is available is not known"
)


def _ratio(judgement: Judgement) -> float:
    return (judgement.available_bytes or 0) / (judgement.limit_bytes or 1)


def _judge_headroom(constraint: Constraint, left_bytes: int, thresholds: Thresholds) -> Judgement:
    raised = held = PressureLevel.NORMAL
    shortage_bytes = 0
    for level in (PressureLevel.LOW, PressureLevel.CRITICAL):
        begin_bytes = thresholds.begins_at(level, constraint.limit_bytes)
        clear_bytes = int(begin_bytes * thresholds.clear_ratio)
        if left_bytes <= begin_bytes:
            raised = level
        if left_bytes <= clear_bytes:
            held = level
            shortage_bytes = max(shortage_bytes, clear_bytes + 1 - left_bytes)
    where = f" of {constraint.path}" if constraint.path else ""
    detail = f"{format_size(left_bytes)} available of {format_size(constraint.limit_bytes)} ({constraint.kind}{where})"
    return Judgement(raised, held, None, left_bytes, constraint.limit_bytes, shortage_bytes, detail)


def has_room(status: MemoryStatus, thresholds: Thresholds, size_bytes: int) -> bool:
    """Return whether *size_bytes* more may be used without that any limit comes near LOW."""
    return all(
        left_bytes - size_bytes
        > int(thresholds.begins_at(PressureLevel.LOW, each.limit_bytes) * thresholds.clear_ratio)
        for each in status.constraints
        if (left_bytes := available_bytes(each)) is not None
    )


def next_level_bytes(left_bytes: int, thresholds: Thresholds, limit_bytes: int) -> int | None:
    """Return at how many available bytes the next level begins; None: there is none above."""
    for level in (PressureLevel.LOW, PressureLevel.CRITICAL):
        begin_bytes = thresholds.begins_at(level, limit_bytes)
        if left_bytes > begin_bytes:
            return begin_bytes
    return None


def poll_after_s(
    status: MemoryStatus, thresholds: Thresholds, is_guarded: Callable[[Constraint], bool] = lambda _: False
) -> float:
    """Return when to look again: before the fastest plausible growth could reach the next threshold of any limit.

    Args:
        status: The last look.
        thresholds: As of the monitor.
        is_guarded: Whether somebody will tell when the next level of a constraint begins, by the kernel or by a gauge.
    """
    waits_s = [thresholds.poll_s_max]
    for constraint in status.constraints:
        left_bytes = available_bytes(constraint)
        if left_bytes is None:
            continue
        low_bytes = thresholds.begins_at(PressureLevel.LOW, constraint.limit_bytes)
        next_bytes = next_level_bytes(left_bytes, thresholds, constraint.limit_bytes)
        if next_bytes is None:
            waits_s.append(0.0)  # only the recovery is waited for
        elif not is_guarded(constraint):
            waits_s.append((left_bytes - next_bytes) / thresholds.fill_bytes_per_s)
        elif left_bytes <= low_bytes * thresholds.clear_ratio:
            waits_s.append(RECOVERY_S)
    return max(min(LOOK_S_MIN, thresholds.poll_s_max), thresholds.poll_s_min, min(waits_s))


class Ladder:
    """The level in force: up at once, down when its cause has passed for the cooldown. Used by one thread."""

    def __init__(self, cooldown_s: float) -> None:
        self.level = PressureLevel.NORMAL
        self._cooldown_s = cooldown_s
        self._calm_since_s: dict[PressureLevel, float | None] = {}

    def move(self, raised: PressureLevel, held: PressureLevel, now_s: float) -> PressureLevel:
        """Return the level after a look that said *raised* and *held*."""
        for level in (PressureLevel.LOW, PressureLevel.CRITICAL):
            if held >= level:
                self._calm_since_s[level] = None
            elif self._calm_since_s.get(level) is None:
                self._calm_since_s[level] = now_s
        self.level = max(
            raised, *(level for level in PressureLevel if level <= self.level and self._lasts(level, now_s))
        )
        return self.level

    def force(self, level: PressureLevel, now_s: float) -> None:
        """Go to *level*, for a cause that has passed already."""
        self.level = level
        for each in (PressureLevel.LOW, PressureLevel.CRITICAL):
            self._calm_since_s[each] = now_s

    def falls_after_s(self, now_s: float) -> float | None:
        """Return when the level may fall next, None where nothing has begun to pass."""
        since = [at_s for level, at_s in self._calm_since_s.items() if level <= self.level and at_s is not None]
        return max(0.0, min(since) + self._cooldown_s - now_s) if since else None

    def _lasts(self, level: PressureLevel, now_s: float) -> bool:
        since_s = self._calm_since_s.get(level)
        return level == PressureLevel.NORMAL or since_s is None or now_s - since_s < self._cooldown_s
