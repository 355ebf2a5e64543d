from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import pytest
from hypothesis import given, settings, strategies as st

from memsafe import Constraint, MemoryStatus, memory_status
from memsafe._kernel import files
from memsafe.testing import FakeKernel
from tests.unit.proc_tree import GIB, HYBRID_MOUNT, MIB, V1_MOUNT, ProcTree

if TYPE_CHECKING:
    from pathlib import Path

PSI = "some avg10={0} avg60=0.00 avg300=0.00 total=1\nfull avg10={0} avg60=0.00 avg300=0.00 total=1\n"


@pytest.fixture
def tree(tmp_path: Path) -> ProcTree:
    tree = ProcTree(tmp_path)
    tree.v2("/")
    return tree


def of_kind(status: MemoryStatus, kind: str) -> list[Constraint]:
    return [constraint for constraint in status.constraints if constraint.kind == kind]


def test_a_machine_without_limits_is_bound_by_its_memory(tree: ProcTree) -> None:
    status = memory_status(root=tree.root)
    (physical,) = status.constraints
    assert (physical.kind, physical.path, physical.consequence) == ("physical", None, "kill")
    assert (physical.limit_bytes, physical.headroom_bytes) == (16 * GIB, 8 * GIB)
    assert (status.limit_bytes, status.available_bytes, status.binding) == (16 * GIB, 8 * GIB, physical)
    assert status.warnings == ()


def test_swap_is_memory_until_it_is_full(tree: ProcTree) -> None:
    tree.meminfo(SwapTotal=4 * MIB, SwapFree=1 * MIB)
    (physical,) = memory_status(root=tree.root).constraints
    assert (physical.limit_bytes, physical.headroom_bytes) == (20 * GIB, 9 * GIB)


def test_available_memory_below_free_memory_reclaims_nothing(tree: ProcTree) -> None:
    tree.meminfo(MemFree=9 * MIB)
    (physical,) = memory_status(root=tree.root).constraints
    assert (physical.reclaimable_bytes, physical.headroom_bytes) == (0, 8 * GIB)


def test_a_machine_never_has_more_free_than_it_has(tmp_path: Path) -> None:
    with FakeKernel(tmp_path) as kernel:
        kernel.machine.set(total=GIB, available=2 * GIB, free=GIB, swap_total=MIB, swap_free=2 * MIB)
        status = memory_status(root=kernel.root)
    (physical,) = status.constraints
    assert physical.headroom_bytes == physical.limit_bytes == GIB + MIB
    assert (status.swap.free_bytes, status.swap.available_bytes) == (MIB, MIB)


def test_the_ancestor_with_the_least_headroom_binds_not_the_lowest_limit(tree: ProcTree) -> None:
    tree.v2("/parent/child")
    tree.v2_group("/parent", 500 * MIB, 450 * MIB)
    tree.v2_group("/parent/child", 200 * MIB, 100 * MIB)
    status = memory_status(root=tree.root)
    assert (status.limit_bytes, status.available_bytes) == (200 * MIB, 50 * MIB)
    assert status.binding is not None
    assert (status.binding.path, status.binding.kind) == ("/parent", "memory.max")
    assert [c.path for c in of_kind(status, "memory.max")] == ["/parent/child", "/parent"]


def test_the_inactive_file_cache_is_free_and_the_active_is_told(tree: ProcTree) -> None:
    tree.v2("/a")
    tree.v2_group("/a", GIB, 1000 * MIB, inactive=700 * MIB, active=150 * MIB)
    (limit,) = of_kind(memory_status(root=tree.root), "memory.max")
    assert (limit.used_bytes, limit.reclaimable_bytes) == (1000 * MIB, 700 * MIB)
    assert (limit.headroom_bytes, limit.active_file_bytes) == (724 * MIB, 150 * MIB)


def test_counters_read_at_different_times_do_not_give_more_than_the_limit(tree: ProcTree) -> None:
    tree.v2("/a")
    tree.v2_group("/a", 1000, 100, inactive=150, active=30)
    (limit,) = of_kind(memory_status(root=tree.root), "memory.max")
    assert (limit.reclaimable_bytes, limit.active_file_bytes, limit.headroom_bytes) == (100, 0, 1000)


def told_beside_changes(tree: ProcTree, monkeypatch: pytest.MonkeyPatch, *usages: int) -> tuple[int | None, int]:
    """Return what is told to be used, and of how many readings, where the usage is another at each of them."""
    tree.v2("/a")
    tree.v2_group("/a", GIB, 100 * MIB, inactive=60 * MIB)
    seen = []

    def read(path: str, *, again: bool = False) -> int | None:
        if not path.endswith("memory.current"):
            return files.count(files.read(path), path)
        seen.append(again)
        return usages[min(len(seen), len(usages)) - 1] * MIB

    monkeypatch.setattr(files, "read_count", read)
    (max_,) = of_kind(memory_status(root=tree.root), "memory.max")
    assert seen == [False, True] * (len(seen) // 2)
    return max_.used_bytes, len(seen)


def test_a_usage_that_changed_while_the_cache_was_read_is_read_again(
    tree: ProcTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told_beside_changes(tree, monkeypatch, 100) == (100 * MIB, 2)
    assert told_beside_changes(tree, monkeypatch, 108, 100, 100, 100) == (100 * MIB, 4)
    assert told_beside_changes(tree, monkeypatch, 100, 108, 108, 108) == (108 * MIB, 4)


def test_of_a_usage_that_never_stands_still_the_most_is_told(tree: ProcTree, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told_beside_changes(tree, monkeypatch, 100, 110, 120, 130, 140, 150) == (150 * MIB, 6)
    assert told_beside_changes(tree, monkeypatch, 150, 140, 130, 120, 110, 100) == (110 * MIB, 6)


def test_memory_high_throttles_beside_memory_max(tree: ProcTree) -> None:
    tree.v2("/a")
    tree.v2_group("/a", 200 * MIB, 150 * MIB, high=100 * MIB)
    status = memory_status(root=tree.root)
    (high,) = of_kind(status, "memory.high")
    assert (high.consequence, high.headroom_bytes) == ("throttle", 0)
    assert status.binding == high
    assert of_kind(status, "memory.max")[0].consequence == "kill"


def test_zero_is_a_limit(tree: ProcTree) -> None:
    tree.v2("/a")
    tree.v2_group("/a", 0, 4096)
    status = memory_status(root=tree.root)
    assert (status.limit_bytes, status.available_bytes) == (0, 0)


@pytest.mark.parametrize("unlimited", [9223372036854771712, 9223372036854710272, 18446744073709551615])
def test_v1_counts_limits_and_leaves_unlimited_ancestors_out(tree: ProcTree, unlimited: int) -> None:
    tree.v1("/parent/child")
    tree.v1_group("", unlimited, 5 * GIB)
    tree.v1_group("/parent", 500 * MIB, 350 * MIB, inactive=50 * MIB)
    tree.v1_group("/parent/child", unlimited, 100 * MIB)
    status = memory_status(root=tree.root)
    (limit,) = of_kind(status, "memory.limit_in_bytes")
    assert (limit.path, limit.headroom_bytes, limit.consequence) == ("/parent", 200 * MIB, "kill")


def memsw(tree: ProcTree, limit: int | str, used: int | str) -> list[tuple[int, int | None]]:
    tree.meminfo(SwapTotal=GIB // 1024)
    tree.v1("/a")
    tree.v1_group("/a", 500 * MIB, 300 * MIB, inactive=50 * MIB)
    tree.write("/sys/fs/cgroup/memory/a/memory.memsw.limit_in_bytes", f"{limit}\n")
    tree.write("/sys/fs/cgroup/memory/a/memory.memsw.usage_in_bytes", f"{used}\n")
    limits = of_kind(memory_status(root=tree.root), "memory.limit_in_bytes")
    return [(limit.limit_bytes // MIB, (limit.headroom_bytes or 0) // MIB) for limit in limits]


def test_v1_memory_and_swap_together_bind_when_what_is_swapped_leaves_less(tree: ProcTree) -> None:
    assert memsw(tree, 600 * MIB, 450 * MIB) == [(500, 250), (600, 200)]
    assert memory_status(root=tree.root).available_bytes == 200 * MIB


def test_v1_memory_and_swap_together_are_not_listed_where_they_leave_as_much(tree: ProcTree) -> None:
    assert memsw(tree, 600 * MIB, 400 * MIB) == [(500, 250)]
    assert memsw(tree, 9223372036854771712, 400 * MIB) == [(500, 250)]


def test_v1_memory_and_swap_together_bind_in_the_cgroup_that_limits_them(tmp_path: Path) -> None:
    with FakeKernel(tmp_path, layout="v1") as kernel:
        kernel.machine.set(swap_total=GIB, swap_free=GIB)
        kernel.cgroup("/pod", limit=4 * GIB, usage=GIB)
        kernel.cgroup("/pod/app", limit=500 * MIB, usage=300 * MIB, swap=150 * MIB, swap_limit=100 * MIB).join()
        limits = of_kind(memory_status(root=kernel.root), "memory.limit_in_bytes")
    assert [(limit.path, limit.limit_bytes // MIB) for limit in limits] == [
        ("/pod/app", 500),
        ("/pod/app", 600),
        ("/pod", 4096),
    ]


def test_v1_swap_that_cannot_be_read_is_a_warning(tree: ProcTree) -> None:
    assert memsw(tree, "lots", 0) == [(500, 250)]
    assert any("memsw.limit_in_bytes" in warning for warning in memory_status(root=tree.root).warnings)
    assert memsw(tree, 600 * MIB, "lots") == [(500, 250)]
    assert any("memsw.usage_in_bytes" in warning for warning in memory_status(root=tree.root).warnings)


def test_limits_on_swap_that_is_not_there_are_not_even_read(tree: ProcTree) -> None:
    swap_of(tree, "/a", limit="lots", high="lots", used="lots")
    memsw(tree, "lots", "lots")
    tree.meminfo(SwapTotal=0)
    status = memory_status(root=tree.root)
    assert (status.swap.total_bytes, status.swap.available_bytes, status.swap.limits) == (0, 0, ())
    assert status.warnings == ()


def swap_of(
    tree: ProcTree, path: str, limit: int | str = "max", used: int | str = 0, *, high: int | str = "max"
) -> None:
    tree.v2_group(path)
    for name, value in (("max", limit), ("high", high), ("current", used)):
        tree.write(f"/sys/fs/cgroup{path}/memory.swap.{name}", f"{value}\n")


def test_what_may_be_swapped_is_the_least_that_any_cgroup_and_the_machine_leave(tree: ProcTree) -> None:
    tree.v2("/pod/app")
    tree.meminfo(SwapTotal=4 * MIB, SwapFree=3 * MIB)
    swap_of(tree, "/pod/app", used=MIB)
    swap_of(tree, "/pod")
    assert memory_status(root=tree.root).swap.available_bytes == 3 * GIB
    swap_of(tree, "/pod", 512 * MIB, 412 * MIB)
    swap_of(tree, "/pod/app", GIB, MIB, high=64 * MIB)
    swap = memory_status(root=tree.root).swap
    assert (swap.total_bytes, swap.free_bytes, swap.available_bytes) == (4 * GIB, 3 * GIB, 100 * MIB)
    assert [(limit.kind, limit.path, limit.headroom_bytes) for limit in swap.limits] == [
        ("memory.swap.max", "/pod/app", 1023 * MIB),
        ("memory.swap.high", "/pod/app", 63 * MIB),
        ("memory.swap.max", "/pod", 100 * MIB),
    ]


@pytest.mark.parametrize(("limit", "left"), [("max", 3 * GIB), (0, 0), (256 * MIB, 156 * MIB), (20 * GIB, 3 * GIB)])
def test_swap_that_the_cgroup_may_not_use_is_no_physical_headroom(tree: ProcTree, limit: int | str, left: int) -> None:
    tree.v2("/a")
    tree.meminfo(SwapTotal=4 * MIB, SwapFree=3 * MIB)
    swap_of(tree, "/a", limit, 0 if limit == 0 else 100 * MIB)
    status = memory_status(root=tree.root)
    (physical,) = of_kind(status, "physical")
    assert physical.headroom_bytes == 8 * GIB + left
    assert physical.limit_bytes == 16 * GIB + (4 * GIB if limit == "max" else min(int(limit), 4 * GIB))
    assert physical.used_bytes is not None
    assert physical.headroom_bytes == physical.limit_bytes - physical.used_bytes + (physical.reclaimable_bytes or 0)
    assert status.swap.available_bytes == left


def test_swapping_out_changes_nothing_of_v1s_sum(tree: ProcTree) -> None:
    memsw(tree, 600 * MIB, 600 * MIB)
    tree.meminfo(SwapTotal=4 * MIB, SwapFree=3 * MIB)
    swap = memory_status(root=tree.root).swap
    assert [(limit.kind, limit.headroom_bytes) for limit in swap.limits] == [("memory.memsw.limit_in_bytes", 0)]
    assert swap.available_bytes == 3 * GIB


@pytest.mark.parametrize("name", ["max", "high", "current"])
def test_a_limit_on_swap_that_cannot_be_read_leaves_the_others(tree: ProcTree, name: str) -> None:
    tree.v2("/a")
    tree.meminfo(SwapTotal=4 * MIB, SwapFree=3 * MIB)
    swap_of(tree, "/a", GIB, high=GIB)
    tree.write(f"/sys/fs/cgroup/a/memory.swap.{name}", "lots\n")
    status = memory_status(root=tree.root)
    assert len(status.warnings) == 1
    assert f"/a/memory.swap.{name}" in status.warnings[0]
    assert status.swap.available_bytes is None
    assert len(status.swap.limits) == (2 if name == "current" else 1)
    assert status.binding == of_kind(status, "physical")[0]


def test_a_kernel_that_does_not_count_swap_has_no_limits_on_it(tree: ProcTree) -> None:
    tree.v2("/a")
    tree.meminfo(SwapTotal=4 * MIB, SwapFree=3 * MIB)
    tree.v2_group("/a")
    status = memory_status(root=tree.root)
    assert (status.swap.available_bytes, status.swap.limits, status.warnings) == (3 * GIB, (), ())
    tree.write("/sys/fs/cgroup/a/memory.swap.max", "0\n")
    assert any("/sys/fs/cgroup/a" in warning for warning in memory_status(root=tree.root).warnings)


def test_a_limit_that_changes_is_seen_by_the_next_call(tree: ProcTree) -> None:
    tree.v2("/a")
    tree.v2_group("/a", 200 * MIB, 100 * MIB)
    assert memory_status(root=tree.root).available_bytes == 100 * MIB
    tree.v2_group("/a", 300 * MIB, 100 * MIB)
    assert memory_status(root=tree.root).available_bytes == 200 * MIB


def test_a_cgroup_that_vanished_is_told_and_its_ancestors_stand(tree: ProcTree) -> None:
    tree.v2("/parent/child")
    tree.v2_group("/parent", 500 * MIB, 450 * MIB)
    status = memory_status(root=tree.root)
    assert status.available_bytes == 50 * MIB
    assert any("/parent/child" in warning for warning in status.warnings)


def test_rlimits_refuse(tree: ProcTree) -> None:
    tree.rlimits(data=str(48 * MIB), address_space=str(66 * MIB))
    status = memory_status(root=tree.root)
    (data,), (space,) = of_kind(status, "rlimit_data"), of_kind(status, "rlimit_as")
    assert (data.used_bytes, data.headroom_bytes, data.consequence) == (32 * MIB, 16 * MIB, "refuse")
    assert (space.used_bytes, space.headroom_bytes) == (64 * MIB, 2 * MIB)
    assert status.binding == space


@pytest.mark.parametrize("mode", [0, 1])
def test_the_sum_of_commit_binds_nobody_outside_of_mode_two(tree: ProcTree, mode: int) -> None:
    tree.overcommit(mode)
    tree.meminfo(Committed_AS=99 * MIB)
    status = memory_status(root=tree.root)
    assert of_kind(status, "commit") == []
    assert (status.commit.mode, status.commit.limit_bytes, status.commit.headroom_bytes) == (mode, 8 * GIB, None)
    assert status.commit.request_limit_bytes == (16 * GIB if mode == 0 else None)


def test_mode_two_keeps_both_reserves(tree: ProcTree) -> None:
    tree.overcommit(2, admin_kb=8192, user_kb=131072)
    tree.meminfo(CommitLimit=10_000_000, Committed_AS=6_000_000)
    tree.status(vm_kb=320_000)
    status = memory_status(root=tree.root)
    (commit,) = of_kind(status, "commit")
    assert status.commit.limit_bytes == 10_000_000 * 1024
    assert status.commit.headroom_bytes == commit.headroom_bytes == 3_981_808 * 1024
    assert (commit.consequence, status.binding) == ("refuse", commit)


def test_commit_beyond_the_limit_leaves_nothing(tree: ProcTree) -> None:
    tree.overcommit(2)
    tree.meminfo(Committed_AS=9 * MIB)
    assert memory_status(root=tree.root).available_bytes == 0


def test_reserves_beyond_the_limit_leave_no_limit_to_promise(tmp_path: Path) -> None:
    with FakeKernel(tmp_path) as kernel:
        kernel.overcommit.set(mode=2, ratio=0)
        (commit,) = of_kind(memory_status(root=kernel.root), "commit")
    assert (commit.limit_bytes, commit.headroom_bytes) == (0, 0)


def test_every_headroom_is_its_limit_less_use_that_cannot_be_reclaimed(tree: ProcTree) -> None:
    tree.v2("/a")
    tree.v2_group("/a", GIB, 300 * MIB, inactive=50 * MIB, high=900 * MIB)
    tree.overcommit(2, admin_kb=8192, user_kb=1024)
    tree.rlimits(data=str(48 * MIB))
    constraints = memory_status(root=tree.root).constraints
    assert {c.kind for c in constraints} == {"memory.max", "memory.high", "rlimit_data", "physical", "commit"}
    for c in constraints:
        assert c.used_bytes is not None
        assert c.reclaimable_bytes is not None
        assert c.headroom_bytes == c.limit_bytes - c.used_bytes + c.reclaimable_bytes


def test_pressure_is_the_own_cgroups_where_it_has_it(tree: ProcTree) -> None:
    tree.write("/proc/pressure/memory", PSI.format("1.00"))
    system = memory_status(root=tree.root).pressure
    tree.v2("/a")
    tree.v2_group("/a")
    tree.write("/sys/fs/cgroup/a/memory.pressure", PSI.format("2.00"))
    own = memory_status(root=tree.root).pressure
    assert system is not None
    assert own is not None
    assert (system.some.avg10, own.full.avg10) == (1.0, 2.0)


def test_without_psi_pressure_is_none_and_no_warning(tree: ProcTree) -> None:
    status = memory_status(root=tree.root)
    assert (status.pressure, status.warnings) == (None, ())


def test_the_process_tells_of_itself(tree: ProcTree) -> None:
    own = memory_status(root=tree.root).process
    assert (own.rss_bytes, own.anonymous_bytes, own.swap_bytes) == (8 * MIB, 4 * MIB, 0)
    assert (own.oom_score, own.oom_score_adj) == (666, -17)


def test_pss_is_read_when_it_is_asked_for(tree: ProcTree) -> None:
    own = memory_status(root=tree.root).process
    tree.write("/proc/self/smaps_rollup", "0-1 ---p 0 0:0 0 [rollup]\nPss:  4096 kB\n")
    assert (own.pss_bytes, own.as_dict()["pss_bytes"]) == (4 * MIB, 4 * MIB)
    tree.remove("/proc/self/smaps_rollup")
    assert own.pss_bytes is None


def test_all_of_it_is_plain_data(tree: ProcTree) -> None:
    tree.v2("/a")
    tree.v2_group("/a", GIB)
    tree.write("/proc/pressure/memory", PSI.format("1.00"))
    plain = json.loads(json.dumps(memory_status(root=tree.root).as_dict()))
    assert plain["constraints"][0]["kind"] == "memory.max"
    assert plain["process"]["pss_bytes"] == 2 * MIB
    assert plain["pressure"]["some"]["avg10"] == 1.0


GARBAGE = [
    ("/proc/self/cgroup", "nonsense\n"),
    ("/proc/self/mountinfo", "1 2 - cgroup2\n"),
    ("/proc/meminfo", "MemTotal: lots\n"),
    ("/proc/self/status", "VmRSS:\tmany kB\n"),
    ("/proc/self/limits", "Max data size    some     unlimited   bytes\n"),
    ("/proc/self/oom_score", "?\n"),
    ("/proc/self/oom_score_adj", "--5\n"),
    ("/proc/sys/vm/overcommit_memory", "7\n"),
    ("/proc/pressure/memory", "some\n"),
    ("/sys/fs/cgroup/a/memory.max", "-1\n"),
    ("/sys/fs/cgroup/a/memory.high", "\n"),
    ("/sys/fs/cgroup/a/memory.current", "1e6\n"),
    ("/sys/fs/cgroup/a/memory.stat", "inactive_file x\n"),
]


@pytest.mark.parametrize(("path", "text"), GARBAGE)
def test_garbage_becomes_none_with_a_warning_that_names_the_file(tree: ProcTree, path: str, text: str) -> None:
    tree.v2("/a")
    tree.v2_group("/a", 200 * MIB, 100 * MIB, high=150 * MIB)
    tree.write("/proc/pressure/memory", PSI.format("1.00"))
    sound = memory_status(root=tree.root)
    tree.write(path, text)
    status = memory_status(root=tree.root)
    assert len(status.constraints) >= 1
    assert status.warnings
    assert all(path in warning for warning in status.warnings), status.warnings
    assert len(set(status.warnings)) == len(status.warnings)
    assert status != sound


@pytest.mark.parametrize("path", [path for path, _ in GARBAGE])
def test_a_directory_in_place_of_a_file_is_a_warning(tree: ProcTree, path: str) -> None:
    tree.v2("/a")
    tree.v2_group("/a", 200 * MIB, 100 * MIB)
    tree.write("/proc/pressure/memory", PSI.format("1.00"))
    tree.remove(path)
    (tree.root / path.lstrip("/")).mkdir()
    assert any(path in warning for warning in memory_status(root=tree.root).warnings)


def test_unknown_use_leaves_the_limit_and_no_headroom(tree: ProcTree) -> None:
    tree.v2("/a")
    tree.v2_group("/a", 200 * MIB)
    tree.remove("/sys/fs/cgroup/a/memory.current")
    status = memory_status(root=tree.root)
    (limit,) = of_kind(status, "memory.max")
    assert (limit.limit_bytes, limit.used_bytes, limit.headroom_bytes) == (200 * MIB, None, None)
    assert status.limit_bytes == 200 * MIB
    assert len(status.warnings) == 1


def test_a_cgroup_without_a_file_cache_to_tell_has_a_headroom_all_the_same(tree: ProcTree) -> None:
    tree.v2("/a")
    tree.v2_group("/a", 200 * MIB, 50 * MIB)
    tree.write("/sys/fs/cgroup/a/memory.stat", "anon 30\n")
    (limit,) = of_kind(memory_status(root=tree.root), "memory.max")
    assert (limit.reclaimable_bytes, limit.headroom_bytes) == (None, 150 * MIB)


def test_an_empty_machine_is_all_none_and_says_why(tmp_path: Path) -> None:
    status = memory_status(root=tmp_path)
    assert (status.limit_bytes, status.available_bytes, status.binding, status.constraints) == (None, None, None, ())
    assert (status.commit.mode, status.process.rss_bytes) == (None, None)
    for name in ("meminfo", "self/status", "self/cgroup", "self/limits", "overcommit_memory", "oom_score", "score_adj"):
        assert any(name in warning for warning in status.warnings)


SIZES = st.integers(0, 2**20).map(lambda pages: pages * 4096)
LEVEL = st.fixed_dictionaries(
    {
        "limit": st.none() | SIZES,
        "high": st.none() | SIZES,
        "usage": SIZES,
        "inactive_file": SIZES,
        "swap": SIZES,
        "swap_limit": st.none() | SIZES,
    }
)


@settings(max_examples=40, deadline=None)
@given(
    levels=st.lists(LEVEL, min_size=1, max_size=4), layout=st.sampled_from(["v2", "v1", "hybrid"]),
    available=SIZES, swap_free=SIZES,
)  # fmt: skip
def test_what_is_left_is_the_least_of_all_however_they_are_nested(
    tmp_path_factory: pytest.TempPathFactory,
    levels: list[dict[str, Any]],
    layout: Literal["v2", "v1", "hybrid"],
    available: int,
    swap_free: int,
) -> None:
    kernel = FakeKernel(tmp_path_factory.mktemp("machine"), layout=layout)
    kernel.machine.set(total=2**33, free=0, available=available, swap_total=2**33, swap_free=swap_free)
    path, left = "", []
    usable = swap_free
    for depth, level in enumerate(levels):
        path += f"/{depth}"
        kernel.cgroup(path, **level).join()
        cache = min(level["inactive_file"], level["usage"])
        limits = [level["limit"]] if layout != "v2" else [level["limit"], level["high"]]
        left += [max(0, limit - level["usage"] + cache) for limit in limits if limit is not None]
        if level["swap_limit"] is None:
            continue
        if layout == "v2":
            usable = min(usable, max(0, level["swap_limit"] - level["swap"]))
        elif level["limit"] is not None:  # of memory and swap together, which hold the usage and the swap
            both = level["limit"] + level["swap_limit"] - level["usage"] - level["swap"]
            left.append(max(0, both + min(level["inactive_file"], level["usage"] + level["swap"])))
    status = memory_status(root=kernel.root)
    assert status.warnings == ()
    assert status.swap.available_bytes == usable
    assert status.available_bytes == min([*left, available + usable])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_content_makes_it_raise(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    tree = ProcTree(tmp_path_factory.mktemp("fuzz"))
    tree.v1("/a")
    tree.mounts(V1_MOUNT, HYBRID_MOUNT)
    tree.v1_group("/a", GIB)
    files = sorted(path for path in tree.root.rglob("*") if path.is_file())
    for path in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=4)):
        text = path.read_bytes()
        at = data.draw(st.integers(0, len(text)))
        path.write_bytes(text[:at] + data.draw(st.binary(max_size=12)) + text[at + data.draw(st.integers(0, 12)) :])
    status = memory_status(root=tree.root)
    assert status.available_bytes is None or status.available_bytes >= 0
