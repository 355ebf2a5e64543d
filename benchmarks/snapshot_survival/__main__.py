"""Run cells, print a table, and leave every run as a line of JSON."""

from __future__ import annotations

import argparse
import os
import platform
import sys

from benchmarks import servers
from benchmarks.snapshot_survival import cells, observer, redis, table
from benchmarks.snapshot_survival.program import ENGINES
from benchmarks.survival import command, place


def main() -> int:
    options = _options()
    if options.table:
        print("\n".join(table.markdown(command.read(options.table))))
        return 0
    with command.Record(options.json) as record:
        try:
            _run(options, record)
        except (place.UnavailableError, servers.UnavailableError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted: what was done so far", file=sys.stderr)
    print("\n".join(table.markdown(record.lines)))
    return 0


def _run(options: argparse.Namespace, record: command.Record) -> None:
    chosen = cells.matrix(
        options.engine,
        limits=options.limit,
        shares=options.share,
        rates=options.rate,
        snapshots=options.snapshots,
        runs=options.runs,
    )
    for cell in chosen:
        record.begin(cell)
        for run in observer.run(cell):
            where = {"kernel": platform.release(), "cgroup": place.version(), "load": os.getloadavg()[0]}
            record.add({**where, "cell": cell.as_dict(), **run.as_dict()})


def _options() -> argparse.Namespace:
    engines = [*ENGINES, redis.ENGINE]
    parser = command.parser("benchmarks.snapshot_survival", __doc__, limits=[cells.LIMIT], rates=cells.RATES)
    add = parser.add_argument
    add("--share", nargs="+", type=float, default=list(cells.SHARES), metavar="RATIO", help="of the limit, for data")
    add("--engine", nargs="+", choices=engines, default=engines, help="who takes the snapshots")
    add("--snapshots", type=int, default=20, help="in each run")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
