"""What a made-up machine was told is what every reader says: each file is written and read back.

That no content makes a reader raise anything but a MemsafeError is tested with each reader, and in tests/fuzz.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings, strategies as st

from memsafe._kernel import cgroup, machine, overcommit, process, psi
from memsafe._kernel.files import UNLIMITED
from memsafe.testing import FakeKernel, FakeMapping

if TYPE_CHECKING:
    from collections.abc import Callable

MEMINFO = {
    "total": "total_bytes", "free": "free_bytes", "available": "available_bytes", "swap_total": "swap_total_bytes",
    "swap_free": "swap_free_bytes", "hugetlb": "hugetlb_bytes", "committed": "committed_bytes",
    "commit_limit": "commit_limit_bytes",
}  # fmt: skip
STATUS = {
    "rss": "rss_bytes", "anonymous": "anonymous_bytes", "swap": "swap_bytes", "total_vm": "total_vm_bytes",
    "data_vm": "data_vm_bytes", "page_tables": "page_table_bytes",
}  # fmt: skip
CGROUP: dict[str, Callable[[cgroup.MemoryCgroup], object]] = {
    "limit": lambda group: group.limit_bytes(),
    "high": lambda group: group.high_bytes(),
    "usage": lambda group: group.usage_bytes(),
    "inactive_file": lambda group: (group.file_cache_bytes() or (None, None))[0],
    "active_file": lambda group: (group.file_cache_bytes() or (None, None))[1],
    "swap": lambda group: group.swap_usage_bytes(),
    "swap_limit": lambda group: group.swap_limit_bytes(),
    "swap_high": lambda group: group.swap_high_bytes(),
    "oom_kills": lambda group: group.oom_kills(),
}
KILOBYTES = st.integers(0, 2**42).map(lambda kilobytes: kilobytes * 1024)
BYTES = st.integers(0, 2**53)
NAME = st.text(
    st.characters(blacklist_characters="/\0\n", blacklist_categories=("Cs",)), min_size=1, max_size=20
).filter(lambda name: name not in {".", ".."} and not name.startswith(("cgroup.", "memory.", "pids.")))


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> FakeKernel:
    return FakeKernel(tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> FakeKernel:
    return FakeKernel(tmp_path_factory.mktemp("v1"), layout="v1")


def read_back(source: object, names: dict[str, str]) -> dict[str, int | None]:
    return {told: getattr(source, name) for told, name in names.items()}


@given(told=st.fixed_dictionaries({name: st.none() | KILOBYTES for name in MEMINFO}))
def test_meminfo(kernel: FakeKernel, told: dict[str, int | None]) -> None:
    kernel.machine.set(**told)
    assert read_back(machine.meminfo(kernel.root), MEMINFO) == told


@given(mode=st.integers(0, 2), numbers=st.lists(st.integers(0, 2**40), min_size=4, max_size=4))
def test_overcommit(kernel: FakeKernel, mode: int, numbers: list[int]) -> None:
    ratio, fixed_kb, admin_kb, user_kb = numbers
    kernel.overcommit.set(
        mode=mode, ratio=ratio, fixed=fixed_kb * 1024, admin_reserve=admin_kb * 1024, user_reserve=user_kb * 1024
    )
    names = ("overcommit_ratio", "overcommit_kbytes", "admin_reserve_kbytes", "user_reserve_kbytes")
    assert [machine.sysctl(f"vm/{name}", kernel.root) for name in names] == numbers
    assert machine.overcommit_mode(kernel.root) == mode


@given(threads=st.integers(0, 2**22), most=st.integers(0, 2**30))
def test_tasks_of_the_machine(kernel: FakeKernel, threads: int, most: int) -> None:
    kernel.machine.set(threads=threads, threads_max=most)
    assert (machine.threads(kernel.root), machine.sysctl("kernel/threads-max", kernel.root)) == (threads, most)


@given(
    told=st.fixed_dictionaries({name: st.none() | KILOBYTES for name in STATUS}),
    uid=st.integers(0, 2**32 - 1), threads=st.integers(0, 2**22), capabilities=st.integers(0, 2**41 - 1),
)  # fmt: skip
def test_status(kernel: FakeKernel, told: dict[str, int | None], uid: int, threads: int, capabilities: int) -> None:
    kernel.process.set(**told, uid=uid, threads=threads, capabilities=capabilities)
    status = process.status(kernel.root)
    assert read_back(status, STATUS) == told
    assert (status.real_uid, status.threads, status.effective_capabilities) == (uid, threads, capabilities)


@given(told=st.lists(st.none() | BYTES, min_size=3, max_size=3))
def test_rlimits(kernel: FakeKernel, told: list[int | None]) -> None:
    data, space, processes = told
    kernel.process.set(data_limit=data, address_space_limit=space, processes_limit=processes)
    limits = process.limits(kernel.root)
    read = [limits.data_bytes, limits.address_space_bytes, limits.processes]
    assert read == [UNLIMITED if value is None else value for value in told]


@given(score=st.integers(0, 2000), adjustment=st.integers(-1000, 1000))
def test_oom_scores(kernel: FakeKernel, score: int, adjustment: int) -> None:
    kernel.process.set(oom_score=score, oom_score_adj=adjustment)
    assert (process.oom_score(kernel.root), process.oom_score_adj(kernel.root)) == (score, adjustment)


@given(sizes=st.lists(KILOBYTES, min_size=4, max_size=4))
def test_smaps_rollup(kernel: FakeKernel, sizes: list[int]) -> None:
    rss, pss, anonymous, swap = sizes
    kernel.process.set(rss=rss, pss=pss, anonymous=anonymous, swap=swap)
    rollup = process.smaps_rollup(root=kernel.root)
    assert (rollup.rss_bytes, rollup.pss_bytes, rollup.anonymous_bytes, rollup.swap_bytes) == (
        rss,
        pss,
        anonymous,
        swap,
    )
    assert process.pss_bytes(root=kernel.root) == pss


@given(
    pages=st.lists(
        st.tuples(st.integers(1, 2**20), st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=20
    )
)
def test_mappings(kernel: FakeKernel, pages: list[tuple[int, bool, bool, bool]]) -> None:
    kernel.process.mappings = [
        FakeMapping(count * 4096, flags="rd wr" + " ac" * charged + " dc" * skipped + " wf" * wiped)
        for count, charged, skipped, wiped in pages
    ]
    charges = [count * 4096 for count, charged, skipped, _ in pages if charged and not skipped]
    cost = overcommit.fork_cost(root=kernel.root)
    assert (cost.charge_bytes, cost.largest_charge_bytes) == (sum(charges), max(charges, default=0))


@given(
    percents=st.lists(st.integers(0, 10000), min_size=2, max_size=2),
    totals=st.lists(st.integers(0, 2**63), min_size=2, max_size=2),
)
def test_pressure(kernel: FakeKernel, percents: list[int], totals: list[int]) -> None:
    some, full = (percent / 100 for percent in percents)
    kernel.stall(some, full, some_us=totals[0], full_us=totals[1])
    told = psi.read_pressure(psi.system_path(kernel.root))
    assert told is not None
    assert [(stall.avg10, stall.avg300, stall.total_us) for stall in (told.some, told.full)] == [
        (some, some, totals[0]),
        (full, full, totals[1]),
    ]


UNLIMITED_WHERE_NONE = {"limit", "high", "swap_limit", "swap_high"}
SETTINGS: dict[str, st.SearchStrategy[int | None]] = {
    name: (st.none() | BYTES) if name in UNLIMITED_WHERE_NONE else BYTES for name in CGROUP
}


@given(told=st.fixed_dictionaries(SETTINGS))
def test_a_v2_cgroup(kernel: FakeKernel, told: dict[str, int | None]) -> None:
    kernel.cgroup("/a").set(**told).join()
    own = cgroup.memory_cgroups(kernel.root)[0]
    expected = {name: UNLIMITED if value is None else value for name, value in told.items()}
    assert {name: read(own) for name, read in CGROUP.items()} == expected


@given(told=st.fixed_dictionaries({name: of for name, of in SETTINGS.items() if "high" not in name}))
def test_a_v1_cgroup(v1: FakeKernel, told: dict[str, Any]) -> None:
    v1.cgroup("/a").set(**told).join()
    own = cgroup.memory_cgroups(v1.root)[0]
    one_sided = {"limit", "swap_limit"}
    assert {name: CGROUP[name](own) for name in told if name not in one_sided} == {
        name: value for name, value in told.items() if name not in one_sided
    }
    assert own.limit_bytes() == (UNLIMITED if told["limit"] is None else told["limit"])
    unlimited = None in (told["limit"], told["swap_limit"])
    assert own.memsw_limit_bytes() == (UNLIMITED if unlimited else told["limit"] + told["swap_limit"])
    assert own.memsw_usage_bytes() == told["usage"] + told["swap"]


@settings(max_examples=50)
@given(names=st.lists(NAME, min_size=1, max_size=3), own=st.lists(NAME, max_size=2))
def test_a_cgroup_of_any_name_is_found_where_it_is_mounted(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], own: list[str]
) -> None:
    top = "/" + "/".join(names)
    kernel = FakeKernel(tmp_path_factory.mktemp("names"), visible_from=top)
    path = "/".join((top, *own))
    group = kernel.cgroup(path, limit=4096).join()
    found = cgroup.memory_cgroups(kernel.root)
    assert [level.path for level in found] == ["/".join((top, *own[:depth])) for depth in range(len(own), -1, -1)]
    assert found[0].limit_bytes() == 4096
    assert found[0].directory == f"{kernel.root}{group.file('x').removesuffix('/x')}"
