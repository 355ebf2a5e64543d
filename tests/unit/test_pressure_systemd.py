"""systemd's protocol: what the environment says to watch, and what may be wrong with it."""

from __future__ import annotations

import base64
import errno
import os
import socket
import threading

import pytest

from memsafe import PressureLevel, PressureMonitor, Thresholds
from memsafe._kernel import systemd
from memsafe.errors import KernelError
from memsafe.testing import FakeKernel

MIB = 1024 * 1024
QUIET = Thresholds(poll_s_min=3600, poll_s_max=3600, cooldown_s=3600)
TRIGGER = base64.b64encode(b"some 150000 2000000\0").decode()


@pytest.fixture
def machine(tmp_path):
    kernel = FakeKernel(tmp_path / "machine")
    kernel.cgroup("/app", limit=128 * MIB, usage=32 * MIB).join()
    return kernel


@pytest.fixture
def managed(machine, monkeypatch):
    """Start a monitor in an environment; paths are of the machine."""

    def start(watch, write=None):
        monkeypatch.setenv(systemd.WATCH, watch)
        monkeypatch.delenv(systemd.WRITE, raising=False)
        if write is not None:
            monkeypatch.setenv(systemd.WRITE, write)
        return PressureMonitor(root=machine.root, thresholds=QUIET)

    return start


def bind(made, directory):
    # By way of a descriptor: a path in here may be longer than an address.
    fd = os.open(directory, os.O_PATH)
    made.bind(f"/proc/self/fd/{fd}/sock")
    os.close(fd)


@pytest.fixture
def listening(machine):
    with socket.socket(socket.AF_UNIX) as server:
        bind(server, machine.root)
        server.listen(8)
        server.settimeout(30)
        yield server


def source(monitor, name="systemd"):
    (found,) = (each for each in monitor.sources if each.name == name)
    return found


def hears_low(monitor):
    heard = threading.Event()
    monitor.on(PressureLevel.LOW, lambda event: event.source == "systemd" and heard.set())
    return heard


def test_where_nothing_is_said_it_is_listed_and_the_rest_goes_on(machine, monkeypatch):
    monkeypatch.delenv(systemd.WATCH, raising=False)
    with PressureMonitor(root=machine.root, thresholds=QUIET) as monitor:
        assert not source(monitor).used
        assert "MEMORY_PRESSURE_WATCH is not set" in source(monitor).reason


def test_a_fifo_that_becomes_readable_raises_low_whoever_else_opens_and_closes_it(machine, managed):
    path = machine.root / "fifo"
    os.mkfifo(path)
    with managed("/fifo", TRIGGER) as monitor:
        assert source(monitor).used
        heard = hears_low(monitor)
        assert monitor.check() == PressureLevel.NORMAL, "what was written to it by this process is no news"
        with path.open("wb") as writer:
            writer.write(b"x" * 5000)
        assert heard.wait(30)
        assert source(monitor).used


def test_a_socket_gets_what_is_to_be_written_and_is_heard(listening, managed):
    with managed("/sock", TRIGGER) as monitor:
        assert source(monitor).used
        manager, _ = listening.accept()
        assert manager.recv(100) == b"some 150000 2000000\0"
        heard = hears_low(monitor)
        manager.sendall(b"anything")
        assert heard.wait(30)
        manager.close()


def test_a_manager_that_hangs_up_is_lost_once_and_not_called_again(listening, managed, caplog):
    with managed("/sock") as monitor:
        manager, _ = listening.accept()
        manager.close()
        while source(monitor).used:
            monitor.check()
        assert "lost" in source(monitor).reason
        monitor.check()
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.accept()
        assert monitor.check() == PressureLevel.NORMAL
    assert len([record for record in caplog.records if "lost" in record.getMessage()]) == 1


def test_dev_null_turns_every_watch_on_stalls_off_and_no_other(managed):
    with managed("/dev/null") as monitor:
        assert not any(each.used for each in monitor.sources if each.name in {"systemd", "psi.some", "psi.full"})
        assert "turned off" in source(monitor).reason
        assert "wants no watch" in source(monitor, "psi.some").reason
        assert source(monitor, "polling").used


@pytest.mark.parametrize(
    ("watch", "write", "reason"),
    [
        ("", None, "not an absolute path"),
        ("memory.pressure", None, "not an absolute path"),
        ("/sys/../fifo", None, "not an absolute path"),
        ("/nowhere", None, "No such file"),
        ("/plain", None, "never signals"),
        ("/sys", None, "neither a pressure file"),
        ("/plain", "c29tZ", "not base64"),
        ("/plain", "ähm", "not base64"),
        ("/plain", base64.b64encode(b"never mind").decode(), "not a trigger"),
        ("/plain", base64.b64encode(b"some 1e5 2000000").decode(), "not a trigger"),
        ("/sock", None, "Connection refused"),
        ("/fifo", base64.b64encode(b"x" * 10**6).decode(), "bytes were taken"),
    ],
)
def test_a_bad_value_is_told_and_never_stops_the_monitor(machine, managed, watch, write, reason):
    plain = machine.root / "plain"
    plain.write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    os.mkfifo(machine.root / "fifo")
    with socket.socket(socket.AF_UNIX) as nobody:
        bind(nobody, machine.root)
    with managed(watch, write) as monitor:
        assert not source(monitor).used
        assert reason in source(monitor).reason
        machine.cgroup("/app").usage = 127 * MIB
        assert monitor.check() == PressureLevel.CRITICAL


def test_a_value_in_more_than_one_line_is_one_value(machine):
    environment = {systemd.WATCH: "/run/x", systemd.WRITE: f"{TRIGGER[:10]}\n {TRIGGER[10:]}\n"}
    assert systemd.watch(environment, machine.root).data == b"some 150000 2000000\0"


@pytest.mark.parametrize(
    ("data", "stall"), [(b"some 150000 2000000\0", ("some", 150_000)), (b"full 7 9\n", ("full", 7))]
)
def test_a_trigger_is_understood(data, stall):
    assert systemd.stall_of(data) == stall


@pytest.mark.parametrize("data", [b"", b"\0", b"some", b"some 1", b"all 1 2", b"some 1 2 3", b"some -1 2"])
def test_what_is_no_trigger_is_refused(data):
    with pytest.raises(KernelError) as refused:
        systemd.stall_of(data)
    assert refused.value.errno == errno.EBADMSG
