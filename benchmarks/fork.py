"""How long this process stands still for a snapshot by fork, beside a bare os.fork() and Redis's own BGSAVE."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from pyperf import perf_counter

from benchmarks import resident
from benchmarks.report import Options, Outcome, Skipped, compare, main
from benchmarks.rounds import alternate
from benchmarks.servers import UnavailableError, redis_server
from memsafe import fork_snapshot, format_size

if TYPE_CHECKING:
    import redis

OURS = "fork_snapshot"
FORK = "os.fork() alone"
WHOLE = "os.fork, _exit, waitpid"
REDIS = "redis BGSAVE, latest_fork_usec"


def _fork() -> tuple[float, float]:
    """Return the seconds that fork took in this process, and those until the child was gone."""
    began_s = perf_counter()
    pid = os.fork()
    if not pid:
        os._exit(0)
    forked_s = perf_counter()
    os.waitpid(pid, 0)
    return forked_s - began_s, perf_counter() - began_s


def work(size_bytes: int, rounds: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory(prefix="memsafe-bench-") as folder, resident.held(size_bytes):

        def snapshot(_loops: int) -> float:
            return fork_snapshot(Path(folder, "image"), lambda out: out.write(b"x")).wait().pause_s

        contenders = {OURS: snapshot, FORK: lambda _loops: _fork()[0], WHOLE: lambda _loops: _fork()[1]}
        return alternate(contenders, rounds=rounds)


def redis_pauses(size_bytes: int, rounds: int) -> list[float]:
    """Return the fork pauses, in seconds, that Redis reports while it holds *size_bytes* of values."""
    import redis

    value_bytes = 16 << 10
    with redis_server("--enable-debug-command", "yes") as port, redis.Redis(port=port, socket_timeout=120) as client:
        client.execute_command("DEBUG", "POPULATE", size_bytes // value_bytes, "key", value_bytes)
        server = psutil.Process(client.info("server")["process_id"])
        return [_bgsave_pause_s(client, server) for _ in range(rounds)]


def _bgsave_pause_s(client: redis.Redis, server: psutil.Process) -> float:
    client.bgsave()
    pause_s = float(client.info("stats")["latest_fork_usec"]) / 1e6
    for child in server.children():
        with suppress(psutil.NoSuchProcess):
            child.kill()  # the file is not what is measured
    while client.info("persistence")["rdb_bgsave_in_progress"]:
        pass
    return pause_s


def measure(options: Options) -> Iterator[Outcome]:
    for size_bytes in resident.sizes(options):
        what = f"pause for a snapshot at {format_size(size_bytes)}"
        if (skipped := resident.refusal(what, size_bytes)) is not None:
            yield skipped
            continue
        rounds = options.rounds(30 if size_bytes < resident.GIB else 10)
        seconds = resident.measure_in_worker("benchmarks.fork", size_bytes, rounds)
        for peer in (FORK, WHOLE):
            yield compare(what, peer, seconds[OURS], seconds[peer])
        if size_bytes:
            yield from _beside_redis(what, size_bytes, seconds[OURS])


def _beside_redis(what: str, size_bytes: int, ours: list[float]) -> Iterator[Outcome]:
    try:
        yield compare(what, REDIS, ours, redis_pauses(size_bytes, len(ours)))
    except (UnavailableError, ImportError) as error:
        yield Skipped(f"{what}, beside Redis", str(error))


if __name__ == "__main__":
    if (arguments := resident.worker_arguments()) is not None:
        print(json.dumps(work(*arguments)))
    else:
        sys.exit(main({"fork": measure}))
