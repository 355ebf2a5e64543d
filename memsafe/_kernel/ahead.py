"""Reading again, in one native call, what was read the last time.

A look at the machine opens, reads and closes some twenty files, and each of these calls gives the GIL away: beside busy
threads, each may wait a switch interval (5 ms) to get it back. Who looks again and again reads them all at once.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from memsafe._kernel import files
from memsafe._native import ffi, lib
from memsafe.errors import KernelError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_BUFFER_BYTES = 256 * 1024
_FILES_MAX = 128


class ReadAhead:
    """While it is entered, files.read() and files.is_directory() of this thread answer from one reading of all files.

    Which files those are, it learns from what was asked for before; others are read one by one. Used by one thread at
    a time, and not for long: what it holds is as old as its entering.
    """

    def __init__(self) -> None:
        self._buffer: Any = ffi.new("char[]", _BUFFER_BYTES)
        self._bytes = ffi.buffer(self._buffer)
        self._known: dict[str, int] = {}
        self._keep: list[Any] = []
        self._files: Any = ffi.new("ms_file[]", 0)
        self._asked: dict[str, None] = {}
        self._fresh = False

    def describe(self, look: Any) -> None:
        """Write into a native ms_waiter_look what to read; who has had that read says so by was_read()."""
        look.files, look.file_count = self._files, len(self._known)
        look.buffer, look.buffer_capacity = self._buffer, _BUFFER_BYTES

    def was_read(self) -> None:
        """Note that the files were read just now: the next entering reads nothing."""
        self._fresh = True

    def __enter__(self) -> Self:
        if not self._fresh:
            lib.ms_files_read(self._files, len(self._known), self._buffer, _BUFFER_BYTES)
        self._fresh = False
        self._asked.clear()
        files.ahead.reader = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        files.ahead.reader = None
        if not self._asked.keys() <= self._known.keys():
            everything = {**self._known, **self._asked}
            self._learn(list(everything if len(everything) <= _FILES_MAX else self._asked))

    def read(self, path: str) -> bytes | None:
        """Return what was read ahead at *path*, None where nothing was.

        Raises:
            KernelError: It could not be read.
        """
        result, offset = self._look_up(path)
        if result >= 0:
            return bytes(self._bytes[offset : offset + result])
        if result in {-errno.ENOBUFS, -errno.EISDIR}:
            return None
        raise KernelError(-result, f"read {path}")

    def is_directory(self, path: str) -> bool | None:
        """Whether *path* is a directory, None where that was not found out."""
        result, _ = self._look_up(path)
        return None if result == -errno.ENOBUFS else result == -errno.EISDIR

    def _look_up(self, path: str) -> tuple[int, int]:
        if "\0" not in path:
            self._asked[path] = None
        index = self._known.get(path)
        if index is None:
            return -errno.ENOBUFS, 0
        return self._files[index].result, self._files[index].offset

    def _learn(self, paths: list[str]) -> None:
        # cffi does not keep what a struct points to.
        self._keep = [ffi.new("char[]", os.fsencode(path)) for path in paths]
        self._files = ffi.new("ms_file[]", [{"path": path} for path in self._keep])
        self._known = {path: index for index, path in enumerate(paths)}
