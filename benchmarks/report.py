"""What was measured, as data, as a table for people and as JSON; and the command line that all modules share."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}


@dataclass(frozen=True)
class Options:
    """How thorough to be: ``quick`` is for CI, which wants to see that everything runs."""

    quick: bool = False

    def rounds(self, thorough: int) -> int:
        return max(3, thorough // 10) if self.quick else thorough


@dataclass(frozen=True)
class Result:
    """One figure beside its peer's, each the median over the rounds.

    Attributes:
        ours, peer: In seconds, or per second where ``unit`` is "/s", else a number of what it
            says: "B".
        target: What the project wants, in words; "" where nothing is set. Nothing is judged by it.
    """

    what: str
    against: str
    ours: float
    peer: float
    unit: str = "s"
    target: str = ""
    rounds: int = 0

    @property
    def ratio(self) -> float:
        return self.ours / self.peer if self.peer else float("inf")


@dataclass(frozen=True)
class Skipped:
    what: str
    why: str


Outcome = Result | Skipped
Measure = Callable[[Options], Iterator[Outcome]]


def compare(
    what: str, against: str, ours: list[float], peer: list[float], *, unit: str = "s", target: str = ""
) -> Result:
    """Return the medians of *ours* and *peer* as a result."""
    return Result(what, against, statistics.median(ours), statistics.median(peer), unit, target, len(ours))


def figure(value: float, unit: str) -> str:
    if unit == "/s":
        return f"{value:,.0f}/s"
    if unit != "s":
        return f"{value:,.0f} {unit}"
    name, size = next(((name, size) for name, size in UNITS.items() if abs(value) >= size), ("ns", 1e-9))
    scaled = value / size
    return f"{scaled:.0f} {name}" if scaled >= 100 else f"{scaled:.3g} {name}"


HEADINGS = ("what", "memsafe", "peer", "peer's", "ratio", "target")


def _row(result: Result) -> tuple[str, ...]:
    return (
        result.what,
        figure(result.ours, result.unit),
        result.against,
        figure(result.peer, result.unit),
        f"{result.ratio:.3g}",
        result.target,
    )


def show(outcomes: list[Outcome]) -> None:
    """Print one table, by rich where it is installed, and what was skipped below it."""
    rows = [_row(outcome) for outcome in outcomes if isinstance(outcome, Result)]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _show_plainly(rows)
    else:
        table = Table(*HEADINGS)
        for column, heading in zip(table.columns, HEADINGS, strict=True):
            column.justify = "right" if heading in {"memsafe", "peer's", "ratio"} else "left"
        for row in rows:
            table.add_row(*row)
        console = Console()
        # Rows are not to be folded where there is no terminal to fold them for.
        Console(width=None if console.is_terminal else 160).print(table)
    for outcome in outcomes:
        if isinstance(outcome, Skipped):
            print(f"skipped: {outcome.what}: {outcome.why}")


def _show_plainly(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in [HEADINGS, *rows]) for column in range(len(HEADINGS))]
    for row in [HEADINGS, tuple("-" * width for width in widths), *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def save(outcomes: list[Outcome], path: Path) -> None:
    """Write everything as JSON, with the machine it was measured on."""
    machine = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "processors": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }
    results = [{**asdict(o), "ratio": o.ratio} for o in outcomes if isinstance(o, Result)]
    skipped = [asdict(o) for o in outcomes if isinstance(o, Skipped)]
    path.write_text(json.dumps({"machine": machine, "results": results, "skipped": skipped}, indent=2) + "\n")


def run(measures: Iterable[tuple[str, Measure]], options: Options) -> list[Outcome]:
    """Measure all; one that cannot run is skipped by name and the next goes on."""
    outcomes: list[Outcome] = []
    for name, measure in measures:
        print(f"measuring: {name}", file=sys.stderr, flush=True)
        try:
            outcomes += measure(options)
        except ImportError as error:
            outcomes.append(Skipped(name, f"{error}"))
    return outcomes


def main(measures: Mapping[str, Measure], *, choose: bool = False) -> int:
    """Run *measures* as the command line says; with *choose*, it may name some of them."""
    parser = argparse.ArgumentParser(description="Measure memsafe, each figure beside a peer in the same run.")
    parser.add_argument("--quick", action="store_true", help="few rounds and small sizes: does everything run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    if choose:
        parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these: {', '.join(measures)}")
    arguments = parser.parse_args()
    names = (arguments.names if choose else None) or list(measures)
    if unknown := sorted(set(names) - set(measures)):
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(measures)}")
    outcomes = run([(name, measures[name]) for name in names], Options(quick=arguments.quick))
    show(outcomes)
    if arguments.json:
        save(outcomes, arguments.json)
    return 0
