"""Memory for those who act when there is none left: what holds it, and when a monitor gives it back."""

from __future__ import annotations

import errno
import functools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from memsafe import Budget, EmergencyReserve
from memsafe.errors import KernelError
from tests.unit.small_machine import CRITICAL, LIMIT, LOW, MIB, NORMAL, QUIET, leave, monitored


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_is_held_is_in_ram_and_what_is_given_back_is_not():
    before_bytes = resident_bytes()
    with EmergencyReserve("64 MiB") as reserve:
        assert resident_bytes() - before_bytes > 60 * MIB
        assert (reserve.size_bytes, reserve.held_bytes) == (64 * MIB, 64 * MIB)
        assert (reserve.take(), reserve.give(), reserve.give(), reserve.held_bytes) == (0, 64 * MIB, 0, 0)
        assert resident_bytes() - before_bytes < 4 * MIB
        assert (reserve.take(), reserve.held_bytes) == (64 * MIB, 64 * MIB)
        assert resident_bytes() - before_bytes > 60 * MIB
    assert resident_bytes() - before_bytes < 4 * MIB


def test_it_is_held_from_the_start_unless_asked_not_to():
    with EmergencyReserve(1) as page, EmergencyReserve("1 MiB", held=False) as none:
        assert page.held_bytes == page.size_bytes == os.sysconf("SC_PAGE_SIZE")
        assert none.held_bytes == 0


def test_a_closed_one_gives_nothing_and_cannot_be_taken():
    reserve = EmergencyReserve("1 MiB")
    reserve.close()
    reserve.close()
    assert (reserve.give(), reserve.held_bytes) == (0, 0)
    with pytest.raises(ValueError, match="closed"):
        reserve.take()


@pytest.mark.parametrize("size", [0, -1, "much"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="size of an emergency reserve"):
        EmergencyReserve(size)


def test_one_that_is_dropped_while_it_is_held_warns():
    reserve = EmergencyReserve("1 MiB")
    with pytest.warns(ResourceWarning, match="emergency reserve of 1 MiB was never closed"):
        del reserve


def test_threads_that_take_and_give_leave_all_or_nothing():
    with EmergencyReserve("64 KiB") as reserve:

        def turn():
            for _ in range(200):
                reserve.give()
                reserve.take()

        threads = [threading.Thread(target=turn) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert reserve.held_bytes == reserve.size_bytes


# --- in a monitor ---------------------------------------------------------------------------------------------------


watched = functools.partial(monitored, reserve="8 MiB")


def test_at_critical_it_is_given_back_before_reclaimers_and_callbacks_and_taken_again_when_calm(machine, clock):
    held = []
    with Budget(name="db") as budget, watched(machine, clock, budget) as monitor:
        budget.reclaimer(lambda need_bytes: held.append(("reclaimer", monitor.reserve.held_bytes)) or 0)
        monitor.on(LOW, lambda event: held.append((event.level.name, monitor.reserve.held_bytes)))
        assert monitor.reserve.held_bytes == 8 * MIB
        leave(machine, 16 * MIB)
        monitor.check()
        assert held[-1] == ("LOW", 8 * MIB), "at LOW there is room yet"
        held.clear()
        leave(machine, 1 * MIB)
        monitor.check()
        assert held == [("reclaimer", 0), ("CRITICAL", 0)]
        leave(machine, 100 * MIB)
        assert (monitor.check(), monitor.reserve.held_bytes) == (CRITICAL, 0)
        clock.now_s += 11
        assert (monitor.check(), monitor.reserve.held_bytes) == (NORMAL, 8 * MIB)
    assert monitor.reserve.held_bytes == 0


def test_between_two_criticals_without_a_calm_it_is_not_taken_and_is_given_once(machine, clock):
    held = []
    with watched(machine, clock) as monitor:
        monitor.on(LOW, lambda event: held.append((event.level, monitor.reserve.held_bytes)))
        for left_bytes in (1 * MIB, 15 * MIB, 1 * MIB):
            leave(machine, left_bytes)
            monitor.check()
            clock.now_s += 11
            monitor.check()
        assert held == [(CRITICAL, 0), (LOW, 0), (CRITICAL, 0)]
        leave(machine, 100 * MIB)
        monitor.check()
        clock.now_s += 11
        assert (monitor.check(), monitor.reserve.held_bytes) == (NORMAL, 8 * MIB)


def test_it_is_not_taken_where_that_would_bring_low_about(machine, clock):
    clear_bytes = int(QUIET.begins_at(LOW, LIMIT) * QUIET.clear_ratio)
    leave(machine, clear_bytes + 8 * MIB)
    with watched(machine, clock) as monitor:
        assert (monitor.check(), monitor.reserve.held_bytes) == (NORMAL, 0)
        leave(machine, clear_bytes + 8 * MIB + 1)
        assert (monitor.check(), monitor.reserve.held_bytes) == (NORMAL, 8 * MIB)


def test_a_drill_gives_it_back_too(machine, clock):
    with watched(machine, clock) as monitor:
        monitor.simulate(CRITICAL)
        assert monitor.reserve.held_bytes == 0
        monitor.simulate(NORMAL)
        monitor.check()
        assert monitor.reserve.held_bytes == 8 * MIB


def test_the_callers_own_is_used_and_stays_the_callers(machine, clock):
    with EmergencyReserve("1 MiB") as reserve:
        with watched(machine, clock, reserve=reserve) as monitor:
            assert monitor.reserve is reserve
            monitor.simulate(CRITICAL)
            assert reserve.held_bytes == 0
        assert reserve.take() == MIB


def test_of_monitors_that_share_one_none_undoes_what_another_needs(machine, clock):
    with EmergencyReserve("1 MiB") as reserve, watched(machine, clock, reserve=reserve) as calm:
        with watched(machine, clock, reserve=reserve) as short:
            short.simulate(CRITICAL)
            assert (calm.check(), reserve.held_bytes) == (NORMAL, 0)
            calm.simulate(CRITICAL)
            short.simulate(NORMAL)
            assert (short.check(), reserve.held_bytes) == (NORMAL, 0)
            calm.simulate(NORMAL)
            assert (calm.check(), reserve.held_bytes) == (NORMAL, MIB)
        assert reserve.held_bytes == MIB, "closing one takes it from no other"
        with watched(machine, clock, reserve=reserve) as short:
            short.simulate(CRITICAL)
        assert (calm.check(), reserve.held_bytes) == (NORMAL, MIB), "a closed one needs it no longer"
    with watched(machine, clock, reserve="1 MiB") as owner:
        owner.check()
        own = owner.reserve
        assert own.held_bytes == MIB
    assert own.held_bytes == 0


def test_one_that_its_owner_closes_is_left_out_and_the_monitor_goes_on(machine, clock, caplog):
    reserve = EmergencyReserve("1 MiB")
    with watched(machine, clock, reserve=reserve) as monitor:
        reserve.close()
        assert (monitor.check(), monitor.reserve) == (NORMAL, None)
        monitor.simulate(CRITICAL)
        assert monitor.level == CRITICAL
    assert not caplog.records


def test_one_that_the_kernel_refuses_is_told_and_the_monitor_goes_on(machine, clock, caplog, monkeypatch):
    def refuse(self):
        raise KernelError(errno.ENOMEM, "mmap")

    with watched(machine, clock) as monitor:
        monitor.simulate(CRITICAL)
        monkeypatch.setattr(EmergencyReserve, "take", refuse)
        monitor.simulate(NORMAL)
        assert (monitor.check(), monitor.reserve.held_bytes) == (NORMAL, 0)
        assert "cannot be taken: mmap" in caplog.text
        monkeypatch.undo()
        monitor.check()
        assert monitor.reserve.held_bytes == 8 * MIB


FORK = """
import os, threading
from memsafe import EmergencyReserve, PressureMonitor

def turn(reserve, stop):
    while not stop.is_set():
        reserve.give()
        reserve.take()

own = EmergencyReserve("1 MiB")
busy, stop = EmergencyReserve("64 KiB"), threading.Event()
taking = threading.Thread(target=turn, args=(busy, stop))
taking.start()
with PressureMonitor(reserve="1 MiB") as monitor:
    statuses = []
    for _ in range(20):  # in some of them the other thread is about it
        child = os.fork()
        if child == 0:
            assert (own.held_bytes, own.give(), monitor.reserve.held_bytes, busy.give()) == (0, 0, 0, 0)
            assert (own.take(), own.held_bytes, own.give(), busy.take()) == (1 << 20, 1 << 20, 1 << 20, 1 << 16)
            for reserve in (own, busy, monitor.reserve):
                reserve.close()
            os._exit(0)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    stop.set()
    taking.join()
    print(any(statuses), own.held_bytes, monitor.reserve.held_bytes)
own.close()
busy.close()
"""


def test_a_forked_child_holds_nothing_and_may_take_its_own_whoever_was_taking_it():
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["False", str(MIB), str(MIB)]
