"""Servers as processes of their own, on free ports, for the tests of memkv."""

from __future__ import annotations

import contextlib
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

ROOT = Path(__file__).parents[2]
MIB = 1024 * 1024
WITHIN_S = 30.0

T = TypeVar("T")


def until(condition: Callable[[], T], what: str, within_s: float = WITHIN_S) -> T:
    """Return what *condition* gives as soon as that is true; fail if it never is."""
    give_up = time.monotonic() + within_s
    while not (result := condition()):
        if time.monotonic() > give_up:
            pytest.fail(f"not within {within_s} s: {what}")
        time.sleep(0.005)
    return result


def tool(name: str) -> str:
    """Return the path of one of Redis's programs."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian packages redis-server, redis-tools)")
    return path


class Raw:
    """A connection on which nothing is made of anything."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=WITHIN_S)
        self.file: BinaryIO = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def ask(self, *words: bytes) -> bytes:
        """Send a command and return the bytes of its reply."""
        self.send(packed(*words))
        return self.reply()

    def reply(self) -> bytes:
        """Return the bytes of one reply; empty at the end."""
        line = self.file.readline()
        kind, rest = line[:1], line[1:].strip()
        if kind in (b"$", b"=") and int(rest) >= 0:
            return line + self.file.read(int(rest) + 2)
        if kind in (b"*", b"~", b"%") and int(rest) > 0:
            return line + b"".join(self.reply() for _ in range(int(rest) * (2 if kind == b"%" else 1)))
        return line

    def to_the_end(self) -> bytes:
        """Say that nothing more is sent, and return what comes until the server closes the connection."""
        received = []
        try:
            self.socket.shutdown(socket.SHUT_WR)
            while data := self.socket.recv(65536):
                received.append(data)
        except (ConnectionError, OSError):  # it closed with bytes unread
            pass
        return b"".join(received)

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def packed(*words: bytes) -> bytes:
    """Return a request as clients send it."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


class Server:
    """A memkv, or a redis-server, that has begun to serve."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, directory: Path, log: Path) -> None:
        self.process = process
        self.port = port
        self.directory = directory
        self.log = log
        self.client = redis.Redis(port=port, socket_timeout=WITHIN_S, retry=Retry(NoBackoff(), 0))

    @property
    def dump(self) -> Path:
        return self.directory / "dump.rdb"

    def info(self, name: str) -> object:
        """Return one field of INFO."""
        return self.client.info("everything")[name]

    def raw(self) -> Raw:
        """Return a new connection."""
        return Raw(self.port)

    def rss_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def stopped_child(self) -> psutil.Process:
        """Return the child that saves, once it stands still: see SAVES_STOP. It goes on when it is resumed."""
        child = until(lambda: next(iter(psutil.Process(self.process.pid).children()), None), "there is a saving child")
        until(lambda: child.status() == psutil.STATUS_STOPPED, "it stands still")
        return child

    def bgsave(self) -> None:
        """Begin a save in the background; what else runs here may have memsafe put it off for a moment."""

        def begun() -> bool:
            try:
                return bool(self.client.bgsave(schedule=False))
            except redis.ResponseError as error:
                if "(defer)" not in str(error):
                    raise
                return False

        until(begun, "a save may begin")

    def until_saved(self) -> None:
        until(lambda: not self.info("rdb_bgsave_in_progress"), "the background save ends")

    def end(self) -> int:
        """Have it end without saving, and return its status."""
        with contextlib.suppress(redis.ConnectionError, ConnectionError):
            self.client.shutdown(nosave=True)
        return self.process.wait(WITHIN_S)

    def kill(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()


def memkv_command(directory: Path, *arguments: str, limit: str = "64 MiB", port: int = 0) -> list[str]:
    return [
        *(sys.executable, "-m", "examples.memkv", "--port", str(port)),
        *("--dir", str(directory), "--limit", limit, *arguments),
    ]


# Code that may run in the new process before it is memkv.
WITHOUT_UVLOOP = """
import sys
sys.modules["uvloop"] = None
"""
# The level is what the last drill made it: it does not fall by itself, however slow the machine is, and no stall of
# other processes raises it.
LEVEL_BY_DRILLS = """
from functools import partial
from examples.memkv import server
from memsafe import PressureMonitor, Thresholds
thresholds = Thresholds(cooldown_s=3600, stall_headroom_ratio=0)
server.PressureMonitor = partial(PressureMonitor, thresholds=thresholds)
"""
# A child that saves stops itself before it writes: it is not done before a slow test has looked at it.
SAVES_STOP = """
import os, signal
from examples.memkv.persistence import Persistence
write = Persistence._write_in_child
def stop_and_write(self, out):
    os.kill(os.getpid(), signal.SIGSTOP)
    write(self, out)
Persistence._write_in_child = stop_and_write
"""
_BE_MEMKV = """
import runpy
runpy.run_module("examples.memkv", run_name="__main__", alter_sys=True)
"""


@contextlib.contextmanager
def memkv(
    directory: Path,
    *arguments: str,
    limit: str = "64 MiB",
    enter: Callable[[], object] | None = None,
    before: str = "",
) -> Iterator[Server]:
    """A memkv on *directory*.

    Args:
        directory: Its --dir.
        arguments: More options.
        limit: Its --limit.
        enter: Called in the new process before its program begins.
        before: Code that runs in it before it is memkv.
    """
    log = directory / "memkv.log"
    command = memkv_command(directory, *arguments, limit=limit)
    if before:
        command[1:3] = ["-c", before + _BE_MEMKV]
    with open(log, "ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=enter,
        )
    try:
        port = until(lambda: _port(process, log, start), "memkv is ready")
        server = Server(process, port, directory, log)
        yield server
        server.client.close()
    finally:
        process.kill()
        process.wait()


def _port(process: subprocess.Popen[bytes], log: Path, start: int) -> int | None:
    text = log.read_bytes()[start:].decode()
    if match := re.search(r"ready to accept connections on \S+ port (\d+)", text):
        return int(match[1])
    if process.poll() is not None:
        pytest.fail(f"memkv ended with {process.returncode}:\n{text}")
    return None


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[Server]:
    """A redis-server on *directory*, with its dump if there is one."""
    program = tool("redis-server")
    log = directory / "redis.log"
    for _ in range(5):  # somebody else may take the port meanwhile
        port = free_port()
        process = subprocess.Popen(
            [
                program,
                "--port",
                str(port),
                "--bind",
                "127.0.0.1",
                "--dir",
                str(directory),
                "--save",
                "",
                "--logfile",
                log,
            ]
        )
        server = Server(process, port, directory, log)
        if until(partial(_state, server), "redis-server is ready") == "ready":
            break
        server.client.close()
    else:
        pytest.fail(f"redis-server does not start:\n{log.read_text()}")
    try:
        yield server
    finally:
        server.kill()


def _state(server: Server) -> str:
    if server.process.poll() is not None:
        return "ended"
    try:
        return "ready" if server.client.ping() else ""
    except (redis.ConnectionError, redis.BusyLoadingError):
        return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def limit_file_size(server: Server, size_bytes: int) -> None:
    """Have the kernel refuse *server* files beyond *size_bytes*, as a full disk does; -1: no more."""
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))
