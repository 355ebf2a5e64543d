"""Run cells here or in the lab; print a table, and leave every run as a line of JSON."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from benchmarks.survival import cells, lab, place, table
from benchmarks.survival.cells import BASELINES, LIMITS, RATES, Cell
from benchmarks.survival.program import HOARDS
from benchmarks.survival.responders import RESPONDERS
from memsafe import parse_size
from tests.kernel.lab import kernels

BASELINE_RUNS = 5


def main() -> int:
    options = _options()
    if options.table:
        lines = (json.loads(line) for path in options.table for line in path.read_text().splitlines())
        print("\n".join(table.markdown(lines)))
        return 0
    with Record(options.json) as record:
        try:
            if options.lab is None:
                _run_here(_chosen(options, highs=_highs_here(options)), record)
            else:
                _run_in_the_lab(options, record)
        except (place.UnavailableError, kernels.UnavailableError, lab.BrokenError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
    print("\n".join(table.markdown(record.lines)))
    return 0


class Record:
    """Every run: kept, and written down as it comes; from any thread."""

    def __init__(self, path: Path | None) -> None:
        self.lines: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._path = path
        self._file: TextIO | None = None

    def __enter__(self) -> Record:
        if self._path is not None:
            self._file = self._path.open("a")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, line: dict[str, Any]) -> None:
        with self._lock:
            if line["what"] == "cell":
                print(f"{line['kernel']}: {Cell.from_dict(line['cell'])}", file=sys.stderr, flush=True)
                return
            self.lines.append(line)
            if self._file is not None:
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()


def _highs_here(options: argparse.Namespace) -> list[bool]:
    return options.high if place.version() == 2 else [False]  # v1 has none


def _run_here(chosen: list[Cell], record: Record) -> None:
    for line in lab.lines_here(chosen):
        record.add(line)


def _run_in_the_lab(options: argparse.Namespace, record: Record) -> None:
    """Run the kernels side by side, each with PSI on and then off."""
    names = options.lab or kernels.names()

    def run(kernel: str) -> None:
        for psi in options.psi:
            # Whether stalls are told changes nothing for who does not listen: the others run once.
            responders = (
                options.responder if psi else [each for each in options.responder if each.startswith("memsafe")]
            )
            chosen = _chosen(options, highs=options.high, responders=responders)
            for line in lab.lines(kernel, chosen, psi=psi, show=lambda _: None):
                record.add(line)

    with ThreadPoolExecutor(options.side_by_side) as pool:
        for future in [pool.submit(run, name) for name in names]:
            future.result()


def _chosen(options: argparse.Namespace, *, highs: list[bool], responders: list[str] | None = None) -> list[Cell]:
    def runs(responder: str) -> int:
        return options.runs if responder.startswith("memsafe") else min(options.runs, options.baseline_runs)

    return [
        cell
        for responder in (options.responder if responders is None else responders)
        for cell in cells.matrix(
            [responder],
            limits=options.limit,
            rates=options.rate,
            highs=highs,
            kinds=options.kind,
            runs=runs(responder),
        )
    ]


def _rate(text: str) -> int | None:
    return None if text == "full" else parse_size(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.survival", description=__doc__)
    add = parser.add_argument
    add("--lab", nargs="*", metavar="KERNEL", help="in virtual machines: these kernels, or all of tests/kernel")
    add("--limit", nargs="+", type=parse_size, default=list(LIMITS), metavar="SIZE", help="limits of the cgroup")
    add("--rate", nargs="+", type=_rate, default=list(RATES), metavar="SIZE", help="bytes a second, or full")
    add("--responder", nargs="+", choices=RESPONDERS, default=["memsafe", *BASELINES], help="who responds")
    add("--kind", nargs="+", choices=HOARDS, default=["native"], help="how memory is taken")
    add("--high", nargs="+", type=lambda text: text == "on", default=[False, True], metavar="on|off")
    add("--psi", nargs="+", type=lambda text: text == "on", default=[True, False], metavar="on|off")
    add("--runs", type=int, default=20, help="of each cell")
    add("--baseline-runs", type=int, default=BASELINE_RUNS, help="at most, of cells without memsafe")
    add("--side-by-side", type=int, default=2, metavar="N", help="machines at a time")
    add("--json", type=Path, metavar="FILE", help="add every run to FILE as it comes")
    add("--table", nargs="+", type=Path, metavar="FILE", help="only print the tables of such files")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
