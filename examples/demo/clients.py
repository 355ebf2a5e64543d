"""Clients: threads with a connection each that load, compare and write."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import redis

from examples.demo import corpus

CONNECTIONS = 4
_BATCH_BYTES = 1 << 20
_BATCH_KEYS = 256
_BATCH_WRITES = 16

Connect = Callable[[], redis.Redis]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a store's content differs from what it should be."""

    compared: int
    missing: tuple[bytes, ...]
    different: tuple[bytes, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing is missing and nothing different."""
        return not self.missing and not self.different

    def __str__(self) -> str:
        if self.equal:
            return f"{self.compared:,} values compared, all equal"
        shown = b", ".join((*self.missing, *self.different)[:3]).decode(errors="replace")
        return (
            f"of {self.compared:,} values {len(self.missing):,} missing, {len(self.different):,} different: {shown} …"
        )


def store(connect: Connect, data: Mapping[bytes, bytes]) -> None:
    """SET all of *data*, in pipelines, from several connections at once.

    Raises:
        redis.RedisError: The store refused one.
    """

    def work(client: redis.Redis, keys: Sequence[bytes]) -> None:
        for batch in _batches(keys, data):
            with client.pipeline(transaction=False) as pipeline:
                for key in batch:
                    pipeline.set(key, data[key])
                pipeline.execute()

    _spread(connect, list(data), work)


def compare(connect: Connect, expected: Mapping[bytes, bytes], *, evicted: bool = False) -> Comparison:
    """GET every key of *expected*, from several connections at once, and compare.

    Args:
        connect: Makes a connection.
        expected: What should be there.
        evicted: Keys may be missing; what is there must be right.
    """

    def work(client: redis.Redis, keys: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
        missing: list[bytes] = []
        different: list[bytes] = []
        for batch in _batches(keys, expected):
            for key, value in zip(batch, client.mget(batch), strict=True):
                if value is None:
                    missing.append(key)
                elif value != expected[key]:
                    different.append(key)
        return missing, different

    found = _spread(connect, list(expected), work)
    missing = tuple(key for part, _ in found for key in part)
    different = tuple(key for _, part in found for key in part)
    compared = len(expected) - len(missing) if evicted else len(expected)
    return Comparison(compared, () if evicted else missing, different)


def _batches(keys: Sequence[bytes], data: Mapping[bytes, bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    gathered = 0
    for key in keys:
        batch.append(key)
        gathered += len(data[key])
        if gathered >= _BATCH_BYTES or len(batch) == _BATCH_KEYS:
            yield batch
            batch, gathered = [], 0
    if batch:
        yield batch


def _spread(connect: Connect, keys: Sequence[bytes], work: Callable[[redis.Redis, Sequence[bytes]], T]) -> list[T]:
    def run(part: int) -> T:
        with connect() as client:
            return work(client, keys[part::CONNECTIONS])

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(run, range(CONNECTIONS)))


class Writers:
    """Connections that write without end, each a history of pages that can be told from any image of it.

    Beside its pages, each sets files of the corpus anew, to the same contents, so that a saving child's memory and the
    server's part ways.
    """

    def __init__(self, connect: Connect, files: Mapping[bytes, bytes]) -> None:
        self._connect = connect
        self._files = [(key, value) for key, value in files.items() if len(value) <= 64 * 1024]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,), name=f"writer {i}") for i in range(CONNECTIONS)]
        self._errors: list[BaseException] = []
        self.acknowledged = [0] * CONNECTIONS
        self.sent = [0] * CONNECTIONS
        self.refused: dict[str, int] = {}
        self.longest_wait_s = 0.0

    @contextmanager
    def writing(self) -> Iterator[Writers]:
        """Write while the block runs; every write is acknowledged when it ends.

        Raises:
            redis.RedisError: A connection failed, or the store refused for another reason than a failed save.
        """
        self._stop.clear()
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()
        if self._errors:
            raise self._errors[0]

    @property
    def total(self) -> int:
        """Writes acknowledged."""
        return sum(self.acknowledged)

    def state(self) -> corpus.Corpus:
        """Return every page as it must be now, when nobody writes."""
        return {key: value for i, n in enumerate(self.acknowledged) for key, value in corpus.pages_after(i, n).items()}

    def _run(self, writer: int) -> None:
        try:
            with self._connect() as client:
                self._write(writer, client)
        except BaseException as error:
            self._errors.append(error)

    def _write(self, writer: int, client: redis.Redis) -> None:
        choice = random.Random(writer)
        n = 0
        while not self._stop.is_set():
            writes = [(corpus.page_key(writer, i), corpus.page(writer, i)) for i in range(n, n + _BATCH_WRITES)]
            n = self.sent[writer] = n + _BATCH_WRITES
            self._send(client, [*writes, choice.choice(self._files)])
            self.acknowledged[writer] = n

    def _send(self, client: redis.Redis, writes: list[tuple[bytes, bytes]]) -> None:
        """Write a batch; what a failed save has the store refuse is written again until it is taken."""
        while writes:
            began = time.monotonic()
            with client.pipeline(transaction=False) as pipeline:
                for key, value in writes:
                    pipeline.set(key, value)
                replies = pipeline.execute(raise_on_error=False)
            self.longest_wait_s = max(self.longest_wait_s, time.monotonic() - began)
            refusals = [(write, reply) for write, reply in zip(writes, replies, strict=True) if reply is not True]
            for _, refusal in refusals:
                text = str(refusal)
                if not text.startswith("MISCONF"):
                    raise refusal if isinstance(refusal, Exception) else redis.ResponseError(text)
                self.refused["MISCONF"] = self.refused.get("MISCONF", 0) + 1
            writes = [write for write, _ in refusals]
            if writes and self._stop.wait(0.02):
                raise redis.ResponseError(f"still refused when the writing was to end: {refusals[0][1]}")
