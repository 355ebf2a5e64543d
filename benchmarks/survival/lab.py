"""The same in virtual machines: boots the kernels of tests/kernel/lab, runs cells inside, hears of each run."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.survival import observer, place
from benchmarks.survival.cells import Cell
from tests.kernel.lab import image, kernels
from tests.kernel.lab.machine import BOOT_S, Machine

MEMORY_MIB = 6144
BOOTS_MAX = 6
_GRACE_S = 120
_TAIL_LINES = 40

Line = dict[str, Any]


class BrokenError(Exception):
    """The cells could not be run to their end; the message has the console's last lines."""


def lines_here(cells: Sequence[Cell]) -> Iterator[Line]:
    """Run *cells* on this machine: yield a line before each cell, and one for each run.

    Raises:
        place.UnavailableError: No memory cgroup can be made here.
    """
    where = {"kernel": platform.release(), "cgroup": place.version(), "psi": _has_psi()}
    for cell in cells:
        told = {**where, "cell": cell.as_dict()}
        yield {"what": "cell", **told, "patience_s": cell.patience_s}
        for run in observer.run(cell):
            yield {"what": "run", **told, **run.as_dict()}


def _has_psi() -> bool:
    try:
        with open("/proc/pressure/memory") as file:
            return bool(file.read())
    except OSError:
        return False


def lines(kernel: str, cells: Sequence[Cell], *, psi: bool, show: Callable[[str], None]) -> Iterator[Line]:
    """Do what lines_here() does in a machine of its own; where that goes down, the rest of the cells in another.

    Raises:
        kernels.UnavailableError: There is no such kernel, or no QEMU.
        BrokenError: It went down too often.
    """
    left = list(cells)
    for _ in range(BOOTS_MAX):
        command = [sys.executable, "-m", "benchmarks.survival.lab"]
        work = [cell.as_dict() for cell in left]
        with Machine(kernels.find(kernel), command, work, memory_mib=MEMORY_MIB, psi=psi) as machine:
            for message in machine:
                if isinstance(message, str):
                    show(message)
                    continue
                machine.allow(BOOT_S)
                if message["what"] == "end":
                    return
                if message["what"] == "broken":
                    raise BrokenError(message["text"])
                if message["what"] == "cell":
                    machine.allow(message["patience_s"] + _GRACE_S)
                    # What was begun when a machine goes down is not begun again: it may be what took it down.
                    left = left[left.index(Cell.from_dict(message["cell"])) + 1 :]
                else:
                    machine.allow(Cell.from_dict(message["cell"]).patience_s + _GRACE_S)
                yield message
            told = "\n".join(machine.console[-_TAIL_LINES:])
        show(f"the machine of {kernel} went down; {len(left)} cells are left")
    raise BrokenError(f"{kernel} went down {BOOTS_MAX} times. The end of its console:\n{told}")


def main() -> None:
    """Run in the guest."""
    from tests.kernel.lab.inside import Channel

    channel = Channel()
    try:
        with open(image.TASK) as file:
            cells = [Cell.from_dict(plain) for plain in json.load(file)]
        for line in lines_here(cells):
            channel.tell(**line)
    except BaseException as error:
        channel.tell("broken", text=f"{type(error).__name__}: {error}")
    channel.tell("end")


if __name__ == "__main__":
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    main()
