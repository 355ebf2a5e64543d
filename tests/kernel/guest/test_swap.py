"""Swap, in a file and in compressed memory: what memory_status() makes of it, and cgroups' limits on it."""

import mmap
import os
from pathlib import Path

import memsafe
from tests.kernel.guest import child
from tests.kernel.guest.conftest import SWAP_BYTES

MIB = 1024 * 1024
HELD = 48 * MIB

_held = []


def status():
    return memsafe.memory_status().as_dict()


def constraint(plain, kind):
    (found,) = [each for each in plain["constraints"] if each["kind"] == kind]
    return found


def used_swap_bytes(plain):
    """What counts against the topmost limit on swap."""
    return plain["swap"]["limits"][-1]["used_bytes"]


def meminfo_bytes(name):
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def held_status():
    """The status of a process that holds HELD bytes which no compressor can make much of."""
    if not _held:
        _held.append(mmap.mmap(-1, HELD, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        for offset in range(0, HELD, MIB):
            _held[0][offset : offset + MIB] = os.urandom(MIB)
    return status()


def test_swap_adds_to_the_headroom_of_physical_memory(swap):
    swap_bytes = meminfo_bytes("SwapTotal")
    assert swap_bytes == SWAP_BYTES - mmap.PAGESIZE, "the first page is its header"
    with child.asking(status) as ask:
        told = ask()
        swap.off()
        on, off = constraint(told, "physical"), constraint(ask(), "physical")
    assert told["swap"]["total_bytes"] == swap_bytes
    assert told["swap"]["available_bytes"] == told["swap"]["free_bytes"] > swap_bytes - MIB
    assert told["swap"]["limits"] == []
    assert (on["limit_bytes"], off["limit_bytes"]) == (
        meminfo_bytes("MemTotal") + swap_bytes,
        meminfo_bytes("MemTotal"),
    )
    assert abs(on["headroom_bytes"] - off["headroom_bytes"] - swap_bytes) < 16 * MIB


def test_what_is_swapped_out_is_told_and_leaves_room_in_the_cgroup(group, swap):
    own = group.child("own", memory_max=256 * MIB)
    with child.asking(held_status, cgroup=own) as ask:
        before = ask()
        own.reclaim(32 * MIB)
        most_bytes = int(own["memory.swap.current"])
        after = ask()
        least_bytes = int(own["memory.swap.current"])  # to answer, it takes some of it back
    assert before["process"]["swap_bytes"] == 0
    assert least_bytes > 16 * MIB
    assert least_bytes - MIB < after["process"]["swap_bytes"] < most_bytes + MIB
    assert constraint(after, "memory.max")["used_bytes"] < constraint(before, "memory.max")["used_bytes"] - 16 * MIB
    assert after["available_bytes"] > before["available_bytes"] + 16 * MIB
    anonymous_bytes = [plain["process"]["anonymous_bytes"] for plain in (before, after)]
    assert anonymous_bytes[1] < anonymous_bytes[0] - 16 * MIB
    assert after["warnings"] == []


def test_limits_on_swap_are_told_and_the_tightest_of_them_bounds_what_swap_is_good_for(group, swap):
    group["memory.swap.max"] = 24 * MIB
    own = group.child("own", memory_max=256 * MIB, memory_swap_max=64 * MIB, memory_swap_high=48 * MIB)
    with child.asking(held_status, cgroup=own) as ask:
        before = ask()
        own.reclaim(16 * MIB)
        after = ask()
    top, name = f"/{group.path.name}", f"/{group.path.name}/own"
    for plain in (before, after):
        assert [(limit["kind"], limit["path"], limit["limit_bytes"]) for limit in plain["swap"]["limits"]] == [
            ("memory.swap.max", name, 64 * MIB),
            ("memory.swap.high", name, 48 * MIB),
            ("memory.swap.max", top, 24 * MIB),
        ]
        assert plain["swap"]["available_bytes"] == 24 * MIB - used_swap_bytes(plain)
        assert constraint(plain, "physical")["limit_bytes"] == meminfo_bytes("MemTotal") + 24 * MIB
    assert used_swap_bytes(before) == 0
    assert used_swap_bytes(after) > 8 * MIB


def hold(size_bytes):
    held = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, size_bytes, mmap.PAGESIZE):
        held[offset : offset + 8] = os.urandom(8)
    return status()


def test_a_process_may_hold_more_than_memory_max_where_its_cgroup_may_swap(group, swap):
    own = group.child("own", memory_max=64 * MIB)
    plain = child.run(hold, 96 * MIB, cgroup=own)
    assert plain["process"]["swap_bytes"] > 32 * MIB
    assert plain["binding"]["kind"] == "memory.max"
    events = own.flat("memory.events")
    assert (events["max"] > 0, events["oom_kill"]) == (True, 0)


def test_beyond_memory_swap_max_it_is_killed_though_swap_is_free(group, swap):
    own = group.child("own", memory_max=64 * MIB, memory_swap_max=16 * MIB)
    child.run(hold, 96 * MIB, cgroup=own, killed=True)
    assert own.flat("memory.events")["oom_kill"] == 1
    events = own.flat("memory.swap.events")
    assert (events["max"] > 0, events["fail"] > 0) == (True, True)


def test_a_cgroup_that_may_not_swap_has_the_headroom_of_memory_max_alone(group, swap):
    own = group.child("own", memory_max=96 * MIB, memory_swap_max=0)
    with child.asking(held_status, cgroup=own) as ask:
        before = ask()
        own.reclaim(32 * MIB)
        after = ask()
    assert own["memory.swap.current"] == "0"
    assert after["process"]["swap_bytes"] == 0
    for plain in (before, after):
        assert plain["binding"]["kind"] == "memory.max"
        assert plain["available_bytes"] < 96 * MIB - HELD
        assert plain["swap"]["available_bytes"] == 0
        assert constraint(plain, "physical")["limit_bytes"] == meminfo_bytes("MemTotal")
