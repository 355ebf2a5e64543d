"""memkv beside redis-server, driven by redis-benchmark: requests a second with 50 clients, one at a time and 16."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.report import Options, Outcome, Skipped, compare, main
from benchmarks.servers import UnavailableError, memkv_server, program, redis_server

CLIENTS = 50
# By (pipeline, test).
TARGETS = {(1, "SET"): "≥ 20,000/s", (1, "GET"): "≥ 30,000/s", (16, "SET"): "≥ 60,000/s", (16, "GET"): "≥ 60,000/s"}


def requests_per_s(port: int, pipeline: int, requests: int) -> dict[str, float]:
    """Return what redis-benchmark measures, by test."""
    command = [program("redis-benchmark"), "-p", str(port), "-t", "set,get", "-c", str(CLIENTS)]
    command += ["-P", str(pipeline), "-n", str(requests), "--csv"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    return {row["test"]: float(row["rps"]) for row in csv.DictReader(printed.splitlines())}


def measure(options: Options) -> Iterator[Outcome]:
    try:
        with memkv_server(limit="512 MiB") as ours, redis_server() as peer:
            for pipeline in (1, 16):
                yield from _beside_redis(ours, peer, pipeline, options)
    except UnavailableError as error:
        yield Skipped("memkv beside redis-server", str(error))


def _beside_redis(ours: int, peer: int, pipeline: int, options: Options) -> Iterator[Outcome]:
    requests = (5_000 if options.quick else 100_000) * (4 if pipeline > 1 else 1)
    measured: dict[int, list[dict[str, float]]] = {ours: [], peer: []}
    for turn in range(options.rounds(5)):
        for port in (ours, peer) if turn % 2 else (peer, ours):
            measured[port].append(requests_per_s(port, pipeline, requests))
    for test in measured[peer][0]:
        what = f"memkv {test}, {CLIENTS} clients" + (f", -P {pipeline}" if pipeline > 1 else "")
        rates = {port: [run[test] for run in runs] for port, runs in measured.items()}
        target = TARGETS.get((pipeline, test), "")
        yield compare(what, "redis-server", rates[ours], rates[peer], unit="/s", target=target)


if __name__ == "__main__":
    sys.exit(main({"memkv": measure}))
