"""A made-up machine, for tests of code that asks memsafe how much memory is left.

FakeKernel writes the files of /proc, /sys and cgroups that memsafe reads into a folder of its own. Whatever takes
``root=`` takes that folder for the machine. Nothing of it touches the real kernel, needs a privilege or a mock.
"""

from __future__ import annotations

from memsafe.testing.cgroup import FakeCgroup
from memsafe.testing.kernel import FakeKernel
from memsafe.testing.machine import FakeMachine, FakeOvercommit
from memsafe.testing.process import FakeMapping, FakeProcess

__all__ = ["FakeCgroup", "FakeKernel", "FakeMachine", "FakeMapping", "FakeOvercommit", "FakeProcess"]
