"""Real memory pressure on a store: memory that runs low beside it, and a watch on what it hears."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import psutil

from examples.demo.processes import Ballast, Store
from memsafe import PressureLevel, format_size
from memsafe._kernel.cgroup import MemoryCgroup
from memsafe.pressure import Thresholds

MIB = 1 << 20
_PACE_S = 0.05
_WAITS_MAX = 100


class Squeeze(Protocol):
    """Takes room from a store step by step, and gives it back."""

    what: str
    pace_s: float
    """How long to wait for the store to notice a step, before the next."""

    def tighten(self, level: str) -> bool:
        """Take the next step from *level*; False when no further one is safe."""
        ...

    def told(self) -> str:
        """Say how tight it is."""
        ...

    def release(self) -> None:
        """Give everything back."""
        ...


class CgroupSqueeze:
    """Another process takes the memory of the store's cgroup, in steps that shrink with what is left."""

    what = "another process in its cgroup takes memory"
    pace_s = 0.1  # the kernel tells it of thresholds at once

    def __init__(self, cgroup: MemoryCgroup) -> None:
        self._cgroup = cgroup
        self._ballast = Ballast(cgroup.directory)
        self._waits = 0

    def tighten(self, level: str) -> bool:
        """Take an eighth of what is left, but no more than brings the next level; then wait for that."""
        left_bytes = self._left_bytes()
        beyond_bytes = left_bytes - _goal_bytes(level, self._cgroup.limit_bytes() or 0)
        if beyond_bytes > 0:
            return self._ballast.grow(min(max(MIB, left_bytes // 8), beyond_bytes))
        self._waits += 1
        return self._waits < _WAITS_MAX

    def told(self) -> str:
        """Say how much the ballast holds, and how much is left."""
        return f"{format_size(self._ballast.size_bytes)} of ballast, {format_size(self._left_bytes())} left"

    def release(self) -> None:
        """End the ballast."""
        self._ballast.close()

    def _left_bytes(self) -> int:
        cgroup = self._cgroup
        cache_bytes = sum(cgroup.file_cache_bytes() or (0, 0))
        return (cgroup.limit_bytes() or 0) - (cgroup.usage_bytes() or 0) + cache_bytes


class RlimitSqueeze:
    """Where no cgroup may be made: the kernel is told to refuse the store memory beyond what it has and a little more.

    The soft RLIMIT_DATA of the store is lowered towards the private memory that it has mapped: to where LOW begins,
    then to where CRITICAL does, then put back.
    """

    what = "the kernel will give it little more than it has (RLIMIT_DATA)"
    pace_s = 1.0  # nothing tells it of a limit: it looks, every five seconds while all is well

    def __init__(self, store: Store) -> None:
        self._process = psutil.Process(store.process.pid)
        self._before = self._process.rlimit(resource.RLIMIT_DATA)
        self._waits = 0

    def tighten(self, level: str) -> bool:
        """Go to what brings the next level, from what is mapped now; that changes while it is waited for."""
        mapped_bytes = self._mapped_bytes()
        limit_bytes = mapped_bytes + _goal_bytes(level, mapped_bytes)
        self._process.rlimit(resource.RLIMIT_DATA, (limit_bytes, self._before[1]))
        self._waits += 1
        return self._waits < _WAITS_MAX

    def told(self) -> str:
        """Say what the limit is, and how much of it is left."""
        limit_bytes, _ = self._process.rlimit(resource.RLIMIT_DATA)
        if limit_bytes == resource.RLIM_INFINITY:
            return f"{format_size(self._mapped_bytes())} mapped, no limit"
        return f"{format_size(limit_bytes - self._mapped_bytes())} left of {format_size(limit_bytes)}"

    def release(self) -> None:
        """Put the limit back."""
        if self._process.is_running():
            self._process.rlimit(resource.RLIMIT_DATA, self._before)

    def _mapped_bytes(self) -> int:
        return int(self._process.memory_info().data)


def _goal_bytes(level: str, limit_bytes: int) -> int:
    """Return how much to leave so that the level after *level* is sure to come."""
    thresholds = Thresholds()
    low_bytes, critical_bytes = (
        thresholds.begins_at(each, limit_bytes) for each in (PressureLevel.LOW, PressureLevel.CRITICAL)
    )
    return critical_bytes * 3 // 4 if level == "LOW" else (low_bytes + critical_bytes) // 2


@contextmanager
def squeeze(store: Store, cgroup: MemoryCgroup | None) -> Iterator[Squeeze]:
    """Squeeze *store* by what the machine allows; all is given back at the end."""
    squeezing: Squeeze = CgroupSqueeze(cgroup) if cgroup else RlimitSqueeze(store)
    try:
        yield squeezing
    finally:
        squeezing.release()


@dataclass(slots=True)
class Watch:
    """Asks a store for its pressure level and how it is, again and again, on a connection of its own.

    Attributes:
        levels: (seconds since the watch began, level), a line for each change.
        longest_wait_s: The longest that the store took to answer.
    """

    store: Store
    levels: list[tuple[float, str]] = field(default_factory=list)
    longest_wait_s: float = 0.0
    error: Exception | None = None
    _stop: threading.Event = field(default_factory=threading.Event)

    @property
    def level(self) -> str:
        """The level that was seen last."""
        return self.levels[-1][1] if self.levels else "?"

    def run(self) -> None:
        """Watch until told to stop."""
        began = time.monotonic()
        try:
            with self.store.connect() as client:
                while not self._stop.wait(_PACE_S):
                    asked = time.monotonic()
                    level = str(client.info("memsafe")["memsafe_pressure_level"]).upper()
                    now = time.monotonic()
                    self.longest_wait_s = max(self.longest_wait_s, now - asked)
                    if level != self.level:
                        self.levels.append((now - began, level))
        except Exception as error:
            self.error = error

    def stop(self) -> None:
        """Have run() end."""
        self._stop.set()


@contextmanager
def watching(store: Store) -> Iterator[Watch]:
    """Watch *store* while the block runs."""
    watch = Watch(store)
    thread = threading.Thread(target=watch.run, name="pressure watch")
    thread.start()
    try:
        yield watch
    finally:
        watch.stop()
        thread.join()
