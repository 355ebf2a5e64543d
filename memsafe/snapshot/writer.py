"""What a snapshot's `write` writes to, whichever engine calls it: a buffered file that spares the disk and the cache.

Three layers: SnapshotWriter buffers, a compressor packs where that is asked for, and ImageFile is the file itself.
"""

from __future__ import annotations

import errno
import inspect
import io
import os
import time
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from operator import index
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

from memsafe import _native
from memsafe.errors import UnsupportedError
from memsafe.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _typeshed import ReadableBuffer

    from memsafe.sizes import Size
    from memsafe.snapshot.atomic import StrPath

ChecksumName: TypeAlias = Literal["crc32", "sha256"]

BUFFER_BYTES = 256 * 1024

WINDOW_BYTES = 4 * 1024 * 1024
"""What is handed to the disk at once. While one window is being written the next one is filled: no more than two, and
what a rewritten header adds, are in the page cache."""

# Rate limits: how much of what was not used may be made up for, and the least that is worth a call.
_SLACK_S = 0.05
_PIECE_BYTES_MIN = 4096

# The compressor's result is in memory at once, so a large write is packed piece by piece.
_PACKED_BYTES_MAX = 1024 * 1024

# What sync_file_range says where there is no such thing: an old sandbox, a file system of its own. EPERM is seccomp's.
_NO_WRITEBACK = frozenset({errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP, errno.EPERM})


def check_request(path: StrPath, write: Callable[..., object]) -> None:
    """Raise TypeError unless *path* is one, and calling *write* does what it says rather than only begin it."""
    os.fsdecode(path)
    if not callable(write):
        raise TypeError(f"write must be callable, not {type(write).__name__}")
    for code in (write, type(write).__call__):
        if inspect.iscoroutinefunction(code) or inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
            raise TypeError(f"write must write when it is called: {write!r} is a coroutine or generator function")


def check_returned(returned: object) -> None:
    """Raise TypeError where what `write` returned is what should have written, not begun yet.

    Of a partial, a lambda or an object with such a method no more can be seen before the call.
    """
    if inspect.isawaitable(returned) or inspect.isgenerator(returned) or inspect.isasyncgen(returned):
        if inspect.iscoroutine(returned):
            returned.close()  # it was never awaited, which is said here
        raise TypeError(f"write must write before it returns, but returned {returned!r}, which nobody will run")


@dataclass(frozen=True, slots=True)
class Zstd:
    """Compression by Zstandard, in one frame with a checksum of its own; ``zstd -d`` reads it.

    Attributes:
        level: As of ``zstd``: 1 to 22, or negative for speed.
        threads: Threads of the library's that pack in the background; 0: none. They are the writing process's own.
    """

    level: int = 3
    threads: int = 0


class Written(NamedTuple):
    """What became of an image.

    Attributes:
        content_bytes: What `write` wrote, before compression.
        checksum: Of the file, ``"crc32:…"`` or ``"sha256:…"`` in hexadecimal; None where none was asked for.
    """

    content_bytes: int
    checksum: str | None


class Checksum(Protocol):
    """A running checksum."""

    @property
    def name(self) -> str:
        """Return what it is called."""

    def update(self, data: memoryview, /) -> None:
        """Take in *data*."""

    def hexdigest(self) -> str:
        """Return what came of it."""


class _Crc32:
    name = "crc32"

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def _sha256() -> Checksum:
    import hashlib  # it loads OpenSSL: for those who ask

    return hashlib.sha256()


_CHECKSUMS: dict[str, Callable[[], Checksum]] = {"crc32": _Crc32, "sha256": _sha256}


@dataclass(frozen=True, slots=True)
class WriterOptions:
    """How an image is written. Checked, and all modules loaded, before anything is begun: see of().

    Attributes:
        checksum: Which one of the file to take, or None.
        new_compressor: Makes what the file is compressed with, or None.
        max_bytes_per_s: How fast the file may be written at most, or None.
    """

    checksum: ChecksumName | None = None
    new_compressor: Callable[[], Any] | None = None
    max_bytes_per_s: int | None = None

    @classmethod
    def of(
        cls,
        checksum: ChecksumName | None = None,
        compress: Literal["zstd"] | Zstd | None = None,
        max_bytes_per_s: Size | None = None,
    ) -> WriterOptions:
        """Return what the caller of an engine asked for.

        Raises:
            ValueError: It makes no sense.
            UnsupportedError: The library that it wants is not installed.
        """
        if checksum is not None and checksum not in _CHECKSUMS:
            raise ValueError(f"checksum must be one of {', '.join(_CHECKSUMS)}, or None: {checksum!r}")
        rate = None if max_bytes_per_s is None else parse_size(max_bytes_per_s, what="max_bytes_per_s")
        if rate == 0:
            raise ValueError("max_bytes_per_s must be above 0, or None for no limit")
        zstd = Zstd() if compress == "zstd" else compress
        if zstd is not None and not isinstance(zstd, Zstd):
            raise ValueError(f"compress must be 'zstd', a Zstd, or None: {zstd!r}")
        return cls(checksum, _packing(zstd) if zstd is not None else None, rate)

    def new_checksum(self) -> Checksum | None:
        """Return an empty checksum, or None."""
        return _CHECKSUMS[self.checksum]() if self.checksum is not None else None


def _packing(options: Zstd) -> Callable[[], Any]:
    """Return what makes a compressor of the standard library's, or of its backport; it imports nothing any more.

    Raises:
        ValueError: There is no such level, or no so many threads.
        UnsupportedError: It is not installed.
    """
    zstd = _zstd()
    parameter = zstd.CompressionParameter
    settings = {
        parameter.compression_level: options.level,
        parameter.nb_workers: options.threads,
        parameter.checksum_flag: 1,
    }
    try:
        fewest, most = parameter.nb_workers.bounds()
        if not fewest <= options.threads <= most:  # the library would take the nearest
            raise ValueError(f"from {fewest} to {most} threads")
        zstd.ZstdCompressor(options=settings)
    except (ValueError, TypeError, OverflowError, zstd.ZstdError) as error:
        raise ValueError(f"{options} makes no sense: {error}") from None
    return partial(zstd.ZstdCompressor, options=settings)


def _zstd() -> Any:
    for module in ("compression.zstd", "backports.zstd"):
        with suppress(ImportError):
            return import_module(module)
    raise UnsupportedError(
        "compress='zstd' needs compression.zstd, which Python 3.14 has where it was built with libzstd, or for older "
        "ones its backport: pip install 'memsafe[zstd]'"
    )


class Pace:
    """A token bucket that holds next to nothing: what was not used in a long wait is not made up for by a burst.

    Args:
        bytes_per_s: How fast.
        clock, sleep: Seconds, never going back, and how to wait for some: time.monotonic and time.sleep.
    """

    def __init__(
        self,
        bytes_per_s: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._next_s = clock()
        self.piece_bytes = max(_PIECE_BYTES_MIN, int(bytes_per_s * _SLACK_S))

    def wait(self) -> None:
        """Return when the next piece may be written."""
        while (wait_s := self._next_s - self._clock()) > 0:
            self._sleep(wait_s)

    def note(self, written_bytes: int) -> None:
        """Charge what was written."""
        self._next_s = max(self._next_s, self._clock() - _SLACK_S) + written_bytes / self._bytes_per_s


@dataclass(slots=True)
class _Range:
    """What was written since the last window was handed over."""

    start: int = 0
    end: int = 0
    written_bytes: int = 0

    def add(self, position: int, size_bytes: int) -> None:
        end = position + size_bytes
        if self.written_bytes:
            self.start, self.end = min(self.start, position), max(self.end, end)
        else:
            self.start, self.end = position, end
        self.written_bytes += size_bytes


class Disk:
    """The calls by which ImageFile hands its pages over; tests of what a disk may answer put others in their place."""

    def write_back(self, fd: int, pages: _Range, *, wait: bool) -> None:
        """Have *pages* written, and wait until they are if so told: sync_file_range(2)."""
        result = _native.lib.ms_writeback(fd, pages.start, pages.end - pages.start, wait)
        _native.check(result, "sync_file_range")

    def drop(self, fd: int, pages: _Range) -> None:
        """Take *pages* out of the page cache; an empty range means the whole file (posix_fadvise(2))."""
        os.posix_fadvise(fd, pages.start, pages.end - pages.start, os.POSIX_FADV_DONTNEED)

    def sync(self, fd: int) -> None:
        """Have all of the file on disk."""
        os.fsync(fd)


class ImageFile(io.FileIO):
    """The file of an image: written at a bounded rate, handed to the disk window by window, and out of the page cache.

    A window is handed to the disk when it is full; then the one before is waited for and dropped from the cache. So
    finish() has little left to sync, and the cache, which counts against the cgroup of the process that is being saved,
    stays small. Any failure is remembered: the kernel tells of a lost page once, and a `write` that swallows that must
    not end as an image. One thread at a time.

    Attributes:
        options: How it is written.
        fd: The file's number; fileno() fails once `write` has closed its file.
        checksum: Of what was written so far, or None.
    """

    def __init__(self, fd: int, options: WriterOptions | None = None, *, disk: Disk | None = None) -> None:
        """Write to *fd*, an empty file, which stays the caller's."""
        super().__init__(fd, "wb", closefd=False)
        self.options = options or WriterOptions()
        self.checksum = self.options.new_checksum()
        rate = self.options.max_bytes_per_s
        self._pace = Pace(rate) if rate is not None else None
        self._disk = disk or Disk()
        self.fd = fd
        self._failure: Exception | None = None
        self._position = 0
        self._filling = _Range()
        self._under_way: _Range | None = None
        self._spreads = True

    @property
    def refuses_seek(self) -> str | None:
        """Why its bytes can only come one after the other; None where they need not."""
        if self.options.new_compressor is not None:
            return "the image is compressed as it is written"
        if self.options.checksum is not None:
            return f"the {self.options.checksum} is taken as the image is written"
        return None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write a piece of *data*, and return its size in bytes."""
        with self.guarded():
            piece = memoryview(data).cast("B")[: WINDOW_BYTES - self._filling.written_bytes]
            if self._pace is not None:
                piece = piece[: self._pace.piece_bytes]
                self._pace.wait()
            size_bytes = super().write(piece)
            if self._pace is not None:
                self._pace.note(size_bytes)
            if self.checksum is not None:
                self.checksum.update(piece[:size_bytes])
            self._filling.add(self._position, size_bytes)
            self._position += size_bytes
            if self._filling.written_bytes >= WINDOW_BYTES:
                self._hand_over()
        return size_bytes

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go on writing elsewhere."""
        self._position = super().seek(offset, whence)
        return self._position

    def seekable(self) -> bool:
        """Whether seek() is possible."""
        return self.refuses_seek is None and super().seekable()

    def finish(self) -> int:
        """Have all of it on disk, and none of it in the page cache; return its size in bytes.

        Raises:
            OSError: It could not be written, now or earlier.
        """
        with self.guarded():
            self._disk.sync(self.fd)
            self._drop(_Range())
            return os.fstat(self.fd).st_size

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Remember a failure in here, or raise the earlier one: no image may come of it, whatever `write` does."""
        if self._failure is not None:
            code = getattr(self._failure, "errno", None) or errno.EIO
            raise OSError(code, f"an earlier write of this image failed: {self._failure}") from self._failure
        try:
            yield
        except Exception as error:
            self._failure = error
            raise

    def _hand_over(self) -> None:
        full, before = self._filling, self._under_way
        self._filling, self._under_way = _Range(), full
        if not self._spreads:
            return
        try:
            self._disk.write_back(self.fd, full, wait=False)
            if before is not None:
                self._disk.write_back(self.fd, before, wait=True)
                self._drop(before)
        except OSError as error:
            if error.errno not in _NO_WRITEBACK:
                raise
            self._spreads = False

    def _drop(self, pages: _Range) -> None:
        with suppress(OSError):  # it is advice
            self._disk.drop(self.fd, pages)


class _Compressed(io.RawIOBase):
    """Packs what is written to it into an ImageFile."""

    def __init__(self, image: ImageFile, compressor: Any) -> None:
        self._image = image
        self._compressor = compressor
        self.taken_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        piece = memoryview(data).cast("B")[:_PACKED_BYTES_MAX]
        with self._image.guarded():
            packed = self._compressor.compress(piece)
        self._put(packed)
        self.taken_bytes += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self.taken_bytes

    def finish(self) -> None:
        self._put(self._compressor.flush())

    def _put(self, packed: bytes) -> None:
        rest = memoryview(packed)
        while rest:
            rest = rest[self._image.write(rest) :]


class SnapshotWriter(io.BufferedWriter):
    """A buffered binary file with progress(). Closing it is allowed and ends nothing.

    It is seekable, unless a checksum or compression was asked for: then seek() raises io.UnsupportedOperation. fileno()
    always does: what others write through it would be paced, checked and kept out of the page cache by nobody. tell()
    counts what was written, before compression.
    """

    def __init__(self, image: ImageFile, report: Callable[[int, int], None]) -> None:
        """Write to *image*; progress goes to *report*."""
        new_compressor = image.options.new_compressor
        self._image = image
        self._compressed = _Compressed(image, new_compressor()) if new_compressor is not None else None
        self._report = report
        super().__init__(self._compressed or image, BUFFER_BYTES)

    def progress(self, done: int, total: int) -> None:
        """Tell the job's owner that *done* of *total* is written, in any unit. Cheap: calls in quick succession are
        thinned out, the last one arrives.
        """
        self._report(index(done), index(total))

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go on writing elsewhere."""
        self._check_seekable("seek")
        return super().seek(offset, whence)

    def truncate(self, size: int | None = None, /) -> int:
        """Cut the file off."""
        self._check_seekable("truncate")
        return super().truncate(size)

    def fileno(self) -> int:
        """Raise io.UnsupportedOperation, as io.BytesIO does: NumPy and others then use write()."""
        raise io.UnsupportedOperation("fileno: an image is written by write(), and synced by the snapshot itself")

    def finish(self) -> Written:
        """Have everything on disk. For the engine, when `write` has returned.

        Raises:
            OSError: It could not be written, now or earlier.
        """
        if not self.closed:
            self.flush()
        if self._compressed is not None:
            self._compressed.finish()
        size_bytes = self._image.finish()
        checksum = self._image.checksum
        return Written(
            self._compressed.taken_bytes if self._compressed is not None else size_bytes,
            f"{checksum.name}:{checksum.hexdigest()}" if checksum is not None else None,
        )

    def _check_seekable(self, what: str) -> None:
        if (why := self._image.refuses_seek) is not None:
            raise io.UnsupportedOperation(f"{what}: {why}")
