"""The lab of tests/kernel: what becomes of tests whose machine does not come up, or goes down."""

from pathlib import Path

import pytest

from tests.kernel.lab.kernels import Kernel
from tests.kernel.lab.session import BOOTS_MAX, BrokenError, GuestSession

KERNEL = Kernel("6.1", "6.1.0", Path("vmlinuz"))


class Machine:
    """A machine that says what it was told to."""

    def __init__(self, script):
        self.console = []
        self.closed = False
        self._script = script

    def __iter__(self):
        for each in self._script:
            if isinstance(each, str):
                self.console.append(each)
            yield each

    def began(self):
        pass

    def close(self):
        self.closed = True


class Rack:
    """Machines for one session, in the order in which they are booted."""

    def __init__(self, *scripts):
        self._scripts = list(scripts)
        self.machines = []
        self.tasks = []
        self.shown = []

    def boot(self, kernel, command, work):
        assert all(machine.closed for machine in self.machines), "one at a time"
        self.tasks.append(work)
        self.machines.append(Machine(self._scripts.pop(0)))
        return self.machines[-1]

    def session(self, *ids):
        return GuestSession(KERNEL, ids, ["-x"], self.shown.append, self.boot)


BEGIN = {"what": "begin"}
OOPS = ["Oops: general protection fault", "Kernel panic"]


def ran(test_id):
    report = {"nodeid": test_id, "outcome": "passed"}
    return [{"what": "start", "id": test_id}, {"what": "report", "report": report}, {"what": "finish", "id": test_id}]


def test_reports_are_handed_over_test_by_test():
    rack = Rack([BEGIN, "hello", *ran("a"), *ran("b"), {"what": "end"}])
    session = rack.session("a", "b")
    assert [report["nodeid"] for name in ("a", "b") for report in session.reports(name)] == ["a", "b"]
    assert rack.tasks == [["-x", "a", "b"]]
    assert rack.shown == ["hello"]
    session.close()
    assert rack.machines[0].closed


def test_reports_may_come_in_another_order():
    session = Rack([BEGIN, *ran("b"), *ran("a")]).session("a", "b")
    assert session.reports("a")[0]["nodeid"] == "a"
    assert session.reports("b")[0]["nodeid"] == "b"


def test_a_boot_that_fails_before_tests_began_is_tried_again_and_counted():
    rack = Rack(OOPS, [], [BEGIN, *ran("a")])
    session = rack.session("a")
    assert session.reports("a")
    assert (session.boots, session.boots_failed) == (3, 2)
    assert rack.shown == OOPS


def test_boots_that_all_fail_are_an_error_with_the_end_of_the_console():
    session = Rack(*[OOPS] * BOOTS_MAX).session("a", "b")
    for test_id in ("a", "b"):
        with pytest.raises(BrokenError, match="general protection fault"):
            session.reports(test_id)
    assert session.boots == session.boots_failed == BOOTS_MAX


def test_a_machine_that_goes_down_takes_one_test_with_it_and_the_next_gets_a_new_machine():
    rack = Rack([BEGIN, *ran("a"), *ran("b")[:1], *OOPS], [BEGIN, *ran("c")])
    session = rack.session("a", "b", "c")
    assert session.reports("a")
    with pytest.raises(BrokenError, match=r"went down during b.*\n.*general protection fault"):
        session.reports("b")
    assert session.reports("c")
    assert rack.tasks == [["-x", "a", "b", "c"], ["-x", "c"]]
    assert (session.boots, session.boots_failed) == (2, 0)


def test_what_kept_the_tests_from_beginning_is_told_and_not_tried_again():
    rack = Rack([{"what": "broken", "text": "ImportError: no such module"}, {"what": "end"}])
    session = rack.session("a", "b")
    for test_id in ("a", "b"):
        with pytest.raises(BrokenError, match="ImportError"):
            session.reports(test_id)
    assert session.boots == 1
    assert rack.machines[0].closed


def test_a_test_that_the_guest_does_not_know_is_told():
    session = Rack([BEGIN, *ran("a"), {"what": "end"}]).session("a", "b")
    assert session.reports("a")
    with pytest.raises(BrokenError, match="did not run b"):
        session.reports("b")
