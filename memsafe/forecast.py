"""How much both sides of a fork will copy: from what the caller says, else from what was measured, else the worst."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from memsafe._kernel import dirty, process
from memsafe._native import object_heap_bytes
from memsafe.errors import KernelError, MemsafeError, UnsupportedError
from memsafe.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

__all__ = ["DirtyMeter", "DirtyRate", "Forecast", "Observations", "measure_dirty_rate", "observations"]

DirtyMethod: TypeAlias = Literal["soft-dirty", "pagemap-scan", "minor-faults"]
ForecastSource: TypeAlias = Literal["caller", "last snapshot", "soft-dirty", "pagemap-scan", "private memory"]

VALID_S = 600.0
"""How long a measured rate is believed: what a store is asked to do changes."""

ASSUMED_WRITE_BYTES_PER_S = 100 * 10**6
"""How fast an image of all private memory is assumed to be written where nobody has said how long it takes."""


@dataclass(frozen=True, slots=True)
class DirtyRate:
    """How fast this process writes to pages of its own, each counted once.

    Attributes:
        bytes_per_s: dirty_bytes a second.
        dirty_bytes: The distinct pages that were written meanwhile.
        duration_s: How long it was watched.
        method: ``soft-dirty`` and ``pagemap-scan`` see every write. ``minor-faults`` sees the first touch of fresh
            memory only, never a page that is written again: it is a lower bound.
        at_s: When the watch ended, by time.monotonic().
    """

    bytes_per_s: float
    dirty_bytes: int
    duration_s: float
    method: DirtyMethod
    at_s: float

    @property
    def is_lower_bound(self) -> bool:
        """Whether more may have been written than was seen."""
        return self.method == "minor-faults"

    def within_bytes(self, duration_s: float) -> int:
        """Return the most distinct pages that *duration_s* of the same would write, in bytes.

        The number of distinct pages grows ever more slowly (hot pages are written again), so a longer time writes at
        most in proportion, and a shorter one at most as much.
        """
        return _times(self.dirty_bytes, max(1.0, duration_s / self.duration_s))

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**asdict(self), "is_lower_bound": self.is_lower_bound}


class DirtyMeter:
    """Watches which pages this process writes, by the best means that this kernel has. A context manager.

    Beginning write-protects all private memory (some milliseconds per GiB, during which no memory can be mapped);
    then each page's first write takes a fault of about a microsecond. ``soft-dirty`` uses bits of the page tables that
    belong to the process: CRIU, if it takes incremental images of it, loses track; a mapping that grows, as the heap
    may, counts whole. ``pagemap-scan`` (userfaultfd, Linux 6.7) divides huge pages that are written. One meter at a
    time in a process, for any thread; a forked child has none.

    Args:
        method: Which one; None: soft-dirty, else pagemap-scan, else minor-faults.
        clock: Seconds, never going back: time.monotonic.

    Raises:
        UnsupportedError: This kernel has *method* not, or forbids it; None always works.
        MemsafeError: Another meter of this process is at work.
        ValueError: There is no such method.

    Example:
        >>> with DirtyMeter() as meter:
        ...     page = bytearray(1 << 20)
        ...     rate = meter.read()
        >>> rate.dirty_bytes >= 1 << 20
        True
    """

    def __init__(self, method: DirtyMethod | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        if method is not None and method not in _METHODS:
            raise ValueError(f"method must be one of {', '.join(_METHODS)}, or None: {method!r}")
        self._clock = clock
        self._pages: dirty.DirtyPages | None = None
        self._token = object()
        if _at_work.setdefault("", self._token) is not self._token:
            raise MemsafeError("a DirtyMeter of this process is at work already: one at a time")
        self._closed = False
        try:
            self.method: DirtyMethod = self._begin(method)
            self._faults = process.minor_faults()
            self._began_s = clock()
        except BaseException:
            self.close()
            raise

    def _begin(self, wanted: DirtyMethod | None) -> DirtyMethod:
        for name in _METHODS if wanted is None else (wanted,):
            if name == "minor-faults":
                break
            try:
                self._pages = dirty.DirtyPages(name)
            except KernelError as error:
                if error.errno not in dirty.REFUSALS:
                    raise
                if wanted is not None:
                    raise UnsupportedError(
                        f"{error}. soft-dirty wants CONFIG_MEM_SOFT_DIRTY; pagemap-scan wants Linux 6.7 and "
                        "userfaultfd, which a container's seccomp profile may forbid; minor-faults always works"
                    ) from None
            else:
                return name
        return "minor-faults"

    def read(self) -> DirtyRate:
        """Return the rate since it began, and go on. assess_fork() uses the last one that was read.

        Raises:
            KernelError: The page tables could not be read.
            ValueError: It was closed, or is the parent's of this forked child.
        """
        if self._closed or _at_work.get("") is not self._token:
            raise ValueError("the meter is closed")
        if self._pages is not None:
            dirty_bytes = self._pages.count_bytes()
        else:
            dirty_bytes = (process.minor_faults() - self._faults) * os.sysconf("SC_PAGESIZE")
        now_s = self._clock()
        duration_s = max(now_s - self._began_s, 1e-6)
        rate = DirtyRate(dirty_bytes / duration_s, dirty_bytes, duration_s, self.method, now_s)
        observations.note_rate(rate)
        return rate

    def close(self) -> None:
        """Stop watching. Twice is a no-op."""
        if not self._closed:
            self._closed = True
            if self._pages is not None:
                self._pages.close()
            if _at_work.get("") is self._token:
                _at_work.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()


_METHODS: tuple[DirtyMethod, ...] = ("soft-dirty", "pagemap-scan", "minor-faults")


def measure_dirty_rate(duration_s: float = 1.0, *, method: DirtyMethod | None = None) -> DirtyRate:
    """Watch for *duration_s* seconds what this process writes, and return the rate. It blocks; other threads work on.

    Args:
        duration_s: Above 0. Best as long as a snapshot takes.
        method: As of DirtyMeter, which see for what it costs.

    Raises:
        ValueError: *duration_s* is not above 0.
        UnsupportedError, MemsafeError: As DirtyMeter.
    """
    if not 0 < duration_s < float("inf"):
        raise ValueError(f"duration_s must be a number of seconds above 0: {duration_s!r}")
    with DirtyMeter(method) as meter:
        time.sleep(duration_s)
        return meter.read()


@dataclass(frozen=True, slots=True)
class LastSnapshot:
    """What a complete snapshot of this process cost.

    Attributes:
        copy_bytes: Its peak of copies.
        duration_s: How long it took; None where unknown.
        private_bytes: Private memory when it began; None where unknown.
        at_s: When it ended, by time.monotonic(); None where unknown.
    """

    copy_bytes: int
    duration_s: float | None = None
    private_bytes: int | None = None
    at_s: float | None = None

    def forecast_bytes(self, private_bytes: int | None, duration_s: float | None) -> int:
        """Return what the next one copies, if the state is written as evenly as then, in bytes.

        In proportion to memory that has grown since, and to time where it is told to take longer.
        """
        grown = _ratio(private_bytes, self.private_bytes) * _ratio(duration_s, self.duration_s)
        return _times(self.copy_bytes, grown)


def _ratio(now: float | None, then: float | None) -> float:
    return max(1.0, now / then) if now is not None and then else 1.0


class Observations:
    """What was measured of this process's writing. A forked child has seen nothing yet."""

    def __init__(self) -> None:
        self.rate: DirtyRate | None = None
        self.snapshot: LastSnapshot | None = None

    def note_rate(self, rate: DirtyRate) -> None:
        """Remember the last rate."""
        self.rate = rate

    def note_snapshot(self, snapshot: LastSnapshot) -> None:
        """Remember a snapshot that was completed."""
        self.snapshot = snapshot

    def note_cut_short(self, copy_bytes: int) -> None:
        """Remember what a snapshot had copied when it was ended: a whole one copies at least as much."""
        if self.snapshot is not None and copy_bytes > self.snapshot.copy_bytes:
            self.snapshot = LastSnapshot(copy_bytes)

    def clear(self) -> None:
        """Forget everything."""
        self.rate = self.snapshot = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """Copies expected while both sides of a fork run.

    Attributes:
        copy_bytes: How much; None where nothing is known at all.
        source: Where it comes from.
        words: The same in words, for a sentence.
    """

    copy_bytes: int | None
    source: ForecastSource
    words: str

    @classmethod
    def of(
        cls,
        private_bytes: int | None,
        *,
        dirty_bytes_per_s: float | None = None,
        duration_s: float | None = None,
        seen: Observations | None = None,
        now_s: float = 0.0,
    ) -> Forecast:
        """Return the forecast for a process with so much private writable memory, which it never exceeds.

        The rate or the time that the caller tells, else whichever was seen last: a snapshot's copies, or a rate with
        what may hold Python objects added, since a child that merely reads them writes their reference counts; else
        all private memory. A rate that is a lower bound foretells nothing.

        Args:
            private_bytes: Private writable memory; None where unknown.
            dirty_bytes_per_s: What the caller says of its rate.
            duration_s: What the caller says of the time.
            seen: What was measured; None: nothing.
            now_s: Now, by time.monotonic().
        """
        seen = seen or Observations()
        if dirty_bytes_per_s is not None or duration_s == 0:
            return cls._told(private_bytes, dirty_bytes_per_s or 0.0, duration_s, seen)
        last, rate = seen.snapshot, seen.rate
        if rate is not None and now_s - rate.at_s <= VALID_S and (last is None or (last.at_s or 0.0) < rate.at_s):
            measured = cls._measured(private_bytes, rate, _expected_s(private_bytes, duration_s, seen))
            if measured is not None:
                return measured
        if last is not None:
            expected_bytes = last.forecast_bytes(private_bytes, duration_s)
            return cls(_least(private_bytes, expected_bytes), "last snapshot", "as the last snapshot copied")
        return cls(private_bytes, "private memory", "if all private memory is written or its objects read")

    @classmethod
    def _measured(cls, private_bytes: int | None, rate: DirtyRate, for_s: float) -> Forecast | None:
        heap_bytes = object_heap_bytes()
        if rate.method == "minor-faults" or heap_bytes is None:
            return None
        written_bytes = rate.within_bytes(for_s)
        words = (
            f"{format_size(written_bytes)} written in {for_s:.1f} s at the rate measured by {rate.method}, and "
            f"{format_size(heap_bytes)} of Python's heap if its objects are read"
        )
        return cls(_least(private_bytes, written_bytes + heap_bytes), rate.method, words)

    @classmethod
    def _told(
        cls, private_bytes: int | None, bytes_per_s: float, duration_s: float | None, seen: Observations
    ) -> Forecast:
        if bytes_per_s == 0 or duration_s == 0:
            return cls(0, "caller", "by the rate and time given")
        words = "by the rate and time given"
        if duration_s is None:
            duration_s = _expected_s(private_bytes, None, seen)
            words = f"by the rate given, in {duration_s:.1f} s"
        return cls(_least(private_bytes, _times(bytes_per_s, duration_s)), "caller", words)


def _expected_s(private_bytes: int | None, duration_s: float | None, seen: Observations) -> float:
    """Return how long a snapshot takes: as told, as the last one took, else as long as all memory takes to write."""
    if duration_s is not None:
        return duration_s
    if seen.snapshot is not None and seen.snapshot.duration_s is not None:
        return seen.snapshot.duration_s * _ratio(private_bytes, seen.snapshot.private_bytes)
    return (private_bytes or 0) / ASSUMED_WRITE_BYTES_PER_S


def _times(size_bytes: float, factor: float) -> int:
    """Return the product in whole bytes, no more than there can be; nothing is nothing, for ever too."""
    return int(min(size_bytes * factor, 2.0**63)) if size_bytes and factor else 0


def _least(*sizes_bytes: int | None) -> int | None:
    return min((size_bytes for size_bytes in sizes_bytes if size_bytes is not None), default=None)


def check_number(name: str, number: float | None) -> None:
    """Raise ValueError unless *number* is None, or a number from 0 that a float can hold."""
    if number is not None and not (0 <= number <= sys.float_info.max or number == float("inf")):
        raise ValueError(f"{name} must be a number from 0: {number!r}")


observations = Observations()
_at_work: dict[str, object] = {}  # the meter's token; setdefault decides between threads, and signal handlers too


def _forget() -> None:
    observations.clear()
    _at_work.clear()


os.register_at_fork(after_in_child=_forget)
