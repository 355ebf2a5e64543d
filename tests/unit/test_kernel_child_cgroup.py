"""Where a cgroup for a child may be made: told from files. That it is made and removed, integration tests show."""

import errno
import os

import pytest

import memsafe
from memsafe._kernel import child_cgroup
from tests.unit.proc_tree import MIB, ProcTree


@pytest.fixture
def tree(tmp_path):
    return ProcTree(tmp_path)


@pytest.fixture(autouse=True)
def attributes(monkeypatch, tree):
    """Extended attributes, which not every file system keeps; /app is delegated."""
    kept = {(f"{tree.root}/sys/fs/cgroup/app", "user.delegate"): b"1"}

    def getxattr(path, name):
        value = kept.get((path, name), errno.ENODATA)
        if isinstance(value, int):
            raise OSError(value, os.strerror(value))
        return value

    monkeypatch.setattr(os, "getxattr", getxattr)
    return kept


def v2(tree, *, parent_passes="memory pids"):
    tree.v2("/app/main")
    tree.v2_group("/app")
    tree.v2_group("/app/main")
    for path, text in (("/app", parent_passes), ("/app/main", "")):
        tree.write(f"/sys/fs/cgroup{path}/cgroup.subtree_control", text + "\n")
        tree.write(f"/sys/fs/cgroup{path}/cgroup.procs", "1\n")


def refusal(tree):
    with pytest.raises(memsafe.UnsupportedError) as refused:
        child_cgroup.make(64 * MIB, tree.root)
    assert not list(tree.root.glob("sys/fs/cgroup/**/memsafe-child-*"))
    return str(refused.value)


def test_without_a_memory_controller_there_is_none(tree):
    tree.write("/proc/self/cgroup", "1:cpu:/\n")
    assert "memory" in refusal(tree)


def test_v2_wants_a_parent_that_passes_the_memory_controller_on(tree):
    v2(tree, parent_passes="pids")
    for folder in ("/app/main", "/app"):
        assert f"{tree.root}/sys/fs/cgroup{folder}/cgroup.subtree_control does not pass the memory" in refusal(tree)


NOT_DELEGATED = "/sys/fs/cgroup/app is not delegated"
MADE = "removed by somebody else"  # a plain folder has no memory.max: so looks a cgroup that was removed in between


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("user.delegate", errno.ENODATA),
        ("user.delegate", errno.EOPNOTSUPP),
        ("trusted.delegate", errno.EPERM),
        ("user.delegate", b"0"),
        ("user.delegate", b""),
        ("trusted.delegate", b"yes"),
        ("user.other", b"1"),
    ],
)
def test_v2_makes_none_beside_the_own_in_what_was_not_delegated(tree, attributes, name, value):
    """A service's sibling is out of the service: of its pids.max and cpu.max, and not stopped with it."""
    v2(tree)
    attributes.clear()
    attributes[f"{tree.root}/sys/fs/cgroup/app", name] = value
    assert NOT_DELEGATED in refusal(tree)


def test_v2_makes_none_beside_the_own_where_only_the_own_was_delegated(tree, attributes):
    v2(tree)
    attributes.clear()
    attributes[f"{tree.root}/sys/fs/cgroup/app/main", "user.delegate"] = b"1"
    assert NOT_DELEGATED in refusal(tree)


@pytest.mark.parametrize("name", ["user.delegate", "trusted.delegate"])
def test_v2_makes_it_beside_the_own_where_either_attribute_says_that_it_may(tree, attributes, name):
    v2(tree)
    attributes.clear()
    attributes[f"{tree.root}/sys/fs/cgroup/app", name] = b"1"
    assert f"made in {tree.root}/sys/fs/cgroup/app: each was {MADE}" in refusal(tree)


def test_v2_makes_it_below_the_own_without_anybodys_leave(tree, attributes):
    v2(tree)
    attributes.clear()
    tree.write("/sys/fs/cgroup/app/main/cgroup.subtree_control", "memory\n")
    assert f"made in {tree.root}/sys/fs/cgroup/app/main: each was {MADE}" in refusal(tree)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("memory.max", "1"),
        ("memory.high", "1"),
        ("memory.swap.max", "0"),
        ("pids.max", "100"),
        ("cpu.max", "50000 100000"),
        ("cpuset.cpus", "0-1"),
        ("cpuset.mems", "0"),
        ("io.max", "8:0 rbps=1048576 wbps=max riops=max wiops=max"),
    ],
)
def test_v2_makes_none_beside_the_own_that_would_be_free_of_its_limits(tree, file, text):
    v2(tree)
    tree.write(f"/sys/fs/cgroup/app/main/{file}", f"{text}\n")
    assert f"would be free of the limits of {tree.root}/sys/fs/cgroup/app/main: {file}" in refusal(tree)


def test_limits_that_are_not_set_bind_nobody(tree):
    v2(tree)
    unset = {
        "pids.max": "max\n",
        "cpu.max": "max 100000\n",
        "cpuset.cpus": "\n",
        "io.max": "",
        "memory.swap.max": "max\n",
    }
    for file, text in unset.items():
        tree.write(f"/sys/fs/cgroup/app/main/{file}", text)
    assert MADE in refusal(tree)


def test_v2_wants_a_folder_that_may_be_written(tree, monkeypatch):
    v2(tree)
    monkeypatch.setattr(os, "access", lambda path, mode: not path.endswith("cgroup.procs"))
    assert f"{tree.root}/sys/fs/cgroup/app/cgroup.procs may not be written" in refusal(tree)


def test_a_control_file_that_is_gone_is_a_refusal_that_names_it(tree):
    v2(tree)
    tree.remove("/sys/fs/cgroup/app/cgroup.subtree_control")
    assert "app/cgroup.subtree_control: No such file" in refusal(tree)


@pytest.mark.parametrize("version", [1, 2])
def test_what_vanishes_while_it_is_made_is_tried_again_and_then_given_up(tree, version):
    if version == 2:
        v2(tree)
    else:
        tree.v1("/app")
        tree.v1_group("/app", 2**62)
    assert MADE in refusal(tree)


@pytest.mark.parametrize("file", ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"])
def test_v1_makes_none_below_the_own_that_does_not_count_it(tree, file):
    """So it may be before Linux 5.11: the limits of the own one then bind its own processes alone."""
    tree.v1("/app")
    tree.v1_group("/app", 2**63 - 4096)
    tree.write(f"/sys/fs/cgroup/memory/app/{file}", f"{512 * MIB}\n")
    hierarchy = "/sys/fs/cgroup/memory/app/memory.use_hierarchy"
    tree.write(hierarchy, "1\n")
    assert MADE in refusal(tree)
    tree.write(hierarchy, "0\n")
    assert f"{tree.root}{hierarchy} is 0: a cgroup in it would be free of its limits" in refusal(tree)


def test_v1_makes_it_below_an_own_one_that_has_no_limit_though_it_does_not_count_it(tree):
    tree.v1("/app")
    tree.v1_group("/app", 2**63 - 4096)
    tree.write("/sys/fs/cgroup/memory/app/memory.use_hierarchy", "0\n")
    assert MADE in refusal(tree)


def test_a_folder_in_which_nothing_can_be_made_is_named(tree):
    tree.v1("/app")
    tree.write("/sys/fs/cgroup/memory/app", "no folder\n")
    with pytest.raises(memsafe.MemsafeError, match=r"cgroup/memory/app"):
        child_cgroup.make(64 * MIB, tree.root)


def test_left_overs_are_swept_but_for_those_in_use_and_those_of_others(tree):
    v2(tree)
    base = tree.root / "sys/fs/cgroup/app"
    for name in ("memsafe-child-1-a", "memsafe-child-2-b", "memsafe-child-3-c", "other"):
        (base / name).mkdir()
    (base / "memsafe-child-2-b" / "populated").touch()
    lock_fd = os.open(base / "memsafe-child-3-c", os.O_RDONLY)
    child_cgroup.fcntl.flock(lock_fd, child_cgroup.fcntl.LOCK_EX)
    with pytest.raises(memsafe.UnsupportedError):
        child_cgroup.make(64 * MIB, tree.root)
    os.close(lock_fd)
    left = {path.name for path in base.iterdir() if path.is_dir()}
    assert left == {"main", "memsafe-child-2-b", "memsafe-child-3-c", "other"}


def test_without_locks_nothing_is_swept_and_none_can_be_made(tree, monkeypatch):
    """Nobody can tell then which are in use."""

    def flock(fd, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    v2(tree)
    left = tree.root / "sys/fs/cgroup/app/memsafe-child-1-a"
    left.mkdir()
    monkeypatch.setattr(child_cgroup.fcntl, "flock", flock)
    with pytest.raises(memsafe.UnsupportedError, match="No locks available"):
        child_cgroup.make(64 * MIB, tree.root)
    assert left.exists()
