from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from memsafe import ForkAssessment, assess_fork
from memsafe.commit import CHILD_NEEDS_BYTES
from memsafe.forecast import ASSUMED_WRITE_BYTES_PER_S
from memsafe.testing import FakeKernel
from tests.unit.proc_tree import GIB, MIB, ProcTree
from tests.unit.test_status import PSI

if TYPE_CHECKING:
    from pathlib import Path

HEAP_MIB = 300
HEAP = f"{HEAP_MIB * 1024} rw-p rd,wr,ac {HEAP_MIB * 1024}"


@pytest.fixture
def tree(tmp_path: Path) -> ProcTree:
    """A process with a heap of 300 MiB in a cgroup of 1 GiB that uses 400 MiB, on a machine of 16 GiB."""
    tree = ProcTree(tmp_path)
    tree.v2("/a")
    tree.v2_group("/a", GIB, 400 * MIB)
    tree.status(anon_kb=HEAP_MIB * 1024)
    tree.smaps(HEAP)
    return tree


def needs_bytes(assessment: ForkAssessment) -> int:
    return (assessment.page_table_bytes or 0) + (assessment.copy_forecast_bytes or 0)


def test_a_fork_that_fits_is_admitted_with_its_figures(tree: ProcTree) -> None:
    fork = assess_fork(root=tree.root)
    assert (fork.decision, fork.kernel_would_allow) == ("admit", True)
    assert (fork.commit_charge_bytes, fork.copy_forecast_bytes) == (HEAP_MIB * MIB, HEAP_MIB * MIB)
    assert (fork.headroom_bytes, fork.commit_headroom_bytes) == (624 * MIB, None)
    assert fork.binding is not None
    assert fork.binding.kind == "memory.max"
    (reason,) = fork.reasons
    assert "300 MiB" in reason
    assert "624 MiB" in reason


def test_exactly_what_is_left_is_admitted_and_a_page_more_is_not(tree: ProcTree) -> None:
    need = needs_bytes(assess_fork(root=tree.root))
    tree.v2_group("/a", 400 * MIB + need, 400 * MIB)
    assert assess_fork(root=tree.root).decision == "admit"
    tree.v2_group("/a", 400 * MIB + need - 4096, 400 * MIB)
    assert assess_fork(root=tree.root).decision != "admit"


def test_it_is_deferred_when_others_hold_what_it_needs(tree: ProcTree) -> None:
    tree.v2_group("/a", GIB, 900 * MIB)
    fork = assess_fork(root=tree.root)
    assert (fork.decision, fork.headroom_bytes) == ("defer", 124 * MIB)
    assert "max_copy" in fork.reasons[0]


def test_it_is_refused_when_it_cannot_fit_beside_what_the_process_holds(tree: ProcTree) -> None:
    tree.v2_group("/a", 500 * MIB, 400 * MIB)
    fork = assess_fork(root=tree.root)
    assert fork.decision == "refuse"
    assert fork.binding is not None
    assert fork.binding.path == "/a"
    assert "max_copy" in fork.reasons[0]


def test_a_bound_on_copies_makes_it_fit(tree: ProcTree) -> None:
    tree.v2_group("/a", 500 * MIB, 400 * MIB)
    fork = assess_fork(root=tree.root, max_copy_bytes=64 * MIB)
    assert (fork.decision, fork.copy_forecast_bytes) == ("admit", 64 * MIB)
    assert "bounded by max_copy" in fork.reasons[0]


def test_the_ancestor_with_the_least_headroom_decides(tree: ProcTree) -> None:
    tree.v2("/p/a")
    tree.v2_group("/p", 2 * GIB, 2 * GIB - 10 * MIB)
    tree.v2_group("/p/a", GIB, 400 * MIB)
    fork = assess_fork(root=tree.root)
    assert (fork.decision, fork.headroom_bytes) == ("defer", 10 * MIB)
    assert fork.binding is not None
    assert fork.binding.path == "/p"


def test_the_gravest_finding_decides_and_not_the_first(tree: ProcTree) -> None:
    tree.v2("/p/a")
    tree.v2_group("/p", 2 * GIB, 2 * GIB - 10 * MIB)
    tree.v2_group("/p/a", 500 * MIB, 400 * MIB)
    fork = assess_fork(root=tree.root)
    assert (fork.decision, len(fork.reasons)) == ("refuse", 2)
    assert fork.binding is not None
    assert fork.binding.path == "/p/a"


@pytest.mark.parametrize(("reclaimable", "decision"), [(0, "refuse"), (150 * MIB, "defer")])
def test_what_can_be_reclaimed_need_not_stay_beside_the_copies(tree: ProcTree, reclaimable: int, decision: str) -> None:
    tree.v2_group("/a", 550 * MIB, 540 * MIB)
    assert assess_fork(root=tree.root, reclaimable_bytes=reclaimable).decision == decision


@pytest.mark.parametrize(("swapped_kb", "decision"), [(0, "defer"), (200 * 1024, "refuse")])
def test_what_the_process_has_swapped_out_stays_too(tree: ProcTree, swapped_kb: int, decision: str) -> None:
    tree.v2("/")
    tree.meminfo(MemTotal=500 * 1024, MemFree=0, MemAvailable=0, SwapTotal=200 * 1024, SwapFree=0)
    tree.status(anon_kb=HEAP_MIB * 1024, swap_kb=swapped_kb)
    assert assess_fork(root=tree.root).decision == decision


def test_what_a_cgroup_leaves_now_it_can_leave_whatever_the_process_holds(tree: ProcTree) -> None:
    tree.v2_group("/a", 301 * MIB, 2 * MIB)  # the heap was charged elsewhere
    fork = assess_fork(root=tree.root)
    assert fork.decision == "refuse"
    assert "could never leave more than 299 MiB" in fork.reasons[0]


def test_physical_memory_decides_where_no_cgroup_does(tree: ProcTree) -> None:
    tree.v2("/")
    tree.meminfo(MemAvailable=100 * 1024)
    fork = assess_fork(root=tree.root)
    assert fork.decision == "defer"
    assert fork.binding is not None
    assert fork.binding.kind == "physical"


def test_rlimits_of_the_process_do_not_hinder_copies(tree: ProcTree) -> None:
    tree.rlimits(data=str(33 * MIB))
    assert assess_fork(root=tree.root).decision == "admit"


def test_half_of_the_file_cache_in_use_is_room(tree: ProcTree) -> None:
    tree.v2_group("/a", GIB, GIB, inactive=200 * MIB, active=400 * MIB)
    fork = assess_fork(root=tree.root)
    assert (fork.decision, fork.headroom_bytes) == ("admit", 400 * MIB)


@pytest.mark.parametrize(
    ("rate", "duration", "forecast"),
    [(MIB, 10, 10 * MIB), (0, None, 0), (None, 0, 0), (GIB, 60, HEAP_MIB * MIB), (float("inf"), 1, HEAP_MIB * MIB)],
)
def test_the_callers_forecast_is_taken_up_to_all_private_memory(
    tree: ProcTree, rate: float | None, duration: float | None, forecast: int
) -> None:
    fork = assess_fork(dirty_bytes_per_s=rate, duration_s=duration, root=tree.root)
    assert (fork.copy_forecast_bytes, fork.forecast_source) == (forecast, "caller")


def test_a_rate_alone_counts_for_as_long_as_writing_all_private_memory_is_assumed_to_take(tree: ProcTree) -> None:
    fork = assess_fork(dirty_bytes_per_s=MIB, root=tree.root)
    expected_s = HEAP_MIB * MIB / ASSUMED_WRITE_BYTES_PER_S
    assert (fork.copy_forecast_bytes, fork.forecast_source) == (int(MIB * expected_s), "caller")
    assert f"{expected_s:.1f} s" in fork.reasons[0]


def test_it_is_deferred_when_it_fits_once_budgets_have_given_what_they_can(tree: ProcTree) -> None:
    tree.v2_group("/a", 500 * MIB, 400 * MIB)
    assert assess_fork(root=tree.root).decision == "refuse"
    fork = assess_fork(root=tree.root, reclaimable_bytes=250 * MIB)
    assert fork.decision == "defer"
    assert "250 MiB that can be reclaimed" in fork.reasons[0]


def test_an_rlimit_that_leaves_nothing_for_the_child_itself_defers(tree: ProcTree) -> None:
    tree.rlimits(data=str(32 * MIB + CHILD_NEEDS_BYTES - 1))
    fork = assess_fork(root=tree.root)
    assert (fork.decision, fork.kernel_would_allow) == ("defer", True)
    assert fork.binding is not None
    assert fork.binding.kind == "rlimit_data"
    assert "RLIMIT_DATA" in fork.reasons[0]


def test_the_last_snapshots_copies_are_a_forecast_that_the_caller_may_replace(tree: ProcTree) -> None:
    last = assess_fork(root=tree.root, last_copy_bytes=7 * MIB)
    assert (last.copy_forecast_bytes, last.forecast_source) == (7 * MIB, "last snapshot")
    told = assess_fork(MIB, 3, root=tree.root, last_copy_bytes=7 * MIB)
    assert (told.copy_forecast_bytes, told.forecast_source) == (3 * MIB, "caller")


@pytest.mark.parametrize("number", [-1, float("nan"), 10**400])
def test_a_rate_or_a_time_that_makes_no_sense_is_refused(tree: ProcTree, number: float) -> None:
    with pytest.raises(ValueError, match="dirty_bytes_per_s"):
        assess_fork(dirty_bytes_per_s=number, root=tree.root)
    with pytest.raises(ValueError, match="duration_s"):
        assess_fork(duration_s=number, root=tree.root)


def test_mode_zero_looks_at_each_mapping_and_not_at_what_is_committed(tree: ProcTree) -> None:
    tree.meminfo(Committed_AS=99 * GIB // 1024)
    fifteen = f"{15 * GIB // 1024} rw-p rd,wr,ac 1024"
    tree.smaps(fifteen, fifteen)
    fork = assess_fork(root=tree.root)
    assert (fork.kernel_would_allow, fork.commit_charge_bytes) == (True, 30 * GIB)
    assert fork.decision == "admit"


@pytest.mark.parametrize(("extra_kb", "allowed"), [(0, True), (4, False)])
def test_mode_zero_refuses_a_mapping_larger_than_ram_and_swap(tree: ProcTree, extra_kb: int, allowed: bool) -> None:
    tree.meminfo(SwapTotal=MIB)
    tree.smaps(f"{17 * MIB + extra_kb} rw-p rd,wr,ac 4")
    fork = assess_fork(root=tree.root)
    assert (fork.kernel_would_allow, fork.decision) == (allowed, "admit" if allowed else "refuse")
    if not allowed:
        assert fork.binding is not None
        assert fork.binding.kind == "commit"
        assert "overcommit_memory=0" in fork.reasons[0]


def test_mode_one_never_refuses(tree: ProcTree) -> None:
    tree.overcommit(1)
    tree.smaps(f"{99 * MIB} rw-p rd,wr,ac 4")
    assert assess_fork(root=tree.root).kernel_would_allow is True


@pytest.mark.parametrize(("spare_kb", "allowed"), [(4, True), (0, False)])
def test_mode_two_wants_the_sum_below_what_is_left(tree: ProcTree, spare_kb: int, allowed: bool) -> None:
    tree.overcommit(2, admin_kb=8192, user_kb=1024)
    charge_kb = HEAP_MIB * 1024 + 64
    tree.smaps(HEAP, "64 rw-p rd,wr,ac 0", "999999 rw-p rd,wr,ac,dc 0")
    tree.meminfo(CommitLimit=4 * MIB + charge_kb + 8192 + 1024 + spare_kb)
    fork = assess_fork(root=tree.root)
    assert (fork.commit_charge_bytes, fork.kernel_would_allow) == (charge_kb * 1024, allowed)
    assert fork.commit_headroom_bytes == (charge_kb + spare_kb) * 1024
    if not allowed:
        assert fork.decision == "refuse"
        assert "overcommit_memory=2" in fork.reasons[0]


def test_nothing_to_charge_is_allowed_in_mode_two_with_nothing_left(tree: ProcTree) -> None:
    tree.overcommit(2)
    tree.meminfo(Committed_AS=99 * MIB)
    tree.smaps("64 rw-p rd,wr,ac,dc 0")
    assert assess_fork(root=tree.root).kernel_would_allow is True


def test_no_room_for_a_task_is_a_refusal(tree: ProcTree) -> None:
    tree.write("/sys/fs/cgroup/a/pids.max", "5\n")
    tree.write("/sys/fs/cgroup/a/pids.current", "5\n")
    fork = assess_fork(root=tree.root)
    assert (fork.kernel_would_allow, fork.decision) == (False, "refuse")
    assert "pids.max" in fork.reasons[0]


@pytest.mark.parametrize(("percent", "decision"), [("9.99", "admit"), ("10.00", "defer")])
def test_pressure_now_defers(tree: ProcTree, percent: str, decision: str) -> None:
    tree.write("/proc/pressure/memory", PSI.format(percent))
    assert assess_fork(root=tree.root).decision == decision


def test_that_some_wait_does_not_defer(tmp_path: Path) -> None:
    with FakeKernel(tmp_path) as kernel:
        kernel.stall(some=90, full=9)
        assert assess_fork(root=kernel.root).decision == "admit"


def test_pressure_does_not_soften_a_refusal(tree: ProcTree) -> None:
    tree.write("/proc/pressure/memory", PSI.format("50.00"))
    tree.v2_group("/a", 500 * MIB, 400 * MIB)
    fork = assess_fork(root=tree.root)
    assert (fork.decision, len(fork.reasons)) == ("refuse", 2)


def test_without_smaps_the_forecast_is_the_anonymous_memory_and_the_answer_unknown(tree: ProcTree) -> None:
    tree.remove("/proc/self/smaps")
    fork = assess_fork(root=tree.root)
    assert (fork.kernel_would_allow, fork.commit_charge_bytes) == (None, None)
    assert (fork.copy_forecast_bytes, fork.page_table_bytes) == (HEAP_MIB * MIB, MIB)
    assert any("smaps" in reason for reason in fork.reasons)


def test_without_status_the_mappings_tell_what_fork_is_charged(tree: ProcTree) -> None:
    tree.remove("/proc/self/status")
    tree.rlimits(processes="100")
    assert assess_fork(root=tree.root).kernel_would_allow is None, "who asks is not known, nor what RLIMIT_NPROC leaves"
    tree.rlimits(processes="unlimited")
    fork = assess_fork(root=tree.root)
    assert (fork.kernel_would_allow, fork.commit_charge_bytes) == (True, HEAP_MIB * MIB)
    assert fork.page_table_bytes == HEAP_MIB * MIB // 512


@pytest.mark.parametrize("name", ["memory.max", "memory.current"])
def test_a_limit_that_is_not_known_is_no_room(tree: ProcTree, name: str) -> None:
    tree.write(f"/sys/fs/cgroup/a/{name}", "lots\n")
    fork = assess_fork(root=tree.root)
    assert fork.decision == ("refuse" if name == "memory.current" else "admit")
    assert any(f"/a/{name}" in reason for reason in fork.reasons)


def test_limits_of_tasks_that_are_not_known_leave_the_kernels_answer_open(tree: ProcTree) -> None:
    tree.write("/sys/fs/cgroup/a/pids.max", "lots\n")
    fork = assess_fork(root=tree.root)
    assert (fork.kernel_would_allow, fork.decision) == (None, "admit")
    assert any("pids.max" in reason for reason in fork.reasons)


def test_nothing_known_is_nothing_admitted(tmp_path: Path) -> None:
    fork = assess_fork(root=tmp_path)
    assert (fork.decision, fork.kernel_would_allow, fork.headroom_bytes) == ("refuse", None, None)
    assert any("meminfo" in reason for reason in fork.reasons)
    assert fork.reasons[-1].count("/self/status") == 1, "each problem is told once"


def test_all_of_it_is_plain_data(tree: ProcTree) -> None:
    assert json.loads(json.dumps(assess_fork(root=tree.root).as_dict()))["binding"]["kind"] == "memory.max"
