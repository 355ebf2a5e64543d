"""The time that a child has, and what it says when that is over."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from memsafe._kernel.descriptors import Owned
from memsafe.snapshot.child import STACK_SIGNAL

if TYPE_CHECKING:
    from memsafe.snapshot.handle import ChildHandle

# How long a child that is out of time has to say where it stands: it takes well below a millisecond of its own.
_LAST_WORDS_S = 2.0
_LAST_WORDS_BYTES_MAX = 64 * 1024


class Deadline:
    """Has a child that is out of time asked where it stands, of which it dies; one that does not is to be killed.

    Attributes:
        at_s: When there is something to be done, by time.monotonic(); never without a timeout, and after the last.
        was_missed: Whether the child was out of time.
    """

    def __init__(self, timeout_s: float | None) -> None:
        """Allow *timeout_s*; None: for ever."""
        self.at_s = math.inf
        self.was_missed = False
        self._timeout_s = timeout_s
        self._stack = Owned(-1)

    @property
    def stack_fd(self) -> int:
        """Where the child is to write its stacks; -1: it will not be asked."""
        return self._stack.fd

    def open(self) -> None:
        """Get what the child can write to; where there is no descriptor left, nothing is said of where it hangs."""
        if self._timeout_s is not None:
            with suppress(OSError):
                self._stack = Owned(os.memfd_create("memsafe-stack"))

    def close(self) -> None:
        """Close it. Twice is a no-op."""
        self._stack.close()

    def begin(self, now_s: float) -> None:
        """Let the time run from *now_s* on."""
        if self._timeout_s is not None:
            self.at_s = now_s + self._timeout_s

    def spares(self, child: ChildHandle, now_s: float) -> bool:
        """At or after at_s: ask *child* where it stands, and whether it may still answer; False: kill it."""
        is_asked = not self.was_missed and self._stack.is_ours() and child.signal(STACK_SIGNAL)
        self.at_s = now_s + _LAST_WORDS_S if is_asked else math.inf
        self.was_missed = True
        return is_asked

    def last_words(self) -> str:
        """Return the stacks that the child left; "" where it left none."""
        if self._stack.is_ours():
            with suppress(OSError):
                return os.pread(self._stack.fd, _LAST_WORDS_BYTES_MAX, 0).decode(errors="replace")
        return ""
