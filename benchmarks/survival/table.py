"""Tables of the lines that runs leave."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from benchmarks.survival.cells import Cell
from benchmarks.survival.plain import Plain
from memsafe import format_size

CellT = TypeVar("CellT", bound=Plain)

MIB = 1024**2

_PLACE_KEYS = ("kernel", "cgroup", "psi")
_HEADINGS = ("limit", "memory.high", "taken by", "pace", "responder", "survived", "else", "lead ms", "lead MiB", "by")
_RIGHT = {"survived", "lead ms", "lead MiB"}


def markdown(lines: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table for each place in which cells were run: kernel, cgroup version, PSI."""
    runs_only = (line for line in lines if line["what"] == "run")
    for (kernel, version, has_psi), cells in by_place(runs_only, _PLACE_KEYS, Cell).items():
        title = f"Linux {kernel}, cgroup v{version}, PSI {'on' if has_psi else 'off'}"
        yield from section(title, _HEADINGS, _RIGHT, (_row(cell, runs) for cell, runs in cells.items()))


def by_place(
    lines: Iterable[dict[str, Any]], keys: Sequence[str], kind: type[CellT]
) -> dict[tuple[Any, ...], dict[CellT, list[dict[str, Any]]]]:
    """Return runs by the values of *keys*, which say where they were, and there by their cell of *kind*."""
    places: dict[tuple[Any, ...], dict[CellT, list[dict[str, Any]]]] = {}
    for line in lines:
        # However often it was to be run: what was added later belongs to it.
        cell = kind.from_dict({**line["cell"], "runs": 0})
        places.setdefault(tuple(line[key] for key in keys), {}).setdefault(cell, []).append(line)
    return places


def section(
    title: str, headings: Sequence[str], right: Collection[str], rows: Iterable[Sequence[str]]
) -> Iterator[str]:
    """Yield the lines of a table under its title; the columns in *right* are set to the right."""
    yield f"### {title}"
    yield ""
    yield f"| {' | '.join(headings)} |"
    yield f"|{'|'.join('---:' if heading in right else '---' for heading in headings)}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def outcomes_of(runs: list[dict[str, Any]]) -> tuple[str, str]:
    """Return how many survived, and what became of the others."""
    outcomes = Counter(run["outcome"] for run in runs)
    survived = outcomes.pop("survived", 0)
    others = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    return f"{survived} of {len(runs)}", others


def _row(cell: Cell, runs: list[dict[str, Any]]) -> tuple[str, ...]:
    sources = Counter(run["source"] for run in runs if run["source"])
    return (
        format_size(cell.limit_bytes),
        format_size(cell.tight_bytes) if cell.has_high else "",
        cell.kind,
        "full" if cell.rate is None else f"{format_size(cell.rate)}/s",
        cell.responder,
        *outcomes_of(runs),
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
