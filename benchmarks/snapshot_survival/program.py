"""What runs in the cgroup: data, a thread that rewrites it, and snapshots meanwhile."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from enum import IntEnum, auto
from functools import partial
from typing import NoReturn

import memsafe
import memsafe.snapshot  # before the cgroup is entered: its pages are not charged there
from benchmarks.snapshot_survival.cells import IMAGE_S, MIB, Cell
from benchmarks.survival.journal import Journal
from benchmarks.survival.place import Place

# A refused snapshot is tried again: the cgroup may stall for a moment after one that was ended.
_TRY_AGAIN_S = 0.1
_TRIES_MAX = 50
# So little is forecast after a snapshot that copied next to nothing: a forecast is not to stand in the way.
_SMALL_COPY = "16 MiB"
_CHUNK_BYTES = 256 * 1024


class Mark(IntEnum):
    """What is counted of a run, snapshot by snapshot."""

    COMPLETE = 0
    ENDED = auto()
    """By memsafe, because memory ran short."""
    SHOT = auto()
    """The child was taken by the OOM killer."""
    REFUSED = auto()
    FAILED = auto()
    DONE = auto()
    """Not 0: all snapshots were gone through, and the program is there to say so."""


class Data:
    """Private memory in pages of 4 KiB, all of it written; rewritten without the GIL, as an extension does."""

    def __init__(self, size_bytes: int) -> None:
        self._map = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self._size_bytes = size_bytes
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._round = 0
        self.rewrite(0, size_bytes)

    def rewrite(self, offset: int, size_bytes: int) -> None:
        self._round += 1
        ctypes.memset(self._address + offset, self._round % 256, size_bytes)

    def pieces(self) -> Iterator[memoryview]:
        view = memoryview(self._map)
        for offset in range(0, self._size_bytes, MIB):
            yield view[offset : offset + MIB]

    def rewritten(self, rate: int | None) -> AbstractContextManager[None]:
        """Have a thread rewrite all of it, over and over."""

        def run(stop: threading.Event) -> None:
            due_s = time.monotonic()
            chunk_bytes = self._size_bytes if rate is None else _CHUNK_BYTES
            while not stop.is_set():
                for offset in range(0, self._size_bytes, chunk_bytes):
                    self.rewrite(offset, chunk_bytes)
                    if rate is not None:
                        due_s = max(due_s + chunk_bytes / rate, time.monotonic())
                        stop.wait(due_s - time.monotonic())

        return writer(run)

    def write(self, write: Callable[[memoryview], object]) -> None:
        """Write an image, no faster than in IMAGE_S."""
        due_s = time.monotonic()
        for piece in self.pieces():
            write(piece)
            due_s += IMAGE_S * MIB / self._size_bytes
            time.sleep(max(0.0, due_s - time.monotonic()))


@contextmanager
def writer(run: Callable[[threading.Event], None]) -> Iterator[None]:
    """Have *run* called in a thread meanwhile; it gets what tells it to return."""
    stop = threading.Event()
    thread = threading.Thread(target=run, args=(stop,), name="writer")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


Engine = Callable[[Data, Cell, str], Mark]


def fork_snapshot(data: Data, cell: Cell, path: str) -> Mark:
    for _ in range(_TRIES_MAX):
        try:
            memsafe.fork_snapshot(f"{path}.small", lambda out: out.write(b"0"), max_copy=_SMALL_COPY).wait()
            with data.rewritten(cell.rate):
                memsafe.fork_snapshot(path, lambda out: data.write(out.write)).wait()
            return Mark.COMPLETE
        except memsafe.SnapshotRefusedError:
            time.sleep(_TRY_AGAIN_S)
        except memsafe.SnapshotOverrunError:
            return Mark.ENDED
        except memsafe.OOMKilledError:
            return Mark.SHOT
        except memsafe.SnapshotFailedError:
            traceback.print_exc()
            return Mark.FAILED
    return Mark.REFUSED


def plain_fork(data: Data, cell: Cell, path: str) -> Mark:
    """What one writes by hand: fork, write, rename."""
    with data.rewritten(cell.rate):
        pid = os.fork()
        if pid == 0:
            try:
                with open(f"{path}.new", "wb") as file:
                    data.write(file.write)
                    os.fsync(file)
                os.rename(f"{path}.new", path)
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return Mark.SHOT if os.WTERMSIG(status) == signal.SIGKILL else Mark.FAILED
    return Mark.COMPLETE


ENGINES: dict[str, tuple[Engine, Callable[[], ExitStack | memsafe.PressureMonitor]]] = {
    "memsafe": (fork_snapshot, ExitStack),
    "memsafe, monitor": (fork_snapshot, partial(memsafe.PressureMonitor)),
    "os.fork": (plain_fork, ExitStack),
}


def live(cell: Cell, place: Place, journal: Journal, folder: str) -> NoReturn:
    """Be the program of *cell* in a forked child; never returns."""
    engine, beside = ENGINES[cell.engine]
    try:
        place.enter()
        data = Data(cell.data_bytes)
        with beside():
            for _ in range(cell.snapshots):
                mark = engine(data, cell, os.path.join(folder, "image"))
                journal[mark] += 1
            journal[Mark.DONE] = 1
            os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
