"""The made-up machine says what it was told to, to every part of memsafe that takes a root."""

from __future__ import annotations

import os

import pytest

from memsafe import MemoryStatus, PressureLevel, PressureMonitor, assess_fork, memory_status
from memsafe._kernel import cgroup, files, process, tasks
from memsafe.testing import FakeKernel, FakeMapping

MIB = 1024 * 1024
GIB = 1024 * MIB


@pytest.fixture
def kernel(tmp_path):
    return FakeKernel(tmp_path)


def look(kernel) -> MemoryStatus:
    status = memory_status(root=kernel.root)
    assert status.warnings == ()
    return status


def test_a_new_machine_is_whole_and_bound_by_its_memory_alone(kernel):
    (physical,) = look(kernel).constraints
    assert (physical.limit_bytes, physical.headroom_bytes) == (16 * GIB, 8 * GIB)
    assert look(kernel).commit.limit_bytes == 8 * GIB
    assert assess_fork(root=kernel.root).decision == "admit"


def test_its_folder_goes_with_it_only_if_it_made_it(tmp_path):
    with FakeKernel() as own:
        assert look(own).binding.kind == "physical"
    assert not own.root.exists()
    with FakeKernel(tmp_path):
        pass
    assert (tmp_path / "proc/meminfo").exists()


@pytest.mark.parametrize(
    ("layout", "kind"), [("v2", "memory.max"), ("v1", "memory.limit_in_bytes"), ("hybrid", "memory.limit_in_bytes")]
)
def test_every_layout_has_nested_cgroups_with_limits_usage_cache_and_swap(tmp_path, layout, kind):
    kernel = FakeKernel(tmp_path, layout=layout)
    kernel.cgroup("/pod", limit="1 GiB", usage="900 MiB")
    app = kernel.cgroup("/pod/app", limit="512 MiB", usage="100 MiB", inactive_file="60 MiB", swap="1 MiB").join()
    status = look(kernel)
    assert [(c.kind, c.path, c.headroom_bytes) for c in status.constraints[:2]] == [
        (kind, "/pod/app", 472 * MIB),
        (kind, "/pod", 184 * MIB),
    ]
    assert status.binding.path == "/pod"
    app.set(swap_limit="1 MiB", oom_kills=2)
    (own, *_) = cgroup.memory_cgroups(kernel.root)
    assert (own.swap_usage_bytes(), own.oom_kills()) == (MIB, 2)
    limit_bytes = own.swap_limit_bytes() if own.version == 2 else own.memsw_limit_bytes() - own.limit_bytes()
    assert limit_bytes == MIB


def test_a_cgroup_holds_what_those_below_it_hold_until_it_is_told_otherwise(kernel):
    pod = kernel.cgroup("/pod", limit=GIB)
    app, other = kernel.cgroup("/pod/app", usage=300 * MIB).join(), kernel.cgroup("/pod/other", usage=100 * MIB)
    assert (pod.usage, look(kernel).available_bytes) == (400 * MIB, 624 * MIB)
    app.usage = "500 MiB"
    assert look(kernel).available_bytes == 424 * MIB
    other.remove()
    assert pod.usage == 500 * MIB
    pod.usage = GIB
    assert look(kernel).available_bytes == 0


def test_what_changes_is_seen_by_the_next_look(kernel):
    app = kernel.cgroup("/app", limit="1 GiB", usage="100 MiB", high="900 MiB").join()
    assert look(kernel).available_bytes == 800 * MIB
    app.high = None
    app.limit = "300 MiB"
    assert look(kernel).available_bytes == 200 * MIB
    kernel.machine.available = "50 MiB"
    assert look(kernel).binding.kind == "physical"
    assert (app.limit, app.high, kernel.machine.available) == (300 * MIB, None, 50 * MIB)


def test_a_cgroup_vanishes_with_those_below_and_returns_as_it_was(kernel):
    kernel.cgroup("/pod", limit=GIB)
    app = kernel.cgroup("/pod/app", limit=200 * MIB, usage=100 * MIB).join()
    pod = kernel.cgroup("/pod")
    pod.remove()
    assert any("/pod/app" in warning for warning in memory_status(root=kernel.root).warnings)
    app.usage = 150 * MIB
    assert not (kernel.root / "sys/fs/cgroup/pod").exists()
    app.restore()
    assert look(kernel).available_bytes == 50 * MIB


def test_a_cgroup_asked_for_again_is_the_same_and_keeps_its_settings(kernel):
    app = kernel.cgroup("/app", limit=GIB)
    assert kernel.cgroup("/app/") is app
    assert kernel.cgroup("//app") is app
    assert kernel.cgroup("/app", usage=1).limit == GIB


@pytest.mark.parametrize(("before", "after"), [(9, 10**9), (10**9, 9), (10**9, 2 * 10**9)])
def test_a_number_changes_in_one_moment_also_for_an_open_descriptor(kernel, monkeypatch, before, after):
    app = kernel.cgroup("/app", usage=before)
    fd = os.open(kernel.root / "sys/fs/cgroup/app/memory.current", os.O_RDONLY)
    seen = [os.pread(fd, 100, 0)]

    def watched(call):
        def change(*arguments):
            call(*arguments)
            seen.append(os.pread(fd, 100, 0))

        return change

    monkeypatch.setattr(os, "pwrite", watched(os.pwrite))
    monkeypatch.setattr(os, "ftruncate", watched(os.ftruncate))
    app.usage = after
    os.close(fd)
    numbers = [files.count(text, "memory.current") for text in seen]
    assert sorted(set(numbers)) == sorted({before, after})
    assert seen[-1] == b"%d\n" % after
    # The kernel copies first and then moves the end: a write that did both at once could be read half.
    at = numbers.index(after)
    assert len(seen[at - 1]) == len(seen[at])


def test_a_file_can_be_garbage_missing_or_unreadable_and_is_named(kernel):
    app = kernel.cgroup("/app", limit=GIB, usage=MIB).join()
    path = app.file("memory.max")
    for spoil in (
        lambda: kernel.write(path, b"\xff\0"),
        lambda: kernel.remove(path),
        lambda: kernel.make_unreadable(path),
    ):
        spoil()
        status = memory_status(root=kernel.root)
        assert any(path in warning for warning in status.warnings)
        assert status.binding.kind == "physical"
        kernel.repair(path)
        assert look(kernel).binding.path == "/app"
    kernel.make_unreadable(path)
    app.usage = 2 * MIB
    assert memory_status(root=kernel.root).warnings, "only what shows the setting is written again"
    app.limit = 2 * GIB
    assert look(kernel).limit_bytes == 2 * GIB


def test_pressure_is_off_until_something_stalls(kernel):
    assert look(kernel).pressure is None
    kernel.stall(12.5, 3)
    assert look(kernel).pressure.some.avg10 == 12.5
    kernel.cgroup("/app").join().stall(50, 40, full_us=7)
    assert (look(kernel).pressure.full.avg60, look(kernel).pressure.full.total_us) == (40.0, 7)
    assert assess_fork(root=kernel.root).decision == "defer"


def test_beside_v1_the_cgroup2_tells_of_pressure(tmp_path):
    kernel = FakeKernel(tmp_path, layout="hybrid")
    kernel.cgroup("/app").join().stall(5)
    assert look(kernel).pressure.source.endswith("/unified/app/memory.pressure")


def test_commit_is_counted_as_the_kernel_does(kernel):
    kernel.machine.set(total=10 * GIB, swap_total=GIB, committed=5 * GIB)
    kernel.overcommit.set(mode=2, ratio=60, admin_reserve=8 * MIB, user_reserve=128 * MIB)
    kernel.process.total_vm = 320 * MIB
    status = look(kernel)
    assert status.commit.limit_bytes == kernel.machine.commit_limit == 7 * GIB
    assert status.commit.headroom_bytes == 2 * GIB - 8 * MIB - 10 * MIB
    kernel.process.capabilities = 1 << process.CAP_SYS_ADMIN
    assert look(kernel).commit.headroom_bytes == 2 * GIB - 10 * MIB
    kernel.overcommit.fixed = "3 GiB"
    assert look(kernel).commit.limit_bytes == 4 * GIB
    kernel.machine.commit_limit = 9 * GIB
    assert look(kernel).commit.limit_bytes == 9 * GIB


def test_mappings_are_what_fork_is_charged_for(kernel):
    kernel.process.page_tables = GIB
    kernel.process.mappings = [
        FakeMapping("300 MiB", "200 MiB", swap="10 MiB"),
        FakeMapping("1 GiB", flags="rd wr mr mw me ac dc"),
        FakeMapping("64 MiB", "64 MiB", permissions="rw-s", flags="rd wr sh"),
    ]
    fork = assess_fork(root=kernel.root)
    assert (fork.commit_charge_bytes, fork.copy_forecast_bytes) == (300 * MIB, 210 * MIB)


def test_rlimits_refuse(kernel):
    kernel.process.set(data_limit="48 MiB", address_space_limit="66 MiB", processes_limit=100)
    found = {c.kind: c.headroom_bytes for c in look(kernel).constraints}
    assert (found["rlimit_data"], found["rlimit_as"]) == (16 * MIB, 2 * MIB)
    assert process.limits(kernel.root).processes == 100


def test_tasks_run_out_in_a_cgroup_and_on_the_machine(kernel):
    def exhausted():
        return tasks.exhausted(cgroup.placement(kernel.root), kernel.root) or ""

    app = kernel.cgroup("/app", pids=5, pids_limit=6).join()
    kernel.machine.set(threads=99, threads_max=100)
    assert exhausted() == ""
    kernel.machine.threads = 100
    assert "threads-max" in exhausted()
    app.pids = 6
    assert "pids.max" in exhausted()


def test_an_oom_kill_below_counts_in_the_ancestors_events_and_not_in_their_local_ones(kernel):
    kernel.cgroup("/pod", oom_kills=1)
    kernel.cgroup("/pod/app", oom_kills=2, ooms=3).join()
    app, pod, _ = cgroup.memory_cgroups(kernel.root)
    assert (app.oom_kills(), pod.oom_kills()) == (2, 3)
    assert (pod.events().get(b"oom"), pod.events(local=True).get(b"oom_kill")) == (3, 1)


def test_a_namespaces_root_has_limits(kernel):
    kernel.cgroup("/", limit=GIB, usage=GIB // 2)
    assert (look(kernel).binding.path, look(kernel).available_bytes) == ("/", GIB // 2)


def test_a_monitor_hears_of_what_the_test_does(kernel):
    app = kernel.cgroup("/app", limit="128 MiB", usage="32 MiB").join()
    heard = []
    with PressureMonitor(root=kernel.root) as monitor:
        monitor.on(PressureLevel.CRITICAL, heard.append)
        assert monitor.check() == PressureLevel.NORMAL
        app.usage = "127 MiB"
        assert monitor.check() == PressureLevel.CRITICAL
    assert [event.level for event in heard] == [PressureLevel.CRITICAL]


def test_swap_has_limits_and_both_versions_tell_what_is_used(tmp_path):
    for layout, kind in (("v2", "memory.swap.max"), ("hybrid", "memory.memsw.limit_in_bytes")):
        kernel = FakeKernel(tmp_path / layout, layout=layout)
        kernel.machine.set(swap_total="4 GiB", swap_free="3 GiB")
        kernel.cgroup("/app", limit="1 GiB", usage="100 MiB", swap="200 MiB", swap_limit="500 MiB").join()
        swap = look(kernel).swap
        (limit,) = swap.limits
        assert (limit.kind, limit.path) == (kind, "/app")
        assert limit.headroom_bytes == (300 * MIB if layout == "v2" else GIB + 500 * MIB - 300 * MIB)
        assert swap.available_bytes == (300 * MIB if layout == "v2" else 3 * GIB)
    kernel = FakeKernel(tmp_path / "high")
    kernel.machine.set(swap_total="4 GiB", swap_free="3 GiB")
    kernel.cgroup("/app", swap_high="1 MiB", swap="2 MiB").join()
    assert [(limit.kind, limit.headroom_bytes) for limit in look(kernel).swap.limits] == [("memory.swap.high", 0)]


@pytest.mark.parametrize("layout", ["v2", "v1", "hybrid"])
def test_a_container_sees_its_own_cgroup_by_its_path_on_the_host(tmp_path, layout):
    kernel = FakeKernel(tmp_path, layout=layout, visible_from="/docker/a b:c")
    kernel.cgroup("/docker", limit="1 MiB", usage="1 MiB")
    box = kernel.cgroup("/docker/a b:c", limit="512 MiB", usage="100 MiB")
    kernel.cgroup("/docker/a b:c/worker", limit="256 MiB", usage="50 MiB").join()
    status = look(kernel)
    assert [(c.path, c.headroom_bytes) for c in status.constraints[:-1]] == [
        ("/docker/a b:c/worker", 206 * MIB),
        ("/docker/a b:c", 412 * MIB),
    ]
    assert (kernel.root / box.file("memory.stat").lstrip("/")).exists()
    box.remove()
    assert any("/docker/a b:c" in warning for warning in memory_status(root=kernel.root).warnings)


def test_capabilities_are_worth_what_the_user_namespace_makes_them(kernel):
    kernel.machine.set(total=10 * GIB, committed=0)
    kernel.overcommit.set(mode=2, ratio=100, admin_reserve=8 * MIB, user_reserve=0)
    kernel.process.set(capabilities=1 << process.CAP_SYS_ADMIN)
    assert look(kernel).commit.headroom_bytes == 10 * GIB
    kernel.process.user_namespace = 4026532301
    assert look(kernel).commit.headroom_bytes == 10 * GIB - 8 * MIB
    kernel.process.user_namespace = None
    assert look(kernel).commit.headroom_bytes == 10 * GIB


def test_a_users_tasks_run_out(kernel):
    kernel.process.set(threads=9, processes_limit=10)
    assert assess_fork(root=kernel.root).kernel_would_allow
    kernel.process.threads = 10
    fork = assess_fork(root=kernel.root)
    assert (fork.kernel_would_allow, fork.decision) == (False, "refuse")
    assert "RLIMIT_NPROC" in fork.reasons[0]


@pytest.mark.parametrize("path", ["app", "/../app", "/a/../../b", "", "/./app", "/a\nb"])
def test_a_path_that_is_none_of_the_hierarchy_is_refused(kernel, path):
    with pytest.raises(ValueError, match="cgroup's path"):
        kernel.cgroup(path)


def test_no_cgroup_has_the_name_of_a_file_of_the_one_above(kernel):
    with pytest.raises(ValueError, match=r"has that name already: '/app/memory\.max'"):
        kernel.cgroup("/app/memory.max")
    assert kernel.cgroup("/app", limit=GIB).file("memory.max")


def test_a_setting_that_does_not_exist_is_an_error_and_changes_nothing(kernel):
    with pytest.raises(TypeError, match="no setting 'used'"):
        kernel.cgroup("/app", used=5)
    with pytest.raises(ValueError, match="usage must"):
        kernel.cgroup("/app").usage = -1
    with pytest.raises(ValueError, match="pids must"):
        kernel.cgroup("/app").set(limit=5, pids=-1)
    assert kernel.cgroup("/app").limit is None
    with pytest.raises(ValueError, match="layout"):
        FakeKernel(kernel.root, layout="v3")


def test_a_name_need_not_be_text(kernel):
    kernel.cgroup("/\udcff", limit=GIB).join()
    status = look(kernel)
    assert (status.constraints[0].path, status.warnings) == ("/\udcff", ())


def test_huge_pages_beyond_all_memory_leave_nothing_to_promise(kernel):
    kernel.machine.hugetlb = "1 TiB"
    assert (look(kernel).commit.limit_bytes, look(kernel).warnings) == (0, ())


def test_a_kernel_may_not_tell_the_user(kernel):
    kernel.process.set(uid=None, threads=50, processes_limit=50)
    assert "it has no Uid" in assess_fork(root=kernel.root).reasons[-1]
