"""What a child tells its parent over a pipe: frames of a length and a JSON array that begins with the kind."""

from __future__ import annotations

import errno
import json
import os
import select
import struct
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from memsafe.snapshot.writer import Written

if TYPE_CHECKING:
    from memsafe._kernel.descriptors import Owned

_LENGTH = struct.Struct("=I")
_FRAME_BYTES_MAX = 2 * 2**20
_READ_BYTES = 64 * 1024
_BUFFER_BYTES_MAX = _FRAME_BYTES_MAX + _LENGTH.size  # what is more is a frame, or nonsense

# Progress goes at once for a while, then is thinned out: a report for each of a million items would cost the child a
# system call and the parent's thread a turn at the GIL, each.
_PROGRESS_BURST = 100
_PROGRESS_PER_S = 50

# A message may be the repr of anything; a traceback of a deep recursion is shortened by Python itself. JSON in ASCII
# takes up to 12 bytes for a character (a pair of \uXXXX): the longest of both still fit in a frame.
_NAME_CHARS_MAX = 1024
_MESSAGE_CHARS_MAX = 16 * 1024
_TRACEBACK_CHARS_MAX = 128 * 1024


@dataclass(frozen=True, slots=True)
class Progress:
    """The writer's progress()."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Raised:
    """`write`, or what follows it in the child, raised."""

    type: str
    message: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Done:
    """The image is complete and synced.

    Attributes:
        copy_bytes: Private copies, counted by the child itself; None where it could not.
        warnings: What could not be done.
        written: What became of the image.
    """

    copy_bytes: int | None
    warnings: tuple[str, ...]
    written: Written


Report: TypeAlias = Progress | Raised | Done


class Reporter:
    """The child's side. The pipe does not block: progress that finds it full waits for the next report."""

    def __init__(self, fd: int) -> None:
        """Report to *fd*, the write end of a non-blocking pipe."""
        self._fd = fd
        self._credit = float(_PROGRESS_BURST)
        self._credited_at_s = time.monotonic()
        self._pending: tuple[int, int] | None = None

    def progress(self, done: int, total: int) -> None:
        """Send progress now, or keep it for the next report."""
        now_s = time.monotonic()
        earned = (now_s - self._credited_at_s) * _PROGRESS_PER_S
        self._credit = min(_PROGRESS_BURST, self._credit + earned)
        self._credited_at_s = now_s
        self._pending = (done, total)
        if self._credit >= 1:
            self._credit -= 1
            self._send_pending(wait=False)

    def done(self, copy_bytes: int | None, warnings: list[str], written: Written) -> None:
        """Send the success, after the last progress."""
        self._send_pending(wait=True)
        self._send(["done", copy_bytes, warnings, *written], wait=True)

    def raised(self, error: BaseException) -> None:
        """Send what was raised."""
        kind = type(error)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        self._send_pending(wait=True)
        self._send(["raised", name[:_NAME_CHARS_MAX], _message(error), _traceback(error)], wait=True)

    def _send_pending(self, *, wait: bool) -> None:
        if self._pending is not None and self._send(["progress", *self._pending], wait=wait):
            self._pending = None

    def _send(self, report: list[object], *, wait: bool) -> bool:
        body = json.dumps(report).encode("ascii")
        rest = memoryview(_LENGTH.pack(len(body)) + body)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                if not wait:  # nothing of it was written: at most PIPE_BUF bytes go as a whole (pipe(7))
                    return False
                poller = select.poll()
                poller.register(self._fd, select.POLLOUT)
                poller.poll()
        return True


def _message(error: BaseException) -> str:
    try:
        return str(error)[:_MESSAGE_CHARS_MAX]
    except Exception:
        return "(its message could not be made)"


def _traceback(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))[-_TRACEBACK_CHARS_MAX:]
    except Exception:
        return ""


class ReportReader:
    """The parent's side."""

    def __init__(self, pipe: Owned) -> None:
        """Read from *pipe*, the read end of one that does not block, which close() closes."""
        self._pipe = pipe
        self._buffer = bytearray()
        self.at_end = False

    def read(self) -> list[Report]:
        """Return the reports that have come in whole; sets at_end once nobody can send any more.

        Raises:
            OSError: What came in makes no sense: something else wrote to the pipe.
        """
        while not self.at_end and len(self._buffer) < _BUFFER_BYTES_MAX:
            try:
                data = os.read(self._pipe.fd, _READ_BYTES)
            except BlockingIOError:
                break
            self.at_end = not data
            self._buffer += data
        reports = []
        while (frame := self._take()) is not None:
            reports.append(_decode(frame))
        return reports

    def close(self) -> None:
        """Listen no more; the writer is told. Twice is a no-op."""
        self.at_end = True
        with suppress(OSError):  # it is closed all the same
            self._pipe.close()

    def _take(self) -> bytes | None:
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > _FRAME_BYTES_MAX:
            raise OSError(errno.EPROTO, f"a report of {length} bytes came from the child")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        frame = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return frame


def _decode(frame: bytes) -> Report:
    try:
        match json.loads(frame):
            case ["progress", int(done), int(total)]:
                return Progress(done, total)
            case ["done", (int() | None) as copy_bytes, list(warnings), int(content_bytes), (str() | None) as checksum]:
                return Done(copy_bytes, tuple(map(str, warnings)), Written(content_bytes, checksum))
            case ["raised", str(kind), str(message), str(text)]:
                return Raised(kind, message, text)
    except ValueError:
        pass
    raise OSError(errno.EPROTO, f"a report that makes no sense came from the child: {frame[:80]!r}")
