"""Sizes: whole bytes in, whole bytes out.

``"64 MiB"``, ``"64MiB"`` and ``"64M"`` are binary, as systemd and docker read them; ``"64 MB"`` is decimal.
"""

from __future__ import annotations

import re
from operator import index
from typing import TypeAlias

Size: TypeAlias = int | str
"""A number of bytes, or a string such as "64 MiB"."""

MAX_SIZE_BYTES = 2**63 - 1
"""The largest size: what the kernel's and our own 64-bit counters hold."""

_PATTERN = re.compile(r"\s*([0-9]+)(?:\.([0-9]+))?\s*([A-Za-z]*)\s*", re.ASCII)
_LETTERS = "KMGTPE"
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}{suffix}".lower(): 1024**i for i, letter in enumerate(_LETTERS, 1) for suffix in ("", "iB")}
_UNITS |= {f"{letter}B".lower(): 1000**i for i, letter in enumerate(_LETTERS, 1)}


def parse_size(size: Size, *, what: str = "a size") -> int:
    """Return *size* in bytes.

    Args:
        size: An int of bytes, anything that is one by ``__index__``, or a string: ``"64 MiB"``, ``"64M"``,
            ``"64MiB"`` (binary), ``"64 MB"`` (decimal), ``"65536"``. Case does not matter.
        what: What the size is for; it begins the error's sentence.

    Raises:
        ValueError: It is negative, not a whole number of bytes, larger than 2**63 - 1, or no size at all, of
            whatever type.
    """
    if isinstance(size, str):
        size_bytes = _parse(size, what)
    elif isinstance(size, (float, bool)):
        raise ValueError(f"{what} must be a whole number of bytes or a string such as '64 MiB', not {size!r}")
    else:
        try:
            size_bytes = int(index(size))
        except TypeError:
            kind = type(size).__name__
            raise ValueError(f"{what} must be an int of bytes or a string such as '64 MiB', not {kind}") from None
    if size_bytes < 0:
        raise ValueError(f"{what} must not be negative: {size!r}")
    if size_bytes > MAX_SIZE_BYTES:
        raise ValueError(f"{what} must be below 8 EiB: {size!r}")
    return size_bytes


def _parse(text: str, what: str) -> int:
    match = _PATTERN.fullmatch(text)
    unit = _UNITS.get(match[3].lower()) if match else None
    if match is None or unit is None or len(text) > 64:
        raise ValueError(f"{what} must look like '64 MiB', '64M' or '65536': {text!r}")
    fraction = match[2] or ""
    size_bytes: int
    size_bytes, rest = divmod(int(match[1] + fraction) * unit, 10 ** len(fraction))
    if rest:
        raise ValueError(f"{what} must be a whole number of bytes: {text!r}")
    return size_bytes


def format_size(size_bytes: int | None) -> str:
    """Return *size_bytes* for people: ``"1.5 GiB"``, ``"512 B"``; ``"unknown"`` for None."""
    if size_bytes is None:
        return "unknown"
    value = float(abs(size_bytes))
    sign = "-" if size_bytes < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1023.95 or unit == "TiB":
            break
        value /= 1024
    text = f"{value:.0f}" if unit == "B" else f"{value:.1f}".removesuffix(".0")
    return f"{sign}{text} {unit}"
