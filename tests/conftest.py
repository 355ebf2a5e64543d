"""What all tests share: in the run of CI that forbids it, a skip is a failure; no test fails for being slow."""

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is not a defect: no test asserts a duration, that of making examples neither. Nor is what a change did
# not bring: the same code is given the same examples. For new ones: --hypothesis-profile=explore.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("memsafe", settings.get_profile("explore"), derandomize=True)
settings.load_profile("memsafe")


def pytest_configure():
    # A shell has what it runs in the background ignore SIGINT, and so would all that the tests start and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("MEMSAFE_FORBID_SKIPS"):
        report.outcome = "failed"
        report.longrepr = f"skipped where MEMSAFE_FORBID_SKIPS is set: {report.longrepr}"
    return report
