"""redis-server and memkv, each in a folder and on a port of its own, and gone afterwards."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

READY_WITHIN_S = 30.0
STOPPED_WITHIN_S = 30.0


class UnavailableError(Exception):
    """A program that is not installed, or a server that did not come up; says which."""


def program(name: str) -> str:
    """Return the path of an installed program."""
    path = shutil.which(name)
    if path is None:
        raise UnavailableError(f"{name} is not installed (Debian: redis-server, redis-tools)")
    return path


@contextmanager
def redis_server(*options: str, enter: Callable[[], None] | None = None) -> Iterator[int]:
    """Run a redis-server that saves nothing by itself; yield its port.

    *enter* is called in its process before it begins, to put it into a cgroup.
    """
    port = _free_port()
    command = [program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with _running("redis-server", [*command, *options], port, enter=enter):
        yield port


@contextmanager
def memkv_server(*, limit: str) -> Iterator[int]:
    """Run examples.memkv under a budget of *limit*; yield its port."""
    if find_spec("examples") is None or find_spec("examples.memkv") is None:
        raise UnavailableError("examples.memkv is not to be imported from here: run this from the project's folder")
    port = _free_port()
    project = Path(__file__).resolve().parent.parent
    with _running(
        "memkv",
        [sys.executable, "-m", "examples.memkv", "--port", str(port), "--dir", ".", "--limit", limit],
        port,
        {"PYTHONPATH": str(project)},
    ):
        yield port


@contextmanager
def _running(
    name: str,
    command: list[str],
    port: int,
    env: dict[str, str] | None = None,
    enter: Callable[[], None] | None = None,
) -> Iterator[None]:
    with ExitStack() as cleanup:
        folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="memsafe-bench-"))
        log = cleanup.enter_context(open(Path(folder, "server.log"), "w+b"))
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})},
            preexec_fn=enter,
        )
        cleanup.callback(_stop, process)
        if not _answers(process, port):
            log.seek(0)
            last = log.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise UnavailableError(f"{name} did not come up: {last or 'it says nothing'}")
        yield


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until the server says PONG; False when it ends or does not in time."""
    deadline_s = time.monotonic() + READY_WITHIN_S
    while process.poll() is None and time.monotonic() < deadline_s:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(64).startswith(b"+PONG"):
                    return True
        except OSError:
            pass
        time.sleep(0.02)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOPPED_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
