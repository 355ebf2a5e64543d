"""Threads that are not in a forked child: what they had in hand at the fork, and what can be done about it.

CPython renews its own locks in a child, logging the locks of its handlers, glibc those of malloc and stdio. What is
left over and can be renewed, or dropped, is so by renew(). Who might hold the rest is said by witnesses().
"""

from __future__ import annotations

import logging
import sys
import threading
from contextlib import suppress
from importlib import _bootstrap
from io import BufferedWriter, FileIO, TextIOWrapper
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from memsafe._kernel import process
from memsafe.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from memsafe._kernel.files import Root

# Libraries that wait in a child for threads of their own, or on a lock of theirs that another thread held.
_LIBRARIES = {
    "libgomp": "OpenMP of GCC",
    "libtbb": "oneTBB",
    "libcuda": "CUDA",
    "cygrpc": "gRPC",
    "polars": "Polars",
    "libzmq": "ZeroMQ",
    "librdkafka": "Kafka",
    "libjvm": "Java",
    "sqlite3": "SQLite",
}

_abandoned: list[object] = []  # never finalized: that would write the parent's pending bytes, or wait for their lock


def renew() -> None:
    """In a child: make imports and logging usable, whatever other threads were doing."""
    _forget_imports()
    for handler in _handlers():
        _renew(handler)


def _forget_imports() -> None:
    """Take back what another thread was importing: nobody will finish it, nobody will release its lock."""
    own = threading.get_ident()
    locks: dict[str, Any] = getattr(_bootstrap, "_module_locks", {})  # weak references; empty while nothing is imported
    for name, reference in list(locks.items()):
        lock = reference()
        if lock is None or getattr(lock, "owner", own) == own:
            continue
        locks.pop(name, None)
        if getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False):
            for begun in [other for other in sys.modules if other == name or other.startswith(f"{name}.")]:
                del sys.modules[begun]


def _handlers() -> Iterator[logging.Handler]:
    for reference in getattr(logging, "_handlerList", ()):
        handler = reference()
        if handler is not None:
            yield handler


def _renew(handler: logging.Handler) -> None:
    """Give *handler* a stream or a queue whose lock nobody holds. CPython does so for stdout and stderr only."""
    stream = getattr(handler, "stream", None)
    if type(stream) is TextIOWrapper and stream not in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with suppress(OSError, ValueError):  # closed, or on no file
            raw = FileIO(stream.fileno(), "w", closefd=False)  # of a descriptor: it is not cut off
            fresh = TextIOWrapper(BufferedWriter(raw), stream.encoding, stream.errors)
            _abandoned.append(stream)
            handler.stream = fresh  # type: ignore[attr-defined]
    elif hasattr(handler, "enqueue") and hasattr(handler, "queue"):  # a QueueHandler; its listener is not here
        _abandoned.append(handler.queue)
        handler.queue = SimpleQueue()


def witnesses(forked_by: int, root: Root = "/") -> str:
    """Say who, in this process, may hold what a child of its waits for; "" where there is nobody.

    Args:
        forked_by: The identity of the thread that the child has.
        root: The directory that stands for "/".
    """
    threads = threading.enumerate()
    found = {
        "Python's threads": _suspects(thread.name for thread in threads if thread.ident != forked_by),
        "other threads": _suspects(_native_threads(root, {thread.native_id for thread in threads})),
        "libraries that may wait for ever in a child": _libraries(root),
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in found.items() if names)


def _native_threads(root: Root, known: set[int | None]) -> list[str]:
    with suppress(KernelError):
        named = process.thread_names(root)
        return [name for tid, name in named.items() if tid not in known]
    return []


def _suspects(names: Iterable[str]) -> list[str]:
    """Return *names* without memsafe's own, whose locks are all usable in a child."""
    return sorted({name for name in names if not name.startswith("memsafe")})


def _libraries(root: Root) -> list[str]:
    with suppress(KernelError):
        names = process.mapped_files(root)
        return [f"{what} ({part})" for part, what in _LIBRARIES.items() if any(part in name for name in names)]
    return []
