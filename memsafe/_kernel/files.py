"""Reading the kernel's files under a root.

A fact that is missing (ENOENT: this kernel or this cgroup has no such file), one that cannot be read (EACCES and the
like) and one that makes no sense (EBADMSG) stay apart: every failure is a KernelError that names the file.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

from memsafe.errors import KernelError

if TYPE_CHECKING:
    from typing import Protocol

    class Reader(Protocol):
        """Who has read files already, see kept.py. None: read it yourself."""

        def read(self, path: str, *, again: bool = False) -> bytes | None: ...
        def renew(self) -> None: ...
        def is_directory(self, path: str) -> bool | None: ...


Root: TypeAlias = str | os.PathLike[str]
"""The directory that stands for "/": a tree of proc and sys files is a machine."""

UNLIMITED = 2**63 - 1
"""What every unlimited value is read as: larger than any amount of memory."""

# v1 rounds LONG_MAX down to a page, which differs between 4 KiB and 64 KiB pages; some readers print 2**64 - 1.
_UNLIMITED_FROM = UNLIMITED - 2**20

# ENODEV: a cgroup's file whose cgroup was removed after it was opened. ESRCH: a /proc/<pid> whose process is gone.
_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ESRCH})


class _Ahead(threading.local):
    """Who answers for this thread from what was read together; see kept.py."""

    reader: Reader | None = None


ahead = _Ahead()

_CHUNK_BYTES = 16 * 1024
_FILE_BYTES_MAX = 2**20


def under(root: Root, path: str) -> str:
    """Return the absolute *path* as it lies under *root*."""
    prefix = os.fspath(root).rstrip("/")
    return prefix + path


def read(path: str, *, max_bytes: int = _FILE_BYTES_MAX, again: bool = False) -> bytes:
    """Return all of the file at *path*; read after all that was asked for before, where *again* says so.

    Raises:
        KernelError: It is missing, cannot be read, or is larger than *max_bytes*.
    """
    if ahead.reader is not None and (text := ahead.reader.read(path, again=again)) is not None:
        return text
    try:
        # O_NONBLOCK: a FIFO laid in the way must not hang the reader; the kernel's own files ignore it.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise failed(error, path) from None
    except ValueError:
        raise KernelError(errno.EINVAL, f"open {path!r}", "the path holds a NUL byte") from None
    try:
        return _read_all(fd, path, max_bytes)
    except OSError as error:
        raise error if isinstance(error, KernelError) else failed(error, path) from None
    finally:
        with suppress(OSError):  # it is closed all the same, and what was read was read
            os.close(fd)


def renew() -> None:
    """Have what is read from here on be read later than all that was read so far."""
    if ahead.reader is not None:
        ahead.reader.renew()


def _read_all(fd: int, path: str, max_bytes: int) -> bytes:
    data = os.read(fd, _CHUNK_BYTES)
    if not data:
        return data
    chunks = []
    total_bytes = 0
    # A short read is no end: seq files stop at a whole record.
    while data:
        chunks.append(data)
        total_bytes += len(data)
        if total_bytes > max_bytes:
            raise KernelError(errno.EFBIG, f"read {path}", f"more than {max_bytes} bytes")
        data = os.read(fd, max(_CHUNK_BYTES, total_bytes))
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def read_optional(path: str, *, again: bool = False) -> bytes | None:
    """Return all of the file at *path* as read() does, or None where there is none.

    Raises:
        KernelError: It is there and cannot be read.
    """
    try:
        return read(path, again=again)
    except KernelError as error:
        if is_missing(error):
            return None
        raise


def read_link(path: str) -> str:
    """Return where the symbolic link at *path* leads.

    Raises:
        KernelError: It is missing, is no link, or cannot be read.
    """
    try:
        return os.readlink(path)  # noqa: PTH115 - a path under an injected root, and often asked for
    except OSError as error:
        raise failed(error, path, "readlink") from None
    except ValueError:
        raise KernelError(errno.EINVAL, f"readlink {path!r}", "the path holds a NUL byte") from None


def names(path: str) -> list[str]:
    """Return what the directory at *path* holds.

    Raises:
        KernelError: It is missing, is no directory, or cannot be read.
    """
    try:
        return os.listdir(path)  # noqa: PTH208 - a path under an injected root
    except OSError as error:
        raise failed(error, path, "list") from None
    except ValueError:
        raise KernelError(errno.EINVAL, f"list {path!r}", "the path holds a NUL byte") from None


def is_directory(path: str) -> bool:
    """Whether there is a directory at *path* that this process can see."""
    if ahead.reader is not None and (found := ahead.reader.is_directory(path)) is not None:
        return found
    return os.path.isdir(path)  # noqa: PTH112 - a path under an injected root, and often asked for


def is_missing(error: OSError) -> bool:
    """Whether *error* says that the file, its cgroup or its process is not there."""
    return error.errno in _MISSING


def failed(error: OSError, path: str, call: str = "read") -> KernelError:
    """Return *error* as the KernelError of *call* on *path*."""
    return KernelError(error.errno or errno.EIO, f"{call} {path}")


def garbage(path: str, detail: str) -> KernelError:
    """Return the error for a file that was read and makes no sense."""
    return KernelError(errno.EBADMSG, f"read {path}", detail)


def lacking(path: str, field: str) -> KernelError:
    """Return the error for a file that lacks *field*: this kernel may be too old for it."""
    return KernelError(errno.ENODATA, f"read {path}", f"it has no {field}")


def count(text: bytes, path: str) -> int:
    """Return the number that *text* is; *path* is for the error.

    Raises:
        KernelError: It is not a plain decimal number of at most 64 bits.
    """
    digits = text.strip()
    # int() would also take signs, underscores and, after decoding, other scripts' digits.
    if not digits.isdigit() or len(digits) > 20:
        raise garbage(path, f"{digits[:40]!r} is not a number")
    return int(digits)


def limit(text: bytes, path: str) -> int:
    """Return the limit that *text* is, ``max`` and v1's spellings of it as UNLIMITED. 0 is a real limit.

    Raises:
        KernelError: It is neither ``max`` nor a number.
    """
    if text.strip() == b"max":
        return UNLIMITED
    value = count(text, path)
    return UNLIMITED if value >= _UNLIMITED_FROM else value


def read_count(path: str, *, again: bool = False) -> int | None:
    """Return the number in the file at *path* as read() does, or None where there is no such file."""
    text = read_optional(path, again=again)
    return None if text is None else count(text, path)


def read_limit(path: str) -> int | None:
    """Return the limit in the file at *path* (see limit()), or None where there is no such file."""
    text = read_optional(path)
    return None if text is None else limit(text, path)


class Flat:
    """A flat keyed file such as memory.stat or memory.events: one ``key value`` a line."""

    __slots__ = ("_text", "path")

    def __init__(self, text: bytes, path: str) -> None:
        self.path = path
        self._text = b"\n" + text

    def get(self, key: bytes) -> int | None:
        """Return the value of *key*, or None where the file has no such key."""
        # Few of some sixty lines are ever asked for: they are not all taken apart.
        _, found, rest = self._text.partition(b"\n" + key + b" ")
        return count(rest.partition(b"\n")[0], self.path) if found else None

    def as_dict(self) -> dict[str, int]:
        """Return every key with its value.

        Raises:
            KernelError: A value is not a number.
        """
        words = self._text.split()
        pairs = zip(words[::2], words[1::2], strict=False)
        return {key.decode("ascii", "replace"): count(value, self.path) for key, value in pairs}


class Labelled:
    """A labelled file such as /proc/meminfo or /proc/self/status: ``Label:  value [kB]``, one a line."""

    __slots__ = ("_text", "path")

    def __init__(self, text: bytes, path: str) -> None:
        self.path = path
        self._text = b"\n" + text

    def get(self, label: bytes) -> bytes | None:
        """Return what stands after ``label:``, or None where the file has no such line."""
        _, found, rest = self._text.partition(b"\n" + label + b":")
        return rest.partition(b"\n")[0].strip() if found else None

    def count(self, label: bytes) -> int | None:
        """Return the number after *label*, or None where the file has no such line."""
        value = self.get(label)
        return None if value is None else count(value, self.path)

    def size_bytes(self, label: bytes) -> int | None:
        """Return the kilobytes after *label* as bytes, or None where the file has no such line."""
        value = self.get(label)
        if value is None:
            return None
        number, _, unit = value.partition(b" ")
        if unit.strip() != b"kB":
            raise garbage(self.path, f"{label.decode()} is {value[:40]!r}, which is not in kB")
        return count(number, self.path) * 1024

    def required_bytes(self, label: bytes) -> int:
        """Return the kilobytes after *label* as bytes.

        Raises:
            KernelError: There is no such line, or it makes no sense.
        """
        size_bytes = self.size_bytes(label)
        if size_bytes is None:
            raise lacking(self.path, label.decode())
        return size_bytes
