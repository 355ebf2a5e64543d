from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings, strategies as st

from memsafe._kernel import cgroup
from memsafe._kernel.cgroup import memory_cgroups, parse_membership, parse_mount, placement
from memsafe._kernel.files import UNLIMITED
from memsafe.errors import KernelError
from tests.unit.proc_tree import V1_MOUNT, V2_MOUNT, ProcTree, only_memsafe_errors

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def tree(tmp_path: Path) -> ProcTree:
    return ProcTree(tmp_path)


def seen(tree: ProcTree) -> list[tuple[int, str, str]]:
    root = str(tree.root)
    return [(group.version, group.path, group.directory.removeprefix(root)) for group in memory_cgroups(root)]


def test_own_cgroup_comes_first_then_every_ancestor(tree: ProcTree) -> None:
    tree.v2("/a/b")
    for path in ("/a", "/a/b"):
        tree.v2_group(path)
    assert seen(tree) == [
        (2, "/a/b", "/sys/fs/cgroup/a/b"),
        (2, "/a", "/sys/fs/cgroup/a"),
        (2, "/", "/sys/fs/cgroup"),
    ]


def test_the_line_with_memory_decides_for_v1_wherever_the_unified_line_stands(tree: ProcTree) -> None:
    for text in ("0::/u\n4:cpu,memory:/m\n", "4:cpu,memory:/m\n0::/u\n"):
        tree.v1("/m")
        tree.write("/proc/self/cgroup", text)
        assert seen(tree) == [(1, "/m", "/sys/fs/cgroup/memory/m"), (1, "/", "/sys/fs/cgroup/memory")]


def test_memory_on_v1_that_is_not_mounted_does_not_fall_back_to_v2(tree: ProcTree) -> None:
    tree.v1("/m")
    tree.mounts(V2_MOUNT)
    located = placement(tree.root).locate("memory")
    assert (located.version, located.cgroups) == (None, ())
    assert "not mounted" in (located.problem or "")


def test_named_hierarchies_and_hierarchy_zero_are_no_v1_controllers(tree: ProcTree) -> None:
    tree.v2("/a")
    tree.write("/proc/self/cgroup", "3:name=memory:/x\n0:memory:/y\n0::/a\n")
    assert seen(tree)[0] == (2, "/a", "/sys/fs/cgroup/a")


def test_cgroup2_without_the_memory_controller_has_no_memory_cgroups(tree: ProcTree) -> None:
    tree.v2("/a")
    tree.write("/sys/fs/cgroup/cgroup.controllers", "cpu io hugetlb\n")
    located = placement(tree.root).locate("memory")
    assert located.cgroups == ()
    assert "no memory controller" in (located.problem or "")


def test_below_the_last_cgroup_with_the_controller_the_nearest_ancestor_is_charged(tree: ProcTree) -> None:
    tree.v2("/a/b/c")
    tree.v2_group("/a")
    for path in ("/a/b", "/a/b/c"):
        tree.write(f"/sys/fs/cgroup{path}/cgroup.controllers", "cpu\n")
    assert [path for _, path, _ in seen(tree)] == ["/a", "/"]


def test_a_mount_whose_root_is_a_cgroup_shows_what_lies_below_it(tree: ProcTree) -> None:
    own = "/kube/pod:cri-containerd:86ac"
    tree.v1(f"{own}/worker")
    tree.mounts(f"35 31 0:32 {own} /sys/fs/cgroup/memory ro master:12 - cgroup cgroup rw,memory")
    assert seen(tree) == [
        (1, f"{own}/worker", "/sys/fs/cgroup/memory/worker"),
        (1, own, "/sys/fs/cgroup/memory"),
    ]


def test_a_name_that_begins_like_the_mounts_root_is_not_below_it(tree: ProcTree) -> None:
    tree.v1("/docker/abcd")
    tree.mounts(V1_MOUNT.replace(" / ", " /docker/abc "))
    assert seen(tree) == []


@pytest.mark.parametrize("first", [True, False])
def test_of_two_mounts_the_one_under_sys_fs_cgroup_is_taken(tree: ProcTree, first: bool) -> None:
    tree.v1("/m")
    lines = [V1_MOUNT, V1_MOUNT.replace("/sys/fs/cgroup/memory", "/mnt/memory")]
    tree.mounts(*(lines if first else reversed(lines)))
    assert seen(tree)[0][2] == "/sys/fs/cgroup/memory/m"


def test_a_mount_that_exists_goes_before_one_that_is_hidden(tree: ProcTree) -> None:
    tree.v1("/m")
    tree.mounts(V1_MOUNT, V1_MOUNT.replace("/sys/fs/cgroup/memory", "/mnt/memory"))
    tree.write("/mnt/memory/m/memory.usage_in_bytes", "1\n")
    assert seen(tree)[0][2] == "/mnt/memory/m"


def test_another_controllers_hierarchy_is_not_looked_at(tree: ProcTree) -> None:
    tree.v1("/m")
    tree.mounts(V1_MOUNT.replace("memory", "pids"), V1_MOUNT)
    tree.write("/sys/fs/cgroup/pids/m/pids.max", "1\n")
    tree.write("/sys/fs/cgroup/memory/m/memory.usage_in_bytes", "1\n")
    assert seen(tree)[0][2] == "/sys/fs/cgroup/memory/m"


def test_of_two_mounts_the_one_that_shows_more_ancestors_is_taken(tree: ProcTree) -> None:
    tree.v1("/pod/app")
    tree.mounts(V1_MOUNT.replace(" / ", " /pod "), V1_MOUNT.replace("/sys/fs/cgroup/memory", "/mnt/memory"))
    tree.write("/sys/fs/cgroup/memory/app/memory.usage_in_bytes", "1\n")
    tree.write("/mnt/memory/pod/app/memory.usage_in_bytes", "1\n")
    assert [path for _, path, _ in seen(tree)] == ["/pod/app", "/pod", "/"]


def test_a_mount_covers_an_earlier_one_at_its_point(tree: ProcTree) -> None:
    tree.v1("/m")
    tree.mounts(V1_MOUNT, V1_MOUNT.replace(" / ", " /m "))
    assert seen(tree) == [(1, "/m", "/sys/fs/cgroup/memory")]


def test_a_mount_from_outside_of_the_namespace_is_passed_over(tree: ProcTree) -> None:
    tree.v2("/a")
    tree.mounts(V2_MOUNT.replace(" / /sys/fs/cgroup ", " /../.. /cgroup-in "), V2_MOUNT)
    assert seen(tree)[0][2] == "/sys/fs/cgroup/a"


def test_a_process_moved_out_of_its_namespace_is_not_looked_for_beside_the_mount_point(tree: ProcTree) -> None:
    tree.v2("/../sibling")
    located = placement(tree.root).locate("memory")
    assert located.cgroups == ()
    assert "/../sibling" in (located.problem or "")


def test_a_mount_rooted_outside_shows_a_process_that_moved_there(tree: ProcTree) -> None:
    tree.v2("/../sibling")
    tree.mounts(V2_MOUNT.replace(" / /sys", " /.. /sys"))
    assert seen(tree) == [(2, "/../sibling", "/sys/fs/cgroup/sibling"), (2, "/..", "/sys/fs/cgroup")]


def test_a_namespaces_root_is_a_cgroup_with_limits(tree: ProcTree) -> None:
    tree.v2("/")
    tree.v2_group("", 4096)
    (group,) = memory_cgroups(tree.root)
    assert (group.path, group.limit_bytes()) == ("/", 4096)


def test_the_real_root_has_no_limit_to_tell(tree: ProcTree) -> None:
    tree.v2("/")
    (group,) = memory_cgroups(tree.root)
    assert (group.limit_bytes(), group.usage_bytes(), group.events(), group.oom_kills()) == (None, None, None, None)


def test_a_v1_ancestor_that_does_not_count_its_children_ends_the_chain(tree: ProcTree) -> None:
    tree.v1("/a/b/c")
    for path in ("/a", "/a/b", "/a/b/c"):
        tree.v1_group(path, 4096)
        tree.write(f"/sys/fs/cgroup/memory{path}/memory.use_hierarchy", "0\n" if path == "/a" else "1\n")
    assert [path for _, path, _ in seen(tree)] == ["/a/b/c", "/a/b"]


def test_v1_counts_descendants_in_its_file_cache(tree: ProcTree) -> None:
    tree.v1("/m")
    tree.v1_group("/m", 9223372036854771712, 1000, inactive=400, active=30)
    group = memory_cgroups(tree.root)[0]
    assert (group.limit_bytes(), group.usage_bytes(), group.file_cache_bytes()) == (UNLIMITED, 1000, (400, 30))


@pytest.mark.parametrize(("version", "name"), [(2, "memory.events"), (1, "memory.oom_control")])
def test_oom_kills_are_counted_in_both_versions(tree: ProcTree, version: int, name: str) -> None:
    (tree.v2 if version == 2 else tree.v1)("/m")
    base = "/sys/fs/cgroup/m" if version == 2 else "/sys/fs/cgroup/memory/m"
    tree.write(f"{base}/{name}", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert memory_cgroups(tree.root)[0].oom_kills() == 3


@pytest.mark.parametrize(
    ("version", "shown", "frozen"),
    [
        (1, {"freezer.state": "THAWED\n"}, False),
        (1, {"freezer.state": "FREEZING\n"}, True),
        (1, {"freezer.state": "FROZEN\n"}, True),
        (1, {}, False),
        (2, {"cgroup.freeze": "0\n", "cgroup.events": "populated 0\nfrozen 0\n"}, False),
        (2, {"cgroup.freeze": "1\n", "cgroup.events": "populated 1\nfrozen 0\n"}, True),
        (2, {"cgroup.freeze": "0\n", "cgroup.events": "populated 0\nfrozen 1\n"}, True),
        (2, {}, False),
    ],
)
def test_a_frozen_cgroup_is_told(tmp_path, version: int, shown: dict[str, str], frozen: bool) -> None:
    for name, text in shown.items():
        (tmp_path / name).write_text(text)
    assert cgroup.Cgroup(version, "/", str(tmp_path)).is_frozen() == frozen


def test_the_unified_directory_is_found_beside_v1(tree: ProcTree) -> None:
    tree.v1("/m")
    tree.write("/proc/self/cgroup", "4:memory:/m\n0::/u\n")
    assert cgroup.unified_directory(tree.root) == f"{tree.root}/sys/fs/cgroup/unified/u"


def test_another_process_is_looked_up_by_its_number(tree: ProcTree) -> None:
    tree.v2("/a")
    tree.write("/proc/42/cgroup", "0::/b\n")
    tree.write("/proc/42/mountinfo", V2_MOUNT + "\n")
    assert memory_cgroups(tree.root, 42)[0].path == "/b"


@pytest.mark.parametrize("name", ["cgroup", "mountinfo"])
def test_a_missing_file_is_named(tree: ProcTree, name: str) -> None:
    tree.remove(f"/proc/self/{name}")
    with pytest.raises(KernelError, match=f"/proc/self/{name}"):
        memory_cgroups(tree.root)


@pytest.mark.parametrize(
    ("line", "root", "point"),
    [
        ("1 2 0:3 /a\\040b\\011c\\012d\\134e /m\\040n rw - cgroup2 x rw", "/a b\tc\nd\\e", "/m n"),
        ("1 2 0:3 /a\\134040 /m\\043 rw - cgroup2 x rw", "/a\\040", "/m\\043"),
        ("1 2 0:3 / /m rw shared:1 master:2 propagate_from:3 - cgroup2 x rw", "/", "/m"),
        ("1 2 0:3 / /m rw - cgroup x rw,path=C:\\Program Files\\x,memory", "/", "/m"),
    ],
)
def test_lines_of_mountinfo(line: str, root: str, point: str) -> None:
    mount = parse_mount(line, "mountinfo")
    assert mount is not None
    assert (mount.root, mount.point) == (root, point)


def test_options_after_a_space_still_name_controllers() -> None:
    mount = parse_mount("1 2 0:3 / /m rw - cgroup x rw,a=b c,memory", "mountinfo")
    assert mount is not None
    assert "memory" in mount.options


@pytest.mark.parametrize(
    "line", ["", "1 2 0:3 / /m rw cgroup x rw", "1 2 0:3 / /m - cgroup x rw", "1 2 3 4 5 6 - cgroup"]
)
def test_a_broken_line_of_mountinfo_is_garbage(line: str) -> None:
    with pytest.raises(KernelError, match="mountinfo"):
        parse_mount(line, "mountinfo")


@pytest.mark.parametrize("line", ["", "5", "5:cpu", "x::/a", "-1::/a", "0::relative", "٣::/a"])
def test_a_broken_line_of_cgroup_is_garbage(line: str) -> None:
    with pytest.raises(KernelError, match="self/cgroup"):
        parse_membership(line, "self/cgroup")


@settings(max_examples=200)
@given(
    memberships=st.lists(st.binary(max_size=30) | st.sampled_from([b"0::/a", b"4:memory:/m/../x", b"4:memory:/\0"])),
    mounts=st.lists(
        st.binary(max_size=60)
        | st.sampled_from([V1_MOUNT.encode(), V2_MOUNT.encode(), b"1 2 3 /.. /\0 rw - cgroup2 x y"])
    ),
)
def test_no_content_raises_anything_but_a_memsafe_error(
    tmp_path_factory: pytest.TempPathFactory, memberships: list[bytes], mounts: list[bytes]
) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_bytes(b"\n".join(memberships))
    (root / "proc/self/mountinfo").write_bytes(b"\n".join(mounts))
    with only_memsafe_errors(naming=str(root)):
        groups = memory_cgroups(root)
        assert [group.limit_bytes() for group in groups] == [None] * len(groups)
