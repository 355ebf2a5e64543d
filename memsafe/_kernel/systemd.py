"""systemd's protocol: the service manager says what to watch for memory pressure (https://systemd.io/PRESSURE)."""

from __future__ import annotations

import base64
import binascii
import errno
import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memsafe._kernel import files, notify
from memsafe.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from memsafe._kernel.files import Root

WATCH, WRITE = "MEMORY_PRESSURE_WATCH", "MEMORY_PRESSURE_WRITE"


@dataclass(frozen=True, slots=True)
class Watch:
    """What the service manager wants watched.

    Attributes:
        path: An absolute path: a pressure file of the kernel, a FIFO or a socket.
        data: What to write to it once it is open; empty: nothing was said.
        is_off: It wants nothing watched.
    """

    path: str
    data: bytes = b""
    is_off: bool = False


def watch(environment: Mapping[str, str], root: Root = "/") -> Watch | None:
    """Return what *environment* says, None where it says nothing.

    Raises:
        KernelError: What it says makes no sense (EBADMSG).
    """
    path = environment.get(WATCH)
    if path is None:
        return None
    if path == os.devnull:
        return Watch(path, is_off=True)
    # As systemd's own reader: nothing that could mean another file than it says.
    if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise KernelError(errno.EBADMSG, f"{WATCH}={path[:200]!r}", "not an absolute path")
    try:
        data = base64.b64decode("".join(environment.get(WRITE, "").split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise KernelError(errno.EBADMSG, WRITE, f"not base64: {error}") from None
    return Watch(files.under(root, path), data)


def is_stream(path: str) -> bool:
    """Return whether *path* is a FIFO or a socket, which says something by being readable, rather than a file.

    Raises:
        KernelError: There is nothing, or it is of another kind (EBADF).
    """
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        raise files.failed(error, path, "stat") from None
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        raise KernelError(errno.EBADF, f"watch {path}", "neither a pressure file, a FIFO nor a socket")
    return not stat.S_ISREG(mode)


def stall_of(data: bytes) -> tuple[str, int]:
    """Return the kind, ``some`` or ``full``, and the microseconds that a trigger asks for.

    Raises:
        KernelError: It asks for none (EBADMSG).
    """
    kind, *numbers = data.rstrip(b"\0").split() or [b""]
    if kind not in {b"some", b"full"} or len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise KernelError(errno.EBADMSG, f"{WRITE} {data[:80]!r}", "not a trigger: some or full, and two numbers")
    return kind.decode(), int(numbers[0][:20])


def open_stream(path: str, data: bytes) -> int:
    """Return a descriptor of a FIFO or a socket, to which *data* was written, that is readable when it has news.

    Raises:
        KernelError: Nobody listens on the socket, or *data* was not taken at once.
    """
    # By way of a descriptor: a socket's path may be longer than an address, and the kind cannot change in between.
    try:
        path_fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise files.failed(error, path, "open") from None
    try:
        link = f"/proc/self/fd/{path_fd}"
        is_socket = stat.S_ISSOCK(os.fstat(path_fd).st_mode)
        fd = _connect(link) if is_socket else _open_fifo(link)
    except OSError as error:
        raise files.failed(error, path, "open") from None
    finally:
        os.close(path_fd)
    try:
        if data:
            notify.write(fd, data, path)
        if not is_socket:
            _discard(fd)  # else what was just written would be the first news
    except (KernelError, OSError):
        os.close(fd)
        raise
    return fd


def _connect(path: str) -> int:
    # Non-blocking: a socket on which nobody accepts must not hold up the monitor.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as made:
        made.connect(path)
        return made.detach()


def _open_fifo(path: str) -> int:
    # For writing too: then it never ends, whoever else opens and closes it.
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def _discard(fd: int) -> None:
    with suppress(BlockingIOError):
        while os.read(fd, 4096):
            pass
