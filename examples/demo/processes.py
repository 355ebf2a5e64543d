"""The processes of the demo: stores to talk to, and ballast that takes memory."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

import memsafe

ROOT = Path(__file__).resolve().parents[2]
READY_WITHIN_S = 60.0
_PORTS_TRIED = 5  # a free port may be gone by the time it is used
_END_WITHIN_S = 10.0


class DemoError(Exception):
    """The demo cannot go on."""


class Store:
    """A key-value server that speaks Redis's protocol, on a port of its own, with its folder and its log.

    Attributes:
        name: What to call it.
        port: Where it listens, on 127.0.0.1.
        process: The server.
    """

    def __init__(self, name: str, command: list[str], directory: Path, *, cgroup: str | None = None) -> None:
        self.name = name
        self.directory = directory
        self.log = directory / f"{name}.log"
        for _ in range(_PORTS_TRIED):
            self._start(command, cgroup)
            try:
                if self._is_ready():
                    return
            except BaseException:
                self.close()
                raise
            if "in use" not in self.log.read_text(errors="replace").lower():
                break
        raise DemoError(f"it did not start; {self.obituary()}")

    def _start(self, command: list[str], cgroup: str | None) -> None:
        self.port = _free_port()
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C is for the demo, which then ends its children in order.
            self.process = memsafe.Popen(
                [argument.format(port=self.port) for argument in command],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cgroup=cgroup,
            )

    def connect(self) -> redis.Redis:
        """Return a new connection, which hides no failure by trying again."""
        never = Retry(NoBackoff(), 0)
        return redis.Redis(port=self.port, single_connection_client=True, protocol=2, socket_timeout=60, retry=never)

    def info(self) -> dict[str, Any]:
        """Return INFO, every section."""
        with self.connect() as client:
            return dict(client.info("everything"))

    def obituary(self) -> str:
        """Say how it is, and what it said last."""
        status = self.process.poll()
        said = "\n    ".join(self.log.read_text(errors="replace").splitlines()[-15:])
        return f"{self.name} {'runs' if status is None else f'ended with {status}'}, and said last:\n    {said}"

    def said(self, what: str) -> list[str]:
        """Return the lines of its log that say *what*, without date and process."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [re.sub(r"^.*?(?=\d\d:\d\d:\d\d)", "", line) for line in lines if what in line]

    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def children(self) -> list[psutil.Process]:
        """Return the children it has now."""
        return psutil.Process(self.process.pid).children()

    def shut_down(self) -> int:
        """Ask it to end without saving; return its status."""
        with self.connect() as client, contextlib.suppress(redis.ConnectionError):
            client.execute_command("SHUTDOWN", "NOSAVE")
        return int(self.process.wait(_END_WITHIN_S))

    def close(self) -> None:
        """End it, whatever it takes."""
        end(self.process)

    def _is_ready(self) -> bool:
        give_up = time.monotonic() + READY_WITHIN_S
        while self.alive():
            with contextlib.suppress(redis.ConnectionError, redis.BusyLoadingError), self.connect() as client:
                return bool(client.ping())
            if time.monotonic() > give_up:
                self.close()
            time.sleep(0.02)
        return False


def memkv(directory: Path, limit_bytes: int, *, cgroup: str | None = None) -> Store:
    """Start memkv on what *directory* holds."""
    arguments = ["--port", "{port}", "--dir", str(directory), "--limit", str(limit_bytes), "--policy", "noeviction"]
    return Store("memkv", [sys.executable, "-m", "examples.memkv", *arguments], directory, cgroup=cgroup)


def redis_server(program: str, directory: Path) -> Store:
    """Start redis-server on the dump.rdb in *directory*."""
    return Store(
        "redis-server",
        [program, "--port", "{port}", "--bind", "127.0.0.1", "--dir", str(directory), "--save", ""],
        directory,
    )


_BALLAST = """
import mmap, sys
held = []
for line in sys.stdin:
    piece = mmap.mmap(-1, int(line), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, len(piece), mmap.PAGESIZE):
        piece[offset] = 1
    held.append(piece)
    print(flush=True)
"""


class Ballast:
    """A process that does nothing but take memory, a piece at a time; the first to go if it comes to that."""

    def __init__(self, cgroup: str) -> None:
        self.size_bytes = 0
        self.process = memsafe.Popen(
            [sys.executable, "-S", "-E", "-c", _BALLAST],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            cgroup=cgroup,
            oom_score_adj=1000,
        )

    def grow(self, size_bytes: int) -> bool:
        """Take *size_bytes* more, and touch them; False if it did not survive that."""
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"%d\n" % size_bytes)
            self.process.stdin.flush()
        if not self.process.stdout.readline():
            return False
        self.size_bytes += size_bytes
        return True

    def close(self) -> None:
        """Give everything back."""
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()
        end(self.process)


def end(process: memsafe.Popen) -> None:
    """Terminate *process*, kill it if that does not help, and wait for it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def version_of(program: str) -> str:
    """Return a program's version, of what it says to --version."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+\.\d+\.\d+", said)
    return found[0] if found else "of unknown version"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
