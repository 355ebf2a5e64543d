"""Processes that the user forks while a snapshot runs: they have no claim on it, and keep nothing of it alive."""

import errno
import json
import mmap
import os
import signal
import threading

import pytest

import memsafe
from memsafe.snapshot import fork, supervisor
from tests.integration import scenario
from tests.integration.snapshots import PATIENCE_S, Gate, content, gated, outcome, temporaries, without_tmpfile


def used_in_another_child(path, named):
    """The forked process takes a snapshot of its own, for the same path, while the parent's runs."""
    if named:
        without_tmpfile()
    gate = Gate()
    job = memsafe.fork_snapshot(path, gated(gate))
    pid = os.fork()
    if pid == 0:
        try:
            job.wait(PATIENCE_S)
        except RuntimeError:
            memsafe.fork_snapshot(path, lambda out: out.write(b"other")).wait(PATIENCE_S)
            os._exit(5)
        os._exit(6)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    meanwhile = content(path)
    gate.open()
    got = outcome(job)
    gate.close()
    return {**got, "status": status, "meanwhile": meanwhile}


@pytest.mark.parametrize("named", [False, True])
def test_a_forked_child_has_a_slot_of_its_own_and_no_claim_on_the_parents_job_or_file(path, named):
    got = scenario.run(used_in_another_child, path, named)
    assert (got["status"], got["meanwhile"]) == (5, "other")
    assert got["result"]["size_bytes"] == 3
    assert path.read_bytes() == b"new"
    assert temporaries(path) == []


def forked_meanwhile(path, when):
    """Have the user fork while a snapshot runs; return what of the job's its copy has open."""
    gate, read_fd, write_fd = Gate(), *os.pipe()

    def fork():
        pid = os.fork()
        if not pid:
            os.write(write_fd, json.dumps(list(scenario.open_files().values())).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        return json.loads(os.read(read_fd, 1 << 16))

    found = []
    if when == "while it is prepared":
        own_oom_score_adj = supervisor._own_oom_score_adj

        def in_another_thread():
            thread = threading.Thread(target=lambda: found.extend(fork()))
            thread.start()
            thread.join()
            return own_oom_score_adj()

        supervisor._own_oom_score_adj = in_another_thread
    ours = scenario.open_files().values()
    job = memsafe.fork_snapshot(path, gated(gate))
    if when == "while it runs":
        found = fork()
    gate.open()
    result = job.wait(PATIENCE_S)
    gate.close()
    os.close(read_fd)
    os.close(write_fd)
    images = [name for name in found if name.startswith(os.path.dirname(path) + "/")]
    return {"size": result.size_bytes, "pipes": len(set(_pipes(found)) - set(_pipes(ours))), "images": images}


def _pipes(names):
    return [name for name in names if name.startswith("pipe:")]


@pytest.mark.parametrize("when", ["while it is prepared", "while it runs"])
def test_a_process_that_the_user_forks_keeps_neither_the_image_nor_the_pipe(path, when):
    got = scenario.run(forked_meanwhile, path, when)
    assert (got["pipes"], got["images"]) == (0, [])
    assert (got["size"], path.read_bytes()) == (3, b"new")


def forked_after_a_stranger_closed(path):
    """The job's descriptors were closed and are another's by then: the forked child keeps what is not the job's."""
    gate = Gate()
    job = memsafe.fork_snapshot(path, gated(gate))
    supervised = fork._slot._holder[""].supervisor
    image_fd = supervised._file.fd
    saved = os.dup(image_fd)
    with open(path, "rb") as stranger:
        os.dup2(stranger.fileno(), image_fd)
        pid = os.fork()
        if not pid:
            try:
                os._exit(os.fstat(image_fd).st_ino != os.fstat(stranger.fileno()).st_ino)
            except OSError:
                os._exit(9)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.dup2(saved, image_fd, inheritable=False)
    os.close(saved)
    gate.open()
    result = job.wait(PATIENCE_S)
    gate.close()
    return {"status": status, "size": result.size_bytes}


def test_in_a_forked_process_a_stranger_who_got_the_jobs_number_keeps_his_file(path):
    got = scenario.run(forked_after_a_stranger_closed, path)
    assert (got["status"], got["size"]) == (0, 3)


def unkillable_beside_a_copy(path):
    """Only its guard can end the child, when nobody listens any more; and the user has forked meanwhile."""

    def refuse(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    gate, over = Gate(), Gate()
    job = memsafe.fork_snapshot(path, gated(gate))
    pid = os.fork()
    if not pid:
        over.wait()
        os._exit(0)
    signal.pidfd_send_signal = refuse
    job.cancel()
    try:
        got = outcome(job)
    finally:
        over.open()
        os.waitpid(pid, 0)
    gate.close()
    over.close()
    return got


def test_a_process_that_the_user_forked_does_not_keep_the_guard_from_ending_the_child(path):
    assert scenario.run(unkillable_beside_a_copy, path)["error"] == "SnapshotCancelledError"


def forked_by_write(path):
    """The process that `write` forks writes to the image, after its success."""
    finished, told = Gate(), Gate()
    said = mmap.mmap(-1, mmap.PAGESIZE)

    def write(out):
        out.write(b"new")
        out.flush()
        if os.fork() == 0:
            finished.wait()
            try:
                os.write(out.raw.fileno(), b"more")
            except OSError:
                said[0] = 1
            told.open()
            os._exit(0)

    got = outcome(memsafe.fork_snapshot(path, write))
    finished.open()
    told.wait()
    finished.close()
    told.close()
    return {**got, "refused": said[0], "content": content(path)}


def test_a_process_that_write_forks_has_no_part_in_the_image(path):
    got = scenario.run(forked_by_write, path)
    assert got["result"]["size_bytes"] == 3
    assert (got["refused"], got["content"]) == (1, "new")


def returned_in_both(path):
    """`write` forks and both processes return from it."""

    def write(out):
        out.write(b"new")
        if pid := os.fork():
            os.waitpid(pid, 0)

    got = outcome(memsafe.fork_snapshot(path, write))
    return {**got, "content": content(path)}


def test_where_write_returns_in_a_process_that_it_forked_only_the_first_one_counts(path):
    got = scenario.run(returned_in_both, path)
    assert got["result"]["size_bytes"] == 3
    assert got["content"] == "new"
