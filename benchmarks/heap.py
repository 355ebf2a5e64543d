"""What guard_python_heap() costs code that allocates, beside plain Python and beside tracemalloc on the same.

Hooks are never removed, so each contender has a process of its own; they run one after another, round by round, and
anew in new processes a few times, because the layout of a process's memory is a matter of luck too. Counted is the
processor's time, not the clock's: what is compared is work.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from time import process_time

from benchmarks.report import Options, Outcome, compare, main
from benchmarks.rounds import alternate

TARGET = "ratio ≤ 1.03"
LIMIT = "64 GiB"
GENERATIONS = 5

DOCUMENT = {f"key {n}": [n, n / 3, None, {"nested": "text " * (n % 20)}] for n in range(2000)}


def dump_and_load_json() -> object:
    return json.loads(json.dumps(DOCUMENT))


def churn_containers() -> object:
    table = {}
    for n in range(20_000):
        table[n] = [n, n + 1]
        if n >= 5_000:
            del table[n - 5_000]
    return len(table)


def build_strings() -> object:
    parts = [f"{n:>8}{n:x}" for n in range(5_000)]
    text = ""
    for part in parts:
        text += part
    return len(",".join(parts).replace("1", "one").split(",")) + len(text)


class Point:
    def __init__(self, x: float, y: float) -> None:
        self.x, self.y = x, y


def create_objects() -> object:
    points = [Point(n / 2, n / 3) for n in range(10_000)]
    return sum(Point(point.y, point.x).x for point in points)


def allocate_blocks() -> object:
    return sum(len(bytes(600 + n % 8000)) for n in range(20_000))


def query_sqlite() -> object:
    with sqlite3.connect(":memory:") as db:
        db.execute("create table words (id integer primary key, word text)")
        db.executemany("insert into words (word) values (?)", ((f"word {n % 977}",) for n in range(5_000)))
        rows = db.execute("select word, count(*) from words group by word order by 2 desc, 1").fetchall()
    db.close()
    return len(rows)


LOOPS: dict[str, Callable[[], object]] = {
    "json, dumps and loads": dump_and_load_json,
    "dicts and lists, made and dropped": churn_containers,
    "strings, built and split": build_strings,
    "10,000 objects": create_objects,
    "bytes of 0.6 to 8.6 KB, made and dropped": allocate_blocks,
    "sqlite, inserted and grouped": query_sqlite,
}


class Worker:
    """A process that runs loops when asked, in one way of allocating."""

    def __init__(self, how: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )

    def run(self, name: str, loops: int) -> float:
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps([name, loops]), file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def work() -> None:
    for line in sys.stdin:
        name, loops = json.loads(line)
        loop = LOOPS[name]
        begin = process_time()
        for _ in range(loops):
            loop()
        print(process_time() - begin, flush=True)


def work_as(how: str) -> None:
    import memsafe

    # In all of them, entered or not: compared is the guard, not more modules, which move blocks to other places.
    guard = memsafe.guard_python_heap(LIMIT)
    if how == "plain":
        work()
    elif how == "tracemalloc":
        import tracemalloc

        tracemalloc.start()
        work()
    else:
        with guard:
            work()


WAYS = ("plain", "guarded", "tracemalloc")


def measure(options: Options) -> Iterator[Outcome]:
    seconds: dict[str, dict[str, list[float]]] = {name: {way: [] for way in WAYS} for name in LOOPS}
    for _ in range(1 if options.quick else GENERATIONS):
        with ExitStack() as stack:
            workers = {way: stack.enter_context(Worker(way)) for way in WAYS}
            for name in LOOPS:
                contenders = {way: partial(workers[way].run, name) for way in WAYS}
                took = alternate(contenders, rounds=options.rounds(15), at_least_s=0.01 if options.quick else 0.05)
                for way in WAYS:
                    seconds[name][way] += took[way]
    for name, took in seconds.items():
        yield compare(f"heap guarded: {name}", "plain Python", took["guarded"], took["plain"], target=TARGET)
    for name, took in seconds.items():
        yield compare(f"heap guarded: {name}", "under tracemalloc", took["guarded"], took["tracemalloc"])


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in WAYS:
        work_as(sys.argv[1])
    else:
        sys.exit(main({"heap": measure}))
