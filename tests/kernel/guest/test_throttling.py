"""memory.high under load: throttled, stalled, told by memory_status(), and not killed."""

import mmap
from pathlib import Path

import memsafe
from tests.kernel.guest import child

MIB = 1024 * 1024
HIGH = 48 * MIB

_held = []


def grow(size_bytes):
    """Hold so much more; the status after it."""
    more = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, size_bytes, mmap.PAGESIZE):
        more[offset] = 1
    _held.append(more)
    return memsafe.memory_status().as_dict()


def grow_beyond(ask, own):
    """Have it grow until the kernel throttled it; what it told last."""
    told = ask(HIGH // 3)
    while own.flat("memory.events")["high"] == 0:
        told = ask(MIB // 4)  # the more is taken at once beyond it, the longer the kernel lets it wait
    return told


def test_beyond_memory_high_a_process_is_throttled_and_lives(group):
    own = group.child("own", memory_high=HIGH, memory_max=256 * MIB)
    with child.asking(grow, cgroup=own) as ask:
        within = ask(MIB)
        beyond = grow_beyond(ask, own)
    for plain in (within, beyond):
        assert (plain["binding"]["kind"], plain["binding"]["consequence"]) == ("memory.high", "throttle")
        assert plain["limit_bytes"] == HIGH
    assert within["available_bytes"] > 16 * MIB
    assert beyond["available_bytes"] < MIB
    events = own.flat("memory.events")
    assert (events["max"], events["oom_kill"]) == (0, 0)


def test_an_ancestors_memory_high_throttles_and_binds(group):
    group["memory.high"] = HIGH
    own = group.child("own", memory_max=256 * MIB)
    with child.asking(grow, cgroup=own) as ask:
        beyond = grow_beyond(ask, group)
    assert (beyond["binding"]["kind"], beyond["binding"]["path"]) == ("memory.high", f"/{group.path.name}")
    assert own.flat("memory.events.local")["high"] == 0


def test_stalls_are_told_as_the_kernel_tells_them(group):
    own = group.child("own", memory_high=HIGH)
    with child.asking(grow, cgroup=own) as ask:
        calm = ask(MIB)["pressure"]
        told = grow_beyond(ask, own)["pressure"]
        while not told["some"]["avg10"] or not told["full"]["avg10"]:  # the kernel works averages out every two seconds
            told = ask(MIB // 8)["pressure"]
        lines = own["memory.pressure"].splitlines()
    assert told["source"] == f"{own.path}/memory.pressure"
    for line, kind in zip(lines, ("some", "full"), strict=True):
        total_us = int(line.partition("total=")[2])
        assert line.startswith(kind)
        assert calm[kind]["total_us"] < told[kind]["total_us"] <= total_us
        assert 0 < told[kind]["avg10"] <= 100
    assert told["full"]["total_us"] <= told["some"]["total_us"]


def system_pressure():
    return memsafe.memory_status().pressure.as_dict()


def test_outside_of_limits_the_machines_stalls_are_told(group):
    own = group.child("own", memory_high=HIGH)
    with child.asking(system_pressure) as ask, child.asking(grow, cgroup=own) as hog:
        before = ask()
        grow_beyond(hog, own)
        after = ask()
    assert after["some"]["total_us"] > before["some"]["total_us"]
    total_us = int(Path("/proc/pressure/memory").read_text().splitlines()[0].partition("total=")[2])
    assert after["some"]["total_us"] <= total_us
