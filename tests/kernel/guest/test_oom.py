"""The OOM killer, in a cgroup and of the whole machine: foretold, counted, and survived by the parent."""

import mmap
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import memsafe
from tests.kernel.guest import child

MIB = 1024 * 1024
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

# Memory that grows by a MiB for each line that it is told, and without end when there are no more.
EAT = """
import sys
held = []
for line in sys.stdin:
    held.append(bytearray(1 << 20))
    print(len(held), flush=True)
while True:
    held.append(bytearray(1 << 20))
"""


def hold(size_bytes):
    held = mmap.mmap(-1, size_bytes, PRIVATE)
    held.madvise(mmap.MADV_NOHUGEPAGE)
    for offset in range(0, size_bytes, mmap.PAGESIZE):
        held[offset] = 1
    return held


# A cgroup's limit


def lose_a_child(cgroup=None):
    """Have a child shot; how the counts tell it."""
    before = memsafe.oom.kills()
    done = memsafe.run([sys.executable, "-c", EAT], input=b"", oom_score_adj=500, cgroup=cgroup)
    return {"status": done.returncode, "kills": [before, memsafe.oom.kills()]}


def test_a_child_that_is_shot_in_the_own_cgroup_is_counted_and_the_parent_lives(group):
    own = group.child("own", memory_max=64 * MIB)
    assert child.run(lose_a_child, cgroup=own) == {"status": -signal.SIGKILL, "kills": [0, 1]}
    assert own.flat("memory.events.local")["oom_kill"] == 1


def test_one_that_is_shot_for_an_ancestors_limit_is_counted_where_it_was(group):
    group["memory.max"] = 64 * MIB
    own, sibling = group.child("own"), group.child("sibling")
    assert child.run(lose_a_child, cgroup=own) == {"status": -signal.SIGKILL, "kills": [0, 1]}
    assert sibling.flat("memory.events")["oom_kill"] == 0
    assert group.flat("memory.events")["oom_kill"] == 1


def test_a_neighbour_that_is_shot_is_not_counted_as_the_own(group):
    own, sibling = group.child("own"), group.child("sibling", memory_max=64 * MIB)
    assert child.run(lose_a_child, str(sibling.path), cgroup=own) == {"status": -signal.SIGKILL, "kills": [0, 0]}
    assert sibling.flat("memory.events")["oom_kill"] == 1


# memory.max beyond what was foretold


def take(beyond_bytes):
    """Hold what is said to be available, and so much more or less."""
    return len(hold(memsafe.memory_status().available_bytes + beyond_bytes))


def test_what_is_available_can_be_had_and_more_cannot(group):
    """The interpreter's own takes a little meanwhile."""
    own = group.child("own", memory_max=96 * MIB)
    assert child.run(take, -4 * MIB, cgroup=own) > 48 * MIB
    assert own.flat("memory.events")["oom"] == 0
    child.run(take, 4 * MIB, cgroup=own, killed=True)
    assert own.flat("memory.events")["oom_kill"] == 1


def fork_and_write_all(size_bytes):
    """Fork whatever was foretold, and have the child write to all of its copy."""
    held = hold(size_bytes)
    assessment = memsafe.assess_fork()
    forked = os.fork()
    if not forked:
        memsafe.oom.set_score_adj(1000)
        for offset in range(0, size_bytes, mmap.PAGESIZE):
            held[offset] = 2
        os._exit(0)
    _, status = os.waitpid(forked, 0)
    return {"decision": assessment.decision, "status": status, "binding": assessment.as_dict()["binding"]["kind"]}


@pytest.mark.parametrize(("held_mib", "decision", "status"), [(40, "admit", 0), (112, "refuse", signal.SIGKILL)])
def test_the_forecast_of_copies_is_what_decides_over_life_and_death(group, held_mib, decision, status):
    own = group.child("own", memory_max=160 * MIB)
    told = child.run(fork_and_write_all, held_mib * MIB, cgroup=own)
    assert told == {"decision": decision, "status": status, "binding": "memory.max"}


# The whole machine


def starve_the_machine():
    """Have a child take all memory; what was told when it began to run short, and what came of it."""
    warned, heard = threading.Event(), []
    with memsafe.PressureMonitor() as monitor:

        @monitor.on(memsafe.PressureLevel.LOW)
        def shed(event):
            heard.append(event.level.name)
            warned.set()

        before, low = memsafe.oom.kills(), None
        hog = memsafe.Popen(
            [sys.executable, "-c", EAT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, oom_score_adj=1000
        )
        with hog:
            while not warned.is_set():
                print(file=hog.stdin, flush=True)
                assert hog.stdout.readline(), "it was shot before anybody was warned"
            low = memsafe.memory_status().as_dict()
            kills_when_warned = memsafe.oom.kills()
            hog.stdin.close()
            status = hog.wait()
        after = memsafe.memory_status().as_dict()
    return {
        "heard": heard,
        "status": status,
        "kills": [before, kills_when_warned, memsafe.oom.kills()],
        "low": low["binding"],
        "recovered": after["binding"]["headroom_bytes"] > low["binding"]["headroom_bytes"],
    }


def test_before_the_machine_is_out_of_memory_it_is_told_and_the_child_is_shot(group):
    own = group.child("own")
    told = child.run(starve_the_machine)
    assert told["heard"][0] == "LOW"
    assert told["low"]["kind"] == "physical"
    assert told["low"]["consequence"] == "kill"
    assert told["low"]["headroom_bytes"] < told["low"]["limit_bytes"] // 4
    assert told["status"] == -signal.SIGKILL
    before, warned, after = told["kills"]
    assert (warned - before, after - before) == (0, 1)
    assert told["recovered"]
    assert own.flat("memory.events")["oom_kill"] == 0
    assert f"oom_kill {after}\n" in Path("/proc/vmstat").read_text()
