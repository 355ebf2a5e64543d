"""What the commands that count survivors share: options, and runs that are kept as lines of JSON."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from memsafe import parse_size


def parser(
    name: str, about: str | None, *, limits: Iterable[int], rates: Iterable[int | None]
) -> argparse.ArgumentParser:
    """Return a parser of the options that all of them have: limit, rate, runs, json, table.

    Args:
        name: The module that is run.
        about: What it does.
        limits: Of the cgroup, in bytes, unless others are asked for.
        rates: In bytes per second, likewise; None: as fast as it goes.
    """
    made = argparse.ArgumentParser(prog=f"python -m {name}", description=about)
    add = made.add_argument
    add("--limit", nargs="+", type=parse_size, default=list(limits), metavar="SIZE", help="limits of the cgroup")
    add("--rate", nargs="+", type=_rate, default=list(rates), metavar="SIZE", help="bytes a second, or full")
    add("--runs", type=int, default=20, help="of each cell")
    add("--json", type=Path, metavar="FILE", help="add every run to FILE as it comes")
    add("--table", nargs="+", type=Path, metavar="FILE", help="only print the tables of such files")
    return made


def _rate(text: str) -> int | None:
    return None if text == "full" else parse_size(text)


def read(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yield the runs in files that a Record wrote."""
    return (json.loads(line) for path in paths for line in path.read_text().splitlines())


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

    def begin(self, what: object) -> None:
        """Say what is being run."""
        with self._lock:
            print(what, file=sys.stderr, flush=True)

    def add(self, line: dict[str, Any]) -> None:
        """Keep a run."""
        with self._lock:
            self.lines.append(line)
            if self._file is not None:
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()
