"""Redis RDB files that hold strings: written as a stream, read as a stream.

Written is format version 9: the newest that Redis 5, 6 and 7, Valkey and KeyDB all load (a server refuses a version
above its own: 9 up to Redis 6.2, 10 in 7.0, 11 in 7.2, 12 in 7.4), and later ones changed nothing about strings,
expiries or the checksum. Read are versions 1 to 12. The format is what redis/src/rdb.h and rdb.c do.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import BinaryIO, Protocol, TypeAlias

import anycrc
import lzf

from memsafe.errors import MemsafeError

Entry: TypeAlias = tuple[bytes, bytes, int | None]
"""A key, its value, and when it expires: milliseconds since 1970, or None."""

VERSION = 9
NEWEST_READABLE_VERSION = 12

_MAGIC = b"REDIS"
_FIRST_VERSION_WITH_CHECKSUM = 5

_STRING = 0
_SLOT_INFO = 244
_FUNCTION2 = 245
_FUNCTION_PRE_RELEASE = 246
_MODULE_AUX = 247
_IDLE = 248
_FREQ = 249
_AUX = 250
_RESIZEDB = 251
_EXPIRETIME_MS = 252
_EXPIRETIME = 253
_SELECTDB = 254
_EOF = 255

_TYPE_NAMES = {
    **dict.fromkeys((1, 10, 14, 18), "list"),
    **dict.fromkeys((2, 11, 20), "set"),
    **dict.fromkeys((3, 5, 12, 17), "sorted set"),
    **dict.fromkeys((4, 9, 13, 16, 22, 23, 24, 25), "hash"),
    **dict.fromkeys((6, 7), "module's value"),
    **dict.fromkeys((15, 19, 21), "stream"),
}

_CHUNK_BYTES = 256 * 1024
"""How much is gathered before it is written, and read at once: what a saving child holds beside the data."""

# Redis compresses strings longer than 20 bytes where that saves 4 bytes or more (rdbSaveRawString).
_LZF_SHORTEST_BYTES = 21
_LZF_SAVED_BYTES = 4
_LZF_LONGEST_BYTES = 1 << 20  # not Redis's: compressing needs as much again, which a saving child must not take
_LZF_READABLE_BYTES = 2**32 - 1  # python-lzf hands its lengths on as unsigned int
_LZF_RATIO_MAX = 88  # three bytes of back reference stand for at most 264

_crc64 = anycrc.Model("CRC64-REDIS").calc  # Jones' polynomial, reflected, from 0; (data, value so far) -> value


class RDBError(MemsafeError):
    """A file is not a whole, intact RDB file, or holds what is not supported here.

    Attributes:
        name: The file.
        offset: Where the offending bytes begin, counted from the file's first.
        found, expected: What is there, what should be.
    """

    def __init__(self, name: str, offset: int, found: str, expected: str) -> None:
        super().__init__(f"{name}, at byte {offset}: found {found}, expected {expected}")
        self.name = name
        self.offset = offset
        self.found = found
        self.expected = expected


class Writer(Protocol):
    """What write() needs of a file."""

    def write(self, data: bytes, /) -> object:
        """Take all of *data*."""
        ...


# ---- writing


def write(
    out: Writer,
    entries: Iterable[Entry],
    *,
    total_hint: int | None = None,
    progress: Callable[[int, int | None], object] | None = None,
    aux: Mapping[str, str | int] | None = None,
    compress: bool = True,
) -> int:
    """Write *entries* to *out* as one RDB file, database 0, and return how many there were.

    Nothing is gathered beyond one chunk of 256 KiB (a larger value is handed on as it is), so that a forked child that
    writes copies little. The same key twice gives a file that redis-server refuses.

    Args:
        out: A binary file; a buffered one, as each write() must take everything.
        entries: (key, value, expires_at_ms) each; expires_at_ms is milliseconds since 1970, or None for never.
        total_hint: How many entries will come, for the loader to size its table and for *progress*.
        progress: Called with (entries written, total_hint) once a chunk.
        aux: Informational fields beyond, or instead of, redis-ver, redis-bits, ctime and aof-base; "used-mem" (bytes)
            is one that redis-server logs.
        compress: Compress values with LZF where that is shorter, as Redis does by default.

    Raises:
        ValueError: An expiry before 1970 or beyond 64 bits; 8 EiB of aux.
        OSError: From *out*.
    """
    crc = count = gathered = 0
    parts = [_header(total_hint, aux or {})]
    lengths = _SHORT_LENGTHS

    def hand_on(data: bytes) -> None:
        nonlocal crc
        crc = _crc64(data, crc)
        out.write(data)

    def flush() -> None:
        data = b"".join(parts)
        parts.clear()
        hand_on(data)

    for key, value, expires_at_ms in entries:
        if expires_at_ms is not None:
            parts.append(_expiry(expires_at_ms))
        key_bytes, value_bytes = len(key), len(value)
        parts += (b"\0", lengths[key_bytes] if key_bytes < 64 else _length(key_bytes), key)
        if value_bytes < _LZF_SHORTEST_BYTES:
            parts += (lengths[value_bytes], value)
        else:
            head, value = _long_value(value, compress=compress)
            value_bytes = len(value)
            parts.append(head)
            if value_bytes < _CHUNK_BYTES:
                parts.append(value)
            else:
                flush()
                hand_on(value)
        count += 1
        gathered += key_bytes + value_bytes + 16
        if gathered >= _CHUNK_BYTES:
            flush()
            gathered = 0
            if progress is not None:
                progress(count, total_hint)
    parts.append(bytes([_EOF]))
    flush()
    out.write(crc.to_bytes(8, "little"))
    if progress is not None:
        progress(count, total_hint)
    return count


def _long_value(value: bytes, *, compress: bool) -> tuple[bytes, bytes]:
    """Return what stands before *value*, and *value* as it is written: compressed if that saves enough."""
    plain_bytes = len(value)
    if compress and plain_bytes <= _LZF_LONGEST_BYTES:
        packed: bytes | None = lzf.compress(value, plain_bytes - _LZF_SAVED_BYTES)
        if packed is not None:
            return b"\xc3" + _length(len(packed)) + _length(plain_bytes), packed
    return _length(plain_bytes), value


def _header(total_hint: int | None, aux: Mapping[str, str | int]) -> bytes:
    fields = {"redis-ver": "6.2.0", "redis-bits": 64, "ctime": int(time.time()), **aux}
    fields.setdefault("aof-base", 0)
    parts = [b"%s%04d" % (_MAGIC, VERSION)]
    for name, value in fields.items():
        parts += (bytes([_AUX]), _raw(name.encode()), _raw(str(value).encode()))
    parts.append(bytes([_SELECTDB, 0]))
    if total_hint is not None:
        parts += (bytes([_RESIZEDB]), _length(total_hint), _length(0))
    return b"".join(parts)


def _raw(data: bytes) -> bytes:
    return _length(len(data)) + data


def _length(n: int) -> bytes:
    """Return *n* as RDB writes lengths: 6, 14, 32 or 64 bits, big-endian."""
    if n < 1 << 6:
        return n.to_bytes(1, "big")
    if n < 1 << 14:
        return (n | 0x4000).to_bytes(2, "big")
    if n < 1 << 32:
        return b"\x80" + n.to_bytes(4, "big")
    return b"\x81" + n.to_bytes(8, "big")


_SHORT_LENGTHS = [_length(n) for n in range(64)]


def _expiry(expires_at_ms: int) -> bytes:
    if not 0 <= expires_at_ms < 1 << 63:
        raise ValueError(f"an expiry must be milliseconds since 1970 in 63 bits, not {expires_at_ms}")
    return b"\xfc" + expires_at_ms.to_bytes(8, "little")


# ---- reading


@dataclass(frozen=True, slots=True)
class Summary:
    """What check() found in an intact file."""

    version: int
    entries: int
    expiring: int
    size_bytes: int
    checksummed: bool
    aux: dict[str, str]

    def as_dict(self) -> dict[str, object]:
        """Return the fields as plain data."""
        return {name: getattr(self, name) for name in self.__slots__}


def read(source: str | os.PathLike[str] | BinaryIO) -> Iterator[Entry]:
    """Yield (key, value, expires_at_ms) for every string in an RDB file, expired or not.

    The file is read once, in order: **what was yielded may be trusted only when the iterator ends by itself**, for the
    checksum stands at the end. A file that is cut short anywhere, altered, or followed by anything never ends that way.
    Where half a load would do harm, run check() before. No more is allocated than the file can hold.

    Args:
        source: A path, or a binary file positioned at the start; one that cannot seek will do. It is not closed.

    Raises:
        RDBError: Not an RDB file; one of a version above 12; cut short; a checksum that is not the content's (none is
            checked where the file has none: before version 5, or zero); a length beyond the file's end; a value that is
            no string; a key outside database 0.
        OSError: It could not be opened or read.
    """
    with _opened(source) as file:
        yield from _Parser(file).entries()


def check(source: str | os.PathLike[str] | BinaryIO) -> Summary:
    """Read a whole RDB file as read() does, keep nothing, and say what is in it.

    Args:
        source: As for read().

    Raises:
        RDBError, OSError: As read() does.
    """
    with _opened(source) as file:
        return _Parser(file).summary()


def _opened(source: str | os.PathLike[str] | BinaryIO) -> AbstractContextManager[BinaryIO | io.FileIO]:
    return io.FileIO(source) if isinstance(source, (str, os.PathLike)) else nullcontext(source)


class _Parser:
    """One pass over one file: a window of bytes, where it stands, and the checksum of what lies before it."""

    def __init__(self, file: BinaryIO | io.FileIO) -> None:
        self._file = file
        self._name = str(getattr(file, "name", "RDB data"))
        self._unread_bytes = _remaining_bytes(file)
        self._window = b""
        self._position = 0
        self._window_offset = 0
        self._crc = 0
        self.version = 0
        self.checksummed = False
        self.aux: dict[str, str] = {}

    def entries(self) -> Iterator[Entry]:
        self._read_header()
        expires_at_ms: int | None = None
        database = 0
        byte, string = self._byte, self._string
        while (opcode := byte()) != _EOF:
            if opcode == _STRING:
                at = self.offset - 1
                key = string("a key")
                value = string("the value of", key)
                if database:
                    raise RDBError(self._name, at, f"key {_shown(key)} in database {database}", "only database 0")
                yield key, value, expires_at_ms
                expires_at_ms = None
            elif opcode == _EXPIRETIME_MS:
                expires_at_ms = int.from_bytes(self._take(8, "an expiry"), "little", signed=True)
            elif opcode == _EXPIRETIME:
                expires_at_ms = 1000 * int.from_bytes(self._take(4, "an expiry"), "little", signed=True)
            elif opcode == _SELECTDB:
                database = self._length()
            else:
                self._skip(opcode)
        self._read_end()

    def summary(self) -> Summary:
        count = expiring = 0
        for _, _, expires_at_ms in self.entries():
            count += 1
            expiring += expires_at_ms is not None
        return Summary(self.version, count, expiring, self.offset, self.checksummed, self.aux)

    @property
    def offset(self) -> int:
        return self._window_offset + self._position

    # -- the file's frame

    def _read_header(self) -> None:
        found = self._peek(9)
        if found[:5] != _MAGIC[: len(found)] or not found:
            raise RDBError(
                self._name, 0, repr(found) if found else "an empty file", "an RDB file, which begins b'REDIS'"
            )
        digits = self._take(9, "the header")[5:]
        if not digits.isdigit() or int(digits) < 1:
            raise RDBError(self._name, 5, repr(digits), "a format version such as b'0009'")
        self.version = int(digits)
        if self.version > NEWEST_READABLE_VERSION:
            expected = f"at most {NEWEST_READABLE_VERSION}: a newer server wrote it"
            raise RDBError(self._name, 5, f"format version {self.version}", expected)

    def _read_end(self) -> None:
        if self.version >= _FIRST_VERSION_WITH_CHECKSUM:
            crc = _crc64(self._window[: self._position], self._crc)
            at = self.offset
            stored = int.from_bytes(self._take(8, "the checksum"), "little")
            self.checksummed = stored != 0  # zero: the writer was told not to (rdbchecksum no)
            if stored not in (0, crc):
                raise RDBError(self._name, at, f"checksum {stored:016x}", f"{crc:016x}: the content was altered")
        if self._peek(1):
            # An append-only file may begin with an RDB: to stop here would silently drop what was written since.
            raise RDBError(self._name, self.offset, "more data", "the end of the file")

    def _skip(self, opcode: int) -> None:
        """Pass over what says nothing about strings, or say what it is that cannot be."""
        if opcode == _AUX:
            name = self._string("an AUX name")
            self.aux[name.decode(errors="replace")] = self._string("AUX field", name).decode(errors="replace")
        elif opcode == _RESIZEDB:
            self._length(), self._length()
        elif opcode == _IDLE:
            self._length()
        elif opcode == _FREQ:
            self._byte()
        elif opcode == _FUNCTION2:
            self._string("a function library")
        elif opcode == _SLOT_INFO:
            self._length(), self._length(), self._length()
        elif opcode == _MODULE_AUX:
            self._skip_module_aux()
        else:
            self._refuse(opcode)

    def _skip_module_aux(self) -> None:
        self._length(), self._length(), self._length()  # the module, and when it was to be loaded
        while kind := self._length():
            if kind in (1, 2):
                self._length()
            elif kind in (3, 4):
                self._take(4 if kind == 3 else 8, "a module's number")
            elif kind == 5:
                self._string("a module's string")
            else:
                raise RDBError(self._name, self.offset - 1, f"module opcode {kind}", "0 to 5")

    def _refuse(self, opcode: int) -> None:
        at = self.offset - 1
        if opcode == _FUNCTION_PRE_RELEASE:
            raise RDBError(
                self._name, at, "functions as a release candidate of Redis 7.0 wrote them", "a release's file"
            )
        if opcode not in _TYPE_NAMES:
            raise RDBError(self._name, at, f"unknown opcode {opcode}", "a key, an opcode from 244 on, or the end")
        key = self._string("a key")
        raise RDBError(self._name, at, f"a {_TYPE_NAMES[opcode]} (type {opcode}) under key {_shown(key)}", "a string")

    # -- its parts

    def _byte(self) -> int:
        position = self._position
        if position == len(self._window):
            return self._take(1, "an opcode or a length")[0]
        self._position = position + 1
        return self._window[position]

    def _length(self) -> int:
        at = self.offset
        first = self._byte()
        n = self._long_length(first)
        if n is None:
            raise RDBError(self._name, at, f"length byte 0x{first:02x}", "a plain length")
        return n

    def _long_length(self, first: int) -> int | None:
        """Return the length that *first* begins, or None if it begins a string's special encoding."""
        if first < 0x40:
            return first
        if first < 0x80:
            return (first & 0x3F) << 8 | self._byte()
        if first >= 0xC0:
            return None
        if first > 0x81:
            raise RDBError(self._name, self.offset - 1, f"length byte 0x{first:02x}", "0x80 or 0x81 for a long one")
        return int.from_bytes(self._take(4 if first == 0x80 else 8, "a length"), "big")

    def _string(self, what: str, key: bytes | None = None) -> bytes:
        position, window = self._position, self._window
        if position < len(window) and (n := window[position]) < 0x40 and position + n < len(window):
            self._position = position = position + 1 + n
            return window[position - n : position]
        at = self.offset
        first = self._byte()
        n_or_none = self._long_length(first)
        if n_or_none is not None:
            return self._take(n_or_none, what, key)
        if first <= 0xC2:
            return b"%d" % int.from_bytes(self._take(1 << first - 0xC0, what, key), "little", signed=True)
        if first == 0xC3:
            return self._compressed(at, what, key)
        raise RDBError(self._name, at, f"string encoding 0x{first:02x} for {_named(what, key)}", "0xc0 to 0xc3")

    def _compressed(self, at: int, what: str, key: bytes | None) -> bytes:
        packed_bytes, plain_bytes = self._length(), self._length()
        if plain_bytes > min(packed_bytes * _LZF_RATIO_MAX, _LZF_READABLE_BYTES) or not packed_bytes:
            found = f"{_named(what, key)} of {plain_bytes} bytes compressed to {packed_bytes}"
            raise RDBError(self._name, at, found, f"at most {_LZF_RATIO_MAX} to 1, and below 4 GiB")
        packed = self._take(packed_bytes, what, key)
        try:
            plain: bytes | None = lzf.decompress(packed, plain_bytes)
        except ValueError:
            plain = None
        if plain is None or len(plain) != plain_bytes:
            raise RDBError(
                self._name, at, f"broken LZF data for {_named(what, key)}", f"{plain_bytes} bytes of content"
            )
        return plain

    # -- the window

    def _take(self, n: int, what: str, key: bytes | None = None) -> bytes:
        """Return the next *n* bytes, which are (part of) *what*."""
        position = self._position
        if position + n > len(self._window):
            have = len(self._window) - position
            if self._unread_bytes is None or have + self._unread_bytes >= n:
                have = self._move_window(n)
            else:
                have += self._unread_bytes  # nothing is read, so nothing allocated, for a length that cannot be true
            if have < n:
                found = f"{have} byte{'s' * (have != 1)}, then the end of the file"
                raise RDBError(self._name, self.offset, found, f"{n} of {_named(what, key)}")
            position = 0
        self._position = position + n
        return self._window[position : position + n]

    def _peek(self, n: int) -> bytes:
        """Return the next *n* bytes, or all that are left if those are fewer, without passing them."""
        if self._position + n > len(self._window):
            self._move_window(n)
        return self._window[self._position : self._position + n]

    def _move_window(self, n: int) -> int:
        """Move the window up so that it holds *n* bytes from here, or all that are left; return how many.

        Where the file's size is unknown, it is read piece by piece: a length alone never allocates.
        """
        passed, rest = self._window[: self._position], self._window[self._position :]
        self._crc = _crc64(passed, self._crc)
        self._window_offset += self._position
        pieces, have = [rest], len(rest)
        while have < n and (piece := self._file.read(self._piece_bytes(n - have))):
            if self._unread_bytes is not None:
                self._unread_bytes = max(0, self._unread_bytes - len(piece))
            pieces.append(piece)
            have += len(piece)
        self._window, self._position = b"".join(pieces), 0
        return have

    def _piece_bytes(self, missing_bytes: int) -> int:
        return _CHUNK_BYTES if self._unread_bytes is None else max(_CHUNK_BYTES, missing_bytes)


def _remaining_bytes(file: BinaryIO | io.FileIO) -> int | None:
    """Return how much *file* has from where it stands, or None for a pipe and the like."""
    try:
        if not file.seekable():
            return None
        here = file.tell()
        end = file.seek(0, io.SEEK_END)
        file.seek(here)
    except (OSError, AttributeError):
        return None
    return max(0, end - here)


def _shown(key: bytes) -> str:
    return repr(key) if len(key) <= 64 else f"{key[:64]!r}… ({len(key)} bytes)"


def _named(what: str, key: bytes | None) -> str:
    return what if key is None else f"{what} {_shown(key)}"
