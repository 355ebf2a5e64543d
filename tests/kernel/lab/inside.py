"""What runs in the guest: pytest, whose reports go to the host as lines of JSON over the second serial port.

Messages are objects with ``what``: ``begin``; ``start`` and ``finish`` with the test's ``id``, ``start`` also with the
``timeout_s`` after which pytest-timeout fails it; ``report`` with pytest's own serialized ``report``; ``broken`` with a
``text`` where tests could not even begin; ``end``.
"""

from __future__ import annotations

import json
import os
import sys
import termios
import traceback
import tty
from typing import Any, TextIO

import pytest

from tests.kernel.lab.image import TASK

_PORT = "/dev/ttyS1"


class Channel:
    """The way to the host."""

    def __init__(self) -> None:
        self._fd = os.open(_PORT, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
        tty.setraw(self._fd)

    def tell(self, what: str, **more: Any) -> None:
        data = json.dumps({"what": what, **more}).encode() + b"\n"
        while data:
            data = data[os.write(self._fd, data) :]
        # Nothing must be in the port's buffer when the machine panics.
        termios.tcdrain(self._fd)


class Reporter:
    """A pytest plugin: tells everything to the host."""

    def __init__(self, channel: Channel, unheard: TextIO) -> None:
        self._channel = channel
        self._unheard = unheard
        self._config: pytest.Config

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config
        # The host's own speaks to people. This one is there for pytest-timeout and for the options of pyproject.toml.
        terminal = config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(type(terminal)(config, self._unheard), "terminalreporter")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._channel.tell("broken", text=str(report.longrepr))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> None:
        self._channel.tell("begin")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        marker = item.get_closest_marker("timeout")
        timeout_s = float(marker.args[0] if marker else self._config.getini("timeout"))
        self._channel.tell("start", id=item.nodeid, timeout_s=timeout_s)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        plain = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._channel.tell("report", report=plain)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._channel.tell("finish", id=nodeid)


def main() -> None:
    channel = Channel()
    try:
        with open(TASK) as file:
            arguments = json.load(file)
        with open(os.devnull, "w") as unheard:
            status = pytest.main(["-p", "no:cacheprovider", *arguments], [Reporter(channel, unheard)])
        if status not in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}:
            channel.tell("broken", text=f"pytest ended with {status!r} in the guest: its output is on the console")
    except BaseException:
        channel.tell("broken", text=traceback.format_exc())
    channel.tell("end")


if __name__ == "__main__":
    sys.exit(main())
