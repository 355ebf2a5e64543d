"""A virtual machine that boots one kernel with one task, and says what happens in it."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.kernel.lab import image
from tests.kernel.lab.kernels import CACHE, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

    from tests.kernel.lab.kernels import Kernel

QEMU = "qemu-system-x86_64"
MEMORY_MIB = 1024
DISK_MIB = 512

# Emulated, it takes some seconds from power to the first test, and next to nothing from one test to the next.
BOOT_S = 120

_PARAMETERS = (
    "console=ttyS0 quiet loglevel=4 cryptomgr.notests mitigations=off audit=0 "
    # The kernel counts ticks while it boots; a busy host delivers none, and the boot hung ("timer not connected").
    "no_timer_check "
    # An oops ends the machine, and the machine ends QEMU: none is to be overlooked.
    "oops=panic panic=-1"
)


def require() -> None:
    """Raise UnavailableError where a program is missing."""
    if shutil.which(QEMU) is None:
        raise UnavailableError(f"{QEMU} is needed: apt-get install qemu-system-x86 busybox-static")


class Machine:
    """One boot. Iterating gives what comes from it, as it comes, until it is off.

    Yields:
        A str for each line of its console, a dict for each message of the task (see tests/kernel/lab/inside.py).

    Attributes:
        console: All lines of it so far.
        overdue: Whether it was switched off because its time was over.

    Raises:
        UnavailableError: A program or a kernel is missing.
    """

    def __init__(
        self,
        kernel: Kernel,
        command: Sequence[str],
        work: object = None,
        *,
        memory_mib: int = MEMORY_MIB,
        psi: bool = True,
    ) -> None:
        require()
        self.console: list[str] = []
        self.overdue = False
        with ExitStack() as stack:
            CACHE.mkdir(parents=True, exist_ok=True)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=CACHE, prefix="boot-")))
            image.write_initrd(folder / "initrd", kernel.modules, command, work)
            with (folder / "disk").open("wb") as disk:
                disk.truncate(DISK_MIB * 2**20)
            self._messages_fd, write_fd = os.pipe()
            stack.callback(os.close, self._messages_fd)
            self._qemu = subprocess.Popen(
                _command(kernel, folder, f"/dev/fd/{write_fd}", memory_mib, psi),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[write_fd],
            )
            os.close(write_fd)
            stack.enter_context(self._qemu)
            stack.callback(self.kill)
            self.allow(BOOT_S)  # from now: until here it may have waited for another's archive
            self._resources = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Switch it off. Twice is a no-op."""
        self._resources.close()

    def kill(self) -> None:
        """End it at once, from any thread: what iterates comes to its end."""
        with suppress(ProcessLookupError):
            self._qemu.kill()

    def allow(self, seconds: float) -> None:
        """Give it so long from now; what still runs then is switched off, whatever it says meanwhile."""
        self._until_s = time.monotonic() + seconds
        self._allowed_s = seconds

    def __iter__(self) -> Iterator[str | dict[str, Any]]:
        assert self._qemu.stdout is not None
        console, messages = _Lines(self._qemu.stdout.fileno()), _Lines(self._messages_fd)
        with selectors.DefaultSelector() as selector:
            selector.register(console.fd, selectors.EVENT_READ, console)
            selector.register(messages.fd, selectors.EVENT_READ, messages)
            while selector.get_map():
                ready = selector.select(max(0, self._until_s - time.monotonic()))
                if not self.overdue and time.monotonic() >= self._until_s:
                    self.overdue = True
                    yield self._note(f"switched off: it had {self._allowed_s:.0f} s")
                    self.kill()
                for key, _ in ready:
                    lines = key.data.read()
                    if lines is None:
                        selector.unregister(key.fd)
                        continue
                    for line in lines:
                        yield json.loads(line) if key.data is messages else self._note(line.decode(errors="replace"))

    def _note(self, line: str) -> str:
        self.console.append(line)
        return line


class _Lines:
    """The lines of a pipe, as far as they are whole."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._rest = b""

    def read(self) -> list[bytes] | None:
        """Return the lines that are there; None at the end."""
        data = os.read(self.fd, 65536)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n")
        return lines


def _command(kernel: Kernel, folder: Path, messages: str, memory_mib: int, psi: bool) -> list[str]:
    parameters = f"{_PARAMETERS} psi={psi:d}"
    return [
        *("nice", "-n", "10", QEMU),
        *("-machine", "pc", "-accel", "tcg", "-cpu", "Nehalem", "-smp", "1", "-m", f"{memory_mib}M"),
        *("-kernel", str(kernel.image), "-initrd", str(folder / "initrd"), "-append", parameters),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-serial", "stdio", "-serial", f"file:{messages}"),
        *("-drive", f"file={folder / 'disk'},if=none,id=disk,format=raw,cache=unsafe"),
        *("-device", "nvme,drive=disk,serial=lab"),
    ]
