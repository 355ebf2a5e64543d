"""Point-in-time images: the job that every engine shares, atomic replacement of files, and the engine that forks."""

from __future__ import annotations

from memsafe.snapshot.atomic import AtomicFile
from memsafe.snapshot.fork import fork_snapshot
from memsafe.snapshot.job import SnapshotJob, SnapshotProgress, SnapshotResult, SnapshotState
from memsafe.snapshot.schedule import SavePoint, SnapshotSchedule
from memsafe.snapshot.standing import SnapshotForecast
from memsafe.snapshot.writer import SnapshotWriter, Zstd

__all__ = [
    "AtomicFile",
    "SavePoint",
    "SnapshotForecast",
    "SnapshotJob",
    "SnapshotProgress",
    "SnapshotResult",
    "SnapshotSchedule",
    "SnapshotState",
    "SnapshotWriter",
    "Zstd",
    "fork_snapshot",
]
