"""Who else in the parent waits for children, or would rather not: outcomes are told all the same."""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import threading
from pathlib import Path

import pytest

import memsafe
from tests.integration import scenario
from tests.integration.snapshots import (
    PATIENCE_S,
    Gate,
    content,
    gated,
    hello,
    outcome,
)


def sigchld_ignored(path):
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    good = outcome(memsafe.fork_snapshot(path, hello))
    bad = outcome(memsafe.fork_snapshot(path, lambda out: os._exit(0)))
    return {"good": good, "bad": bad, "content": content(path)}


def test_a_parent_that_ignores_sigchld_still_tells_success_from_failure(path):
    got = scenario.run(sigchld_ignored, path)
    assert got["good"]["result"]["size_bytes"] == 3
    assert got["bad"]["error"] == "SnapshotFailedError"
    assert got["content"] == "new"


def reaped_by_another(path):
    outcomes = {"good": [], "bad": []}
    statuses = []
    for _ in range(10):
        for name, write in (("good", hello), ("bad", lambda out: os._exit(0))):
            gate = Gate()

            def gated_write(out, gate=gate, write=write):
                gate.wait()
                write(out)

            job = memsafe.fork_snapshot(path, gated_write)
            reaper = threading.Thread(target=lambda: statuses.append(_wait_for_any()))
            reaper.start()
            gate.open()
            outcomes[name].append(next(iter(outcome(job))))
            reaper.join()
            gate.close()
    return {**{name: sorted(set(kinds)) for name, kinds in outcomes.items()}, "reaped": statuses.count(True)}


def _wait_for_any():
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        return False
    return True


def test_a_child_reaped_by_somebody_elses_wait_is_judged_by_what_it_said(path):
    got = scenario.run(reaped_by_another, path)
    assert (got["good"], got["bad"]) == (["result"], ["error"])


def no_zombies_wanted(path):
    """SA_NOCLDWAIT: children end without becoming zombies, though SIGCHLD is heard."""
    libc = ctypes.CDLL(None, use_errno=True)
    action = ctypes.create_string_buffer(152)  # struct sigaction: the handler, the mask, the flags, the restorer
    assert libc.sigaction(signal.SIGCHLD, None, action) == 0
    no_cld_wait = 2
    ctypes.c_int.from_buffer(action, 8 + 128).value |= no_cld_wait
    assert libc.sigaction(signal.SIGCHLD, action, None) == 0
    good = outcome(memsafe.fork_snapshot(path, hello))
    bad = outcome(memsafe.fork_snapshot(path, lambda out: os._exit(0)))
    gate = Gate()
    job = memsafe.fork_snapshot(path, gated(gate))
    job.cancel()
    ended = outcome(job)
    gate.close()
    return {"good": good, "bad": bad, "ended": ended}


def test_where_children_are_reaped_by_the_kernel_their_outcomes_are_told_all_the_same(path):
    got = scenario.run(no_zombies_wanted, path)
    assert got["good"]["result"]["size_bytes"] == 3
    assert got["bad"]["error"] == "SnapshotFailedError"
    assert got["ended"]["error"] == "SnapshotCancelledError"


def pid_reused(path):
    """The child is gone, and a stranger has its number, when the job's thread comes to end it."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gate = Gate()
    jobs, strangers = [], []

    def write(out):
        gate.wait()
        out.progress(os.getpid(), 1)
        gate.wait()
        os._exit(0)

    def on_progress(pid, _):
        child = os.pidfd_open(pid)
        gate.open()
        select.select([child], [], [], PATIENCE_S)
        os.close(child)
        while strangers[-1:] != [pid]:
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
            strangers.append(os.posix_spawn("/bin/sleep", ["sleep", "100"], {}))
        jobs[0].cancel()

    jobs.append(memsafe.fork_snapshot(path, write, on_progress=on_progress))
    gate.open()
    got = outcome(jobs[0])
    gate.close()
    stranger = os.pidfd_open(strangers[-1])
    lives = not select.select([stranger], [], [], 0)[0]
    os.close(stranger)
    for pid in strangers:
        os.kill(pid, signal.SIGKILL)
    for pid in strangers:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    return {**got, "lives": lives}


def test_a_stranger_who_got_the_childs_number_is_not_killed_in_its_place(path):
    if not os.path.exists("/proc/sys/kernel/ns_last_pid"):
        pytest.skip("this kernel was built without CONFIG_CHECKPOINT_RESTORE: no number can be chosen")
    prefix = ["unshare", *(["--user", "--map-root-user"] if os.geteuid() else []), "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no pid namespace may be made")
    got = scenario.run(pid_reused, path, prefix=prefix)
    assert got["error"] == "SnapshotCancelledError"
    assert got["lives"]
