"""What all tests share: in the run of CI that forbids it, a skip is a failure."""

import os

import pytest
from hypothesis import settings

# How long an example takes says how busy the machine is; durations belong in benchmarks/.
settings.register_profile("memsafe", deadline=None)
settings.load_profile("memsafe")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("MEMSAFE_FORBID_SKIPS"):
        report.outcome = "failed"
        report.longrepr = f"skipped where MEMSAFE_FORBID_SKIPS is set: {report.longrepr}"
    return report
