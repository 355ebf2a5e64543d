"""Where a cgroup for a child may be made: told from files. That it is made and removed, integration tests show."""

import os

import pytest

import memsafe
from memsafe._kernel import child_cgroup
from tests.unit.proc_tree import MIB, ProcTree


@pytest.fixture
def tree(tmp_path):
    return ProcTree(tmp_path)


def v2(tree, *, parent_passes="memory pids", own_limit="max"):
    tree.v2("/app/main")
    tree.v2_group("/app")
    tree.v2_group("/app/main", own_limit)
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


@pytest.mark.parametrize(("file", "text"), [("memory.max", 1), ("memory.high", 1), ("memory.swap.max", 0)])
def test_v2_makes_none_beside_the_own_that_would_be_free_of_its_limits(tree, file, text):
    v2(tree)
    tree.write(f"/sys/fs/cgroup/app/main/{file}", f"{text}\n")
    assert f"would be free of the limits of {tree.root}/sys/fs/cgroup/app/main" in refusal(tree)


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
    """A plain folder has no memory.max: so looks a cgroup that somebody removed in between."""
    if version == 2:
        v2(tree)
    else:
        tree.v1("/app")
        tree.v1_group("/app", 2**62)
    assert "removed by somebody else" in refusal(tree)


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
