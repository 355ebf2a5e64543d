"""All benchmarks, or those named: ``python -m benchmarks [--quick] [--json FILE] [NAME ...]``."""

from __future__ import annotations

import sys

from benchmarks import budget, fork, heap, importing, memkv, numpy, snapshot_write, spawn, status
from benchmarks.report import main
from benchmarks.snapshot_survival import measure as snapshot_survival
from benchmarks.survival import measure as survival

MEASURES = {
    "budget": budget.measure,
    "heap": heap.measure,
    "status": status.measure,
    "spawn": spawn.measure,
    "fork": fork.measure,
    "snapshot_write": snapshot_write.measure,
    "importing": importing.measure,
    "memkv": memkv.measure,
    "numpy": numpy.measure,
    "survival": survival.measure,
    "snapshot_survival": snapshot_survival.measure,
}

sys.exit(main(MEASURES, choose=True))
