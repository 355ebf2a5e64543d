"""What the tests inside have at hand: cgroups, sysctls and swap that are put back, a disk."""

import itertools
import select
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.kernel.lab import image

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

    def reclaim(self, size_bytes):
        """Have so much of its memory swapped out and dropped, as far as that goes."""
        with suppress(BlockingIOError):
            self["memory.reclaim"] = size_bytes

    def child(self, name, **limits):
        """Make a cgroup below it; memory_swap_max=… sets its memory.swap.max."""
        if "memory" not in self["cgroup.subtree_control"].split():
            self["cgroup.subtree_control"] = "+memory +pids"
        group = Group(self.path / name)
        group.path.mkdir()
        for key, value in limits.items():
            group[key.replace("_", ".")] = value
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


class Swap:
    """A swap area of one of two kinds, to be switched on and off: a file on the disk, or compressed memory."""

    def __init__(self, path):
        self.path = str(path)
        subprocess.run(["mkswap", self.path], check=True, stdout=subprocess.DEVNULL)

    @property
    def is_on(self):
        return self.path in Path("/proc/swaps").read_text()

    def on(self):
        subprocess.run(["swapon", self.path], check=True)

    def off(self):
        if self.is_on:
            subprocess.run(["swapoff", self.path], check=True)


SWAP_BYTES = 96 * 1024 * 1024


@pytest.fixture
def swap_file(scratch):
    path = scratch / "swap"
    path.write_bytes(bytes(SWAP_BYTES))
    path.chmod(0o600)
    swap = Swap(path)
    yield swap
    swap.off()


@pytest.fixture
def zram():
    modules = sorted(Path(image.MODULES).iterdir())
    if not modules:
        pytest.skip("the kernel's image came without its modules: zram is one")
    device = Path("/sys/block/zram0")
    if not device.exists():
        for module in modules:
            subprocess.run(["insmod", module], check=True)
    (device / "disksize").write_text(str(SWAP_BYTES))
    swap = Swap("/dev/zram0")
    yield swap
    swap.off()
    (device / "reset").write_text("1")


@pytest.fixture(params=["swap_file", "zram"])
def swap(request):
    """Swap of either kind, switched on."""
    area = request.getfixturevalue(request.param)
    area.on()
    return area
