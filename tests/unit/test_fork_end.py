"""The native end of a snapshot's child, on any child."""

import errno
import os
import select
import signal
import subprocess

import pytest

from memsafe import _native


@pytest.fixture
def sleeper():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_when_it_returns_the_child_has_ended(sleeper):
    pidfd = os.pidfd_open(sleeper.pid)
    _native.fork_end(pidfd, 60_000)
    assert select.select([pidfd], [], [], 0)[0]
    assert sleeper.wait() == -signal.SIGKILL
    _native.fork_end(pidfd, 60_000)  # gone already: no failure
    os.close(pidfd)


def test_a_child_that_does_not_end_is_waited_for_no_longer_than_told(sleeper):
    pidfd = os.pidfd_open(sleeper.pid)
    _native.fork_end(pidfd, 0)
    os.close(pidfd)
    assert sleeper.wait() == -signal.SIGKILL


def test_what_is_no_process_is_refused():
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        _native.fork_end(-1, 0)
    assert caught.value.errno == errno.EBADF
