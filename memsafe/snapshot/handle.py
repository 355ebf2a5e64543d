"""A snapshot's child as its parent holds it: by a pidfd, so that nothing that is done to it can hit a stranger.

Where another part of the program has closed that, by its number, which is its own until it was waited for.
"""

from __future__ import annotations

import os
import select
import signal
import struct
from contextlib import suppress

from memsafe._kernel.descriptors import Owned


class ChildHandle:
    """A child that may be there.

    Attributes:
        pid: Its number; 0: there is none.
        pidfd: Where it can be signalled, waited for and polled; of -1: there is none, and then nothing is done.
    """

    def __init__(self, pid: int, pidfd: Owned) -> None:
        self.pid = pid
        self.pidfd = pidfd

    def signal(self, number: int) -> bool:
        """Send a signal. False where that is not allowed: the child has become another user's."""
        try:
            if self.pidfd.is_ours():
                signal.pidfd_send_signal(self.pidfd.fd, number)
            elif self.pidfd.is_lost() and self._waits_or_lives():
                os.kill(self.pid, number)
        except ProcessLookupError:  # it ended by itself
            pass
        except OSError:
            return False
        return True

    def has_ended(self) -> bool:
        """Whether it has ended, reaped or not."""
        poller = select.poll()
        poller.register(self.pidfd.fd, select.POLLIN)
        return bool(poller.poll(0))

    def reap(self) -> os.waitid_result | None:
        """Return how it ended, or None where SIGCHLD is ignored or somebody else has waited for it."""
        if self.pidfd.fd < 0:
            return None
        with suppress(OSError):
            if self.pidfd.is_ours():
                try:
                    return os.waitid(os.P_PIDFD, self.pidfd.fd, os.WEXITED)
                except ChildProcessError:
                    return None
                except OSError:  # a sandbox that knows pidfds, but not P_PIDFD
                    pass
            os.waitpid(self.pid, 0)
        return None

    def _waits_or_lives(self) -> bool:
        """Whether nobody has waited for it, so that its number is nobody else's."""
        try:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True


class Handover:
    """Where the native fork leaves the child, for another thread to adopt.

    It fills this before any Python can run: however the thread that forks is interrupted, a child is never nobody's.

    Attributes:
        buffer: For the native fork; all zeros until there is a child.
    """

    _LAYOUT = struct.Struct(
        "=qqqQQ"
    )  # pid, pidfd, pause_ns, the pidfd's device and inode: struct handover of fork_py.c

    def __init__(self) -> None:
        self.buffer = bytearray(self._LAYOUT.size)

    def has_child(self) -> bool:
        """Whether the fork has happened."""
        return any(self.buffer)

    def adopt(self) -> tuple[ChildHandle, int]:
        """Return the child, to be held by one alone, and for how long the fork stood still, in nanoseconds."""
        pid, pidfd, pause_ns, device, inode = self._LAYOUT.unpack(self.buffer)
        return ChildHandle(pid, Owned(pidfd, (device, inode) if inode else None)), pause_ns
