"""Replies: bytes out of what a command answers, in RESP2 and RESP3.

The two differ where a command answers with nil, a map, a set or text for people; everything else is the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias

OK: Final = b"+OK\r\n"
NIL: Final = b"$-1\r\n"
NIL3: Final = b"_\r\n"
ZERO: Final = b":0\r\n"
ONE: Final = b":1\r\n"

PIECE_BYTES: Final = 64 * 1024
"""A reply that is longer is sent in pieces of about this size, as the client takes them."""

_HEADS: Final = [b"$%d\r\n" % n for n in range(1024)]
_INTEGERS: Final = [b":%d\r\n" % n for n in range(1024)]


def integer(n: int) -> bytes:
    """Return *n* as an integer reply."""
    return _INTEGERS[n] if 0 <= n < 1024 else b":%d\r\n" % n


def bulk(value: bytes) -> bytes:
    """Return *value* as a bulk string."""
    size = len(value)
    return (_HEADS[size] if size < 1024 else b"$%d\r\n" % size) + value + b"\r\n"


def bulk_or_nil(value: bytes | None, nil: bytes = NIL) -> bytes:
    """Return *value* as a bulk string, or *nil* for None."""
    return nil if value is None else bulk(value)


def text(value: str, protocol: int) -> bytes:
    """Return text for people: a bulk string, in RESP3 a verbatim string."""
    content = value.encode("utf-8", "surrogateescape")
    return bulk(content) if protocol == 2 else b"=%d\r\ntxt:%b\r\n" % (len(content) + 4, content)


def bulks(values: list[bytes]) -> bytes:
    """Return *values* as an array of bulk strings."""
    return array([bulk(value) for value in values])


def parts(values: Iterable[bytes | None], head: bytes, nil: bytes = NIL) -> Iterator[bytes | memoryview]:
    """Yield *head* and *values* as bulk strings piece by piece: a long reply is never in memory as a whole."""
    gathered, size = [head], 0
    for value in values:
        if value is not None and len(value) >= PIECE_BYTES:
            gathered.append(b"$%d\r\n" % len(value))
            yield b"".join(gathered)
            view = memoryview(value)
            for at in range(0, len(value), PIECE_BYTES):
                yield view[at : at + PIECE_BYTES]
            gathered, size = [b"\r\n"], 0
        else:
            gathered.append(bulk_or_nil(value, nil))
            size += len(gathered[-1])
            if size >= PIECE_BYTES:
                yield b"".join(gathered)
                gathered, size = [], 0
    yield b"".join(gathered)


def array(replies: list[bytes]) -> bytes:
    """Return an array of *replies*, which are encoded already."""
    return b"*%d\r\n" % len(replies) + b"".join(replies)


def error(message: str | bytes) -> bytes:
    """Return an error reply; *message* begins with its code, such as ERR."""
    text = message.encode() if isinstance(message, str) else message
    return b"-" + text.translate(_NO_NEWLINES) + b"\r\n"


_NO_NEWLINES: Final = bytes(32 if code in b"\r\n" else code for code in range(256))

Encodable: TypeAlias = "int | bytes | str | Status | list[Encodable] | Set | dict[str, Encodable] | None"
"""What encode() takes."""


class Status(str):
    """A simple string, in what encode() takes."""

    __slots__ = ()


class Set(list["Encodable"]):
    """A set, in what encode() takes."""

    __slots__ = ()


def encode(value: Encodable, protocol: int) -> bytes:
    """Return a reply built of lists, maps, ints, strings and None; for replies whose speed does not matter."""
    if value is None:
        return NIL if protocol == 2 else NIL3
    if isinstance(value, list):
        sign = b"~" if isinstance(value, Set) and protocol > 2 else b"*"
        return b"%b%d\r\n%b" % (sign, len(value), b"".join(encode(element, protocol) for element in value))
    if isinstance(value, dict):
        pairs = b"".join(encode(part, protocol) for pair in value.items() for part in pair)
        return (b"*%d\r\n" % (2 * len(value)) if protocol == 2 else b"%%%d\r\n" % len(value)) + pairs
    if isinstance(value, int):
        return integer(value)
    if isinstance(value, Status):
        return b"+%b\r\n" % value.encode()
    return bulk(value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape"))
