"""The made-up machine: its parts, and what a test does to its files."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from memsafe.testing.cgroup import MOUNTS, FakeCgroup, Layout, cgroup_path
from memsafe.testing.machine import FakeMachine, FakeOvercommit
from memsafe.testing.parts import stalls
from memsafe.testing.process import FakeProcess
from memsafe.testing.tree import Tree

if TYPE_CHECKING:
    from typing import Self


class FakeKernel:
    """A machine of files: 16 GiB, 8 GiB of it available, no swap, overcommit mode 0, one process in the root cgroup.

    Everything can be changed while a test runs; the files change at once, each in one moment, so that a monitor that
    polls beside never sees half a number. What signals in a real kernel (memory.events, PSI triggers) does not here:
    PressureMonitor polls, or is told to look by its check().

    As a context manager it removes the folder at the end if it made it.

    Args:
        root: The folder to fill, such as pytest's tmp_path; by default a new temporary one.
        layout: ``v2``: one cgroup2. ``v1``: the memory controller on v1. ``hybrid``: the same with a cgroup2 beside,
            which has memory.pressure alone.
        visible_from: The cgroup that is mounted as the root: a container that is shown its own cgroup and those below
            it, by their paths on the host. What lies above limits it as well, but cannot be seen.

    Attributes:
        root: What to pass as ``root=``.
        layout, visible_from: As given.
        machine: Physical memory, swap and commit (FakeMachine).
        overcommit: The mode and the reserves (FakeOvercommit).
        process: The process itself (FakeProcess).

    Raises:
        ValueError: *layout* is none of the three, or *visible_from* no path of a cgroup.
    """

    def __init__(
        self, root: str | os.PathLike[str] | None = None, *, layout: Layout = "v2", visible_from: str = "/"
    ) -> None:
        if layout not in MOUNTS:
            raise ValueError(f"layout must be one of {', '.join(MOUNTS)}: {layout!r}")
        visible_from = cgroup_path(visible_from)
        self._own = root is None
        self.root = Path(tempfile.mkdtemp(prefix="memsafe-kernel-") if root is None else root)
        self._tree = Tree(self.root)
        self.layout: Layout = layout
        self.visible_from = visible_from
        self._cgroups: dict[str, FakeCgroup] = {}
        self.machine = FakeMachine(self)
        self.overcommit = FakeOvercommit(self)
        self.process = FakeProcess(self)
        for part in (self.overcommit, self.process):
            part._render()
        self.mounts(*(line.replace(" / ", f" {_escaped(visible_from)} ", 1) for line in MOUNTS[layout]))
        self.cgroup(visible_from).join()

    def cgroup(self, path: str, **settings: Any) -> FakeCgroup:
        """Return the cgroup at *path*, with *settings* changed; it and its ancestors are made where they are not there.

        Args:
            path: From the root of the hierarchy, such as ``/pod/app``.
            settings: Attributes of FakeCgroup.

        Raises:
            ValueError: *path* is no path of a cgroup, or a value makes no sense.
            TypeError: There is no such setting.
        """
        path = cgroup_path(path)
        if path != "/":
            self.cgroup(str(PurePosixPath(path).parent))
        group = self._cgroups.get(path) or FakeCgroup(self, path)
        group.set(**settings)
        self._cgroups[path] = group
        group._appear()
        return group

    def stall(self, some: float = 0.0, full: float = 0.0, *, some_us: int = 0, full_us: int = 0) -> None:
        """Have the machine's tasks wait for memory. Until then it has no PSI.

        Args:
            some: Percent of the time that some task waits, in all three averages.
            full: Percent of the time that every task waits.
            some_us: The total of what some task waited, in microseconds.
            full_us: The total of what every task waited, in microseconds.
        """
        self._tree.show_again("/proc/pressure/memory", stalls(some, full, some_us, full_us))

    def mounts(self, *lines: str) -> None:
        """Replace /proc/self/mountinfo by *lines*."""
        self._tree.show_again("/proc/self/mountinfo", "".join(f"{line}\n" for line in lines))

    def write(self, path: str, content: str | bytes) -> Path:
        """Have the file at *path* hold *content*, garbage included, until a setting that it shows is changed.

        Returns:
            Where it is.
        """
        self._tree.write(path, os.fsencode(content) if isinstance(content, str) else content)
        return self._tree.at(path)

    def remove(self, path: str) -> None:
        """Remove the file at *path*: this kernel does not have it, until a setting that it shows is changed."""
        self._tree.at(path).unlink()

    def make_unreadable(self, path: str) -> None:
        """Have every reading of the file at *path* fail, root's too, until a setting that it shows is changed.

        The error is ELOOP: of what a file can answer, it alone also stops those whom no permission stops.
        """
        file = self._tree.at(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.symlink_to(file.name)

    def repair(self, path: str) -> None:
        """Have the file at *path* show the settings again, after write(), remove() or make_unreadable().

        Raises:
            KeyError: No setting is shown there.
        """
        self._tree.repair(path)

    def close(self) -> None:
        """Remove the folder, if it was made here."""
        if self._own:
            shutil.rmtree(self.root, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _escaped(path: str) -> str:
    """Return *path* as mountinfo writes it."""
    return "".join(f"\\{ord(char):03o}" if char in " \t\n\\" else char for char in path)
