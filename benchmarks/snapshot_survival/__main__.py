"""Run cells, print a table, and leave every run as a line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import servers
from benchmarks.snapshot_survival import cells, observer, redis, table
from benchmarks.snapshot_survival.program import ENGINES
from benchmarks.survival import place
from memsafe import parse_size


def main() -> int:
    options = _options()
    if options.table:
        lines = (json.loads(line) for path in options.table for line in path.read_text().splitlines())
        print("\n".join(table.markdown(lines)))
        return 0
    done = []
    try:
        for line in _lines(options):
            done.append(line)
            if options.json is not None:
                with options.json.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    except (place.UnavailableError, servers.UnavailableError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was done so far", file=sys.stderr)
    print("\n".join(table.markdown(done)))
    return 0


def _lines(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    chosen = cells.matrix(
        options.engine,
        limits=options.limit,
        shares=options.share,
        rates=options.rate,
        snapshots=options.snapshots,
        runs=options.runs,
    )
    for cell in chosen:
        print(cell, file=sys.stderr, flush=True)
        for run in observer.run(cell):
            where = {"kernel": platform.release(), "cgroup": place.version(), "load": os.getloadavg()[0]}
            yield {**where, "cell": cell.as_dict(), **run.as_dict()}


def _rate(text: str) -> int | None:
    return None if text == "full" else parse_size(text)


def _options() -> argparse.Namespace:
    engines = [*ENGINES, redis.ENGINE]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.snapshot_survival", description=__doc__)
    add = parser.add_argument
    add("--limit", nargs="+", type=parse_size, default=[cells.LIMIT], metavar="SIZE", help="limits of the cgroup")
    add("--share", nargs="+", type=float, default=list(cells.SHARES), metavar="RATIO", help="of the limit, for data")
    add("--rate", nargs="+", type=_rate, default=list(cells.RATES), metavar="SIZE", help="bytes a second, or full")
    add("--engine", nargs="+", choices=engines, default=engines, help="who takes the snapshots")
    add("--snapshots", type=int, default=20, help="in each run")
    add("--runs", type=int, default=20, help="of each cell")
    add("--json", type=Path, metavar="FILE", help="add every run to FILE as it comes")
    add("--table", nargs="+", type=Path, metavar="FILE", help="only print the table of such files")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
