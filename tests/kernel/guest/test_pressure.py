"""PressureMonitor where cgroup v2 has the memory controller."""

import dataclasses
import errno
import json
import mmap
import os
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

import memsafe
from memsafe import PressureLevel
from memsafe._kernel import notify
from memsafe.pressure import levels, sources as kernel_sources
from memsafe.pressure.hub import Hub
from memsafe.pressure.waiter import How, Waiter
from tests.kernel.guest import child

MIB = 1024 * 1024
PATIENCE_S = 60

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Hoard:
    """Memory that grows MiB by MiB."""

    def __init__(self, limit_bytes):
        self._map = mmap.mmap(-1, limit_bytes, PRIVATE)
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.size_bytes = 0

    def grow(self):
        self._map[self.size_bytes : self.size_bytes + MIB] = bytes(MIB)
        self.size_bytes += MIB


def sources():
    with memsafe.PressureMonitor() as monitor:
        return [each.as_dict() for each in monitor.sources]


def used(told, name):
    return [source["path"] for source in told if source["name"] == name and source["used"]]


# memory.events


def read_through(path, size_bytes):
    with open(path, "rb") as file:
        while file.read(MIB):
            pass
    return size_bytes


def exceed(limit_bytes):
    hoard = Hoard(4 * limit_bytes)
    while True:
        hoard.grow()


@pytest.mark.parametrize("event", ["high", "max", "oom_kill"])
def test_memory_events_signals(group, scratch, event):
    own = group.child("own", **{"memory_high" if event == "high" else "memory_max": 32 * MIB})
    events_fd = notify.open_watched(f"{own.path}/memory.events")
    before = own.flat("memory.events")
    os.pread(events_fd, 4096, 0)  # until it is read, it is news
    with select.epoll() as poller:
        poller.register(events_fd, select.EPOLLPRI)
        assert not poller.poll(0)
        if event == "max":
            (scratch / "file").write_bytes(bytes(64 * MIB))
            subprocess.run(["sh", "-c", "sync; echo 1 >/proc/sys/vm/drop_caches"], check=True)
            child.run(read_through, str(scratch / "file"), 64 * MIB, cgroup=own)
            assert poller.poll(PATIENCE_S)
        else:
            with child.start(exceed, 32 * MIB, cgroup=own) as hog:
                assert poller.poll(PATIENCE_S)
                os.pread(events_fd, 4096, 0)
                while own.flat("memory.events")[event] == before[event]:  # an "oom" comes before its "oom_kill"
                    assert poller.poll(PATIENCE_S)
                    os.pread(events_fd, 4096, 0)  # before the next look, or what comes in between would be no news
                hog.kill()  # or it would crawl on, throttled
    os.close(events_fd)
    assert own.flat("memory.events")[event] > before[event]


def test_memory_events_of_self_and_ancestors_are_watched_and_the_root_has_none(group):
    own = group.child("own", memory_max=256 * MIB)
    told = child.run(sources, cgroup=own)
    assert used(told, "memory.events") == [f"{own.path}/memory.events", f"{group.path}/memory.events"]
    assert used(child.run(sources), "memory.events") == []


def grow_until_told(limit_bytes, pace_s):
    """Grow at a pace until LOW was heard; the levels, each with what was held when it came."""
    hoard, heard, low = Hoard(limit_bytes), [], threading.Event()
    with memsafe.PressureMonitor() as monitor:

        @monitor.on(PressureLevel.LOW)
        def shed(event):
            heard.append([event.level.name, hoard.size_bytes, event.available_bytes, event.source])
            low.set()

        while not low.is_set() and hoard.size_bytes < limit_bytes:
            hoard.grow()
            time.sleep(pace_s)
    return heard


def test_low_is_heard_before_the_limit_of_a_small_cgroup(group):
    own = group.child("own", memory_max=64 * MIB)
    heard = child.run(grow_until_told, 64 * MIB, 0.02, cgroup=own)
    level, held_bytes, available_bytes, _ = heard[0]
    assert level == "LOW"
    assert 16 * MIB < held_bytes < 62 * MIB
    assert available_bytes > 4 * MIB
    assert own.flat("memory.events")["oom_kill"] == 0


def test_low_is_heard_before_memory_high_throttles(group):
    own = group.child("own", memory_max=256 * MIB, memory_high=64 * MIB)
    (heard, *_) = child.run(grow_until_told, 64 * MIB, 0.02, cgroup=own)
    assert heard[0] == "LOW"
    assert own.flat("memory.events")["high"] == 0


def watch_beside(code, *args, deaf=False):
    """Run *code* in a process of its own, watched; every level that is announced, until it has ended.

    A deaf monitor judges no limits: only what the kernel says by itself raises a level, which is waited for.
    """
    heard, told = [], threading.Event()
    if deaf:
        judge = levels.judge
        levels.judge = lambda status, *others: judge(dataclasses.replace(status, constraints=()), *others)
    with memsafe.PressureMonitor() as monitor:
        monitor.on(PressureLevel.LOW, lambda event: heard.append([event.level.name, event.source, event.detail]))
        monitor.on(PressureLevel.LOW, lambda event: told.set())
        done = subprocess.run([sys.executable, "-c", code, *args], check=False)
        if deaf:  # of several events within 10 ms all but the first are told late (CGROUP_FILE_NOTIFY_MIN_INTV)
            told.wait(PATIENCE_S)
        monitor.check()
    return {"status": done.returncode, "heard": heard}


EAT = """
with open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")
held = bytearray()
while True:
    held += bytes(1 << 20)
"""


def watch_deafly(code, *args):
    return watch_beside(code, *args, deaf=True)


@pytest.mark.parametrize("number", range(4))
def test_a_kill_in_the_own_cgroup_is_critical_and_spares_who_watches(group, number):
    """Several times: a monitor that charges memory while the victim is dying is shot by chance (Linux 7.3)."""
    own = group.child("own", memory_max=96 * MIB)
    told = child.run(watch_deafly, EAT, cgroup=own)
    assert told["status"] == -9
    assert [level for level, _, _ in told["heard"]] == ["CRITICAL"]
    assert own.flat("memory.events")["oom_kill"] == 1


WRITE = """
import sys
with open(sys.argv[1], "wb") as file:
    for _ in range(192):
        file.write(bytes(1 << 20))
with open(sys.argv[1], "rb") as file:
    while file.read(1 << 20):
        pass
"""


def test_page_cache_alone_raises_no_level(group, scratch):
    own = group.child("own", memory_max=96 * MIB)
    told = child.run(watch_beside, WRITE, str(scratch / "file"), cgroup=own)
    assert told == {"status": 0, "heard": []}
    assert own.flat("memory.events")["max"] > 0, "the limit was met"


# PSI


def hear_stall(path, kind):
    """Whether a trigger fires while *path*'s cgroup stalls; True, or the errno of its refusal."""
    try:
        fd = notify.arm_stall_trigger(path, kind, 100_000)
    except memsafe.KernelError as error:
        return error.errno
    print("armed", flush=True)
    with select.epoll() as poller:
        poller.register(fd, select.EPOLLPRI)
        (ready,) = poller.poll(PATIENCE_S) or [(fd, 0)]
    os.close(fd)
    return bool(ready[1] & select.EPOLLPRI)


@pytest.mark.parametrize("user", [child.ROOT, child.ORDINARY])
def test_a_stall_trigger_hears_a_throttled_cgroup(group, kernel, user):
    stalled = group.child("stalled", memory_high=24 * MIB)
    pressure = stalled.path / "memory.pressure"
    if user == child.ORDINARY:
        os.chown(pressure, child.NOBODY, child.NOBODY)  # as a delegated cgroup's
    listener = child.start(hear_stall, str(pressure), "some", user=user)
    with listener, child.start(exceed, 64 * MIB, cgroup=stalled) as hog:
        try:
            told = listener.communicate(timeout=PATIENCE_S)
        finally:
            hog.kill()
            listener.kill()
    assert told[0].split() == ["armed", "true"], told


@pytest.mark.parametrize("user", [child.ROOT, child.ORDINARY])
def test_the_systems_trigger_is_used_outside_of_cgroups(user):
    """By an ordinary user too: since 6.5, and in 6.1's later updates. The root cgroup's file is the system's, too."""
    told = child.run(sources, user=user)
    path = "/sys/fs/cgroup/memory.pressure" if user == child.ROOT else "/proc/pressure/memory"
    assert used(told, "psi.some") == used(told, "psi.full") == [path]


@pytest.mark.parametrize("delegated", [True, False])
def test_the_own_cgroups_trigger_comes_first_and_the_systems_where_that_may_not_be_written(group, delegated):
    own = group.child("own")
    if delegated:
        os.chown(own.path / "memory.pressure", child.NOBODY, child.NOBODY)
    told = child.run(sources, cgroup=own, user=child.ORDINARY)
    if delegated:
        assert used(told, "psi.some") == [f"{own.path}/memory.pressure"]
    else:
        assert used(told, "psi.some") == ["/proc/pressure/memory"]
        assert any(
            "Permission denied" in each["reason"] for each in told if each["path"] == f"{own.path}/memory.pressure"
        )


def throttled_beside_a_monitor():
    """Grow beyond memory.high until CRITICAL was heard."""
    hoard, critical = Hoard(256 * MIB), threading.Event()
    with memsafe.PressureMonitor() as monitor:
        monitor.on(PressureLevel.CRITICAL, lambda event: critical.set())
        while not critical.is_set():
            hoard.grow()
        return hoard.size_bytes


def test_throttling_by_memory_high_is_critical(group):
    own = group.child("own", memory_max=256 * MIB, memory_high=64 * MIB)
    assert child.run(throttled_beside_a_monitor, cgroup=own) < 80 * MIB


# what each of the counts of memory.events does, in the own cgroup and above


JOIN = """
import os, sys
with open(sys.argv[1], "w") as file:
    file.write(str(os.getpid()))
"""


def hears(path):
    """A monitor's hub that polls nothing, asked whenever it is woken; what it says goes to *path*'s reader."""
    quiet = memsafe.Thresholds(poll_s_min=3600, poll_s_max=3600)
    hub = Hub("/", quiet)
    hub.choose(memsafe.memory_status())
    names = {source.token: source.path for source in hub._chosen if source.used}
    print("watching", flush=True)
    while True:
        reports = hub.wait()
        _, causes = hub.hear(reports)
        told = {
            "paths": [names[report.token] for report in reports if report.token in names],
            "causes": [[cause.level.name, cause.detail] for cause in causes if cause.source == "memory.events"],
        }
        if path in told["paths"]:
            print(json.dumps(told), flush=True)


def limited(group, whose, **limits):
    """A cgroup and one below it for who watches, one of them limited; and where to eat so that its limit is met."""
    pod = group.child("pod", **(limits if whose == "ancestor" else {}))
    own = pod.child("own", **(limits if whose == "own" else {}))
    return (own, own, own) if whose == "own" else (pod, own, pod.child("beside"))


@pytest.mark.parametrize("whose", ["own", "ancestor"])
@pytest.mark.parametrize("count", ["high", "max"])
def test_a_limit_that_is_met_here_or_above_wakes_and_is_no_cause(group, scratch, whose, count):
    whose_limit, own, beside = limited(group, whose, **{f"memory_{count}": 48 * MIB})
    (scratch / "file").write_bytes(bytes(96 * MIB))
    subprocess.run(["sh", "-c", "sync; echo 1 >/proc/sys/vm/drop_caches"], check=True)
    before = whose_limit.flat("memory.events")[count]
    with child.start(hears, f"{whose_limit.path}/memory.events", cgroup=own) as watcher:
        assert watcher.stdout.readline().split() == ["watching"]
        child.run(read_through, str(scratch / "file"), 96 * MIB, cgroup=beside)
        assert json.loads(watcher.stdout.readline())["causes"] == []
        watcher.kill()
    assert whose_limit.flat("memory.events")[count] > before


@pytest.mark.parametrize("whose", ["own", "ancestor"])
def test_an_oom_here_or_above_is_critical(group, whose):
    whose_limit, own, beside = limited(group, whose, memory_max=96 * MIB)
    told = child.run(watch_deafly, JOIN + EAT, f"{beside.path}/cgroup.procs", cgroup=own)
    ((level, source, detail),) = told["heard"]
    assert (told["status"], level, source) == (-9, "CRITICAL", "memory.events")
    assert detail.startswith("oom +1")
    assert f" in /{whose_limit.path.relative_to('/sys/fs/cgroup')};" in detail
    assert whose_limit.flat("memory.events")["oom_kill"] == 1


KILLED_FROM_WITHOUT = """
import time
with open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")
held = bytes(16 << 20)
with open("/proc/sysrq-trigger", "w") as file:
    file.write("f")  # as if the machine had run out of memory: no limit of a cgroup is met
time.sleep(60)
"""


def test_a_kill_in_the_cgroup_for_the_machines_sake_is_critical(group):
    own = group.child("own", memory_max=256 * MIB)
    told = child.run(watch_deafly, KILLED_FROM_WITHOUT, cgroup=own)
    assert told["status"] == -9
    ((level, source, detail),) = told["heard"]
    assert (level, source) == ("CRITICAL", "memory.events")
    assert detail.startswith("oom_kill +1 in")
    assert own.flat("memory.events")["oom"] == 0


def test_an_oom_below_another_child_of_an_ancestor_is_no_cause(group):
    """It is counted in the ancestor's memory.events, and not in its memory.events.local."""
    pod = group.child("pod")
    own, other = pod.child("own"), pod.child("other", memory_max=48 * MIB)
    with child.start(hears, f"{pod.path}/memory.events", cgroup=own) as watcher:
        assert watcher.stdout.readline().split() == ["watching"]
        subprocess.run([sys.executable, "-c", JOIN + EAT, f"{other.path}/cgroup.procs"], check=False)
        assert json.loads(watcher.stdout.readline())["causes"] == []
        watcher.kill()
    assert pod.flat("memory.events")["oom_kill"] == 1


@pytest.mark.parametrize("limit", ["memory_max", "memory_high"])
def test_page_cache_at_a_limit_of_any_kind_raises_no_level(group, scratch, limit):
    own = group.child("own", **{limit: 96 * MIB})
    told = child.run(watch_beside, WRITE, str(scratch / "file"), cgroup=own)
    assert told == {"status": 0, "heard": []}
    assert own.flat("memory.events")[limit.removeprefix("memory_")] > 0, "the limit was met"


# a machine that changes


def moved_and_limited(other, steps):
    """What is watched after each step: the cgroup is left and removed, limits come and go."""
    told = []
    with memsafe.PressureMonitor(thresholds=memsafe.Thresholds(poll_s_min=3600, poll_s_max=3600)) as monitor:
        descriptors = []
        for path, value in steps:
            if value is None:
                Path(path).rmdir()
            else:
                Path(path).write_text(value if value != "self" else str(os.getpid()))
            monitor.check()
            monitor.check()
            used = [source for source in monitor.sources if source.used]
            told.append(
                {
                    "events": [source.path for source in used if source.name == "memory.events"],
                    "limits": sorted(
                        source.reason.split(" under ")[1].split(" without")[0]
                        for source in used
                        if source.name.startswith("headroom.memory")
                    ),
                    "level": monitor.level.name,
                }
            )
            descriptors.append(len(os.listdir("/proc/self/fd")))
    return {"told": told, "descriptors": descriptors}


def test_it_follows_limits_and_moves_and_removals(group):
    pod = group.child("pod", memory_max=256 * MIB)
    old, new = pod.child("old", memory_max=128 * MIB), group.child("new")
    below = f"/{pod.path.relative_to('/sys/fs/cgroup')}"
    steps = [
        (f"{old.path}/memory.max", str(200 * MIB)),
        (f"{old.path}/memory.max", str(100 * MIB)),
        (f"{old.path}/memory.high", str(90 * MIB)),
        (f"{pod.path}/memory.max", "max"),
        (f"{old.path}/memory.max", "max"),
        (f"{old.path}/memory.high", "max"),
        (f"{new.path}/cgroup.procs", "self"),
        (f"{old.path}", None),
        (f"{pod.path}", None),
        (f"{new.path}/memory.max", str(128 * MIB)),
    ]
    found = child.run(moved_and_limited, str(new.path), steps, cgroup=old)
    in_old, in_pod = f"memory.max of {below}/old", f"memory.max of {below}"
    assert [each["limits"] for each in found["told"]] == [
        sorted([in_old, in_pod]),
        sorted([in_old, in_pod]),
        sorted([in_old, in_pod, f"memory.high of {below}/old"]),
        sorted([in_old, f"memory.high of {below}/old"]),
        [f"memory.high of {below}/old"],
        [],
        [],
        [],
        [],
        [f"memory.max of /{new.path.relative_to('/sys/fs/cgroup')}"],
    ]
    assert all(each["level"] == "NORMAL" for each in found["told"])
    in_all = [f"{group.path}/memory.events"]
    assert found["told"][5]["events"] == [f"{old.path}/memory.events", f"{pod.path}/memory.events", *in_all]
    assert found["told"][-1]["events"] == [f"{new.path}/memory.events", *in_all]


def lost(path):
    """What the waiter reports of a trigger and of memory.events when their cgroup goes."""
    waiter = Waiter()
    events_fd = notify.open_watched(f"{path}/memory.events")
    trigger_fd = notify.arm_stall_trigger(f"{path}/memory.pressure", "some", 100_000)
    waiter.add(events_fd, How.KERNFS, 1)
    waiter.add(trigger_fd, How.TRIGGER, 2)
    Path(path).rmdir()
    told = [[report.token, report.lost_errno] for report in waiter.wait()]
    told += [[report.token, report.lost_errno] for report in waiter.take()]
    waiter.close()
    os.close(events_fd)
    os.close(trigger_fd)
    return told


def test_of_a_removed_cgroup_its_trigger_tells_once_and_its_memory_events_never(group):
    """So it takes the next look to find out that the process is in another cgroup."""
    own = group.child("own")
    assert child.run(lost, str(own.path)) == [[2, errno.ENODEV]]


def switches_of(name):
    """How often the thread of that name has slept."""
    told = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended since it was listed
            if (task / "comm").read_text().strip() == name:
                told.append((task / "status").read_text())
    (status,) = told
    (line,) = (each for each in status.splitlines() if each.startswith("voluntary"))
    return int(line.split()[1])


def polls_what_is_gone(old, new):
    """The cgroup that gauges read is left and removed. How often Python was woken for that, and what comes after."""
    kernel_sources.choose = lambda *_: []  # the trigger of a removed cgroup would tell
    hoard, low = Hoard(256 * MIB), threading.Event()
    with memsafe.PressureMonitor(thresholds=memsafe.Thresholds(poll_s_min=0.001, poll_s_max=3600)) as monitor:
        monitor.on(PressureLevel.LOW, lambda event: low.set())
        monitor.check()
        looks, hear = [], monitor._hub.hear
        monitor._hub.hear = lambda reports: looks.append(reports) or hear(reports)
        Path(new, "cgroup.procs").write_text(str(os.getpid()))
        Path(old).rmdir()
        before = switches_of("memsafe-waiter")
        while switches_of("memsafe-waiter") < before + 3:
            pass  # it reads its gauges
        in_vain = sum(map(bool, looks))  # without reports, it is the bell of a request that was served already
        monitor.check()
        while not low.is_set() and hoard.size_bytes < 120 * MIB:
            hoard.grow()
        return {"looks in vain": in_vain, "is low": low.wait(PATIENCE_S)}


def test_a_gauge_of_a_removed_cgroup_is_silent_and_the_next_look_finds_the_new_one(group):
    old, new = group.child("old", memory_max=128 * MIB), group.child("new", memory_max=128 * MIB)
    told = child.run(polls_what_is_gone, str(old.path), str(new.path), cgroup=old)
    assert told == {"looks in vain": 0, "is low": True}


# PSI: what the kernel takes


def triggers(path):
    """The errno of each trigger that is tried, 0 where it is taken."""

    def tried(kind, stall_us, window_us):
        try:
            os.close(notify.arm_stall_trigger(path, kind, stall_us, window_us))
        except memsafe.KernelError as error:
            return error.errno
        return 0

    windows = [(200_000, 2_000_000), (200_000, 4_000_000), (100_000, 1_000_000), (100_000, 10_000_000)]
    return [tried("some", stall_us, window_us) for stall_us, window_us in (*windows, (1, 12_000_000), (0, 2_000_000))]


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        (child.ROOT, [0, 0, 0, 0, errno.EINVAL, errno.EINVAL]),
        (child.ORDINARY, [0, 0, errno.EINVAL, 0, errno.EINVAL, errno.EINVAL]),
    ],
)
def test_which_windows_of_a_stall_trigger_the_kernel_takes(user, expected):
    """Without CAP_SYS_RESOURCE only multiples of 2 s, up to 10 s."""
    assert child.run(triggers, "/proc/pressure/memory", user=user) == expected
