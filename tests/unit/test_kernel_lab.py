"""The lab of tests/kernel: what becomes of tests whose machine does not come up, goes down or stands still."""

import functools
import lzma
import os
import subprocess
import threading
from pathlib import Path

import pytest

from tests.kernel.lab import image, kernels, machine
from tests.kernel.lab.kernels import Kernel
from tests.kernel.lab.session import BOOTS_MAX, GRACE_S, BrokenError, GuestSession, Sessions

KERNEL = Kernel("6.1", "6.1.0", Path("vmlinuz"))


class Machine:
    """A machine that says what it was told to."""

    def __init__(self, script):
        self.console = []
        self.closed = self.overdue = False
        self._script = script

    def __iter__(self):
        for each in self._script:
            if each is HANG:
                self.overdue = True
                return
            if isinstance(each, str):
                self.console.append(each)
            yield each

    def allow(self, seconds):
        self.allowed_s = seconds

    def kill(self):
        self._script = []

    def close(self):
        self.closed = True


class Rack:
    """Machines for one session, in the order in which they are booted."""

    def __init__(self, *scripts, machine=Machine):
        self._scripts = list(scripts)
        self._machine = machine
        self.machines = []
        self.tasks = []
        self.shown = []

    def boot(self, kernel, command, work):
        assert all(machine.closed for machine in self.machines), "one at a time"
        self.tasks.append(work)
        self.machines.append(self._machine(self._scripts.pop(0)))
        return self.machines[-1]

    def session(self, *ids):
        return GuestSession(KERNEL, ids, ["-x"], self.shown.append, self.boot)


BEGIN = {"what": "begin"}
HANG = object()
OOPS = ["Oops: general protection fault", "Kernel panic"]


def start(test_id):
    return {"what": "start", "id": test_id, "timeout_s": 100}


def ran(test_id):
    report = {"nodeid": test_id, "outcome": "passed"}
    return [start(test_id), {"what": "report", "report": report}, {"what": "finish", "id": test_id}]


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


def test_a_machine_that_stands_still_is_told_by_the_name_of_the_test_that_had_its_time():
    rack = Rack([BEGIN, start("a"), "the last words", HANG], [BEGIN, *ran("b")])
    session = rack.session("a", "b")
    with pytest.raises(BrokenError, match=r"stood still during a.*\nthe last words"):
        session.reports("a")
    assert rack.machines[0].allowed_s == 100 + GRACE_S
    assert session.reports("b")


def test_a_boot_that_stands_still_is_tried_again():
    session = Rack(["hello", HANG], [BEGIN, *ran("a")]).session("a")
    assert session.reports("a")
    assert (session.boots, session.boots_failed) == (2, 1)


def test_what_was_stopped_boots_nothing_any_more():
    rack = Rack([BEGIN, *ran("a")], [BEGIN, *ran("b")])
    session = rack.session("a", "b")
    assert session.reports("a")
    session.stop()
    with pytest.raises(BrokenError):
        session.reports("b")
    with pytest.raises(BrokenError, match="stopped"):
        session.reports("c")
    assert all(machine.closed for machine in rack.machines)


def test_kernels_are_tested_side_by_side():
    """Each of two machines goes on only when the other one has come as far."""
    meet = threading.Barrier(2, timeout=60)

    class Meeting(Machine):
        def __iter__(self):
            for each in super().__iter__():
                meet.wait()
                yield each

    shown = []
    sessions = Sessions(2, lambda name, line: shown.append((name, line)))
    for name in ("6.1", "7.3"):
        boot = Rack([BEGIN, f"hello from {name}", *ran(f"a[{name}]")], machine=Meeting).boot
        hear = functools.partial(sessions.hear, name)
        sessions.begin(name, GuestSession(KERNEL, [f"a[{name}]"], [], hear, boot), [f"a[{name}]"])
    for name in ("7.3", "6.1"):
        assert [report["nodeid"] for report in sessions.reports(f"a[{name}]")] == [f"a[{name}]"]
    assert sorted(shown) == [("6.1", "hello from 6.1"), ("7.3", "hello from 7.3")]
    assert [line.split(",")[0] for line in sessions.close()] == ["kernel 6.1: 1 boots", "kernel 7.3: 1 boots"]


def test_one_after_the_other_where_there_is_one_processor():
    sessions = Sessions(1, lambda name, line: None)
    rack = Rack([BEGIN, *ran("a")], [BEGIN, *ran("b")])
    for name in ("a", "b"):
        sessions.begin(name, rack.session(name), [name])
    assert [sessions.reports(name)[0]["nodeid"] for name in ("b", "a")] == ["b", "a"]
    assert len(sessions.close()) == 2


def test_what_breaks_in_a_sessions_thread_reaches_the_one_that_waits():
    sessions = Sessions(1, lambda name, line: None)
    sessions.begin("6.1", Rack().session("a"), ["a"])
    with pytest.raises(IndexError):
        sessions.reports("a")
    assert sessions.close()


# One machine


def test_a_machine_is_switched_off_when_its_time_is_over_whatever_it_says(tmp_path, monkeypatch):
    qemu = tmp_path / "qemu"
    qemu.write_text("#!/bin/sh\nwhile :; do echo talking; sleep 0.01; done\n")
    qemu.chmod(0o755)
    monkeypatch.setattr(machine, "QEMU", str(qemu))
    monkeypatch.setattr(machine, "CACHE", tmp_path)
    monkeypatch.setattr(image, "write_initrd", lambda target, *_: target.touch())
    with machine.Machine(KERNEL, ["task"]) as talking:
        lines = iter(talking)
        assert next(lines) == "talking"
        talking.allow(0)
        # What it had said until then is still told.
        assert [line for line in lines if line != "talking"] == ["switched off: it had 0 s"]
    assert talking.overdue
    assert [path for path in tmp_path.iterdir() if path != qemu] == []


@pytest.mark.parametrize("value", [None, "1", "it's"])
def test_that_skips_are_forbidden_holds_in_the_guest_too(value, monkeypatch):
    monkeypatch.delenv("MEMSAFE_FORBID_SKIPS", raising=False)
    if value is not None:
        monkeypatch.setenv("MEMSAFE_FORBID_SKIPS", value)
    script = image.script(["printenv", "MEMSAFE_FORBID_SKIPS"])
    done = subprocess.run(["sh", "-c", script], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.stdout.strip() == (value or "")


# Kernels


def module(needed):
    return b"\0license=GPL\0depends=" + ",".join(needed).encode() + b"\0name=x\0"


def test_modules_come_after_those_that_they_need(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_MODULES", ("first-one", "last", "built-in"))
    contents = {"last": ["middle", "first_one"], "middle": ["first_one"], "first-one": [], "other": []}
    for name, needed in contents.items():
        path = tmp_path / "lib" / name / f"{name}.ko"
        path.parent.mkdir(parents=True)
        if name == "middle":
            path.with_suffix(".ko.xz").write_bytes(lzma.compress(module(needed)))
        else:
            path.write_bytes(module(needed))
    found = list(kernels._modules(tmp_path))
    assert [name for name, _ in found] == ["first_one", "middle", "last"]
    assert found[1][1] == module(["first_one"])


def test_a_kernel_that_cannot_be_had_is_told_with_where_from_and_the_old_one_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "CACHE", tmp_path)
    monkeypatch.setattr(kernels.shutil, "which", lambda program: program)
    (tmp_path / "trixie" / "modules").mkdir(parents=True)
    (tmp_path / "trixie" / "vmlinuz-6.12.1").touch()

    def fail(self, program, *arguments, **_):
        raise kernels.UnavailableError("no route to host")

    monkeypatch.setattr(kernels._Apt, "_run", fail)
    with pytest.raises(kernels.UnavailableError, match=rf"of trixie .* from {kernels._MIRROR}: no route to host"):
        kernels.fetch("trixie")
    assert kernels.of_suite("trixie").release == "6.12.1"
    assert os.listdir(tmp_path) == ["trixie"]
