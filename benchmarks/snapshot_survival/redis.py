"""redis-server in the same kind of cgroup: BGSAVE while a client rewrites all of its data."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import AbstractContextManager

from benchmarks.servers import redis_server
from benchmarks.snapshot_survival.cells import IMAGE_S, MIB, Cell
from benchmarks.snapshot_survival.program import Mark, writer
from benchmarks.survival.journal import Journal
from benchmarks.survival.place import Place

ENGINE = "redis BGSAVE"

_KEYS_PER_MIB = 64
_VALUE_BYTES = MIB // _KEYS_PER_MIB - 64  # with its header, of a size that jemalloc has
_ANSWER_S = 30.0
_LOOK_EVERY_S = 0.02


class Client:
    """A connection that knows what is needed of the protocol."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=_ANSWER_S)

    def ask(self, *words: str) -> str:
        """Return the answer to a command; of a bulk string, all of it.

        Raises:
            OSError: The server is gone.
        """
        self._socket.sendall(" ".join(words).encode() + b"\r\n")
        answer = self._receive(b"")
        if answer.startswith(b"$"):
            head, _, rest = answer.partition(b"\r\n")
            while len(rest) < int(head[1:]) + 2:
                rest = self._receive(rest)
            answer = rest
        return answer.decode()

    def send(self, commands: bytes, answers_bytes: int) -> None:
        """Send what is answered by so many bytes."""
        self._socket.sendall(commands)
        while answers_bytes > 0:
            answers_bytes -= len(self._receive(b""))

    def _receive(self, before: bytes) -> bytes:
        got = self._socket.recv(64 * 1024)
        if not got:
            raise ConnectionResetError("the server is gone")
        return before + got

    def close(self) -> None:
        self._socket.close()


def _one_mib(number: int) -> bytes:
    """Return the commands that set a MiB of values."""
    value = b"$%d\r\n%b\r\n" % (_VALUE_BYTES, b"x" * _VALUE_BYTES)
    keys = (b"key:%08d" % (number * _KEYS_PER_MIB + each) for each in range(_KEYS_PER_MIB))
    return b"".join(b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n%b" % (len(key), key, value) for key in keys)


def _rewrite_once(client: Client, cell: Cell, stop: threading.Event) -> None:
    due_s = time.monotonic()
    for number in range(cell.data_bytes // MIB):
        if stop.is_set():
            return
        client.send(_one_mib(number), _KEYS_PER_MIB * len(b"+OK\r\n"))
        if cell.rate is not None:
            due_s = max(due_s + MIB / cell.rate, time.monotonic())
            stop.wait(due_s - time.monotonic())


def _rewritten(cell: Cell, port: int) -> AbstractContextManager[None]:
    def run(stop: threading.Event) -> None:
        client = Client(port)
        try:
            while not stop.is_set():
                _rewrite_once(client, cell, stop)
        except OSError:
            pass  # it is gone, as is seen elsewhere
        finally:
            client.close()

    return writer(run)


def _bgsave(client: Client) -> Mark:
    answer = client.ask("BGSAVE")
    if not answer.startswith("+"):
        return Mark.REFUSED
    while "rdb_bgsave_in_progress:1" in (info := client.ask("INFO", "persistence")):
        time.sleep(_LOOK_EVERY_S)
    return Mark.COMPLETE if "rdb_last_bgsave_status:ok" in info else Mark.SHOT


def live(cell: Cell, place: Place, journal: Journal) -> None:
    """Run a server in *place* and have it save; what is written down tells how far it came.

    Raises:
        UnavailableError: There is no redis-server here.
    """
    delay_us = int(IMAGE_S * 1e6 / (cell.data_bytes // MIB * _KEYS_PER_MIB))  # as the others' images, on a slow disk
    with redis_server(
        "--rdb-key-save-delay", str(delay_us), "--stop-writes-on-bgsave-error", "no", enter=place.enter
    ) as port:
        try:
            client = Client(port)
            _rewrite_once(client, Cell(cell.limit_bytes, cell.share, None, cell.engine), threading.Event())
            for _ in range(cell.snapshots):
                with _rewritten(cell, port):
                    mark = _bgsave(client)
                journal[mark] += 1
            journal[Mark.DONE] = 1
        except OSError:
            pass  # it is gone: that is what was to be found out
