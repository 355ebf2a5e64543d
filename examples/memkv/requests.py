"""Requests out of bytes: RESP2, the server's side.

hiredis parses, but it parses what servers say: a superset of what clients may say, with other limits and other errors.
So what it makes of a chunk is packed again and compared with the chunk. If that is the chunk, it was arrays of bulk
strings as every client sends them. The rest (inline commands, errors, requests that end in a later chunk) goes through
a second, strict parser, which takes and answers what redis-server does, word for word, and keeps no more than it may.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Final, TypeAlias

import hiredis

from examples.memkv import resp

Request: TypeAlias = list[bytes]
"""A command's name and its arguments; at least the name."""

REFUSED: Final[Request] = [b""]
"""Stands for a request that there was no room to keep."""

BIG_BYTES: Final = 64 * 1024
"""From here on the bytes of a request, or of a reply, are asked for before they are kept."""

BULK_BYTES_MAX: Final = 512 * 1024 * 1024  # proto-max-bulk-len
_LINE_BYTES_MAX: Final = 64 * 1024  # PROTO_INLINE_MAX_SIZE
_ARRAY_LENGTH_MAX: Final = 2**31 - 1
_ARGUMENT_BYTES: Final = 48  # of an argument beside its content: the object's head, its place in the list

# hiredis makes a list as long as an array's head promises: a head that promises much is left to the strict parser. So
# is one of no elements, which is no request. (A value that looks like such a head costs time, nothing else.)
_UNUSUAL_ARRAY: Final = re.compile(rb"\*(?:[0-9]{5}|0\r)")


# Its own annotation knows tuples of one element only.
_pack: Callable[[tuple[bytes, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]


class ProtocolError(Exception):
    """What a client sent is no request. It is told so, and its connection ends: where it would go on nobody can say."""

    @property
    def reply(self) -> bytes:
        """The error as redis-server says it."""
        return resp.error(f"ERR Protocol error: {self}".encode("latin-1"))


class RequestParser:
    """The requests of one connection, chunk by chunk.

    Args:
        hold: Called with the bytes that a request will take beyond BIG_BYTES, before they are kept; false: they may not
            be. Then the rest of that request is skipped, and it comes out as REFUSED.

    Attributes:
        partial: Whether a request has begun and is not complete.
        failure: Why nothing more can be made of this connection, once that is so.
    """

    __slots__ = ("_reader", "_strict", "failure", "partial")

    def __init__(self, hold: Callable[[int], bool]) -> None:
        self._reader = hiredis.Reader()
        self._strict = _StrictParser(hold)
        self.partial = False
        self.failure: ProtocolError | None = None

    @property
    def held_bytes(self) -> int:
        """What was asked of *hold* for the request that is not complete yet."""
        return self._strict.held_bytes

    @property
    def pending_bytes(self) -> int:
        """What is kept of a request that is not complete yet."""
        return self._strict.pending_bytes

    def parse(self, chunk: bytes) -> list[Request]:
        """Return the requests that *chunk* completes."""
        if self.partial:
            return self._parse_on(chunk)
        if not _UNUSUAL_ARRAY.search(chunk):
            try:
                self._reader.feed(chunk)
                requests: list[Request] = list(iter(self._reader.gets, False))
                packed = b"".join([_pack(tuple(request)) for request in requests])
            except (hiredis.HiredisError, TypeError):
                packed = b""
            if packed == chunk:
                return requests
            self._reader = hiredis.Reader()  # the old one is in the middle of something, or gave up
            if packed and chunk.startswith(packed):
                return requests + self._parse_strictly(chunk[len(packed) :])
        return self._parse_strictly(chunk)

    def _parse_on(self, chunk: bytes) -> list[Request]:
        """Complete the request that an earlier chunk began; what follows it may be simple again."""
        strict = self._strict
        try:
            strict.feed(chunk)
            request = strict.next_request()
        except ProtocolError as failure:
            self.failure = failure
            return []
        if request is None:
            return []
        self.partial = False
        rest = strict.take_rest()
        return [request, *self.parse(rest)] if rest else [request]

    def _parse_strictly(self, chunk: bytes) -> list[Request]:
        requests: list[Request] = []
        try:
            self._strict.feed(chunk)
            while (request := self._strict.next_request()) is not None:
                requests.append(request)
        except ProtocolError as failure:
            self.failure = failure
        self.partial = not self._strict.idle
        return requests

    def drop_buffers(self) -> None:
        """Give back what is kept for speed only."""
        if not self.partial:
            self._reader = hiredis.Reader()


class _StrictParser:
    """One request after another out of chunks, with redis-server's own limits and errors."""

    def __init__(self, hold: Callable[[int], bool]) -> None:
        self._hold = hold
        self._buffer = bytearray()
        self._missing = 0  # arguments that the request still lacks
        self._bulk_bytes = -1  # of the argument that is being read; -1: its head comes next
        self._arguments: Request = []
        self.held_bytes = 0
        self._kept_bytes = 0
        self._big: io.BytesIO | None = None
        self._big_bytes = 0
        self._skipping = False

    @property
    def idle(self) -> bool:
        """Whether a new request would begin with the next byte."""
        return not self._buffer and not self._missing

    @property
    def pending_bytes(self) -> int:
        """What is kept of a request that is not complete."""
        return len(self._buffer) + (0 if self._skipping else self._kept_bytes + self._big_bytes)

    def feed(self, chunk: bytes | memoryview) -> None:
        """Take *chunk*; next_request() says what it completed."""
        if self._bulk_bytes >= 0 and (self._big is not None or self._skipping):
            chunk = self._take_big(chunk)
        self._buffer += chunk

    def take_rest(self) -> bytes:
        """Return what follows the request that was returned last, and forget it."""
        rest, self._buffer = bytes(self._buffer), bytearray()
        return rest

    def next_request(self) -> Request | None:
        """Return the next request that is complete, REFUSED if it could not be kept, or None if none is.

        Raises:
            ProtocolError: As redis-server would, and close the connection.
        """
        while self._buffer or self._missing:
            if not self._missing:
                if self._buffer[0] != 0x2A:  # *
                    line = self._line(b"\n", "too big inline request")
                    if line is None:
                        return None
                    if arguments := split_inline(line.removesuffix(b"\r")):
                        return arguments
                    continue
                line = self._line(b"\r", "too big mbulk count string")
                if line is None:
                    return None
                count = parse_integer(line[1:])
                if count is None or count > _ARRAY_LENGTH_MAX:
                    raise ProtocolError("invalid multibulk length")
                self._missing = max(0, count)
                continue
            if not self._next_argument():
                return None
            if not self._missing:
                return self._complete()
        return None

    def _line(self, end: bytes, too_long: str) -> bytes | None:
        """Take a line off the buffer and return it without its end, or None if it has not ended."""
        buffer = self._buffer
        at = buffer.find(end, 0, _LINE_BYTES_MAX + 2)
        if at < 0 and len(buffer) > _LINE_BYTES_MAX:
            raise ProtocolError(too_long)
        after = at + 1 if end == b"\n" else at + 2
        if at < 0 or after > len(buffer):
            return None
        line = bytes(buffer[:at])
        del buffer[:after]
        return line

    def _next_argument(self) -> bool:
        if self._bulk_bytes < 0 and not self._begin_argument():
            return False
        size = self._bulk_bytes
        apart = self._big is not None or self._skipping
        if (apart and self._big_bytes < size) or len(self._buffer) < (2 if apart else size + 2):
            return False
        if self._big is not None:
            self._arguments.append(self._big.getvalue())
        elif not self._skipping:
            self._arguments.append(bytes(self._buffer[:size]))
        del self._buffer[: 2 if apart else size + 2]
        self._big, self._big_bytes = None, 0
        self._kept_bytes += size
        self._bulk_bytes = -1
        self._missing -= 1
        return True

    def _begin_argument(self) -> bool:
        line = self._line(b"\r", "too big bulk count string")
        if line is None:
            return False
        if not line.startswith(b"$"):
            raise ProtocolError(f"expected '$', got '{(line[:1] or b' ').decode('latin-1')}'")
        size = parse_integer(line[1:])
        if size is None or not 0 <= size <= BULK_BYTES_MAX:
            raise ProtocolError("invalid bulk length")
        self._bulk_bytes = size
        self._make_room(size)
        if self._skipping or size > BIG_BYTES:
            self._big = None if self._skipping else io.BytesIO()
            rest = self._take_big(memoryview(bytes(self._buffer)))
            self._buffer = bytearray(rest)
        return True

    def _make_room(self, size: int) -> None:
        """Ask whether the request may grow by *size*, in steps; give up what there is of it if not."""
        need = self._kept_bytes + _ARGUMENT_BYTES * len(self._arguments) + size - self.held_bytes
        if self._skipping or need <= BIG_BYTES:
            return
        if self._hold(need):
            self.held_bytes += need
        else:
            self._skipping = True
            self._arguments = []

    def _take_big(self, chunk: bytes | memoryview) -> memoryview:
        """Take what *chunk* has of the argument that is being read or skipped; return the rest."""
        view = memoryview(chunk)
        part = view[: self._bulk_bytes - self._big_bytes]
        if self._big is not None:
            self._big.write(part)
        self._big_bytes += len(part)
        return view[len(part) :]

    def _complete(self) -> Request:
        arguments, self._arguments = self._arguments, []
        if self._skipping:
            arguments = REFUSED
        self.held_bytes = self._kept_bytes = 0
        self._skipping = False
        return arguments


def parse_integer(text: bytes) -> int | None:
    """Return *text* as redis-server reads a 64-bit integer (string2ll): no blanks, no plus, no leading zero."""
    if len(text) > 20:
        return None
    try:
        number = int(text)
    except ValueError:
        return None
    return number if b"%d" % number == text and -(2**63) <= number < 2**63 else None


_BLANKS: Final = b" \n\r\t\v\f"
_UNQUOTED_END: Final = b" \n\r\t"
_ESCAPES: Final = {0x6E: 0x0A, 0x72: 0x0D, 0x74: 0x09, 0x62: 0x08, 0x61: 0x07}
_QUOTE, _APOSTROPHE, _BACKSLASH = 0x22, 0x27, 0x5C
_HEX: Final = re.compile(rb"x([0-9a-fA-F]{2})")


def split_inline(line: bytes) -> Request:
    """Return the arguments of an inline command, quoted or not (sdssplitargs).

    Raises:
        ProtocolError: A quote is not closed, or something follows a closing one at once.
    """
    line = line.partition(b"\0")[0]  # to redis-server it is a C string
    arguments: Request = []
    at = 0
    while True:
        while at < len(line) and line[at] in _BLANKS:
            at += 1
        if at == len(line):
            return arguments
        argument = bytearray()
        while at < len(line) and line[at] not in _UNQUOTED_END:
            if line[at] in (_QUOTE, _APOSTROPHE):
                at = _take_quoted(line, at, argument)
                break
            argument.append(line[at])
            at += 1
        arguments.append(bytes(argument))


def _take_quoted(line: bytes, at: int, argument: bytearray) -> int:
    """Append to *argument* what the quote at *at* begins; return where it has ended."""
    quote = line[at]
    at += 1
    while at < len(line):
        code = line[at]
        if code == quote:
            if at + 1 < len(line) and line[at + 1] not in _BLANKS:
                break
            return at + 1
        if code == _BACKSLASH and at + 1 < len(line) and (quote == _QUOTE or line[at + 1] == _APOSTROPHE):
            at += 1
            if quote == _QUOTE and (hexadecimal := _HEX.match(line, at)):
                code = int(hexadecimal[1], 16)
                at += 2
            else:
                code = _ESCAPES.get(line[at], line[at]) if quote == _QUOTE else line[at]
        argument.append(code)
        at += 1
    raise ProtocolError("unbalanced quotes in request")
