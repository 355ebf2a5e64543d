"""What the tests of snapshots share: outcomes as plain data, and a gate on which a child waits."""

import errno
import os
import threading
from pathlib import Path

import memsafe
import memsafe.snapshot  # now, and not when a test is another user, who may not read the interpreter's files
from memsafe.snapshot import atomic

MIB = 1024 * 1024
PATIENCE_S = 30


def outcome(job):
    """The result's fields, or the error that wait() raises, as plain data."""
    try:
        return {"result": job.wait(PATIENCE_S).as_dict()}
    except memsafe.MemsafeError as error:
        return describe(error)


def out_of_time(path, write, came_so_far, **keywords):
    """The outcome of a snapshot that its *timeout_s* ends, with that: the first in which its child *came_so_far*.

    One second is plenty, but on a busy machine. *came_so_far* judges an outcome.
    """
    for timeout_s in (1, 5, 20):
        got = outcome(memsafe.fork_snapshot(path, write, timeout_s=timeout_s, **keywords))
        if came_so_far(got):
            break
    return {**got, "timeout_s": timeout_s}


def describe(error):
    names = ("child_type", "child_message", "child_traceback", "copy_bytes", "max_copy_bytes", "errno")
    fields = {name: getattr(error, name, None) for name in names}
    return {"error": type(error).__name__, "message": str(error), **fields}


def unexpected(warnings):
    """The warnings but the one of where the tests run: a pod may have an oom_score_adj above 0."""
    return [text for text in warnings if "oom_score_adj was only" not in text]


def content(path):
    return Path(path).read_bytes().decode()


def temporaries(path):
    return [name for name in os.listdir(os.path.dirname(path)) if ".memsafe-" in name]


def let_the_thread_end():
    """Wait for the job's thread, which nobody else can join."""
    for thread in threading.enumerate():
        if thread.name == "memsafe-snapshot":
            thread.join(PATIENCE_S)


def hello(out):
    out.write(b"new")


class Gate:
    """What the child waits at until the parent opens it, or the other way round. No pipe: a child keeps none."""

    def __init__(self):
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)

    def wait(self):
        os.eventfd_read(self._fd)

    def open(self):
        os.eventfd_write(self._fd, 1)

    def close(self):
        os.close(self._fd)


def gated(gate):
    def write(out):
        out.write(b"new")
        gate.wait()

    return write


def without_tmpfile():
    """Go on as on a file system without O_TMPFILE."""
    atomic.os = _WithoutTmpfile()


class _WithoutTmpfile:
    """The module os, there."""

    def __getattr__(self, name):
        return getattr(os, name)

    @staticmethod
    def open(path, flags, *args, **keywords):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return os.open(path, flags, *args, **keywords)
