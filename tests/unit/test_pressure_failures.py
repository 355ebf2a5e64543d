"""What may fail around a monitor ends nothing: the handlers of the log, a look, a start."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import threading
import time

import pytest

from memsafe import Thresholds
from memsafe.errors import KernelError
from memsafe.pressure.emergency import EmergencyReserve
from memsafe.pressure.hub import Hub
from tests.integration.scenario import open_files, opened_since
from tests.unit.small_machine import CRITICAL, LOW, MIB, leave, listen, monitored


@pytest.fixture
def on_log():
    handler, log = logging.Handler(), logging.getLogger("memsafe.pressure")

    def have_done(act):
        handler.emit = act
        log.addHandler(handler)

    yield have_done
    log.removeHandler(handler)


def fail(*_):
    raise ZeroDivisionError


@pytest.mark.parametrize(
    "error", [RuntimeError("the disk is full"), SystemExit(1), KeyboardInterrupt(), asyncio.CancelledError()]
)
def test_a_handler_of_the_log_that_raises_ends_nothing(machine, monitor, on_log, monkeypatch, error):
    told = []

    def refuse_to_log(record):
        told.append(record.getMessage())
        raise error

    on_log(refuse_to_log)
    monkeypatch.setattr("memsafe.pressure.deputy.SLOW_S", 0.0)  # each callback is too slow
    with monkeypatch.context() as broken:
        broken.setattr("memsafe.pressure.monitor.status_once", fail)
        with pytest.raises(RuntimeError, match="could not look"):
            monitor.check()
    assert "could not look" in told[0]
    monitor.on(LOW, fail)
    heard = listen(monitor, LOW)
    leave(machine, 15 * MIB)
    assert monitor.check() == LOW
    late = listen(monitor, LOW)
    monitor.check()
    assert len(heard) == len(late) == 1
    assert any("failed" in line for line in told)
    assert any("took" in line for line in told)


def test_a_handler_of_the_log_that_hangs_after_a_slow_callback_keeps_nobody_from_looking(
    machine, clock, on_log, monkeypatch
):
    """It has another thread look, as the callback did."""
    hangs, go_on = threading.Event(), threading.Event()

    def hang(record):
        if "took" in record.getMessage():
            hangs.set()
            assert go_on.wait(60)

    on_log(hang)
    monkeypatch.setattr("memsafe.pressure.deputy.SLOW_S", 0.0)
    with monitored(machine, clock, thresholds=Thresholds(poll_s_max=0.01)) as monitor:
        monitor.check()
        monitor.on(LOW, lambda event: None)
        leave(machine, 15 * MIB)
        assert hangs.wait(60)
        leave(machine, 2 * MIB)
        deadline_s = time.monotonic() + 60
        while monitor.level != CRITICAL:
            assert time.monotonic() < deadline_s
        go_on.set()


class Interrupted(BaseException):
    """What a signal's handler raised."""


@pytest.mark.parametrize("name", ["memsafe-pressure", "memsafe-pressure-deputy"])
def test_an_interrupt_just_after_a_thread_began_leaves_nothing(machine, clock, monkeypatch, name):
    begin, before = threading.Thread.start, open_files()
    with monkeypatch.context() as patched:

        def interrupted(thread):
            begin(thread)
            if thread.name == name:
                raise Interrupted

        patched.setattr(threading.Thread, "start", interrupted)
        monitor = monitored(machine, clock)
        with pytest.raises(Interrupted):
            monitor.start()
    monitor.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("memsafe-pressure")]
    assert opened_since(before) == []
    with monitor:
        monitor.simulate(LOW)
        assert monitor.level == LOW


def test_a_handler_of_the_log_may_call_the_monitor_that_starts(machine, clock, on_log, monkeypatch):
    def refuse_memory(reserve):
        raise KernelError(errno.ENOMEM, "mmap")

    monkeypatch.setattr(EmergencyReserve, "take", refuse_memory)
    monitor = monitored(machine, clock, reserve="1 MiB")
    told = []
    on_log(lambda record: (monitor.on(LOW, told.append), told.append(record.getMessage())))
    starting = threading.Thread(target=monitor.start, daemon=True)
    starting.start()
    starting.join(30)
    assert not starting.is_alive()
    assert "cannot be taken" in told[0]
    monitor.close()


def test_one_that_cannot_begin_keeps_nobody_waiting(machine, clock, monkeypatch):
    ready, errors = Hub.ready, []

    def lack_memory(hub):
        if threading.current_thread().name == "memsafe-pressure":
            raise MemoryError
        ready(hub)

    monkeypatch.setattr(Hub, "ready", lack_memory)
    monkeypatch.setattr(threading, "excepthook", errors.append)
    with monitored(machine, clock) as monitor:
        with pytest.raises(RuntimeError, match=r"has ended|does not run"):
            monitor.check(timeout_s=30)
        monitor.close()
    assert [error.exc_type for error in errors] == [MemoryError]


def refuse(*_, **__):
    raise RuntimeError("can't start new thread")


def refuse_the_second(start=threading.Thread.start):
    calls = itertools.count()
    return lambda self: start(self) if next(calls) == 0 else refuse()


@pytest.mark.parametrize(
    ("what", "fails"),
    [
        ("memsafe.pressure.monitor.status_once", refuse),
        ("threading.Thread.start", refuse),
        ("threading.Thread.start", refuse_the_second()),
    ],
)
def test_nothing_is_left_when_a_start_fails(machine, clock, monkeypatch, what, fails):
    threads = threading.active_count()
    before = open_files()
    monitor = monitored(machine, clock)
    with monkeypatch.context() as broken:
        broken.setattr(what, fails)
        with pytest.raises(RuntimeError, match="new thread"):
            monitor.start()
    assert threading.active_count() == threads
    assert opened_since(before) == []
    monitor.close()
    with monitor:
        monitor.simulate(LOW)


def test_a_look_that_fails_is_logged_told_to_who_asked_and_tried_again(monitor, monkeypatch, caplog):
    with monkeypatch.context() as broken:
        broken.setattr("memsafe.pressure.monitor.status_once", lambda _: 1 / 0)
        for ask in (monitor.check, lambda: monitor.simulate(LOW)):
            with pytest.raises(RuntimeError, match="could not look at the machine") as told:
                ask()
            assert isinstance(told.value.__cause__, ZeroDivisionError)
    assert caplog.text.count("could not look") == 2
    monitor.simulate(LOW)
    assert monitor.level == LOW
