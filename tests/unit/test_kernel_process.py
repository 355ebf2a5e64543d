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


def test_threads_are_told_by_number_and_name(tree: ProcTree) -> None:
    tree.write("/proc/self/task/7/comm", "python3\n")
    tree.write("/proc/self/task/8/comm", "a (b) \xff\n")
    (tree.root / "proc/self/task/9").mkdir()  # it has ended meanwhile
    assert process.thread_names(tree.root) == {7: "python3", 8: "a (b) \xff"}


def test_mapped_files_are_told_by_base_name_once(tree: ProcTree) -> None:
    tree.write(
        "/proc/self/maps",
        "00400000-00401000 r-xp 00000000 08:01 11 /usr/lib/libgomp.so.1.0.0\n"
        "00401000-00402000 rw-p 00001000 08:01 11 /usr/lib/libgomp.so.1.0.0\n"
        "00402000-00403000 rw-p 00000000 00:00 0\n"
        "00403000-00404000 r--p 00000000 08:01 12 /a b/gone.so (deleted)\n"
        "7ffe0000-7fff0000 rw-p 00000000 00:00 0 [stack]\n",
    )
    assert process.mapped_files(tree.root) == {"libgomp.so.1.0.0", "gone.so (deleted)"}


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
        "maps": lambda: process.mapped_files(root),
        "status": lambda: process.status(root).real_uid,
    }
    for name, read in reads.items():
        for head in (b"", b"00400000-00401000 rw-p 0 0:0 0\nSize:", b"Uid:", b"Max data size   "):
            (own / name).write_bytes(head + text)
            with only_memsafe_errors(naming=name):
                read()
