"""Tests in machines: boots them, again where one does not come up, and hands their reports over one by one."""

from __future__ import annotations

import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn

from tests.kernel.lab.machine import BOOT_S, Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.kernel.lab.kernels import Kernel

BOOTS_MAX = 5
# A test that hangs is failed in the guest; where that hangs as well, the machine is switched off so much later.
GRACE_S = 45
_TAIL_LINES = 60


class BrokenError(Exception):
    """A test has no report of its own; the message says what became of the machine."""


class GuestSession:
    """The tests of one kernel, in one machine after another. One thread uses it; stop() is for the others.

    A boot that ends before its tests begin is QEMU's doing: it is counted and tried again. What happens afterwards is
    not: a machine that goes down, or stands still, takes the test that ran there with it, and the next one gets a new
    machine.

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
        self._stopped = threading.Event()
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
                told = f"the guest did not run {test_id}" if message else f"{self._what_became()} during {test_id}"
                raise BrokenError(self._last_words(told))
            self._take(message)
        self._ids.remove(test_id)
        return self._reports.pop(test_id)

    def close(self) -> None:
        """Switch the machine off."""
        if self._machine is not None:
            self._machine.close()
            self._machine = None

    def stop(self) -> None:
        """End what runs, from any thread: whoever waits for reports gets a BrokenError, now and ever after."""
        self._stopped.set()
        machine = self._machine
        if machine is not None:
            machine.kill()

    def _take(self, message: dict[str, Any]) -> None:
        assert self._machine is not None
        match message["what"]:
            case "begin":
                self._machine.allow(BOOT_S)
            case "start":
                self._machine.allow(message["timeout_s"] + GRACE_S)
                self._reports[message["id"]] = []
            case "report":
                self._reports[message["report"]["nodeid"]].append(message["report"])
            case "finish":
                self._machine.allow(BOOT_S)
                self._finished.add(message["id"])
            case "broken":
                self._give_up(message["text"])

    def _boot(self) -> None:
        command = [sys.executable, "-m", "tests.kernel.lab.inside"]
        for _ in range(BOOTS_MAX):
            self.boots += 1
            self._machine = self._start(self._kernel, command, [*self._arguments, *self._ids])
            if self._stopped.is_set():
                self._give_up("the tests were stopped")
            self._messages = self._talk(self._machine)
            message = next(self._messages, None)
            if message is not None:
                self._take(message)
                return
            self.boots_failed += 1
            told = self._last_words(f"{self._what_became()} before its tests began")
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

    def _what_became(self) -> str:
        assert self._machine is not None
        return "the machine stood still" if self._machine.overdue else "the machine went down"

    def _last_words(self, told: str) -> str:
        assert self._machine is not None
        tail = "\n".join(self._machine.console[-_TAIL_LINES:])
        self.close()
        return f"{told}. The end of its console:\n{tail}"


class Sessions:
    """The sessions of several kernels, side by side as far as there are processors.

    One thread uses it. Each session has a thread of its own, which tells this one of lines and of tests that are done.
    """

    def __init__(self, machines_max: int, show: Callable[[str, str], None]) -> None:
        self._show = show
        self._pool = ThreadPoolExecutor(machines_max)
        self._begun: list[tuple[str, GuestSession]] = []
        self._heard: queue.SimpleQueue[tuple[str, str, Any]] = queue.SimpleQueue()
        self._outcomes: dict[str, Any] = {}

    def begin(self, name: str, session: GuestSession, ids: Sequence[str]) -> None:
        """Run the tests of a kernel as soon as there is a processor for it."""
        self._begun.append((name, session))
        self._pool.submit(self._run, session, ids)

    def hear(self, name: str, line: str) -> None:
        """Take a line of a machine's console; thread-safe."""
        self._heard.put(("line", name, line))

    def reports(self, test_id: str) -> list[dict[str, Any]]:
        """Wait for a test to finish, showing what is heard meanwhile; return pytest's reports of it, serialized.

        Raises:
            UnavailableError, BrokenError: There are none, or not all.
        """
        while test_id not in self._outcomes:
            what, name, told = self._heard.get()
            if what == "line":
                self._show(name, told)
            else:
                self._outcomes[name] = told
        outcome = self._outcomes.pop(test_id)
        if isinstance(outcome, Exception):
            raise outcome
        reports: list[dict[str, Any]] = outcome
        return reports

    def close(self) -> list[str]:
        """Switch all machines off; return a line about each kernel's boots."""
        for _, session in self._begun:
            session.stop()
        self._pool.shutdown(cancel_futures=True)
        return [
            f"kernel {name}: {session.boots} boots, {session.boots_failed} of them failed before a test began"
            for name, session in self._begun
        ]

    def _run(self, session: GuestSession, ids: Sequence[str]) -> None:
        for test_id in ids:
            outcome: Any
            try:
                outcome = session.reports(test_id)
            except Exception as error:  # whoever waits for it gets it, or waits for ever
                outcome = error
            self._heard.put(("outcome", test_id, outcome))
        session.close()
