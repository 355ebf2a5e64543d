"""How long this process stands still for a snapshot by fork, beside a bare os.fork() and Redis's own BGSAVE.

The same bytes are held in pages of 4 KiB, in huge pages, and kept out of the image by MADV_DONTFORK.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
from pyperf import perf_counter

from benchmarks import resident
from benchmarks.report import Options, Outcome, Skipped, compare, main
from benchmarks.rounds import Loop, alternate
from benchmarks.servers import UnavailableError, program, redis_server
from memsafe import fork_snapshot, format_size

OURS = "4 KiB pages"
HUGE = "huge pages"
KEPT_OUT = "MADV_DONTFORK"
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


def sizes(options: Options) -> tuple[int, ...]:
    return (resident.GIB // 4,) if options.quick else (resident.GIB // 4, resident.GIB, 4 * resident.GIB)


def work(size_bytes: int, rounds: int) -> dict[str, list[float]]:
    with ExitStack() as cleanup:
        folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="memsafe-bench-"))
        small = cleanup.enter_context(resident.held(size_bytes))
        huge = cleanup.enter_context(resident.held(size_bytes, mmap.MADV_HUGEPAGE))

        def pause_with(*forked: mmap.mmap) -> float:
            for memory in (small, huge):
                memory.madvise(mmap.MADV_DOFORK if memory in forked else mmap.MADV_DONTFORK)
            job = fork_snapshot(Path(folder, "image"), lambda out: out.write(b"x"), max_copy="256 MiB")
            return job.wait().pause_s

        def fork_alone() -> tuple[float, float]:
            small.madvise(mmap.MADV_DOFORK)
            huge.madvise(mmap.MADV_DONTFORK)
            return _fork()

        contenders: dict[str, Loop] = {
            OURS: lambda _loops: pause_with(small),
            HUGE: lambda _loops: pause_with(huge),
            KEPT_OUT: lambda _loops: pause_with(),
            FORK: lambda _loops: fork_alone()[0],
            WHOLE: lambda _loops: fork_alone()[1],
        }
        if why_no_redis() is None:
            contenders[REDIS] = cleanup.enter_context(redis_holding(size_bytes))
        return alternate(contenders, rounds=rounds)


def why_no_redis() -> str | None:
    if find_spec("redis") is None:
        return "Python's redis client is not installed"
    try:
        program("redis-server")
    except UnavailableError as error:
        return str(error)
    return None


@contextmanager
def redis_holding(size_bytes: int) -> Iterator[Loop]:
    """Run a Redis that holds *size_bytes* of values; yield what makes it save and returns the pause it reports."""
    import redis

    value_bytes = 16 << 10
    with redis_server("--enable-debug-command", "yes") as port, redis.Redis(port=port, socket_timeout=120) as client:
        client.execute_command("DEBUG", "POPULATE", size_bytes // value_bytes, "key", value_bytes)
        server = psutil.Process(client.info("server")["process_id"])

        def bgsave(_loops: int) -> float:
            client.bgsave()
            pause_s = float(client.info("stats")["latest_fork_usec"]) / 1e6
            for child in server.children():
                with suppress(psutil.NoSuchProcess):
                    child.kill()  # the file is not what is measured
            while client.info("persistence")["rdb_bgsave_in_progress"]:
                pass
            return pause_s

        yield bgsave


def measure(options: Options) -> Iterator[Outcome]:
    for size_bytes in sizes(options):
        what = f"pause for a snapshot at {format_size(size_bytes)}"
        if (skipped := resident.refusal(what, size_bytes, processes=3)) is not None:
            yield skipped
            continue
        rounds = options.rounds(10 if size_bytes > resident.GIB else 40)
        seconds = resident.measure_in_worker("benchmarks.fork", size_bytes, rounds)
        for ours in (OURS, HUGE, KEPT_OUT):
            for peer in (FORK, WHOLE, REDIS) if ours == OURS else (REDIS,):
                if peer in seconds:
                    yield compare(f"{what}, {ours}", peer, seconds[ours], seconds[peer])
    if (why := why_no_redis()) is not None:
        yield Skipped("pause for a snapshot, beside Redis", why)


if __name__ == "__main__":
    if (arguments := resident.worker_arguments()) is not None:
        print(json.dumps(work(*arguments)))
    else:
        sys.exit(main({"fork": measure}))
