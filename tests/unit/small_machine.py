"""A small machine of files, and monitors of it that are quiet: they look when they are told to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from memsafe import PressureLevel, PressureMonitor, Thresholds

MIB = 1024 * 1024
LIMIT = 128 * MIB
NORMAL, LOW, CRITICAL = PressureLevel

# Polling is left to check(): a test decides when the machine is looked at.
QUIET = Thresholds(poll_s_min=3600, poll_s_max=3600, cooldown_s=10)


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


def leave(machine, left_bytes):
    machine.cgroup("/app").usage = LIMIT - left_bytes


def monitored(machine, clock, budget=None, *, thresholds=QUIET, reserve=None):
    return PressureMonitor(budget, root=machine.root, clock=clock, thresholds=thresholds, reserve=reserve)


def listen(monitor, level):
    heard = []
    monitor.on(level, heard.append)
    return heard


def run(script, *args, returncode=0, flags=()):
    """Run *script* in an interpreter of its own; what it has written on standard error."""
    # A fork beside threads warns since Python 3.12; that it works is what is tested.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", *flags, "-c", script, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert done.returncode == returncode, done.stderr
    return done.stderr
