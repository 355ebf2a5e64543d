"""Run cells here or in the lab; print a table, and leave every run as a line of JSON."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.survival import cells, command, lab, place, table
from benchmarks.survival.cells import BASELINES, LIMITS, RATES, Cell
from benchmarks.survival.command import Record
from benchmarks.survival.program import HOARDS
from benchmarks.survival.responders import RESPONDERS
from tests.kernel.lab import kernels

BASELINE_RUNS = 5


def main() -> int:
    options = _options()
    if options.table:
        print("\n".join(table.markdown(command.read(options.table))))
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


def _highs_here(options: argparse.Namespace) -> list[bool]:
    return options.high if place.version() == 2 else [False]  # v1 has none


def _run_here(chosen: list[Cell], record: Record) -> None:
    for line in lab.lines_here(chosen):
        _take(line, record)


def _take(line: dict[str, Any], record: Record) -> None:
    if line["what"] == "cell":
        record.begin(f"{line['kernel']}: {Cell.from_dict(line['cell'])}")
    else:
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
                _take(line, record)

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


def _options() -> argparse.Namespace:
    parser = command.parser("benchmarks.survival", __doc__, limits=LIMITS, rates=RATES)
    add = parser.add_argument
    add("--lab", nargs="*", metavar="KERNEL", help="in virtual machines: these kernels, or all of tests/kernel")
    add("--responder", nargs="+", choices=RESPONDERS, default=["memsafe", *BASELINES], help="who responds")
    add("--kind", nargs="+", choices=HOARDS, default=["native"], help="how memory is taken")
    add("--high", nargs="+", type=lambda text: text == "on", default=[False, True], metavar="on|off")
    add("--psi", nargs="+", type=lambda text: text == "on", default=[True, False], metavar="on|off")
    add("--baseline-runs", type=int, default=BASELINE_RUNS, help="at most, of cells without memsafe")
    add("--side-by-side", type=int, default=2, metavar="N", help="machines at a time")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
