"""What runs in the cgroup: a cache that a budget knows, and something that takes memory which no budget knows."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from typing import NoReturn, Protocol

import psutil

from benchmarks.survival.cells import Cell
from benchmarks.survival.journal import Ending, Journal, Mark
from benchmarks.survival.place import Place
from memsafe import Budget

_BLOCKS = 128
_MADV_POPULATE_WRITE = 23  # since Linux 5.14

_libc = ctypes.CDLL(None)
# Nothing moves for longer than a monitor takes to slow its polling down as far as it goes; and by chance up to a second
# longer, or a loop that looks each 100 ms would always look at the same moment of a run.
_SETTLE_S, _SETTLE_BY_CHANCE_S = 0.6, 1.0


def _mapped(size_bytes: int) -> mmap.mmap:
    mapped = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Or a page is one of 2 MiB on some machines and of 4 KiB on others.
    mapped.madvise(mmap.MADV_NOHUGEPAGE)
    return mapped


def _address(mapped: mmap.mmap) -> int:
    view = ctypes.c_char.from_buffer(mapped)
    try:
        return ctypes.addressof(view)
    finally:
        del view


def _settle() -> None:
    time.sleep(_SETTLE_S + _SETTLE_BY_CHANCE_S * random.random())


class Cache:
    """Blocks that could be had again, the least recently used first; each a mapping of its own, known to a budget."""

    def __init__(self, budget: Budget, journal: Journal, size_bytes: int) -> None:
        self._budget = budget
        self._journal = journal
        self._block_bytes = size_bytes // _BLOCKS
        self._blocks: OrderedDict[int, mmap.mmap] = OrderedDict()
        for number in range(_BLOCKS):
            budget.charge(self._block_bytes)
            block = _mapped(self._block_bytes)
            ctypes.memset(_address(block), 1, self._block_bytes)
            self._blocks[number] = block
        budget.reclaimer(self.drop)

    def __len__(self) -> int:
        return len(self._blocks)

    def drop(self, need_bytes: int) -> int:
        """Drop the oldest blocks until *need_bytes* are freed; return how much was."""
        self._journal.acted()
        freed_bytes = 0
        while self._blocks and freed_bytes < need_bytes:
            _, block = self._blocks.popitem(last=False)
            block.close()
            self._budget.uncharge(self._block_bytes)
            freed_bytes += self._block_bytes
        self._journal.once(Mark.ROOM_AT)
        return freed_bytes


class Hoard(Protocol):
    """What takes memory behind the budget's back."""

    def grow(self, size_bytes: int) -> None: ...


class NativeHoard:
    """As an extension does it: pages are touched one by one in C, without the GIL."""

    def __init__(self, demand_bytes: int, chunk_bytes: int) -> None:
        self._mapped = _mapped(demand_bytes + chunk_bytes)
        self._next = _address(self._mapped)

    def grow(self, size_bytes: int) -> None:
        ctypes.memset(self._next, 1, size_bytes)
        self._next += size_bytes


class PythonHoard:
    """As Python does it: bytearrays, copied while the GIL is held."""

    def __init__(self, _: int, chunk_bytes: int) -> None:
        self._template = memoryview(bytes(chunk_bytes))
        self._held: list[bytearray] = []

    def grow(self, size_bytes: int) -> None:
        self._held.append(bytearray(self._template[:size_bytes]))


class PopulatedHoard:
    """One request for all of it: the kernel finds every page before the call returns."""

    def __init__(self, demand_bytes: int, _: int) -> None:
        self._mapped = _mapped(demand_bytes)

    def grow(self, _: int) -> None:
        # Not by mmap.madvise(), which holds the GIL meanwhile.
        _libc.madvise(ctypes.c_void_p(_address(self._mapped)), ctypes.c_size_t(len(self._mapped)), _MADV_POPULATE_WRITE)


HOARDS: dict[str, Callable[[int, int], Hoard]] = {
    "native": NativeHoard,
    "python": PythonHoard,
    "at once": PopulatedHoard,
}


class Program:
    """What a responder may know and do.

    Attributes:
        may_go_on: Cleared by a responder that holds the program up.
    """

    def __init__(self, cell: Cell, place: Place, journal: Journal) -> None:
        self.cell = cell
        self.journal = journal
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self._process = psutil.Process()
        self._before_bytes = self._process.memory_info().rss
        self.budget = Budget(cell.limit_bytes, name="program")
        self.cache = Cache(self.budget, journal, cell.cache_bytes)
        self._place = place

    def resident_bytes(self) -> int:
        """Return what the process has made resident since it entered the cgroup: what others can know of its usage."""
        return int(self._process.memory_info().rss) - self._before_bytes

    def give_up(self) -> NoReturn:
        """End at once, as a supervisor that restarts the program would have it."""
        self.journal[Mark.DONE] = Ending.GAVE_UP
        os._exit(0)

    def take(self) -> None:
        """Take memory until the demand is met."""
        cell, journal = self.cell, self.journal
        _settle()
        left_bytes = self._place.left_bytes()
        demand_bytes = cell.demand_bytes(left_bytes)
        hoard = HOARDS[cell.kind](demand_bytes, cell.chunk_bytes)
        journal[Mark.LEFT], journal[Mark.DEMAND] = left_bytes, demand_bytes
        if cell.rate is not None:
            self._grow(hoard, 0, left_bytes - cell.pace_from_bytes, None)
            _settle()
        self._grow(hoard, journal[Mark.TAKEN], demand_bytes, cell.rate)

    def _grow(self, hoard: Hoard, taken_bytes: int, until_bytes: int, rate: int | None) -> None:
        chunk_bytes, took = self.cell.chunk_bytes, self.journal.took
        due_s = time.monotonic()
        while taken_bytes < until_bytes:
            self.may_go_on.wait()
            hoard.grow(chunk_bytes)
            taken_bytes += chunk_bytes
            took(taken_bytes)
            if rate is not None:
                due_s = max(due_s + chunk_bytes / rate, time.monotonic())
                time.sleep(max(0.0, due_s - time.monotonic()))


def live(cell: Cell, place: Place, journal: Journal) -> NoReturn:
    """Be the program of *cell* in a forked child; never returns."""
    from benchmarks.survival.responders import RESPONDERS

    try:
        place.enter()
        random.seed()  # a forked child has its parent's
        program = Program(cell, place, journal)
        with RESPONDERS[cell.responder](program):
            program.take()
            journal[Mark.DONE] = Ending.SURVIVED
            os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
