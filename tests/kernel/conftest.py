"""Tests that run inside of real kernels: collected here, run there, and reported as if they had run here.

    pytest tests/kernel                                  every test on every kernel
    pytest tests/kernel --kernel 6.1 -k memory_events    one test on one kernel
    pytest tests/kernel -s                               with what the tests print, as they print it

`pytest` alone leaves them out. The same file serves both sides: in the guest it gives tests their kernel.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from tests.kernel.lab import image, kernels, machine
from tests.kernel.lab.session import BrokenError, GuestSession, Sessions

GUEST = Path(__file__).parent / "guest"
IN_GUEST = os.path.exists(image.TASK)

_lab = pytest.StashKey["Lab"]()


def pytest_addoption(parser):
    group = parser.getgroup("memsafe")
    group.addoption(
        "--kernel",
        action="append",
        metavar="NAME",
        help="a kernel to test on: 6.1, a Debian suite, the path of an image; several times. The default is the "
        f"kernels of {' and '.join(kernels.DEFAULT_SUITES)}",
    )
    group.addoption("--seed", default="memsafe", help="what random cases of the kernel tests are drawn from")


def pytest_configure(config):
    config.addinivalue_line("markers", "kernel: runs in a virtual machine, see tests/kernel")
    config.stash[_lab] = Lab(config)


def pytest_unconfigure(config):
    config.stash[_lab].close()


def pytest_ignore_collect(collection_path, config):
    """Leave them out unless they were asked for by their path."""
    if collection_path == GUEST:
        asked = [config.invocation_params.dir / argument.partition("::")[0] for argument in config.args]
        return True if not any(path.is_relative_to(GUEST.parent) for path in asked) else None
    return None


def pytest_generate_tests(metafunc):
    if Path(metafunc.definition.path).is_relative_to(GUEST):
        names = metafunc.config.stash[_lab].names()
        metafunc.parametrize("kernel", names, indirect=True, scope="session")


@pytest.fixture(scope="session", autouse=True)
def kernel(request):
    """The release of the kernel that runs the test, as (6, 1)."""
    return tuple(map(int, os.uname().release.split("-")[0].split("+")[0].split(".")[:2]))


def pytest_itemcollected(item):
    if item.path.is_relative_to(GUEST):
        item.add_marker("kernel")
        if not IN_GUEST:
            # The guest watches over its tests itself; here a test takes a boot as well.
            item.add_marker(pytest.mark.timeout(0), append=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    if IN_GUEST or not item.path.is_relative_to(GUEST):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in item.config.stash[_lab].run(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_terminal_summary(terminalreporter, config):
    config.stash[_lab].summarize(terminalreporter)


class Lab:
    """The machines of one run of pytest."""

    def __init__(self, config):
        self._config = config
        self._names = None
        self._kernels = []
        self._unavailable = None
        self._sessions = None
        self._tables = {}

    def names(self):
        """The kernels to test on; a stand-in where one is not to be had, so that its tests are seen to be skipped."""
        if self._names is None:
            self._names = self._config.option.kernel
            if not IN_GUEST:
                try:
                    machine.require()
                    self._names = self._names or kernels.names()
                    self._kernels = [kernels.find(name) for name in self._names]
                except kernels.UnavailableError as error:
                    self._unavailable = error
                    self._names = ["none"]
        return self._names

    def run(self, item):
        """Run *item* in its kernel; return its reports."""
        try:
            if self._unavailable is not None:
                raise self._unavailable
            if self._sessions is None:
                self._begin(item.session)
            reports = self._sessions.reports(item.nodeid)
        except kernels.UnavailableError as error:
            # Whoever names a kernel wants that one.
            outcome = "failed" if self._config.option.kernel else "skipped"
            return [_without_report(item, outcome, f"{outcome.capitalize()}: {error}")]
        except BrokenError as error:
            return [_without_report(item, "failed", str(error))]
        from_plain = self._config.hook.pytest_report_from_serializable
        return [self._noted(from_plain(config=self._config, data=plain)) for plain in reports]

    def _begin(self, session):
        """Start the machines of all kernels: as many at a time as there are processors."""
        self._sessions = Sessions(len(os.sched_getaffinity(0)), self._show)
        option = self._config.option
        for name, kernel in zip(self._names, self._kernels, strict=True):
            ids = [
                item.nodeid
                for item in session.items
                if item.path.is_relative_to(GUEST) and item.callspec.params["kernel"] == name
            ]
            arguments = ["--kernel", name, "--seed", option.seed, "-W", "error"]
            if option.capture == "no":
                arguments.append("-s")
            hear = functools.partial(self._sessions.hear, name)
            self._sessions.begin(name, GuestSession(kernel, ids, arguments, hear), ids)

    def _show(self, name, line):
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.write_line(f"  {name} | {line}")
            terminal.flush()

    def _noted(self, report):
        # JSON has no tuples, and pytest wants these to be some.
        report.location = tuple(report.location)
        if isinstance(report.longrepr, list):
            report.longrepr = tuple(report.longrepr)
        if report.when == "call":
            for name, row in report.user_properties:
                self._tables.setdefault(name, []).append(row)
        return report

    def close(self):
        """Switch the machines off; return a line about each kernel's boots."""
        sessions, self._sessions = self._sessions, None
        return sessions.close() if sessions is not None else []

    def summarize(self, terminal):
        for name, rows in self._tables.items():
            terminal.section(name, "-")
            for line in _table(rows):
                terminal.write_line(line)
        for line in self.close():
            terminal.write_line(line)


def _table(rows):
    """The lines of a table: rows are dicts with the same keys, which tests left with record_property()."""
    lines = [[str(name) for name in rows[0]], *[[str(value) for value in row.values()] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(
            f"{text:>{width}}" if text.isdigit() else f"{text:<{width}}"
            for text, width in zip(line, widths, strict=True)
        ).rstrip()


def _without_report(item, outcome, text):
    """A report of a test that could not run."""
    longrepr = text
    if outcome == "skipped":
        if os.environ.get("MEMSAFE_FORBID_SKIPS"):
            outcome, longrepr = "failed", f"skipped where MEMSAFE_FORBID_SKIPS is set: {text}"
        else:
            longrepr = (str(item.path), item.location[1] or 0, text)
    return pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), outcome, longrepr, "call")
