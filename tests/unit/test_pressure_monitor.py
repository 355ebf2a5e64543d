"""What a monitor makes of the machine: the level, what it says of it, and the sources that it names."""

from __future__ import annotations

import threading

import pytest

import memsafe
from memsafe import PressureLevel, PressureMonitor, Thresholds
from memsafe.testing import FakeKernel
from tests.unit.small_machine import CRITICAL, LOW, MIB, NORMAL, leave, listen, monitored

# --- levels ---------------------------------------------------------------------------------------------------------


def test_a_level_is_told_once_until_it_changes(machine, monitor):
    heard = listen(monitor, LOW)
    leave(machine, 15 * MIB)
    assert monitor.check() == LOW
    assert monitor.check() == LOW
    (event,) = heard
    assert (event.level, event.previous, event.source) == (LOW, NORMAL, "polling")
    assert (event.available_bytes, event.limit_bytes, event.at_s) == (15 * MIB, 128 * MIB, 1000.0)
    assert "15 MiB available of 128 MiB (memory.max of /app)" in event.detail
    leave(machine, 1 * MIB)
    assert monitor.check() == CRITICAL
    assert [event.level for event in heard] == [LOW, CRITICAL]


def test_it_falls_after_the_cooldown_and_says_so(machine, monitor, clock):
    clear = listen(monitor, NORMAL)
    leave(machine, 1 * MIB)
    monitor.check()
    leave(machine, 100 * MIB)
    assert monitor.check() == CRITICAL
    clock.now_s += 9.9
    assert monitor.check() == CRITICAL
    assert clear == []
    clock.now_s += 0.2
    assert monitor.check() == NORMAL
    assert [(event.level, event.previous) for event in clear] == [(NORMAL, CRITICAL)]


def test_page_cache_alone_raises_nothing(machine, monitor):
    heard = listen(monitor, LOW)
    for inactive, active in [(100 * MIB, 0), (0, 100 * MIB), (50 * MIB, 50 * MIB)]:
        machine.cgroup("/app", usage=128 * MIB, inactive_file=inactive, active_file=active)
        assert monitor.check() == NORMAL
    assert heard == []


def test_a_limit_that_is_lowered_is_noticed(machine, monitor):
    machine.cgroup("/app").limit = 40 * MIB
    assert monitor.check() == LOW


def test_an_ancestor_counts(machine, monitor):
    machine.cgroup("/pod", limit=256 * MIB, usage=255 * MIB)
    machine.cgroup("/pod/app", limit=128 * MIB, usage=32 * MIB).join()
    heard = listen(monitor, CRITICAL)
    assert monitor.check() == CRITICAL
    assert "of /pod)" in heard[0].detail


def test_a_machine_that_makes_no_sense_is_survived(machine, monitor):
    machine.write("/sys/fs/cgroup/app/memory.max", "lots\n")
    machine.write("/proc/self/cgroup", "nonsense\n")
    assert monitor.check() == NORMAL
    machine.repair("/sys/fs/cgroup/app/memory.max")
    machine.repair("/proc/self/cgroup")
    leave(machine, 1 * MIB)
    assert monitor.check() == CRITICAL


def test_the_polling_timer_looks_by_itself(machine):
    # Nothing but time passes here: the event itself is what is waited for.
    thresholds = Thresholds(poll_s_min=0.001, poll_s_max=0.001, cooldown_s=0)
    with PressureMonitor(root=machine.root, thresholds=thresholds) as monitor:
        came, left = threading.Event(), threading.Event()
        monitor.on(LOW, lambda event: came.set())
        monitor.on(NORMAL, lambda event: left.set())
        leave(machine, 15 * MIB)
        assert came.wait(30)
        leave(machine, 100 * MIB)
        assert left.wait(30)


# --- both ends ------------------------------------------------------------------------------------------------------


def boxed(tmp_path, limit_bytes):
    """A container that fills a machine as far as that goes: its host is half as large again."""
    kernel = FakeKernel(tmp_path)
    kernel.machine.set(total=limit_bytes * 3 // 2, free=limit_bytes, available=limit_bytes, committed=0)
    kernel.cgroup("/app", limit=limit_bytes).join()
    return kernel


@pytest.mark.parametrize("limit_bytes", [64 * MIB, 1 << 40], ids=["64 MiB", "1 TiB"])
def test_page_cache_alone_raises_nothing_in_a_small_container_and_on_a_large_host(tmp_path, clock, limit_bytes):
    machine = boxed(tmp_path, limit_bytes)
    anonymous_bytes = limit_bytes // 4
    cache_bytes = limit_bytes - anonymous_bytes
    with monitored(machine, clock) as monitor:
        for active_share in (0, 1, 2, 4):
            active_bytes = cache_bytes * active_share // 4
            machine.machine.set(free=0, available=limit_bytes * 3 // 2 - anonymous_bytes)
            machine.cgroup(
                "/app", usage=limit_bytes, active_file=active_bytes, inactive_file=cache_bytes - active_bytes
            )
            monitor.simulate(NORMAL)
            assert monitor.check() == NORMAL
        # The same use without the cache is the end of it.
        machine.cgroup("/app", usage=limit_bytes, active_file=0, inactive_file=0)
        assert monitor.check() == CRITICAL


@pytest.mark.parametrize(
    ("limit_bytes", "low_bytes", "critical_bytes"),
    [(64 * MIB, 16 * MIB, 6 * MIB), (1 << 40, 2 << 30, 512 * MIB)],
    ids=["64 MiB", "1 TiB"],
)
def test_the_defaults_begin_where_there_is_room_to_act_and_no_waste(
    tmp_path, clock, limit_bytes, low_bytes, critical_bytes
):
    machine = boxed(tmp_path, limit_bytes)
    with monitored(machine, clock) as monitor:
        levels = []
        for left_bytes in (low_bytes + 4096, low_bytes, critical_bytes + 4096, critical_bytes):
            machine.cgroup("/app").usage = limit_bytes - left_bytes
            levels.append(monitor.check())
    assert levels == [NORMAL, LOW, LOW, CRITICAL]


# --- sources --------------------------------------------------------------------------------------------------------


def sources(monitor):
    return {source.name: source for source in monitor.sources}


def test_on_a_copy_of_the_files_only_polling_is_used_and_the_files_are_left_alone(machine, clock):
    machine.cgroup("/app").stall()
    own = machine.root / "sys/fs/cgroup/app/memory.pressure"
    pressure = own.read_text()
    with monitored(machine, clock) as monitor:
        found = sources(monitor)
        assert [name for name, source in found.items() if source.used] == ["polling"]
        for name in ("memory.events", "psi.some", "psi.full"):
            assert "plain file" in next(s for s in monitor.sources if s.name == name and "app" in s.path).reason
        assert found["usage"].reason == "the memory controller is on cgroup v2"
    assert own.read_text() == pressure
    assert not any(source.used for source in monitor.sources)


def test_v1_without_a_limit_and_no_controller_at_all_are_told_apart(tmp_path, clock):
    machine = FakeKernel(tmp_path, layout="hybrid")
    machine.cgroup("/app").join()
    with monitored(machine, clock) as monitor:
        assert "has a limit" in sources(monitor)["usage"].reason
        assert "cgroup v1" in sources(monitor)["memory.events"].reason
    machine.write("/proc/self/cgroup", "")
    with monitored(machine, clock) as monitor:
        assert "no memory cgroup" in sources(monitor)["memory.events"].reason


def test_usage_thresholds_follow_the_limits(tmp_path, clock):
    machine = FakeKernel(tmp_path, layout="hybrid")
    app = machine.cgroup("/app", limit=128 * MIB, usage=32 * MIB).join()
    with monitored(machine, clock) as monitor:
        found = sources(monitor)
        assert not found["usage.low"].used
        before = monitor.sources
        monitor.check()
        assert monitor.sources == before
        app.limit = None
        monitor.check()
        assert "usage.low" not in sources(monitor)


def test_public_names_come_from_the_package():
    assert memsafe.PressureMonitor is PressureMonitor
    assert isinstance(PressureMonitor().level, PressureLevel)
