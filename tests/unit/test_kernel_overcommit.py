from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from memsafe._kernel import machine, overcommit, process, tasks
from memsafe._kernel.cgroup import placement
from memsafe.errors import KernelError
from tests.unit.proc_tree import GIB, MIB, ProcTree

if TYPE_CHECKING:
    from pathlib import Path

ALL_CAPABILITIES = 0x1FFFFFFFFFF


@pytest.fixture
def tree(tmp_path: Path) -> ProcTree:
    return ProcTree(tmp_path)


def commit_limit_kb(tree: ProcTree) -> int | None:
    size_bytes = overcommit.commit_limit_bytes(machine.meminfo(tree.root), tree.root)
    return None if size_bytes is None else size_bytes // 1024


def test_the_kernels_own_commit_limit_goes_before_arithmetic(tree: ProcTree) -> None:
    tree.meminfo(CommitLimit=12345)
    assert commit_limit_kb(tree) == 12345


def test_commit_limit_is_counted_in_whole_pages_without_huge_pages_and_with_swap(tree: ProcTree) -> None:
    tree.meminfo(CommitLimit=None, MemTotal=10_000_004, Hugetlb=1_000_000, SwapTotal=2048)
    tree.overcommit(2, ratio=33)
    pages = (10_000_004 - 1_000_000) * 1024 // machine.PAGE_BYTES
    assert commit_limit_kb(tree) == pages * 33 // 100 * machine.PAGE_BYTES // 1024 + 2048


def test_overcommit_kbytes_replace_the_ratio(tree: ProcTree) -> None:
    tree.meminfo(CommitLimit=None, SwapTotal=2048, Hugetlb=1_000_000)
    tree.overcommit(2, ratio=33, kbytes=640_001)
    assert commit_limit_kb(tree) == 640_000 + 2048


def test_commit_limit_is_unknown_without_its_terms(tree: ProcTree) -> None:
    tree.meminfo(CommitLimit=None, MemTotal=None)
    assert commit_limit_kb(tree) is None


@pytest.mark.parametrize(
    ("vm_kb", "caps", "namespace", "reserve_kb"),
    [
        (320_000, 0, None, 8192 + 10_000),
        (8_000_000, 0, None, 8192 + 131_072),
        (8_000_000, ALL_CAPABILITIES, None, 131_072),
        (8_000_000, ALL_CAPABILITIES, "user:[4026531837]", 131_072),
        (8_000_000, ALL_CAPABILITIES, "user:[4026532301]", 8192 + 131_072),
        (8_000_000, ALL_CAPABILITIES & ~(1 << 21), None, 8192 + 131_072),
    ],
)
def test_reserves(tree: ProcTree, vm_kb: int, caps: int, namespace: str | None, reserve_kb: int) -> None:
    tree.overcommit(2, admin_kb=8192, user_kb=131_072)
    tree.status(vm_kb=vm_kb, caps=caps)
    if namespace:
        (tree.root / "proc/self/ns").mkdir()
        (tree.root / "proc/self/ns/user").symlink_to(namespace)
    reserves = overcommit.reserves(process.status(tree.root), tree.root)
    assert reserves.total_bytes == reserve_kb * 1024


def test_an_unknown_size_leaves_the_whole_user_reserve(tree: ProcTree) -> None:
    tree.overcommit(2, user_kb=131_072)
    tree.write("/proc/self/status", "Name:\tx\n")
    assert overcommit.reserves(process.status(tree.root), tree.root).user_bytes == 131_072 * 1024


def test_a_mode_that_does_not_exist_is_garbage(tree: ProcTree) -> None:
    tree.overcommit(3)
    with pytest.raises(KernelError, match="overcommit_memory"):
        machine.overcommit_mode(tree.root)


def cost(tree: ProcTree, *entries: str, page_table_bytes: int | None = None) -> overcommit.ForkCost:
    tree.smaps(*entries)
    return overcommit.fork_cost(page_table_bytes, root=tree.root)


def test_fork_is_charged_for_accounted_mappings_that_it_copies(tree: ProcTree) -> None:
    asked = cost(
        tree,
        "2048 rw-p rd,wr,mr,mw,me,ac",
        "262144 rw-p rd,wr,ac",
        "262144 rw-p rd,wr,dc,ac",
        "131072 rw-p rd,wr,ac,wf",
        "262144 rw-s rd,wr,sh,ms",
        "262144 rw-p rd,wr,nr",
        "262144 r--p rd,mr",
        "65536 ---p mr,mw,ac",
    )
    assert asked.charge_bytes == (2048 + 262144 + 131072 + 65536) * 1024
    assert asked.largest_charge_bytes == 262144 * 1024


def test_copies_are_of_private_writable_pages_that_the_child_gets(tree: ProcTree) -> None:
    asked = cost(
        tree,
        "2048 rw-p rd,wr,ac 1024",
        "2048 rw-p rd,wr,nr 512",
        "2048 rw-p rd,wr,ac,dc 256",
        "2048 rw-p rd,wr,ac,wf 128",
        "2048 r--p rd,mw,ac 64",
        "2048 rw-s rd,wr,sh 32",
    )
    assert asked.copyable_bytes == (1024 + 512) * 1024


@pytest.mark.skipif(machine.PAGE_BYTES != 4096, reason="figures of 4 KiB pages")
def test_page_tables_are_one_page_a_slot_of_two_mebibytes_and_no_more_than_the_parent_has(tree: ProcTree) -> None:
    dense = f"{GIB // 1024} rw-p rd,wr,ac {GIB // 1024}"
    assert cost(tree, dense).page_table_bytes == 2 * MIB
    assert cost(tree, f"{GIB // 1024} rw-p rd,wr,ac 8").page_table_bytes == 8192
    assert cost(tree, dense, page_table_bytes=4096).page_table_bytes == 4096
    assert cost(tree, f"{GIB // 1024} rw-s rd,wr,sh {GIB // 1024}").page_table_bytes == 0


def exhausted(tree: ProcTree) -> str | None:
    return tasks.exhausted(placement(tree.root), tree.root)


def test_tasks_are_exhausted_at_pids_max_of_any_ancestor(tree: ProcTree) -> None:
    tree.v2("/a/b")
    for path, limit, current in (("/a", 10, 9), ("/a/b", 100, 5)):
        tree.v2_group(path)
        tree.write(f"/sys/fs/cgroup{path}/pids.max", f"{limit}\n")
        tree.write(f"/sys/fs/cgroup{path}/pids.current", f"{current}\n")
    assert exhausted(tree) is None
    tree.write("/sys/fs/cgroup/a/pids.current", "10\n")
    assert "10 of 10" in (exhausted(tree) or "")
    assert "/a" in (exhausted(tree) or "")


def test_tasks_are_exhausted_at_threads_max(tree: ProcTree) -> None:
    tree.write("/proc/loadavg", "0.00 0.01 0.05 1/500 1234\n")
    tree.write("/proc/sys/kernel/threads-max", "501\n")
    assert exhausted(tree) is None
    tree.write("/proc/sys/kernel/threads-max", "500\n")
    assert "500 of 500" in (exhausted(tree) or "")


def others(tree: ProcTree, *processes: tuple[int, int]) -> None:
    """Other processes, each (user, threads)."""
    for pid, (uid, threads) in enumerate(processes, start=100):
        tree.write(f"/proc/{pid}/status", f"Name:\tx\nUid:\t{uid}\t0\t0\t0\nThreads:\t{threads}\n")


def test_tasks_are_exhausted_at_what_one_user_may_have(tree: ProcTree) -> None:
    others(tree, (1000, 3), (1000, 4), (1001, 50))
    tree.write("/proc/200/status", "what?\n")
    tree.rlimits(processes="8")
    assert exhausted(tree) is None
    tree.rlimits(processes="7")
    assert exhausted(tree) == "7 of 7 tasks that RLIMIT_NPROC allows to user 1000"
    tree.write("/proc/loadavg", "0.00 0.01 0.05 1/6 1234\n")
    assert exhausted(tree) is None, "there are fewer tasks on the whole machine"
    tree.write("/proc/loadavg", "0.00 0.01 0.05 1/57 1234\n")
    assert exhausted(tree) is not None


@pytest.mark.parametrize("capability", [process.CAP_SYS_ADMIN, process.CAP_SYS_RESOURCE])
def test_who_may_administer_has_no_limit_of_tasks_but_in_a_namespace_of_ones_own(
    tree: ProcTree, capability: int
) -> None:
    others(tree, (1000, 3))
    tree.rlimits(processes="3")
    tree.status(caps=ALL_CAPABILITIES & ~(1 << process.CAP_SYS_ADMIN | 1 << process.CAP_SYS_RESOURCE))
    assert exhausted(tree) is not None
    tree.status(caps=1 << capability)
    assert exhausted(tree) is None
    (tree.root / "proc/self/ns").mkdir()
    (tree.root / "proc/self/ns/user").symlink_to("user:[4026532301]")
    assert exhausted(tree) is not None


def test_the_superuser_has_no_limit_of_tasks(tree: ProcTree) -> None:
    others(tree, (0, 3))
    tree.rlimits(processes="3")
    tree.write("/proc/self/status", "Uid:\t0\t0\t0\t0\n")
    assert exhausted(tree) is None
