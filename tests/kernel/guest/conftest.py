"""What the tests inside have at hand: cgroups and sysctls that are put back."""

import itertools
import select
from pathlib import Path

import pytest

TOP = Path("/sys/fs/cgroup")
PATIENCE_S = 60

_numbers = itertools.count(1)


class Group:
    """A v2 cgroup. Its files are read and set by name: ``group["memory.max"] = 64 * MIB``."""

    def __init__(self, path):
        self.path = Path(path)

    def __fspath__(self):
        return str(self.path)

    def __getitem__(self, name):
        return (self.path / name).read_text().strip()

    def __setitem__(self, name, value):
        (self.path / name).write_text(str(value))

    def flat(self, name):
        """A file of keys and numbers, as a dict."""
        return {key: int(value) for key, value in (line.split() for line in self[name].splitlines())}

    def child(self, name, **limits):
        """Make a cgroup below it; memory_max=… sets its memory.max."""
        if "memory" not in self["cgroup.subtree_control"].split():
            self["cgroup.subtree_control"] = "+memory +pids"
        group = Group(self.path / name)
        group.path.mkdir()
        for key, value in limits.items():
            group[key.replace("_", ".", 1)] = value
        return group

    def remove(self):
        """End what runs in it, and remove it with all below."""
        self["cgroup.kill"] = 1
        with open(self.path / "cgroup.events") as events, select.epoll() as poller:
            poller.register(events, select.EPOLLPRI)
            while "populated 1" in events.read():
                assert poller.poll(PATIENCE_S), f"{self.path} is still populated"
                events.seek(0)
        for path in sorted(self.path.rglob("*/"), reverse=True):
            path.rmdir()
        self.path.rmdir()


@pytest.fixture
def group():
    """A cgroup of the test's own, without limits."""
    own = Group(TOP).child(f"lab-{next(_numbers)}")
    yield own
    own.remove()


@pytest.fixture
def sysctl():
    """Set a sysctl for the test: sysctl("vm/overcommit_memory", 2)."""
    before = {}

    def set_value(name, value):
        path = Path("/proc/sys", name)
        before.setdefault(path, path.read_text())
        path.write_text(str(value))

    yield set_value
    for path, value in reversed(before.items()):
        # Of overcommit_kbytes and overcommit_ratio, and the like, setting one clears the other.
        if path.read_text() != value:
            path.write_text(value)


@pytest.fixture
def scratch(tmp_path_factory):
    """A folder on a disk, whose files have a page cache that can be dropped; tmp_path is all memory."""
    folder = Path("/scratch", f"test-{next(_numbers)}")
    folder.mkdir()
    folder.chmod(0o777)
    yield folder
    for file in sorted(folder.rglob("*"), reverse=True):
        file.unlink()
    folder.rmdir()
