"""An engine of snapshots that is driven by hand: no process is forked, and a snapshot ends when the test says so."""

from __future__ import annotations

import threading
from types import SimpleNamespace

from memsafe.errors import SnapshotFailedError, SnapshotRefusedError
from memsafe.snapshot.job import SnapshotJob, SnapshotResult, SnapshotRun

PATIENCE_S = 30


class Engine:
    """Takes snapshots that end when the test says so, or refuses."""

    def __init__(self):
        self.runs = []
        self.calls = []
        self.refusal = None
        self.began = threading.Event()

    def take(self, path, write, **arguments):
        self.calls.append((path, write, arguments))
        if self.refusal is not None:
            raise self.refusal
        self.runs.append(SnapshotRun(path, wake=lambda: None))
        self.began.set()
        return SnapshotJob(self.runs[-1])

    def succeed(self, **fields):
        run = self.runs[-1]
        run.seal()
        run.resolve(result(**fields))

    def fail(self, error=None):
        run = self.runs[-1]
        run.seal()
        run.reject(error or SnapshotFailedError("the disk is full"))


def result(duration_s=2.0, size_bytes=100, pause_s=0.001, peak_copy_bytes=10):
    return SnapshotResult("dump.db", size_bytes, pause_s, duration_s, peak_copy_bytes, "by hand")


def refused(decision):
    return SnapshotRefusedError(f"would not be safe ({decision})", SimpleNamespace(decision=decision))
