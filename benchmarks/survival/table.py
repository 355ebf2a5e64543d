"""Tables of the lines that runs leave."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks.survival.cells import Cell
from memsafe import format_size

MIB = 1024**2

_PLACE_KEYS = ("kernel", "cgroup", "psi")
_HEADINGS = ("limit", "memory.high", "taken by", "pace", "responder", "survived", "else", "lead ms", "lead MiB", "by")


def markdown(lines: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table for each place in which cells were run: kernel, cgroup version, PSI."""
    places: dict[tuple[Any, ...], dict[Cell, list[dict[str, Any]]]] = {}
    for line in lines:
        if line["what"] == "run":
            place = places.setdefault(tuple(line[key] for key in _PLACE_KEYS), {})
            place.setdefault(replace(Cell.from_dict(line["cell"]), runs=0), []).append(line)
    for (kernel, version, has_psi), cells in places.items():
        yield f"### Linux {kernel}, cgroup v{version}, PSI {'on' if has_psi else 'off'}"
        yield ""
        yield f"| {' | '.join(_HEADINGS)} |"
        yield f"|{'|'.join('---:' if heading.startswith(('survived', 'lead')) else '---' for heading in _HEADINGS)}|"
        for cell, runs in cells.items():
            yield f"| {' | '.join(_row(cell, runs))} |"
        yield ""


def _row(cell: Cell, runs: list[dict[str, Any]]) -> tuple[str, ...]:
    outcomes = Counter(run["outcome"] for run in runs)
    survived = outcomes.pop("survived", 0)
    sources = Counter(run["source"] for run in runs if run["source"])
    return (
        format_size(cell.limit_bytes),
        format_size(cell.tight_bytes) if cell.has_high else "",
        cell.kind,
        "full" if cell.rate is None else f"{format_size(cell.rate)}/s",
        cell.responder,
        f"{survived} of {len(runs)}",
        ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()),
        _spread([run["lead_ms"] for run in runs if run["lead_ms"] is not None]),
        _spread([run["lead_bytes"] / MIB for run in runs if run["lead_bytes"] is not None]),
        ", ".join(f"{source} {count}" for source, count in sources.most_common(2)),
    )


def _spread(values: list[float]) -> str:
    """The median, and the least."""
    if not values:
        return ""
    return f"{_figure(statistics.median(values))} ({_figure(min(values))})"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"
