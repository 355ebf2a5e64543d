"""What looks again and again opens nothing: in a full cgroup, an open can call the OOM killer."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import os
import memsafe
from memsafe._kernel import files
from memsafe._kernel.kept import KeptFiles
from memsafe.snapshot.meter import Meter
from tests.integration.sealed import seal
"""

STATUS = """
for _ in range(2):
    memsafe.memory_status()
seal()
assert not memsafe.memory_status().warnings
"""

MONITOR = """
heard = []
db = memsafe.Budget("1 GiB", name="db")
db.reclaimer(lambda need_bytes: 0)
monitor = memsafe.PressureMonitor(budget=db).start()
monitor.on(memsafe.PressureLevel.LOW, lambda event: heard.append(event.level.name))
monitor.check()
hub = monitor._hub
chosen = [source for source in hub._chosen if source.used and source.reads]
assert chosen, monitor.sources
seal()
for _ in range(3):
    monitor.check()
for level in ("LOW", "CRITICAL", "NORMAL"):
    monitor.simulate(memsafe.PressureLevel[level])
assert heard == ["LOW", "CRITICAL"], heard
"""

HEAR = """
for source in chosen:
    source.hear()
"""

STILL_ABSENT = """
keeping = KeptFiles("/", believe_s=0)
for sealed in (False, False, True):
    if sealed:
        seal()
    with keeping.reading():
        assert files.read_optional("/proc/self/absent") is None
"""

METER = """
meter = Meter("/", None)
for _ in range(2):
    meter.measure(os.getpid())
    meter._headroom.slack_bytes = meter._headroom.due_s = 0  # so that it is read
    meter.runs_short(os.getpid())
seal()
for _ in range(3):
    assert meter.measure(os.getpid()).copy_bytes > 0
    meter._headroom.slack_bytes = meter._headroom.due_s = 0
    meter.runs_short(os.getpid())
    assert meter._headroom.slack_bytes > 0
meter.close()
"""

OPENED = "seal()\nfiles.read('/proc/self/status')\n"
ABSENT = "seal()\nfiles.read_optional('/nowhere')\n"


def run(script):
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script + "\nprint('done', flush=True)\nos._exit(0)\n"],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "script", [OPENED, ABSENT, MONITOR + HEAR], ids=["a file", "an absent file", "a source by itself"]
)
def test_the_seal_finds_whoever_opens(script):
    assert run(script) == (-signal.SIGSYS, "", "")


READING = {
    "memory_status": STATUS,
    "a monitor": MONITOR + "with hub.reading():" + HEAR.replace("\n", "\n    "),
    "a snapshot's meter": METER,
    "what is still absent": STILL_ABSENT,
}


@pytest.mark.parametrize("script", READING.values(), ids=READING)
def test_a_look_that_is_not_the_first_opens_nothing(script):
    assert run(script) == (0, "done\n", "")
