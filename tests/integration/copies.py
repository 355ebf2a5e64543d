"""Scenarios of copies, and of who dies for want of memory: of the tests on this machine, and of those in the lab."""

import mmap
import os
import signal

import memsafe
from memsafe.snapshot.sentry import Sentry
from tests.integration.snapshots import MIB, PATIENCE_S, Gate, gated, hello, outcome

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def state_of(size_bytes, *, huge=False):
    """Private memory, every page of it written."""
    state = mmap.mmap(-1, size_bytes, PRIVATE)
    state.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    write_to(state)
    return state


def write_to(state, every=1):
    for offset in range(0, len(state), every * mmap.PAGESIZE):
        state[offset] = (state[offset] + 1) % 256


def copies_of(path, writers, huge, size_bytes):
    """Have every other page of a state written by "parent", "child" or both."""
    state = state_of(size_bytes, huge=huge)
    gate = Gate()

    def write(out):
        if "child" in writers:
            write_to(state, every=2)
        gate.wait()

    job = memsafe.fork_snapshot(path, write)
    if "parent" in writers:
        write_to(state, every=2)
    gate.open()
    result = job.wait(PATIENCE_S)
    gate.close()
    return {"peak": result.peak_copy_bytes}


def write_everything(path, rounds):
    """Have snapshots of 160 MiB copied faster than anybody can look, one after the other."""
    outcomes, filling = [], b"x" * MIB
    state = state_of(160 * MIB)
    for _ in range(rounds):
        memsafe.fork_snapshot(path, hello, max_copy="16 MiB").wait(PATIENCE_S)  # so little is forecast for the next
        gate = Gate()
        job = memsafe.fork_snapshot(path, gated(gate))
        for offset in range(0, len(state), MIB):
            state[offset : offset + MIB] = filling
        outcomes.append(outcome(job)["error"])
        gate.close()
    return {"outcomes": outcomes}


NO_ROOM_BYTES = 288 * MIB
"""The limit in which that cannot be."""


def keep_sentries_out():
    """Have memory filled faster than anybody looks."""
    Sentry._open_files = lambda *_: None


def killed_beside_a_victim(path):
    """Kill the child by hand, after the OOM killer has taken another process of the same cgroup."""

    def write(out):
        eater = memsafe.Popen(["tail", "/dev/zero"], oom_score_adj=1000)
        ended = eater.wait()
        out.progress(-ended, -ended)
        os.kill(os.getpid(), signal.SIGKILL)

    keep_sentries_out()
    signals = []
    job = memsafe.fork_snapshot(path, write, on_progress=lambda done, total: signals.append(done))
    return {**outcome(job), "signals": signals}
