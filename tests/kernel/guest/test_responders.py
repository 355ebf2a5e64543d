"""What is done about pressure, where cgroup v2 is full."""

import mmap
import os
import sys

import pytest

import memsafe
from memsafe import PressureLevel
from tests.kernel.guest import child

MIB = 1024 * 1024
LIMIT = 64 * MIB
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Cache:
    """24 MiB."""

    def __init__(self):
        self._pages = mmap.mmap(-1, 24 * MIB, PRIVATE)
        self._pages.madvise(mmap.MADV_NOHUGEPAGE)
        self.drops = 0

    def fill(self):
        for at in range(0, len(self._pages), mmap.PAGESIZE):
            self._pages[at] = 1

    def drop(self, _):
        self._pages.madvise(mmap.MADV_DONTNEED)
        self.drops += 1
        return 0  # of what the budget knows


def act_at_the_limit(path, by, rounds):
    """Let the limit fall to what is used, again and again: who charges more than a batch of pages is shot."""
    limit_fd, usage_fd = os.open(f"{path}/memory.max", os.O_WRONLY), os.open(f"{path}/memory.current", os.O_RDONLY)
    budget, cache = memsafe.Budget(name="db"), Cache()
    quiet = memsafe.Thresholds(poll_s_min=3600, poll_s_max=3600)
    with memsafe.PressureMonitor(budget, thresholds=quiet) as monitor:
        if by == "reclaimer":
            budget.reclaimer(cache.drop)
        else:
            monitor.on(PressureLevel.CRITICAL, cache.drop)
        for _ in range(rounds):
            cache.fill()
            monitor.check()
            os.pwrite(limit_fd, os.pread(usage_fd, 32, 0).strip(), 0)
            monitor.check()
            os.pwrite(limit_fd, str(LIMIT).encode(), 0)
            monitor.simulate(PressureLevel.NORMAL)
    return cache.drops


@pytest.mark.parametrize("by", ["reclaimer", "callback"])
def test_handlers_run_twenty_times_in_a_cgroup_at_its_limit(group, by):
    own = group.child("own", memory_max=LIMIT)
    drops = child.run(act_at_the_limit, str(own.path), by, 20, cgroup=own)
    assert drops >= 20
    assert own.flat("memory.events")["oom_kill"] == 0
    print(f"{by}: {drops} drops in 20 rounds, {own.flat('memory.events')}", file=sys.stderr)


def take_at_the_limit(path, pages):
    with open(f"{path}/memory.current") as usage, open(f"{path}/memory.max", "w") as limit:
        limit.write(usage.read())
    held = mmap.mmap(-1, pages * mmap.PAGESIZE, PRIVATE)
    for at in range(0, len(held), mmap.PAGESIZE):
        held[at] = 1
    return "survived"


def test_who_takes_more_than_a_batch_of_pages_there_is_shot(group):
    own = group.child("own", memory_max=LIMIT)
    child.run(take_at_the_limit, str(own.path), 128, cgroup=own, killed=True)
    assert own.flat("memory.events")["oom_kill"] == 1
