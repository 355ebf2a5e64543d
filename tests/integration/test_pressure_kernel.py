"""What this machine's kernel signals, through the native waiter and through a monitor. Each in a process of its own."""

from __future__ import annotations

import base64
import ctypes
import errno
import mmap
import os
import select
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from memsafe import EmergencyReserve, PressureLevel, PressureMonitor, Thresholds, memory_status
from memsafe._kernel import cgroup, notify, psi, systemd
from memsafe._native import ffi, lib
from memsafe.errors import KernelError
from memsafe.pressure import monitor as monitor_module, sources
from memsafe.pressure.hub import Hub
from memsafe.pressure.waiter import How, Waiter
from tests.integration import cgroups, scenario
from tests.integration.sealed import refuse_to_sleep_by_cpu_time, seal
from tests.integration.snapshots import PATIENCE_S

MIB = 1024**2

SEALED = 42  # exit status of a scenario that can say no more: nothing may be opened in it


def without_stalls(**changes) -> Thresholds:
    """Thresholds by which it is nothing that others stand still for memory: the kernel may tell that at any time."""
    return Thresholds(stall_headroom_ratio=0, **changes)


# Whatever is heard in time was told by the kernel.
NO_POLLING = without_stalls(poll_s_min=3600, poll_s_max=3600)


@pytest.fixture
def v1_group():
    """A v1 memory cgroup of 128 MiB below that of the tests."""
    with cgroups.v1_memory_group(128 * MIB) as group:
        yield group


@pytest.fixture
def v2_group():
    """A cgroup2 below that of the tests, whatever its controllers."""
    directory = cgroup.unified_directory()
    if directory is None:
        pytest.skip("no cgroup2 is mounted here")
    with cgroups.below(directory) as group:
        yield group


def join(group: str) -> None:
    Path(group, "cgroup.procs").write_text(str(os.getpid()))


class Filler:
    """Takes memory a MiB at a time, off the heap."""

    def __init__(self):
        self.held = []

    def take(self):
        self.held.append(mmap.mmap(-1, MIB))
        self.held[-1].write(b"x" * MIB)


# --- v1 -------------------------------------------------------------------------------------------------------------


def is_warned_by_the_kernel(group):
    join(group)
    (own, *_) = cgroup.memory_cgroups()
    filler, heard = Filler(), {}
    with PressureMonitor(thresholds=NO_POLLING) as monitor:
        marks = {s.name: s.path for s in monitor.sources if s.used and s.name.startswith("usage.")}
        monitor.check()
        for level in (PressureLevel.LOW, PressureLevel.CRITICAL):
            came = threading.Event()

            @monitor.on(level)
            def note(event, level=level, came=came):
                heard.setdefault(level.name, (event.source, event.available_bytes, own.usage_bytes()))
                came.set()

            begins_at = 128 * MIB - NO_POLLING.begins_at(level, 128 * MIB)
            # Less file cache than a MiB lies in this group: its pages were in memory before it was made.
            while own.usage_bytes() - sum(own.file_cache_bytes()) < begins_at + 2 * MIB:
                filler.take()
            assert came.wait(30), monitor.sources
    return {"marks": marks, **heard}


def test_a_v1_cgroup_is_warned_by_the_kernel_before_its_limit(v1_group):
    found = scenario.run(is_warned_by_the_kernel, v1_group)
    assert set(found["marks"]) == {"usage.low", "usage.critical"}
    for level in ("LOW", "CRITICAL"):
        source, available_bytes, usage_bytes = found[level]
        assert source.startswith("usage.")
        assert available_bytes <= NO_POLLING.begins_at(PressureLevel[level], 128 * MIB)
        assert usage_bytes < 128 * MIB


def follows_its_limit(group):
    join(group)
    with PressureMonitor(thresholds=NO_POLLING) as monitor:
        Path(group, "memory.limit_in_bytes").write_text("256M")
        monitor.check()
        return {s.name: s.reason for s in monitor.sources if s.used and s.name.startswith("usage.")}


def test_thresholds_are_set_anew_when_the_limit_changes(v1_group):
    found = scenario.run(follows_its_limit, v1_group)
    expected_bytes = 256 * MIB - NO_POLLING.begins_at(PressureLevel.LOW, 256 * MIB)
    assert found["usage.low"] == f"wakes when the usage passes {expected_bytes} bytes"


def is_warned_by_gauges_alone(group, refused):
    if refused:
        refuse_to_sleep_by_cpu_time(errno.EPERM)
    join(group)
    (own, *_) = cgroup.memory_cgroups()
    filler, heard = Filler(), []
    sources.choose = lambda *_: []
    came = threading.Event()
    thresholds = without_stalls(poll_s_min=0.001, poll_s_max=3600)
    with PressureMonitor(thresholds=thresholds) as monitor:
        used = [source.name for source in monitor.sources if source.used]
        reasons = {source.name: source.reason for source in monitor.sources if not source.used}
        for level in (PressureLevel.LOW, PressureLevel.CRITICAL):
            monitor.on(level, lambda event: (heard.append((event.level.name, event.available_bytes)), came.set()))
            begins_at = 128 * MIB - thresholds.begins_at(level, 128 * MIB)
            while own.usage_bytes() - sum(own.file_cache_bytes()) < begins_at + MIB:
                filler.take()
            assert came.wait(30)
            came.clear()
    return {
        "used": used,
        "unused": reasons,
        "heard": heard[:2],
        "limits": [thresholds.begins_at(PressureLevel(n), 128 * MIB) for n in (1, 2)],
    }


@pytest.mark.parametrize("refused", [False, True])
def test_a_gauge_tells_what_no_source_of_the_kernel_does_also_where_no_thread_may_follow_the_cpu_time(
    v1_group, refused
):
    found = scenario.run(is_warned_by_gauges_alone, v1_group, refused)
    used = {"headroom.memory.limit_in_bytes", "headroom.physical", "polling"}
    assert set(found["used"]) == (used if refused else used | {"cpu_time"})
    assert ("Operation not permitted" in found["unused"].get("cpu_time", "")) == refused
    assert [level for level, _ in found["heard"]] == ["LOW", "CRITICAL"]
    assert all(left <= limit for (_, left), limit in zip(found["heard"], found["limits"], strict=True))


def limits_marked(monitor):
    return [s.reason for s in monitor.sources if s.used and s.name == "usage.low"]


def follows_its_limit_there_and_back(group):
    inner = Path(group, "inner")
    inner.mkdir()
    join(str(inner))
    told = []
    with PressureMonitor(thresholds=NO_POLLING) as monitor:
        # Up, down, the own one lifted, and the ancestor's as well.
        for path, limit in ((group, "256M"), (group, "64M"), (inner, "48M"), (inner, "-1"), (group, "-1")):
            Path(path, "memory.limit_in_bytes").write_text(limit)
            monitor.check()
            told.append(limits_marked(monitor))
        before = os.listdir("/proc/self/fd")
        for limit in ("256M", "-1") * 10:
            Path(group, "memory.limit_in_bytes").write_text(limit)
            monitor.check()
        left = len(os.listdir("/proc/self/fd")) - len(before)
    join(str(group))
    cgroups.remove(inner)
    return {"told": told, "left": left}


def test_thresholds_follow_limits_up_and_down_of_the_cgroup_and_its_ancestors(v1_group):
    found = scenario.run(follows_its_limit_there_and_back, v1_group)

    def marked(*limits):
        marks = (limit * MIB - NO_POLLING.begins_at(PressureLevel.LOW, limit * MIB) for limit in limits)
        return [f"wakes when the usage passes {usage_bytes} bytes" for usage_bytes in marks]

    assert found["told"] == [marked(256), marked(64), marked(48, 64), marked(64), []]
    assert found["left"] == 0


CROSS = """
import mmap, sys
block = b"x" * (4 << 20)
for _ in range(int(sys.argv[1])):
    with mmap.mmap(-1, len(block)) as memory:
        memory[:] = block
"""


class Counted:
    """What a monitor heard and did: signals of the kernel, looks at the machine, levels that were announced."""

    def __init__(self):
        self.signals = {}
        self.looks = 0
        self.levels = []

    def count(self, monitor):
        """Begin before *monitor* does: a wait that has begun would not be counted."""
        wait, look = Hub.wait, monitor_module.status_once

        def counted_wait(hub, *rest_s, **alarm):
            reports = wait(hub, *rest_s, **alarm)
            names = {source.token: source.name for source in hub._chosen if source.used}
            for report in reports:
                if report.token in names:
                    name = names[report.token]
                    self.signals[name] = self.signals.get(name, 0) + report.count
            return reports

        def counted_look(root):
            self.looks += 1
            return look(root)

        Hub.wait, monitor_module.status_once = counted_wait, counted_look
        for level in PressureLevel:
            monitor.on(level, lambda event, level=level: event.level == level and self.levels.append(level.name))


def crosses_to_and_fro(group, times):
    join(group)
    (own, *_) = cgroup.memory_cgroups()
    filler, counted = Filler(), Counted()
    low_bytes = 128 * MIB - NO_POLLING.begins_at(PressureLevel.LOW, 128 * MIB)
    subprocess.run([sys.executable, "-c", CROSS, "1"], check=True)  # what it takes to run is there
    # However long it takes to cross so often, the level does not fall meanwhile.
    monitor = PressureMonitor(thresholds=without_stalls(poll_s_max=3600, cooldown_s=3600))
    counted.count(monitor)
    with monitor:
        monitor.check()
        while own.usage_bytes() < low_bytes - 10 * MIB:
            filler.take()
        subprocess.run([sys.executable, "-c", CROSS, str(times)], check=True)
        monitor.check()
    return {"signals": counted.signals, "looks": counted.looks, "levels": counted.levels}


def test_a_flood_of_crossings_becomes_few_looks_and_one_level(v1_group):
    found = scenario.run(crosses_to_and_fro, v1_group, 600)
    crossings = found["signals"]["usage.low"]
    assert crossings > 200  # 900 to 1,200 mostly; fewer where what the monitor trims moves the mark away
    assert found["looks"] < crossings  # half of them here; a busy machine crosses less often
    assert found["levels"] in ([], ["LOW"])


def fills(group, anonymous_mib, path):
    """Read a file over and over, with so much other memory in use, while a monitor is on."""
    join(group)
    (own, *_) = cgroup.memory_cgroups()
    filler, counted = Filler(), Counted()
    monitor = PressureMonitor(thresholds=without_stalls())
    counted.count(monitor)
    with monitor:
        monitor.check()
        while own.usage_bytes() - sum(own.file_cache_bytes()) < anonymous_mib * MIB:
            filler.take()
        lows = notify.arm_pressure_level(str(group), "low")
        block = bytearray(MIB)
        with open(path, "rb", buffering=0) as file:
            for _ in range(2):
                file.seek(0)
                while file.readinto(block):
                    pass
        monitor.check()
        low_events = os.eventfd_read(lows) if readable(lows) else 0
        os.close(lows)
        return {
            "signals": counted.signals,
            "looks": counted.looks,
            "levels": counted.levels,
            "cache": sum(own.file_cache_bytes()),
            "low_events": low_events,
        }


def readable(fd):
    return bool(select.select([fd], [], [], 0)[0])


def big_file(path):
    """A file of 256 MiB that is in no page cache."""
    with open(path, "wb") as file:
        for _ in range(256):
            file.write(bytes(MIB))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def test_reclaim_of_page_cache_that_the_kernel_calls_low_raises_nothing(v1_group, tmp_path):
    found = scenario.run(fills, v1_group, 64, big_file(tmp_path / "big"))
    if found["cache"] < 32 * MIB:
        pytest.skip(f"{tmp_path} leaves no page cache behind: a tmpfs, or an overlay of one")
    assert found["low_events"] > 50
    assert found["levels"] == []
    assert found["looks"] < 50
    assert sum(found["signals"].values()) < found["low_events"] / 2, found


def writes_files_without_other_memory(group, path):
    join(group)
    criticals = notify.arm_pressure_level(str(group), "critical")
    counted = Counted()
    monitor = PressureMonitor(thresholds=without_stalls())
    counted.count(monitor)
    with monitor:
        monitor.check()
        for _ in range(64):  # mostly the first is enough; a disk that is fast just then wants more
            with open(path, "wb") as file:
                for _ in range(320):
                    file.write(bytes(MIB))
            # The kernel tells one after the other, and the monitor's thread hears it when it has its turn.
            if readable(criticals) and counted.signals.get("pressure_level.critical"):
                break
        monitor.check()
    told = os.eventfd_read(criticals) if readable(criticals) else 0
    os.close(criticals)
    return {"levels": counted.levels, "criticals": told, "heard": counted.signals.get("pressure_level.critical", 0)}


def test_what_the_kernel_calls_critical_is_none_while_there_is_room(v1_group, tmp_path):
    found = scenario.run(writes_files_without_other_memory, v1_group, tmp_path / "written")
    if not found["criticals"]:
        pytest.skip(f"writing to {tmp_path} did not make reclaim fail: a tmpfs, or a fast disk")
    assert found["heard"] > 0
    assert found["levels"] == []


def thrashes(group, path):
    join(group)
    heard, came = [], threading.Event()
    (own, *_) = cgroup.memory_cgroups()
    filler = Filler()
    with PressureMonitor(thresholds=without_stalls(critical_bytes_min=0, critical_ratio=0)) as monitor:
        monitor.on(PressureLevel.CRITICAL, lambda event: (heard.append([event.source, event.detail]), came.set()))
        while own.usage_bytes() - sum(own.file_cache_bytes()) < 119 * MIB:
            filler.take()
        block = bytearray(64 * 1024)
        with open(path, "rb", buffering=0) as file:
            while not came.is_set():
                if not file.readinto(block):
                    file.seek(0)
    return {"heard": heard}


def test_reclaim_that_finds_nothing_is_critical_from_low(v1_group, tmp_path):
    found = scenario.run(thrashes, v1_group, big_file(tmp_path / "big"))
    ((source, detail),) = found["heard"]
    assert source == "pressure_level.critical"
    assert f"can be reclaimed in {cgroup.memory_cgroups()[0].path}/{v1_group.name}" in detail


def follows_its_limit_by_gauges(group):
    join(group)
    (own, *_) = cgroup.memory_cgroups()
    sources.choose = lambda *_: []
    filler, heard, came = Filler(), [], threading.Event()
    with PressureMonitor(thresholds=without_stalls(poll_s_max=3600)) as monitor:
        monitor.on(PressureLevel.LOW, lambda event: (heard.append(event.limit_bytes), came.set()))
        Path(group, "memory.limit_in_bytes").write_text("96M")
        monitor.check()
        while not came.is_set() and own.usage_bytes() < 95 * MIB:
            filler.take()
        assert came.wait(30)
    return {"limit": heard[0]}


def test_a_gauge_follows_its_limit_from_the_next_look_on(v1_group):
    assert scenario.run(follows_its_limit_by_gauges, v1_group)["limit"] == 96 * MIB


def reads_a_gauge_of_a_removed_cgroup(group):
    inner = Path(group, "inner")
    inner.mkdir()
    (inner / "memory.limit_in_bytes").write_text("100M")
    (outer, *_) = cgroup.memory_cgroups()
    join(str(inner))
    sources.choose = lambda *_: []
    told = []
    with PressureMonitor(thresholds=without_stalls(poll_s_max=3600)) as monitor:
        monitor.check()  # the look at the start is over: nobody else uses the hub
        hub = monitor._hub
        readings = list(hub._readings(memory_status()))
        Path(outer.directory, "cgroup.procs").write_text(str(os.getpid()))
        cgroups.remove(inner)
        for reading in readings:
            hub._between.read([reading])
            sight = lib.ms_gauge_read(hub._between.native.gauges, 1, 1, ffi.addressof(hub._between.native, "pace"))
            told.append((sight.told, sight.short_of))
        before = {source.path for source in monitor.sources if source.used}
        level = monitor.check()
        after = {source.path for source in monitor.sources if source.used}
    return {
        "told": told,
        "level": level.name,
        "gauges": [sum("inner" in (path or "") for path in paths) for paths in (before, after)],
    }


def test_a_gauge_whose_cgroup_is_removed_is_silent_and_the_next_look_lets_it_go(v1_group):
    found = scenario.run(reads_a_gauge_of_a_removed_cgroup, v1_group)
    assert len(found["told"]) >= 3, "of the inner cgroup, of the outer one, and of the machine"
    assert set(map(tuple, found["told"])) == {(0, -1)}
    assert (found["level"], found["gauges"]) == ("NORMAL", [1, 0])


def gives_its_reserve_back_beside_a_thread_that_keeps_the_gil(group):
    join(group)
    (own, *_) = cgroup.memory_cgroups()
    sources.choose = lambda *_: []
    libc = ctypes.PyDLL(None)  # its calls keep the GIL
    hoard = mmap.mmap(-1, 128 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(hoard))
    usage_fd, text = os.open(own.file("memory.usage_in_bytes"), os.O_RDONLY), ctypes.create_string_buffer(32)

    def usage_bytes():
        libc.pread(usage_fd, text, 31, ctypes.c_long(0))
        return int(text.value.split()[0])  # behind it may be what is left of a longer one

    heard, is_heard = [], threading.Event()
    critical_bytes = Thresholds().begins_at(PressureLevel.CRITICAL, 128 * MIB)
    with PressureMonitor(reserve="8 MiB", thresholds=without_stalls()) as monitor:

        @monitor.on(PressureLevel.CRITICAL)
        def hear(event):
            heard.append([event.source, event.detail, monitor.reserve.held_bytes])
            is_heard.set()

        for _ in range(2):
            monitor.check()  # what the first one found is watched from the wait before the second one on
        held_bytes = monitor.reserve.held_bytes
        filled_bytes = 129 * MIB - critical_bytes + sum(own.file_cache_bytes())
        switch_s = sys.getswitchinterval()
        sys.setswitchinterval(3600)  # nobody asks for the GIL any more
        libc.memset(ctypes.c_void_p(address), 1, ctypes.c_size_t(filled_bytes - usage_bytes()))
        while usage_bytes() > filled_bytes - 4 * MIB:
            pass  # until it was given back, and nobody could have done that but a native thread
        sys.setswitchinterval(switch_s)
        is_heard.wait(PATIENCE_S)  # that thread may still be in the midst of giving it
    os.close(usage_fd)
    return {"held": held_bytes, "heard": heard}


def test_the_reserve_is_given_back_without_the_gil_and_critical_is_told_after(v1_group):
    found = scenario.run(gives_its_reserve_back_beside_a_thread_that_keeps_the_gil, v1_group)
    assert found["held"] == 8 * MIB
    ((source, detail, left_bytes),) = found["heard"]
    assert (source, left_bytes) == ("headroom.memory.limit_in_bytes", 0)
    assert "the emergency reserve was given back when" in detail


def acts_in_a_full_cgroup(group, gives):
    join(group)
    (own, *_) = cgroup.memory_cgroups()
    filler = Filler()
    with EmergencyReserve("24 MiB") as reserve:
        while own.usage_bytes() - sum(own.file_cache_bytes()) < 126 * MIB:
            filler.take()
        if gives:
            reserve.give()
        for _ in range(16):
            filler.take()
    return {"survived": True}


def test_what_the_emergency_reserve_gives_back_is_room_in_a_full_cgroup(v1_group):
    assert scenario.run(acts_in_a_full_cgroup, v1_group, True)["survived"]
    assert "survived" not in scenario.run(acts_in_a_full_cgroup, v1_group, False, returncode=-9)


def writes_and_reads_a_large_file(group, path):
    join(group)
    heard = []
    (own, *_) = cgroup.memory_cgroups()
    with PressureMonitor(thresholds=without_stalls(poll_s_min=0.01, poll_s_max=0.01)) as monitor:
        monitor.on(PressureLevel.LOW, lambda event: heard.append(str(event)))
        with open(path, "wb+") as file:
            for _ in range(160):
                file.write(bytes(MIB))
                file.flush()
                os.fsync(file.fileno())
            for _ in range(2):
                file.seek(0)
                while file.read(MIB):
                    pass
        monitor.check()
        return {"heard": heard, "cache": sum(own.file_cache_bytes()), "peak": own.usage_bytes()}


def test_page_cache_alone_raises_no_level(v1_group, tmp_path):
    found = scenario.run(writes_and_reads_a_large_file, v1_group, tmp_path / "large")
    if found["cache"] < 64 * MIB:
        pytest.skip(f"{tmp_path} leaves no page cache behind: a tmpfs, or an overlay of one")
    assert found["heard"] == []
    assert found["peak"] > 128 * MIB - NO_POLLING.begins_at(PressureLevel.LOW, 128 * MIB)


EATER = """
import mmap, sys
open("/proc/self/oom_score_adj", "w").write("1000")
held = []
while True:
    held.append(mmap.mmap(-1, 1 << 20))
    held[-1].write(b"x" * (1 << 20))
"""


def hears_an_oom(group):
    join(group)
    hub = Hub("/", NO_POLLING)
    hub.choose(memory_status())
    victim = subprocess.run([sys.executable, "-c", EATER], check=False)
    causes = []
    while not causes:
        causes = [cause for cause in hub.hear(hub.wait())[1] if cause.source == "oom_control"]
    hub.close()
    return {"victim": victim.returncode, "level": causes[0].level.name, "detail": causes[0].detail}


def test_an_oom_in_the_cgroup_is_critical(v1_group):
    found = scenario.run(hears_an_oom, v1_group)
    assert (found["victim"], found["level"]) == (-9, "CRITICAL")
    assert str(v1_group.name) in found["detail"]


def loses_its_cgroup(group):
    inner = Path(group, "inner")
    inner.mkdir()
    (own, *_) = cgroup.memory_cgroups()
    join(str(inner))
    with PressureMonitor(thresholds=NO_POLLING) as monitor:
        Path(own.directory, "cgroup.procs").write_text(str(os.getpid()))
        cgroups.remove(inner)
        level = monitor.check()
        paths = [s.path for s in monitor.sources if s.used and s.path]
    return {"level": level.name, "stale": [path for path in paths if "inner" in path], "left": len(paths)}


def moves_and_opens_nothing_more(group):
    first, second = Path(group, "first"), Path(group, "second")
    for number, inner in enumerate((first, second)):
        inner.mkdir()
        (inner / "memory.limit_in_bytes").write_text(str((100 + number) * MIB))
    join(str(first))
    with PressureMonitor(thresholds=NO_POLLING) as monitor:
        monitor.check()
        join(str(second))
        monitor.check()
        names = {Path(source.path).parent.name for source in monitor.sources if source.used and source.path}
        assert "second" in names, names
        assert "first" not in names, names
        seal()
        for _ in range(3):
            monitor.check()
    os._exit(SEALED)


def test_a_move_to_another_cgroup_costs_one_look_that_opens_and_no_second(v1_group):
    scenario.run(moves_and_opens_nothing_more, v1_group, returncode=SEALED)
    for inner in ("first", "second"):
        cgroups.remove(v1_group / inner)


def test_it_goes_on_when_its_cgroup_vanishes(v1_group):
    found = scenario.run(loses_its_cgroup, v1_group)
    assert (found["level"], found["stale"]) == ("NORMAL", [])


# --- cgroup2 --------------------------------------------------------------------------------------------------------


def hears_a_cgroup2_file_change(group):
    waiter = Waiter()
    events = notify.open_watched(f"{group}/cgroup.events")
    waiter.add(events, How.KERNFS, 1)
    before = waiter.take()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    Path(group, "cgroup.procs").write_text(str(child.pid))
    populated = waiter.wait()
    child.communicate(b"\n", timeout=30)
    emptied = waiter.wait()
    waiter.close()
    os.close(events)
    return {"before": len(before), "populated": [r.count for r in populated], "emptied": [r.count for r in emptied]}


def test_a_cgroup2_file_that_changes_wakes_the_waiter_each_time(v2_group):
    found = scenario.run(hears_a_cgroup2_file_change, v2_group)
    assert (found["before"], found["populated"], found["emptied"]) == (0, [1], [1])


# --- pressure stall information -------------------------------------------------------------------------------------


def armed(path):
    try:
        return notify.arm_stall_trigger(path, "some", 200_000)
    except KernelError as error:
        if error.errno in (errno.ENOENT, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EROFS):
            pytest.skip(f"no PSI trigger may be set here: {error}")
        raise


def test_a_stall_trigger_is_armed_and_used():
    path = psi.system_path()
    os.close(armed(path))
    with PressureMonitor() as monitor:
        used = {source.name for source in monitor.sources if source.used}
    assert used >= {"psi.some", "psi.full"}


def test_a_trigger_that_the_kernel_refuses_leaves_no_descriptor():
    path = psi.system_path()
    os.close(armed(path))
    before = scenario.open_files()
    with pytest.raises(KernelError, match="write 'some 3000000 2000000'") as refused:
        notify.arm_stall_trigger(path, "some", 3_000_000)
    assert refused.value.errno == errno.EINVAL
    assert scenario.opened_since(before) == []


def loses_a_trigger(group, how):
    waiter = Waiter()
    trigger = notify.arm_stall_trigger(f"{group}/memory.pressure", "some", 200_000)
    waiter.add(trigger, How(how), 1)
    Path(group).rmdir()
    (report,) = waiter.wait()
    again = waiter.take()
    waiter.close()
    os.close(trigger)
    return {"lost": report.lost_errno, "again": len(again)}


@pytest.mark.parametrize("how", [How.TRIGGER, How.KERNFS])
def test_a_descriptor_whose_cgroup_is_removed_is_lost_once(v2_group, how):
    if not (v2_group / "memory.pressure").exists():
        pytest.skip("cgroup2 has no memory.pressure here")
    os.close(armed(f"{v2_group}/memory.pressure"))
    found = scenario.run(loses_a_trigger, v2_group, int(how))
    assert (found["lost"], found["again"]) == (errno.ENODEV, 0)


def test_the_service_managers_trigger_stands_in_for_the_own_one_of_its_kind(monkeypatch):
    os.close(armed(psi.system_path()))
    monkeypatch.setenv(systemd.WATCH, psi.system_path())
    monkeypatch.setenv(systemd.WRITE, "c29tZSAxNTAwMDAgMjAwMDAwMAA=")  # some 150000 2000000
    with PressureMonitor() as monitor:
        used = {source.name: source.reason for source in monitor.sources if source.used}
    assert used["systemd"] == "raises LOW as the service manager asks: some tasks stall for 150 ms"
    assert "psi.some" not in used
    assert "psi.full" in used


@pytest.mark.parametrize("trigger", ["some 0 2000000", "some 3000000 2000000", "some 1 99999999999999999999"])
def test_a_trigger_that_the_kernel_refuses_is_listed_and_the_own_ones_are_used(monkeypatch, trigger):
    os.close(armed(psi.system_path()))
    monkeypatch.setenv(systemd.WATCH, psi.system_path())
    monkeypatch.setenv(systemd.WRITE, base64.b64encode(trigger.encode()).decode())
    with PressureMonitor() as monitor:
        used = {source.name for source in monitor.sources if source.used}
    assert "systemd" not in used
    assert used >= {"psi.some", "psi.full"}
