"""What the signals of the sources mean by themselves, on trees of files that never signal."""

from __future__ import annotations

import errno
import os
import select

import pytest

from memsafe import PressureLevel, Thresholds, memory_status
from memsafe._kernel import cgroup, notify
from memsafe.errors import KernelError
from memsafe.pressure import sources, waiter
from memsafe.pressure.hub import Debounce, Hub
from memsafe.pressure.levels import Needs
from memsafe.pressure.sources import CgroupEvents, OomNotice, ReclaimNotice, StallTrigger
from memsafe.testing import FakeKernel

MIB = 1024 * 1024


@pytest.fixture
def machine(tmp_path):
    return FakeKernel(tmp_path)


@pytest.fixture
def v1_machine(tmp_path):
    return FakeKernel(tmp_path, layout="hybrid")


def pressure(some_us, full_us=0):
    def line(kind, total_us):
        return f"{kind} avg10=0.00 avg60=0.00 avg300=0.00 total={total_us}\n"

    return line("some", some_us) + line("full", full_us)


def test_a_signal_without_growth_of_the_stall_is_a_false_one(machine):
    file = machine.write("/proc/pressure/memory", pressure(5_000_000, 9_000_000))
    some = StallTrigger(str(file), "some", PressureLevel.LOW, 200_000)
    full = StallTrigger(str(file), "full", PressureLevel.CRITICAL, 200_000)
    for trigger in (some, full):
        # As arming it would: what was stalled before is not counted. A copy of the file signals nothing.
        with pytest.raises(KernelError):
            trigger._arm()
        assert trigger.hear() is None
    file.write_text(pressure(5_100_000, 9_200_000))
    assert some.hear() is None
    cause = full.hear()
    assert (cause.level, cause.source, cause.needs) == (PressureLevel.CRITICAL, "psi.full", Needs.SHORT_HEADROOM)
    assert "200 ms" in cause.detail
    file.write_text(pressure(5_400_000, 9_200_000))
    assert some.hear().level == PressureLevel.LOW
    assert full.hear() is None


def test_pressure_that_was_turned_off_is_named(machine):
    trigger = StallTrigger(str(machine.root / "proc/pressure/memory"), "some", PressureLevel.LOW, 1)
    with pytest.raises(KernelError) as off:
        trigger.hear()
    assert off.value.errno == errno.EOPNOTSUPP


def events(machine, name, **counts):
    lines = {"low": 0, "high": 0, "max": 0, "oom": 0, "oom_kill": 0} | counts
    machine.write(f"/sys/fs/cgroup/app/{name}", "".join(f"{key} {value}\n" for key, value in lines.items()))


def test_only_ooms_of_the_cgroup_itself_are_critical(machine):
    machine.cgroup("/app", limit=128 * MIB).join()
    events(machine, "memory.events", oom=7)
    events(machine, "memory.events.local", oom=2)
    source = CgroupEvents(cgroup.memory_cgroups(machine.root)[0])
    source.hear()
    assert source.hear() is None
    # Its limit was met and cache was recycled; an OOM in a child is the child's.
    events(machine, "memory.events", oom=8, max=100, high=100)
    events(machine, "memory.events.local", oom=2, max=100, high=100)
    assert source.hear() is None
    events(machine, "memory.events.local", oom=3, oom_kill=1)
    cause = source.hear()
    assert (cause.level, cause.source) == (PressureLevel.CRITICAL, "memory.events")
    assert cause.detail == "oom +1, oom_kill +1 in /app"


def test_without_local_counts_those_of_the_subtree_are_taken(machine):
    machine.cgroup("/app", limit=128 * MIB).join()
    machine.remove("/sys/fs/cgroup/app/memory.events.local")
    events(machine, "memory.events", oom=7)
    source = CgroupEvents(cgroup.memory_cgroups(machine.root)[0])
    source.hear()
    events(machine, "memory.events", oom=8)
    assert source.hear().level == PressureLevel.CRITICAL
    machine.remove("/sys/fs/cgroup/app/memory.events")
    with pytest.raises(KernelError):
        source.hear()


def test_the_last_signal_of_a_removed_v1_cgroup_is_no_oom(v1_machine):
    app = v1_machine.cgroup("/app", limit=128 * MIB, oom_kills=4).join()
    source = OomNotice(cgroup.memory_cgroups(v1_machine.root)[0])
    assert "4 killed" in source.hear().detail
    app.remove()
    assert source.hear() is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errno.EOPNOTSUPP, "PSI is off: boot with psi=1"),
        (errno.EBUSY, "somebody else has a trigger on it"),
        (errno.EROFS, "the file system is read-only here"),
        (errno.EACCES, "this user may not open it for writing"),
        (errno.EPERM, "Operation not permitted"),
        (errno.EINVAL, "a multiple of 2 s without CAP_SYS_RESOURCE"),
        (errno.ENOENT, "No such file"),
    ],
)
def test_each_refusal_of_a_trigger_is_listed_with_what_to_do_and_the_next_best_is_tried(
    machine, monkeypatch, error, reason
):
    machine.stall()
    machine.cgroup("/app", limit=128 * MIB).join().stall()
    tried = []

    def refuse(path, kind, stall_us):
        tried.append(path)
        raise KernelError(error, f"open {path}")

    monkeypatch.setattr(notify, "arm_stall_trigger", refuse)
    hub = Hub(machine.root, Thresholds())
    try:
        hub.choose(memory_status(root=machine.root))
        listed = [each for each in hub.statuses if each.name == "psi.some"]
    finally:
        hub.close()
    own, system = (str(machine.root / path) for path in ("sys/fs/cgroup/app/memory.pressure", "proc/pressure/memory"))
    assert tried == [own, system, own, system]
    assert [each.path for each in listed] == [own, system]
    assert not any(each.used for each in listed)
    assert all(reason in each.reason and each.path in each.reason for each in listed)


def test_every_cgroup_on_the_way_up_is_a_source(machine):
    machine.cgroup("/pod", limit=256 * MIB)
    machine.cgroup("/pod/app", limit=128 * MIB).join()
    chosen = sources.choose(machine.root, memory_status(root=machine.root), Thresholds())
    base = machine.root / "sys/fs/cgroup"
    found = [each.path for each in chosen if each.name == "memory.events"]
    assert found == [f"{base}/pod/app/memory.events", f"{base}/pod/memory.events"]


def test_a_v1_limit_has_a_threshold_for_each_level_on_every_limited_ancestor(v1_machine):
    v1_machine.cgroup("/pod", limit=256 * MIB)
    v1_machine.cgroup("/pod/app").join()
    chosen = sources.choose(v1_machine.root, memory_status(root=v1_machine.root), Thresholds())
    found = {each.name: each.usage_bytes for each in chosen if isinstance(each, sources.UsageThreshold)}
    expected = {level: 256 * MIB - Thresholds().begins_at(level, 256 * MIB) for level in PressureLevel if level}
    assert found == {f"usage.{level.name.lower()}": usage_bytes for level, usage_bytes in expected.items()}


def test_a_flood_of_signals_is_rested_through_longer_and_longer_up_to_a_bound():
    debounce = Debounce(most_s=0.01)
    rests = [debounce.rest_s(0.002) for _ in range(5)]
    assert rests == [0.002, 0.004, 0.008, 0.01, 0.01]
    debounce.ended()
    assert debounce.rest_s(0.002) == 0.002
    assert debounce.rest_s(0.0) == 0, "after a change the next signal is heard at once"
    assert debounce.rest_s(0.002) == 0.002
    assert Debounce(most_s=0.001).rest_s(0.002) == 0.002


def test_what_signals_while_it_is_rested_is_a_flood_and_polling_is_none(machine):
    hub = Hub(machine.root, Thresholds(poll_s_min=0.001, poll_s_max=0.001))
    hub._debounce = Debounce(most_s=0.5)
    flood = os.eventfd(0, os.EFD_NONBLOCK)
    hub._waiter.add(flood, waiter.How.COUNTER, 99)
    try:
        for _ in range(2):  # signalled already when the rest begins
            os.eventfd_write(flood, 1)
            assert select.select([hub._waiter.fileno()], [], [], 30)[0], "the native thread has seen it"
            assert 99 in {report.token for report in hub.wait(0.001)}
        assert hub._debounce.rest_s(0.001) == 0.004
        hub.poll_after(0.001)
        assert {report.token for report in hub.wait(0.002)} == {hub._polling.token}
        assert hub._debounce.rest_s(0.001) == 0.001
    finally:
        hub.close()
        os.close(flood)


def test_the_kernels_low_is_no_source_and_its_critical_needs_low(v1_machine):
    app = v1_machine.cgroup("/app", limit=128 * MIB, usage=MIB).join()
    chosen = sources.choose(v1_machine.root, memory_status(root=v1_machine.root), Thresholds())
    notices = {each.name: each for each in chosen if isinstance(each, ReclaimNotice) and "app" in each.path}
    assert set(notices) == {"pressure_level.medium", "pressure_level.critical"}
    assert notices["pressure_level.medium"].hear() is None
    cause = notices["pressure_level.critical"].hear()
    assert (cause.level, cause.source, cause.needs) == (PressureLevel.CRITICAL, "pressure_level.critical", Needs.LOW)
    assert "in /app" in cause.detail
    app.remove()
    assert notices["pressure_level.critical"].hear() is None


@pytest.mark.parametrize(("refused", "wanted"), [("medium,local", "medium"), (None, "medium,local")])
def test_a_kernel_without_the_local_mode_is_asked_again_without_it(monkeypatch, refused, wanted):
    written = []

    def arm(directory, name, argument):
        if argument == refused:
            raise KernelError(errno.EINVAL, "write")
        written.append((directory, name, argument))
        return 7

    monkeypatch.setattr(notify, "_arm_v1", arm)
    assert notify.arm_pressure_level("/memory/app", "medium") == 7
    assert written == [("/memory/app", "memory.pressure_level", wanted)]


def test_a_better_source_of_the_same_kind_replaces_the_other(machine, monkeypatch):
    hub = Hub(machine.root, Thresholds())

    class Pipe(sources.Source):
        def _arm(self):
            return sources.waiter.open_timer()

    own, system, broken, fallback = (Pipe(name, name, "") for name in ("own", "system", "broken", "fallback"))
    broken._arm = lambda: (_ for _ in ()).throw(KernelError(errno.EBUSY, "open it"))
    system.stands_in_for, fallback.stands_in_for = frozenset({own.key}), frozenset({broken.key})
    monkeypatch.setattr(sources, "choose", lambda *_: [own, system, broken, fallback])
    try:
        assert hub.choose(memory_status(root=machine.root))
        assert [each.used for each in (own, system, broken, fallback)] == [True, False, False, True]
        assert "better source" in system.status.reason
        assert "somebody else has a trigger" in broken.status.reason
        assert not hub.choose(memory_status(root=machine.root))
    finally:
        hub.close()
