from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, strategies as st

from memsafe._kernel import overcommit, process
from memsafe._kernel.files import UNLIMITED
from memsafe.errors import KernelError
from tests.unit.proc_tree import ProcTree, only_memsafe_errors

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def tree(tmp_path: Path) -> ProcTree:
    return ProcTree(tmp_path)


def test_status_tells_sizes_in_bytes(tree: ProcTree) -> None:
    tree.status(vm_kb=100, anon_kb=20, pte_kb=3, caps=0x1FF)
    status = process.status(tree.root)
    assert (status.total_vm_bytes, status.anonymous_bytes, status.page_table_bytes) == (102400, 20480, 3072)
    assert (status.real_uid, status.effective_capabilities) == (1000, 0x1FF)


def test_a_kernel_thread_has_no_memory_to_tell(tree: ProcTree) -> None:
    tree.write("/proc/self/status", "Name:\tkthreadd\n")
    status = process.status(tree.root)
    assert (status.rss_bytes, status.real_uid, status.effective_capabilities) == (None, None, 0)


def test_garbage_in_one_line_leaves_the_others_readable(tree: ProcTree) -> None:
    tree.write("/proc/self/status", "VmRSS:\tmany kB\nVmData:\t 4 kB\nCapEff:\tzz\n")
    status = process.status(tree.root)
    assert status.data_vm_bytes == 4096
    with pytest.raises(KernelError, match="self/status"):
        _ = status.rss_bytes
    with pytest.raises(KernelError, match="self/status"):
        _ = status.effective_capabilities


def test_soft_limits_are_read(tree: ProcTree) -> None:
    tree.rlimits(data="1048576", processes="100")
    limits = process.limits(tree.root)
    assert (limits.data_bytes, limits.address_space_bytes, limits.processes) == (1048576, UNLIMITED, 100)


def test_a_negative_oom_score_adj_is_read(tree: ProcTree) -> None:
    assert (process.oom_score(tree.root), process.oom_score_adj(tree.root)) == (666, -17)


def test_the_first_user_namespace_is_known_by_its_number(tree: ProcTree) -> None:
    assert process.in_initial_user_namespace(tree.root), "a kernel without user namespaces has only the first"
    link = tree.root / "proc/self/ns/user"
    link.parent.mkdir()
    link.symlink_to("user:[4026531837]")
    assert process.in_initial_user_namespace(tree.root)
    link.unlink()
    link.symlink_to("user:[4026532301]")
    assert not process.in_initial_user_namespace(tree.root)


@given(st.binary(max_size=300))
def test_no_content_raises_anything_but_a_memsafe_error(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    own = root / "proc/self"
    own.mkdir(parents=True)
    reads = {
        "smaps": lambda: overcommit.fork_cost(root=root),
        "smaps_rollup": lambda: process.smaps_rollup(root=root),
        "oom_score_adj": lambda: process.oom_score_adj(root),
        "limits": lambda: process.limits(root).data_bytes,
        "status": lambda: process.status(root).real_uid,
    }
    for name, read in reads.items():
        for head in (b"", b"00400000-00401000 rw-p 0 0:0 0\nSize:", b"Uid:", b"Max data size   "):
            (own / name).write_bytes(head + text)
            with only_memsafe_errors(naming=name):
                read()
