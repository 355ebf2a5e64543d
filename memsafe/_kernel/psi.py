"""Pressure stall information: how long tasks stood still for memory (Documentation/accounting/psi.rst)."""

from __future__ import annotations

import errno
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from memsafe._kernel import cgroup, files
from memsafe.errors import KernelError

if TYPE_CHECKING:
    from memsafe._kernel.files import Root


@dataclass(frozen=True, slots=True)
class Stall:
    """One line of a pressure file: the share of time stalled, in percent, and the total.

    Attributes:
        avg10, avg60, avg300: Percent of the last 10, 60 and 300 seconds, 0 to 100.
        total_us: Microseconds stalled since boot, or since the cgroup was made.
    """

    avg10: float
    avg60: float
    avg300: float
    total_us: int


@dataclass(frozen=True, slots=True)
class Pressure:
    """Memory pressure.

    Attributes:
        some: Time in which at least one task waited for memory.
        full: Time in which all that were not idle did.
        source: The file that said so.
    """

    some: Stall
    full: Stall
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def parse_pressure(text: bytes, path: str) -> Pressure:
    """Return what a pressure file says; unknown lines and fields are left alone.

    Raises:
        KernelError: A line or a field is missing, doubled, or makes no sense.
    """
    stalls: dict[bytes, Stall] = {}
    for line in text.splitlines():
        kind, _, rest = line.partition(b" ")
        if kind not in {b"some", b"full"}:
            continue
        if kind in stalls:
            raise files.garbage(path, f"it has two lines of {kind.decode()!r}")
        stalls[kind] = _stall(rest, path)
    if len(stalls) != 2:
        raise files.lacking(path, "full" if b"some" in stalls else "some")
    return Pressure(stalls[b"some"], stalls[b"full"], path)


def read_pressure(path: str) -> Pressure | None:
    """Return the pressure at *path*, or None where PSI is off or not built in.

    Raises:
        KernelError: The file is there and cannot be read, or makes no sense.
    """
    try:
        text = files.read(path)
    except KernelError as error:
        # psi=0 at boot leaves the files there to answer EOPNOTSUPP.
        if error.errno == errno.EOPNOTSUPP or files.is_missing(error):
            return None
        raise
    return parse_pressure(text, path)


def system_path(root: Root = "/") -> str:
    """Return the path of the whole system's memory pressure."""
    return files.under(root, "/proc/pressure/memory")


def cgroup_path(root: Root = "/", pid: int | str = "self") -> str | None:
    """Return the memory.pressure of the cgroup2 that holds *pid*, or None; it also exists where memory is on v1.

    Raises:
        KernelError: /proc/<pid>/cgroup or mountinfo cannot be read or makes no sense.
    """
    directory = cgroup.unified_directory(root, pid)
    return None if directory is None else f"{directory}/memory.pressure"


def _stall(text: bytes, path: str) -> Stall:
    fields: dict[bytes, bytes] = {}
    for word in text.split():
        key, equals, value = word.partition(b"=")
        if not equals or key in fields:
            raise files.garbage(path, f"{text[:80]!r} is not a line of pressure")
        fields[key] = value
    try:
        return Stall(
            avg10=_percent(fields[b"avg10"], path),
            avg60=_percent(fields[b"avg60"], path),
            avg300=_percent(fields[b"avg300"], path),
            total_us=files.count(fields[b"total"], path),
        )
    except KeyError as error:
        raise files.lacking(path, error.args[0].decode()) from None


def _percent(text: bytes, path: str) -> float:
    whole, point, part = text.partition(b".")
    if not whole.isdigit() or (point and not part.isdigit()) or len(text) > 16:
        raise files.garbage(path, f"{text[:40]!r} is not a percentage")
    return float(text)
