"""A memory cgroup for one run, of either version."""

from __future__ import annotations

import itertools
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from memsafe._kernel.cgroup import MemoryCgroup, memory_cgroups, unified_directory

_REMOVE_WITHIN_S = 10.0

_numbers = itertools.count(1)


class UnavailableError(Exception):
    """No memory cgroup may be made here."""


class Place:
    """A new memory cgroup below that of this process.

    Args:
        limit_bytes: Its memory.max, or v1's memory.limit_in_bytes.
        high_bytes: Its memory.high (v2 only); None: it has none.

    Raises:
        UnavailableError: It cannot be made.
    """

    def __init__(self, limit_bytes: int, high_bytes: int | None = None) -> None:
        version, parent = _parent()
        name = f"memsafe-survival-{os.getpid()}-{next(_numbers)}"
        self._tight_bytes = limit_bytes if high_bytes is None else high_bytes
        self._group = MemoryCgroup(version, f"/{name}", str(parent / name))
        try:
            Path(self._group.directory).mkdir()
        except OSError as error:
            raise UnavailableError(f"{self._group.directory}: {error.strerror}") from None
        try:
            if version == 2:
                self._set("memory.max", limit_bytes)
                if high_bytes is not None:
                    self._set("memory.high", high_bytes)
                with suppress(OSError):  # without swap accounting there is nothing to keep out
                    self._set("memory.swap.max", 0)
            else:
                if high_bytes is not None:
                    raise UnavailableError("cgroup v1 has no memory.high")
                self._set("memory.limit_in_bytes", limit_bytes)
                self._set("memory.swappiness", 0)
        except BaseException:
            self.remove()
            raise

    def enter(self) -> None:
        """Move this process there; what it has already stays charged elsewhere."""
        self._set("cgroup.procs", 0)

    def left_bytes(self) -> int:
        """Return what is left under the tightest limit, file cache counted as free."""
        usage_bytes, cache_bytes = self._group.usage_bytes(), self._group.file_cache_bytes()
        return self._tight_bytes - (usage_bytes or 0) + sum(cache_bytes or (0, 0))

    def oom_kills(self) -> int:
        return self._group.oom_kills() or 0

    def remove(self) -> None:
        """End whatever is left in it and remove it; the kernel may need a moment to let go of the dead."""
        give_up = time.monotonic() + _REMOVE_WITHIN_S
        while True:
            self._end_all()
            try:
                Path(self._group.directory).rmdir()
            except OSError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.01)
            else:
                return

    def _end_all(self) -> None:
        with suppress(OSError):
            for pid in Path(self._group.file("cgroup.procs")).read_text().split():
                os.kill(int(pid), signal.SIGKILL)

    def _set(self, name: str, value: int) -> None:
        Path(self._group.file(name)).write_text(str(value))


def version() -> int:
    """Return the version of the cgroups that are made here.

    Raises:
        UnavailableError: None can be made.
    """
    return _parent()[0]


def _parent() -> tuple[int, Path]:
    groups = memory_cgroups()
    if groups and groups[0].version == 1:
        return 1, Path(groups[0].directory)
    directory = unified_directory()
    if directory is None:
        raise UnavailableError("no memory controller is to be seen")
    parent = Path(directory)
    if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
        raise UnavailableError(f"the children of {parent} have no memory controller")
    return 2, parent
