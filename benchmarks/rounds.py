"""Alternating rounds: every contender once a round, in another order each time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from random import Random
from timeit import Timer
from typing import Any

from pyperf import perf_counter

Loop = Callable[[int], float]
"""Does something so many times and returns the seconds that it took."""


def statement(text: str, names: Mapping[str, Any]) -> Loop:
    """Return a loop around the statement *text*, without the price of a call."""
    return Timer(text, timer=perf_counter, globals=dict(names)).timeit


def call(function: Callable[[], object]) -> Loop:
    """Return a loop around a call of *function*."""
    return statement("function()", {"function": function})


def alternate(contenders: Mapping[str, Loop], *, rounds: int, at_least_s: float = 0.0) -> dict[str, list[float]]:
    """Return the seconds that one run of each contender took, round by round.

    Args:
        contenders: By name.
        rounds: How many; one more is run first and not counted.
        at_least_s: Each contender's loops are doubled until a round of it lasts so long.
    """
    loops = {name: _calibrated(loop, at_least_s) for name, loop in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names, shuffle = list(contenders), Random(0)
    with _without_gc():
        for turn in range(rounds + 1):
            shuffle.shuffle(names)  # in a fixed order, each would always pay for what the same other one left behind
            for name in names:
                took_s = contenders[name](loops[name]) / loops[name]
                if turn:
                    seconds[name].append(took_s)
    return seconds


def _calibrated(loop: Loop, at_least_s: float) -> int:
    loops = 1
    while at_least_s and loop(loops) < at_least_s:
        loops *= 2
    return loops


@contextmanager
def _without_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
