"""Tests in a machine: boots it, again where it does not come up, and hands their reports over one by one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn

from tests.kernel.lab.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.kernel.lab.kernels import Kernel

BOOTS_MAX = 5
_TAIL_LINES = 60


class BrokenError(Exception):
    """A test has no report of its own; the message says what became of the machine."""


class GuestSession:
    """The tests of one kernel.

    A boot that ends before its tests begin is QEMU's doing: it is counted and tried again. What happens afterwards is
    not: a machine that goes down takes the test that ran there with it, and the next one gets a new machine.

    Attributes:
        boots, boots_failed: How often it was booted, and how often in vain.
    """

    def __init__(
        self,
        kernel: Kernel,
        ids: Sequence[str],
        arguments: Sequence[str],
        show: Callable[[str], None],
        boot: Callable[[Kernel, Sequence[str], object], Machine] = Machine,
    ) -> None:
        self.boots = 0
        self.boots_failed = 0
        self._kernel = kernel
        self._ids = list(ids)
        self._arguments = list(arguments)
        self._show = show
        self._start = boot
        self._machine: Machine | None = None
        self._messages: Iterator[dict[str, Any]] = iter(())
        self._hopeless: str | None = None
        self._reports: dict[str, list[dict[str, Any]]] = {}
        self._finished: set[str] = set()

    def reports(self, test_id: str) -> list[dict[str, Any]]:
        """Wait for a test to finish; return pytest's reports of it, serialized.

        Raises:
            BrokenError: There are none, or not all.
        """
        if self._hopeless is not None:
            raise BrokenError(self._hopeless)
        if self._machine is None:
            self._boot()
        while test_id not in self._finished:
            message = next(self._messages, None)
            if message is None or message["what"] == "end":
                self._ids.remove(test_id)
                told = f"the guest did not run {test_id}" if message else f"the machine went down during {test_id}"
                raise BrokenError(self._last_words(told))
            self._take(message)
        self._ids.remove(test_id)
        return self._reports.pop(test_id)

    def close(self) -> None:
        """Switch the machine off."""
        if self._machine is not None:
            self._machine.close()
            self._machine = None

    def _take(self, message: dict[str, Any]) -> None:
        match message["what"]:
            case "start":
                self._reports[message["id"]] = []
            case "report":
                self._reports[message["report"]["nodeid"]].append(message["report"])
            case "finish":
                self._finished.add(message["id"])
            case "broken":
                self._give_up(message["text"])

    def _boot(self) -> None:
        command = [sys.executable, "-m", "tests.kernel.lab.inside"]
        for _ in range(BOOTS_MAX):
            self.boots += 1
            self._machine = self._start(self._kernel, command, [*self._arguments, *self._ids])
            self._messages = self._talk(self._machine)
            message = next(self._messages, None)
            if message is not None:
                self._machine.began()
                self._take(message)
                return
            self.boots_failed += 1
            told = self._last_words("the machine went down before its tests began")
        self._give_up(f"{told}\n{BOOTS_MAX} boots failed alike")

    def _give_up(self, told: str) -> NoReturn:
        """No test can run: the others are told the same, without another boot."""
        self._hopeless = told
        self.close()
        raise BrokenError(told)

    def _talk(self, machine: Machine) -> Iterator[dict[str, Any]]:
        """Yield the messages, and show what comes over the console meanwhile."""
        for each in machine:
            if isinstance(each, dict):
                yield each
            else:
                self._show(each)

    def _last_words(self, told: str) -> str:
        assert self._machine is not None
        tail = "\n".join(self._machine.console[-_TAIL_LINES:])
        self.close()
        return f"{told}. The end of its console:\n{tail}"
