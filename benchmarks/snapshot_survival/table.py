"""A table of the lines that runs leave."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.snapshot_survival.cells import Cell
from benchmarks.survival.table import by_place, outcomes_of, section
from memsafe import format_size

_COUNTS = ("complete", "ended", "shot", "refused", "failed", "oom_kills")
_HEADINGS = (
    "data",
    "limit",
    "rewritten at",
    "engine",
    "parent survived",
    "else",
    *(count.replace("oom_kills", "OOM kills") for count in _COUNTS),
)
_RIGHT = {"parent survived", *_HEADINGS[-len(_COUNTS) :]}


def markdown(lines: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table for each place in which cells were run: kernel and cgroup version."""
    for (kernel, version), cells in by_place(lines, ("kernel", "cgroup"), Cell).items():
        loads = [line["load"] for runs in cells.values() for line in runs]
        title = f"Linux {kernel}, cgroup v{version}, a load of {min(loads):.0f} to {max(loads):.0f}"
        yield from section(title, _HEADINGS, _RIGHT, (_row(cell, runs) for cell, runs in cells.items()))


def _row(cell: Cell, runs: list[dict[str, Any]]) -> tuple[str, ...]:
    return (
        format_size(cell.data_bytes),
        format_size(cell.limit_bytes),
        cell.pace,
        cell.engine,
        *outcomes_of(runs),
        *(str(sum(run[count] for run in runs)) for count in _COUNTS),
    )
