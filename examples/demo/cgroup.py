"""A memory cgroup of the demo's own, where it may make one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memsafe._kernel.cgroup import MemoryCgroup, memory_cgroups
from memsafe.errors import KernelError

_REMOVE_WITHIN_S = 10.0


@contextmanager
def own_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup | str]:
    """Make a memory cgroup limited to *limit_bytes*, and remove it with all that is left in it.

    With v1 it is a child of this process's own cgroup. With v2, where a cgroup that holds processes has no
    children with a memory controller, it may have to be a sibling. Nothing about any other cgroup is changed.

    Yields:
        The cgroup, or why there is none.
    """
    why_not = "no memory controller is to be seen"
    made: MemoryCgroup | None = None
    try:
        candidates = _parents()
    except KernelError as error:
        candidates, why_not = [], str(error)
    for parent in candidates:
        try:
            made = _make(parent, limit_bytes)
            break
        except OSError as error:
            why_not = f"{parent.directory}: {error.strerror}"
    if made is None:
        yield why_not
        return
    try:
        yield made
    finally:
        _remove(made)


def _parents() -> list[MemoryCgroup]:
    """Return the cgroups below which one may be made: where the memory controller reaches the children."""
    cgroups = memory_cgroups()[:2]
    if cgroups and cgroups[0].version == 1:
        return [cgroups[0]]
    return [cgroup for cgroup in cgroups if _gives_memory_on(cgroup)]


def _gives_memory_on(cgroup: MemoryCgroup) -> bool:
    with contextlib.suppress(OSError):
        return "memory" in Path(cgroup.file("cgroup.subtree_control")).read_text().split()
    return False


def _make(parent: MemoryCgroup, limit_bytes: int) -> MemoryCgroup:
    name = f"memsafe-demo-{os.getpid()}"
    made = MemoryCgroup(parent.version, f"{parent.path.rstrip('/')}/{name}", f"{parent.directory}/{name}")
    Path(made.directory).mkdir()
    try:
        set_limit(made, limit_bytes)
        _try_to_enter(made)
    except OSError:
        Path(made.directory).rmdir()
        raise
    return made


def set_limit(cgroup: MemoryCgroup, limit_bytes: int) -> None:
    """Set the limit beyond which the OOM killer comes, and keep what is in it out of swap.

    Raises:
        OSError: Not permitted, or v1 could not push the usage below it.
    """
    Path(cgroup.file("memory.max" if cgroup.version == 2 else "memory.limit_in_bytes")).write_text(str(limit_bytes))
    swap = Path(cgroup.file("memory.swap.max" if cgroup.version == 2 else "memory.swappiness"))
    with contextlib.suppress(OSError):  # without swap accounting there is nothing to keep out
        swap.write_text("0")


def _try_to_enter(cgroup: MemoryCgroup) -> None:
    """Move a child there that only waits, so that not being allowed to shows now.

    Raises:
        OSError: It is not allowed.
    """
    read_end, write_end = os.pipe()
    child = os.posix_spawn("/bin/sh", ["sh", "-c", "read _"], os.environ, file_actions=[
        (os.POSIX_SPAWN_DUP2, read_end, 0), (os.POSIX_SPAWN_CLOSE, write_end),
    ])  # fmt: skip
    try:
        Path(cgroup.file("cgroup.procs")).write_text(str(child))
    finally:
        os.close(read_end)
        os.close(write_end)
        os.waitpid(child, 0)


def _remove(cgroup: MemoryCgroup) -> None:
    """Kill what is left in *cgroup* and remove it; the kernel may need a moment to let go of the dead."""
    give_up = time.monotonic() + _REMOVE_WITHIN_S
    while True:
        with contextlib.suppress(FileNotFoundError):
            for pid in Path(cgroup.file("cgroup.procs")).read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        try:
            Path(cgroup.directory).rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)
