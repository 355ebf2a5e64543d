"""What a snapshot's copies come to, and who dies of them, on this kernel and in cgroup v2; and whom the killer took."""

import errno
import os
import signal
from pathlib import Path

import pytest

import memsafe
from tests.integration.copies import (
    NO_ROOM_BYTES,
    copies_of,
    keep_sentries_out,
    killed_beside_a_victim,
    state_of,
    write_everything,
)
from tests.integration.snapshots import MIB, Gate, outcome
from tests.kernel.guest import child


@pytest.fixture
def path(scratch):
    target = scratch / "dump"
    target.write_bytes(b"old")
    return target


# Copies are counted whoever writes.


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("writers", [["parent"], ["child"], ["parent", "child"]])
def test_a_page_that_either_side_writes_is_one_copy(path, writers, huge):
    idle = child.run(copies_of, str(path), [], huge, 16 * MIB)["peak"]
    told = child.run(copies_of, str(path), writers, huge, 16 * MIB)["peak"]
    assert idle < 8 * MIB
    assert abs(told - idle - 8 * MIB) < 2 * MIB


# With everything against it.


@pytest.mark.parametrize("throttled", [False, True])
def test_where_copies_find_no_memory_the_parent_survives_and_the_child_does_not(group, path, throttled):
    limits = {"memory_high": NO_ROOM_BYTES - 16 * MIB} if throttled else {}
    own = group.child("own", memory_max=NO_ROOM_BYTES, **limits)
    rounds = 1 if throttled else 5  # after a stall, the next is deferred for ten seconds
    outcomes = child.run(write_everything, str(path), rounds, cgroup=own)["outcomes"]
    print("outcomes:", outcomes)
    assert len(outcomes) == rounds
    assert set(outcomes) <= {"SnapshotOverrunError", "OOMKilledError"}
    assert path.read_bytes() == b"new"


# Whom the killer took.


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
