"""A snapshot's child: what it is like before `write` runs, and who else lives in the parent."""

import atexit
import ctypes
import faulthandler
import gc
import logging
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import pytest

import memsafe
from memsafe._kernel import process
from tests.integration import scenario
from tests.integration.snapshots import (
    PATIENCE_S,
    Gate,
    content,
    gated,
    hello,
    out_of_time,
    outcome,
    temporaries,
    unexpected,
)

NOBODY = 65534
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def from_thread_that_ends(path):
    gate = Gate()
    jobs = []
    thread = threading.Thread(target=lambda: jobs.append(memsafe.fork_snapshot(path, gated(gate))))
    thread.start()
    thread.join()
    gate.open()
    got = outcome(jobs[0])
    gate.close()
    return got


def test_the_child_outlives_the_thread_that_forked(path):
    assert scenario.run(from_thread_that_ends, path)["result"]["size_bytes"] == 3


def held_locks(path):
    lock = threading.RLock()

    def write(out):
        with lock:
            logging.getLogger("x").debug("its locks are renewed")
            out.write(b"new")

    with lock:
        job = memsafe.fork_snapshot(path, write)
    return outcome(job)


def test_a_lock_that_the_caller_holds_is_its_own_in_the_child(path):
    assert scenario.run(held_locks, path)["result"]["size_bytes"] == 3


def child_state(path):
    process.oom_score_adj()
    kept, _kept_peer = socket.socketpair()
    dropped, peer = socket.socketpair()
    gate, ready = Gate(), Gate()
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append("term"))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    own_adj = process.oom_score_adj()
    atexit.register(lambda: Path(path + ".atexit").touch())

    def write(out):
        os.kill(os.getpid(), signal.SIGINT)  # a Ctrl-C at the terminal is for the parent
        state = {
            "oom_score_adj": process.oom_score_adj(),
            "comm": Path("/proc/self/comm").read_text().strip(),
            "gc": gc.isenabled(),
            "frozen": gc.get_freeze_count() > 0,
            "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            "kept": stat.S_ISSOCK(os.fstat(kept.fileno()).st_mode),
            "dropped": stat.S_ISSOCK(os.fstat(dropped.fileno()).st_mode),
            "main": threading.current_thread() is threading.main_thread(),
            "handlers": [signal.getsignal(number) == signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGUSR1)],
            "interrupt": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
            "threads": sorted(Path(f"/proc/self/task/{tid}/comm").read_text() for tid in os.listdir("/proc/self/task")),
            "stdio": [os.fstat(fd).st_ino for fd in range(3)],
            "nice": os.nice(0),
            "status": [line for line in Path("/proc/self/status").read_text().splitlines() if line[:4] == "SigI"],
        }
        out.write(repr(state).encode())
        out.flush()
        ready.open()
        gate.wait()

    job = memsafe.fork_snapshot(path, write, keep_fds=[kept])
    ready.wait()
    dropped.close()
    half_open = peer.recv(1) != b""
    gate.open()
    got = outcome(job)
    state = eval(content(path))
    for thing in (gate, ready, kept, _kept_peer, peer):
        thing.close()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    stdio = [os.fstat(fd).st_ino for fd in range(3)]
    own = {"own_adj": own_adj, "own_nice": os.nice(0), "stdio": stdio}
    return {**got, **own, "state": state, "half_open": half_open, "heard": heard}


def easily_killed(path):
    own_adj = max(300, process.oom_score_adj())  # anybody may raise it
    Path("/proc/self/oom_score_adj").write_text(str(own_adj))

    def write(out):
        out.write(str(process.oom_score_adj()).encode())

    return {**outcome(memsafe.fork_snapshot(path, write)), "own_adj": own_adj, "child_adj": int(content(path))}


def test_a_parent_that_leaves_the_oom_killer_little_preference_for_the_child_is_told_how_much(path):
    got = scenario.run(easily_killed, path)
    assert got["child_adj"] == 1000
    (warning,) = got["result"]["warnings"]
    assert f"only {1000 - got['own_adj']} above this process's, which is {got['own_adj']} " in warning


def test_the_child_is_tame_before_write_runs(path):
    got = scenario.run(child_state, path)
    state = got["state"]
    assert state["oom_score_adj"] == min(1000, got["own_adj"] + 1000)
    assert state["comm"] == "memsafe-snap"
    assert (state["gc"], state["frozen"]) == (False, not FREE_THREADED)
    assert state["blocked"] == []
    assert (state["kept"], state["dropped"]) == (True, False)
    assert state["main"]
    assert state["handlers"] == [True, True]
    assert state["interrupt"]
    assert state["threads"] == ["memsafe-guard\n", "memsafe-snap\n"]
    assert state["stdio"] == got["stdio"]
    assert state["nice"] == got["own_nice"]
    ignored = int(state["status"][0].split()[1], 16)
    assert all(ignored & 1 << number - 1 for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGUSR2))
    assert not ignored & 1 << signal.SIGTERM - 1
    assert got["half_open"] is False
    assert got["heard"] == []
    assert not (path.parent / "dump.db.memsafe").exists()


def closed_by_the_parent(path):
    """A pipe that the parent closes, as subprocess does with the one that tells it of a failed exec."""
    read_fd, write_fd = os.pipe()
    gate = Gate()
    job = memsafe.fork_snapshot(path, gated(gate))
    os.close(write_fd)
    ended = bool(select.select([read_fd], [], [], PATIENCE_S)[0]) and os.read(read_fd, 1) == b""
    gate.open()
    got = outcome(job)
    gate.close()
    os.close(read_fd)
    return {**got, "ended": ended}


def test_a_pipe_that_the_parent_closes_is_not_held_open(path):
    got = scenario.run(closed_by_the_parent, path)
    assert got["ended"]
    assert unexpected(got["result"]["warnings"]) == []


def kept_pipe(path):
    read_fd, write_fd = os.pipe()
    got = outcome(memsafe.fork_snapshot(path, lambda out: os.write(write_fd, b"heard"), keep_fds=[write_fd]))
    os.close(write_fd)
    heard = os.read(read_fd, 16).decode()
    os.close(read_fd)
    return {**got, "heard": heard}


def test_a_pipe_that_is_to_be_kept_is_kept(path):
    assert scenario.run(kept_pipe, path)["heard"] == "heard"


def event_loop(path):
    event_fd = os.eventfd(0, os.EFD_CLOEXEC)
    loop = select.epoll()
    loop.register(event_fd, select.EPOLLIN)

    def write(out):
        try:
            loop.unregister(event_fd)
        except OSError as error:
            out.write(os.strerror(error.errno).encode())

    got = outcome(memsafe.fork_snapshot(path, write))
    os.eventfd_write(event_fd, 1)
    ready = loop.poll(0)
    os.close(event_fd)
    loop.close()
    return {**got, "ready": len(ready), "refused": content(path)}


def test_the_child_cannot_change_the_parents_event_loop(path):
    got = scenario.run(event_loop, path)
    assert got["ready"] == 1
    assert got["refused"] == "Invalid argument"


IOPRIO_GET, IDLE = {"x86_64": 252, "aarch64": 31}[os.uname().machine], 3 << 13


def polite(path):
    def write(out):
        out.write(f"{os.nice(0)} {ctypes.CDLL(None).syscall(IOPRIO_GET, 1, 0)}".encode())

    got = outcome(memsafe.fork_snapshot(path, write, nice=3, idle_io=True))
    niceness, priority = map(int, content(path).split())
    return {**got, "above": niceness - os.nice(0), "priority": priority}


def test_the_child_leaves_processor_and_disk_to_others_where_that_is_asked_for(path):
    got = scenario.run(polite, path)
    assert (got["above"], got["priority"]) == (3, IDLE)
    assert unexpected(got["result"]["warnings"]) == []


def impolite():
    folder = tempfile.mkdtemp()
    if not os.geteuid():
        os.chown(folder, NOBODY, NOBODY)
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    path = folder + "/dump.db"
    got = outcome(memsafe.fork_snapshot(path, hello, nice=-1))
    os.unlink(path)
    os.rmdir(folder)
    return got


def test_a_refused_niceness_is_a_warning_and_the_image_is_there():
    warnings = scenario.run(impolite)["result"]["warnings"]
    assert [text for text in warnings if "nice" in text] == [
        "the child could not lower its priority (nice): Operation not permitted"
    ]


def collected(path):
    table = [{"key": [number]} for number in range(100_000)]

    def write(out):
        before = process.smaps_rollup().private_dirty_bytes
        gc.enable()
        gc.collect()
        young = [[number] for number in range(50_000)]
        out.write(str(process.smaps_rollup().private_dirty_bytes - before).encode())
        assert young

    return {**outcome(memsafe.fork_snapshot(path, write)), "copied": int(content(path)), "rows": len(table)}


@pytest.mark.skipif(FREE_THREADED, reason="freezing copies all without the GIL")
def test_a_collection_in_the_child_leaves_the_parents_objects_alone(path):
    got = scenario.run(collected, path)
    assert (
        got["copied"] < 100 * got["rows"]
    )  # a row has 3 objects, of which each has a header of 16 bytes to be written


def faulthandler_in_the_parent(path):
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append("term"))
    faulthandler.register(signal.SIGTERM, file=2, chain=True)
    got = out_of_time(path, lambda out: Gate().wait(), lambda got: got["child_traceback"])
    return {**got, "heard": heard}


def test_the_parents_own_traceback_on_a_signal_is_not_in_the_way_of_the_childs(path):
    got = scenario.run(faulthandler_in_the_parent, path)
    assert "faulthandler_in_the_parent" in got["child_traceback"]
    assert "File" not in got["stderr"]
    assert got["heard"] == []


def atexit_in_child(path):
    counter = path + ".runs"

    def count():
        with open(counter, "a") as file:
            file.write("x")

    atexit.register(count)
    sys.stdout.write("pending ")
    return outcome(memsafe.fork_snapshot(path, hello))


def test_neither_exit_functions_nor_pending_output_run_twice(path):
    got = scenario.run(atexit_in_child, path)
    assert (path.parent / "dump.db.runs").read_text() == "x"
    assert got["stdout"].count("pending") == 1


def terminated(path):
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append("term"))

    def write(out):
        os.kill(os.getpid(), signal.SIGTERM)

    return {**outcome(memsafe.fork_snapshot(path, write)), "heard": heard}


def test_a_signal_to_the_child_does_not_run_the_parents_handler(path):
    got = scenario.run(terminated, path)
    assert "SIGTERM" in got["message"]
    assert got["heard"] == []


def killed_parent(path, pipe_fd):
    def write(out):
        out.write(b"new")
        out.flush()
        os.write(pipe_fd, b"%d\n" % os.getpid())
        Gate().wait()

    threading.Thread(target=lambda: memsafe.fork_snapshot(path, write, keep_fds=[pipe_fd])).start()
    Gate().wait()


def finishing_parent(path, pipe_fd):
    written = Gate()

    def write(out):
        out.write(b"new")
        os.write(pipe_fd, b"%d\n" % os.getpid())
        written.open()
        Gate().wait()

    # Exit functions run in reverse order: this one sees what ours has done.
    atexit.register(lambda: os.write(pipe_fd, type(job._run.future.exception(0)).__name__.encode()))
    job = memsafe.fork_snapshot(path, write, keep_fds=[pipe_fd])
    written.wait()
    sys.stdin.read()  # until the test has hold of the child
    sys.exit()


def stopped_parent(path, pipe_fd):
    def write(out):
        os.write(pipe_fd, b"%d\n" % os.getpid())
        os.kill(os.getpid(), signal.SIGSTOP)

    memsafe.fork_snapshot(path, write, keep_fds=[pipe_fd])
    Gate().wait()


def replaced_parent(path, pipe_fd):
    """It becomes another program: its pidfd says nothing of that, its end of the report pipe does."""

    def write(out):
        os.write(pipe_fd, b"%d\n" % os.getpid())
        Gate().wait()

    memsafe.fork_snapshot(path, write, keep_fds=[pipe_fd])
    sys.stdin.read()
    os.execv("/bin/sleep", ["sleep", "100"])


@pytest.mark.parametrize("body", [killed_parent, finishing_parent, stopped_parent, replaced_parent])
def test_the_child_ends_with_its_parent_and_leaves_no_file(path, body):
    read_fd, write_fd = os.pipe()
    said = os.fdopen(read_fd, "rb")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen(
        scenario.command(body, str(path), write_fd),
        pass_fds=[write_fd],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    os.close(write_fd)
    try:
        child_pid = int(said.readline())
        child = os.pidfd_open(child_pid)
        parent.stdin.close()
        if body is stopped_parent:
            while "T (stopped)" not in Path(f"/proc/{child_pid}/status").read_text():
                time.sleep(0.001)  # nothing tells a stranger that a process has stopped
        if body is finishing_parent:
            assert parent.wait(PATIENCE_S) == 0
            assert said.read() == b"SnapshotCancelledError"
        elif body is not replaced_parent:
            parent.kill()
        assert select.select([child], [], [], PATIENCE_S)[0], "the child outlived its parent"
        os.close(child)
    finally:
        parent.kill()
        parent.wait()
        said.close()
    assert path.read_bytes() == b"old"
    assert temporaries(path) == []


def undumpable():
    """As in a daemon that was started by root and changed its user: its /proc/<pid> belongs to root."""
    if os.geteuid():
        return {"skip": "only root can change its user"}
    folder = tempfile.mkdtemp()
    os.chown(folder, NOBODY, NOBODY)
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    path = folder + "/dump.db"
    got = {"free": outcome(memsafe.fork_snapshot(path, hello)), "bounded": _bounded(path), "content": content(path)}
    os.unlink(path)
    os.rmdir(folder)
    return got


def _bounded(path):
    gate = Gate()
    got = outcome(memsafe.fork_snapshot(path, gated(gate), max_copy="1 GiB"))
    gate.close()
    return got


def test_after_a_change_of_user_what_cannot_be_done_is_told():
    got = scenario.run(undumpable)
    if "skip" in got:
        pytest.skip(got["skip"])
    assert "result" in got["free"]
    assert "OOM killer" in " ".join(got["free"]["result"]["warnings"])
    assert got["bounded"]["error"] == "SnapshotFailedError"
    assert "max_copy cannot be kept" in got["bounded"]["message"]
    assert got["content"] == "new"
