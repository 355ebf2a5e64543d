"""A table of the lines that runs leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks.snapshot_survival.cells import Cell
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
    places: dict[tuple[Any, ...], dict[Cell, list[dict[str, Any]]]] = {}
    for line in lines:
        place = places.setdefault((line["kernel"], line["cgroup"]), {})
        place.setdefault(replace(Cell.from_dict(line["cell"]), runs=0), []).append(line)
    for (kernel, version), cells in places.items():
        loads = [line["load"] for runs in cells.values() for line in runs]
        yield f"### Linux {kernel}, cgroup v{version}, a load of {min(loads):.0f} to {max(loads):.0f}"
        yield ""
        yield f"| {' | '.join(_HEADINGS)} |"
        yield f"|{'|'.join('---:' if heading in _RIGHT else '---' for heading in _HEADINGS)}|"
        for cell, runs in cells.items():
            yield f"| {' | '.join(_row(cell, runs))} |"
        yield ""


def _row(cell: Cell, runs: list[dict[str, Any]]) -> tuple[str, ...]:
    outcomes = Counter(run["outcome"] for run in runs)
    survived = outcomes.pop("survived", 0)
    return (
        format_size(cell.data_bytes),
        format_size(cell.limit_bytes),
        cell.pace,
        cell.engine,
        f"{survived} of {len(runs)}",
        ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()),
        *(str(sum(run[count] for run in runs)) for count in _COUNTS),
    )
