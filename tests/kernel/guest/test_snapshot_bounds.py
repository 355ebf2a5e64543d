"""What a snapshot's copies come to, and who dies of them, on this kernel and in cgroup v2; and whom the killer took."""

import errno
import mmap
import os
import signal
from pathlib import Path

import pytest

import memsafe
from memsafe.snapshot.sentry import Sentry
from tests.kernel.guest import child

MIB = 1024 * 1024
PATIENCE_S = 60

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


@pytest.fixture
def path(scratch):
    target = scratch / "dump"
    target.write_bytes(b"old")
    return target


def state_of(size_bytes, huge=False):
    state = mmap.mmap(-1, size_bytes, PRIVATE)
    state.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    write_to(state)
    return state


def write_to(state, every=1):
    for offset in range(0, len(state), every * mmap.PAGESIZE):
        state[offset] = (state[offset] + 1) % 256


def outcome(job):
    try:
        return {"copies": job.wait(PATIENCE_S).peak_copy_bytes}
    except memsafe.SnapshotFailedError as error:
        return {"error": type(error).__name__, "message": str(error)}


class Gate:
    """An eventfd, which the child keeps: of inherited pipes it has none."""

    def __init__(self):
        self.fd = os.eventfd(0)

    def wait(self):
        os.eventfd_read(self.fd)

    def open(self):
        os.eventfd_write(self.fd, 1)


# Copies are counted whoever writes.


def copies_of(path, writers, huge):
    state, gate = state_of(16 * MIB, huge), Gate()

    def write(out):
        if "child" in writers:
            write_to(state, every=2)
        gate.wait()

    job = memsafe.fork_snapshot(path, write)
    if "parent" in writers:
        write_to(state, every=2)
    gate.open()
    return outcome(job)


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("writers", [["parent"], ["child"], ["parent", "child"]])
def test_a_page_that_either_side_writes_is_one_copy(path, writers, huge):
    idle = child.run(copies_of, str(path), [], huge)["copies"]
    told = child.run(copies_of, str(path), writers, huge)["copies"]
    assert idle < 8 * MIB
    assert abs(told - idle - 8 * MIB) < 2 * MIB


# With everything against it.


def write_everything(path, rounds):
    outcomes, filling = [], b"x" * MIB
    state = state_of(160 * MIB)
    for _ in range(rounds):
        memsafe.fork_snapshot(path, lambda out: out.write(b"new"), max_copy="16 MiB").wait(PATIENCE_S)
        gate = Gate()

        def write(out, gate=gate):
            gate.wait()

        job = memsafe.fork_snapshot(path, write)
        for offset in range(0, len(state), MIB):
            state[offset : offset + MIB] = filling
        outcomes.append(outcome(job)["error"])
    return outcomes


@pytest.mark.parametrize("throttled", [False, True])
def test_where_copies_find_no_memory_the_parent_survives_and_the_child_does_not(group, path, throttled):
    limits = {"memory_high": 272 * MIB} if throttled else {}
    own = group.child("own", memory_max=288 * MIB, **limits)
    rounds = 1 if throttled else 5  # after a stall, the next is deferred for ten seconds
    outcomes = child.run(write_everything, str(path), rounds, cgroup=own)
    print("outcomes:", outcomes)
    assert len(outcomes) == rounds
    assert set(outcomes) <= {"SnapshotOverrunError", "OOMKilledError"}
    assert path.read_bytes() == b"new"


# Whom the killer took.


def keep_sentries_out():
    """Have memory filled faster than anybody looks."""
    Sentry._open_files = lambda *_: None


def killed_beside_a_victim(path):
    def write(out):
        eater = memsafe.Popen(["tail", "/dev/zero"], oom_score_adj=1000)
        ended = eater.wait()
        out.progress(-ended, -ended)
        os.kill(os.getpid(), signal.SIGKILL)

    keep_sentries_out()
    signals = []
    job = memsafe.fork_snapshot(path, write, on_progress=lambda done, total: signals.append(done))
    return {**outcome(job), "signals": signals}


@pytest.mark.parametrize(("user", "error"), [(child.ROOT, "SnapshotFailedError"), (child.ORDINARY, "OOMKilledError")])
def test_a_child_killed_by_hand_is_told_from_a_victim_beside_it_by_who_may_read_the_log(
    group, path, sysctl, user, error
):
    sysctl("kernel/dmesg_restrict", 1)
    path.chmod(0o666)
    path.parent.chmod(0o777)
    own = group.child("own", memory_max=96 * MIB)
    told = child.run(killed_beside_a_victim, str(path), cgroup=own, user=user)
    assert told["signals"] == [signal.SIGKILL]
    assert told["error"] == error
    assert own.flat("memory.events.local")["oom_kill"] == 1


def shot(path):
    gate, ended = Gate(), []

    def write(out):
        out.progress(os.getpid(), os.getpid())
        gate.wait()
        state_of(192 * MIB)

    def on_progress(pid, _):
        pidfd = os.pidfd_open(pid)  # while this lasts nothing is measured: the killer comes first
        gate.open()
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
        os.close(pidfd)
        ended.append(True)

    keep_sentries_out()
    return {**outcome(memsafe.fork_snapshot(path, write, on_progress=on_progress)), "ended": ended}


def test_a_victim_is_named_by_the_kernels_log(group, path):
    told = child.run(shot, str(path), cgroup=group.child("own", memory_max=96 * MIB))
    assert told["ended"] == [True]
    assert told["error"] == "OOMKilledError"
    assert "the kernel's log names it" in told["message"]


# Who may change what.


def adjust():
    """Raise, take back, protect: the values seen, and the error's number where there is one."""
    base = memsafe.oom.score_adj()
    with memsafe.oom.set_score_adj(base + 300):
        seen = [memsafe.oom.score_adj()]
    seen.append(memsafe.oom.score_adj())
    try:
        with memsafe.oom.protect():
            seen.append(memsafe.oom.score_adj())
        number = 0
    except memsafe.KernelError as error:
        number = error.errno
    return {"base": base, "seen": seen, "errno": number, "after": memsafe.oom.score_adj()}


@pytest.mark.parametrize("base", [0, 200])
def test_an_ordinary_user_may_raise_and_take_back_and_not_protect(base):
    with memsafe.oom.set_score_adj(base):
        told = child.run(adjust, user=child.ORDINARY)
    assert told == {"base": base, "seen": [base + 300, base], "errno": errno.EACCES, "after": base}


def test_root_may_protect_relative_to_what_it_inherited():
    with memsafe.oom.set_score_adj(200):
        told = child.run(adjust)
    assert told == {"base": 200, "seen": [500, 200, -300], "errno": 0, "after": 200}
    assert Path("/proc/self/oom_score_adj").read_text() == "0\n"
