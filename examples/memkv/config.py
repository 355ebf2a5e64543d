"""What can be configured, by CONFIG and by the command line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from examples.memkv.requests import BULK_BYTES_MAX
from memsafe import parse_size

POLICIES: Final = ("noeviction", "allkeys-lru")

# As redis-server reads sizes: "m" is decimal, "mb" is binary.
_UNITS: Final = {
    "": 1, "b": 1, "k": 1000, "kb": 1024, "m": 1000**2, "mb": 1024**2, "g": 1000**3, "gb": 1024**3,
}  # fmt: skip
_SIZE: Final = re.compile(r"([0-9]+)([a-z]*)", re.IGNORECASE)


@dataclass(slots=True)
class Config:
    """The settings. Those that may change while the server runs are changed through Settings.

    Attributes:
        limit_bytes: maxmemory: what keys, values and what waits for clients may take; None: no limit of its own.
        policy: What happens at the limit.
        save_points: (seconds, changes) after which a save begins by itself. None: nothing was said of it, so there are
            none; unlike when it was said that there be none, a save that failed then stops writes.
        stop_writes_on_bgsave_error: Whether writes are refused from a failed save until one succeeds.
        snapshot_max_copy_bytes: What a save may copy before it is ended; None: as much as the headroom allows.
        shed_ratio: The share of the data that is evicted when memory runs low, if the policy evicts.
    """

    port: int = 6379
    host: str = "127.0.0.1"
    directory: Path = field(default_factory=Path.cwd)
    dbfilename: str = "dump.rdb"
    limit_bytes: int | None = None
    policy: str = "noeviction"
    save_points: tuple[tuple[int, int], ...] | None = None
    stop_writes_on_bgsave_error: bool = True
    rdbcompression: bool = True
    snapshot_max_copy_bytes: int | None = None
    shed_ratio: float = 0.1
    clients_max: int = 10_000
    timeout_s: int = 0

    @property
    def dump(self) -> Path:
        """Where the data is saved."""
        return self.directory / self.dbfilename


class SettingError(Exception):
    """A value that a setting cannot have; the message says what it must be."""


@dataclass(frozen=True, slots=True)
class _Setting:
    show: Callable[[Config], str]
    read: Callable[[str], object] | None = None  # None: cannot be changed
    attribute: str = ""


def _choice(choices: tuple[str, ...]) -> Callable[[str], object]:
    def read(text: str) -> str:
        if text.lower() not in choices:
            raise SettingError(f"argument must be one of the following: {', '.join(choices)}")
        return text.lower()

    return read


def _boolean(text: str) -> bool:
    if text.lower() not in ("yes", "no"):
        raise SettingError("argument must be 'yes' or 'no'")
    return text.lower() == "yes"


def _no(text: str) -> bool:
    if _boolean(text):
        raise SettingError("memkv keeps no append-only file; it saves RDB files")
    return False


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match and (unit := _UNITS.get(match[2].lower())):
        return int(match[1]) * unit
    try:
        return parse_size(text)
    except ValueError:
        raise SettingError("argument must be a memory value") from None


def _size_or_none(text: str) -> int | None:
    return _size(text) or None


def _max_copy(text: str) -> int | None:
    return None if text.lower() == "auto" else _size(text)


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1
    if not 0 <= ratio <= 1:
        raise SettingError("argument must be a number from 0 to 1")
    return ratio


def _integer(low: int, high: int) -> Callable[[str], object]:
    def read(text: str) -> int:
        if not text.isdecimal() or not text.isascii():
            raise SettingError("argument couldn't be parsed into an integer")
        if not low <= int(text) <= high:
            raise SettingError(f"argument must be between {low} and {high} inclusive")
        return int(text)

    return read


def read_save_points(text: str) -> tuple[tuple[int, int], ...]:
    """Return the save points in "seconds changes seconds changes …".

    Raises:
        SettingError: It is not pairs of whole numbers, the seconds at least 1.
    """
    words = text.split()
    if len(words) % 2 or not all(word.isdecimal() and word.isascii() for word in words):
        raise SettingError("Invalid save parameters")
    points = tuple((int(seconds), int(changes)) for seconds, changes in zip(words[::2], words[1::2], strict=True))
    if any(seconds < 1 for seconds, _ in points):
        raise SettingError("Invalid save parameters")
    return points


def _protected(text: str) -> object:
    raise SettingError("can't set protected config")  # or who may connect might overwrite any file


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"


def _fixed(text: str) -> _Setting:
    return _Setting(lambda _: text)


# What clients and tools ask for, in redis-server's words. Without a reader it can be looked at only.
_SETTINGS: Final[dict[str, _Setting]] = {
    "maxmemory": _Setting(lambda config: str(config.limit_bytes or 0), _size_or_none, "limit_bytes"),
    "maxmemory-policy": _Setting(lambda config: config.policy, _choice(POLICIES), "policy"),
    "save": _Setting(
        lambda config: " ".join(f"{seconds} {changes}" for seconds, changes in config.save_points or ()),
        read_save_points,
        "save_points",
    ),
    "stop-writes-on-bgsave-error": _Setting(
        lambda config: _yes_no(config.stop_writes_on_bgsave_error), _boolean, "stop_writes_on_bgsave_error"
    ),
    "snapshot-max-copy": _Setting(
        lambda config: "auto" if config.snapshot_max_copy_bytes is None else str(config.snapshot_max_copy_bytes),
        _max_copy,
        "snapshot_max_copy_bytes",
    ),
    "pressure-shed-ratio": _Setting(lambda config: str(config.shed_ratio), _ratio, "shed_ratio"),
    "dir": _Setting(lambda config: str(config.directory), _protected),
    "dbfilename": _Setting(lambda config: config.dbfilename, _protected),
    "rdbcompression": _Setting(lambda config: _yes_no(config.rdbcompression), _boolean, "rdbcompression"),
    "timeout": _Setting(lambda config: str(config.timeout_s), _integer(0, 2**31 - 1), "timeout_s"),
    "maxclients": _Setting(lambda config: str(config.clients_max), _integer(1, 2**32 - 1), "clients_max"),
    "port": _Setting(lambda config: str(config.port)),
    "bind": _Setting(lambda config: config.host),
    "appendonly": _Setting(lambda _: "no", _no),
    "appendfsync": _fixed("everysec"),
    "databases": _fixed("1"),
    "hz": _fixed("10"),
    "proto-max-bulk-len": _fixed(str(BULK_BYTES_MAX)),
    "rdbchecksum": _fixed("yes"),
    "requirepass": _fixed(""),
    "maxmemory-samples": _fixed("0"),
    "cluster-enabled": _fixed("no"),
    "slowlog-log-slower-than": _fixed("-1"),
    "notify-keyspace-events": _fixed(""),
}


class Settings:
    """The settings by their names, for CONFIG GET and CONFIG SET."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def names(self) -> list[str]:
        """Return all names."""
        return list(_SETTINGS)

    def show(self, name: str) -> str:
        """Return the value of *name*, which must exist, as redis-server writes it."""
        return _SETTINGS[name].show(self._config)

    def read(self, name: str, text: str) -> tuple[str, object] | None:
        """Return the attribute of Config that *name* is, and the value that *text* means; None if nothing changes.

        Raises:
            KeyError: There is no such setting.
            SettingError: It cannot be changed, or not to that.
        """
        setting = _SETTINGS[name]
        if setting.read is None:
            if text == setting.show(self._config):
                return None
            raise SettingError("can't set immutable config")
        value = setting.read(text)
        return (setting.attribute, value) if setting.attribute else None
