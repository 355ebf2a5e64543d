"""The price of memory_status(), beside psutil's two calls that tell a part of the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import psutil

from benchmarks.report import Options, Outcome, compare, main
from benchmarks.rounds import alternate, call
from memsafe import memory_status


def measure(options: Options) -> Iterator[Outcome]:
    peers: dict[str, Callable[[], object]] = {
        "psutil.virtual_memory()": psutil.virtual_memory,
        "psutil memory_full_info()": psutil.Process().memory_full_info,
    }
    contenders = {name: call(function) for name, function in {"ours": memory_status, **peers}.items()}
    seconds = alternate(contenders, rounds=options.rounds(30), at_least_s=0.005 if options.quick else 0.02)
    for name in peers:
        yield compare("memory_status()", name, seconds["ours"], seconds[name])


if __name__ == "__main__":
    sys.exit(main({"status": measure}))
