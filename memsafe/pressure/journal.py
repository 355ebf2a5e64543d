"""What the monitor's threads log. Handlers are user code: one that raises, whatever it is, must not end the thread that
warns.
"""

from __future__ import annotations

import logging
from contextlib import suppress

_log = logging.getLogger("memsafe.pressure")

_CALLER = 3  # as logging counts: whoever called warning() or exception() is what the record names


def warning(message: str, *args: object) -> None:
    """Log a warning, as logging takes it."""
    _write(logging.WARNING, message, args)


def exception(message: str, *args: object) -> None:
    """Log an error with the exception that is being handled."""
    _write(logging.ERROR, message, args, is_failure=True)


def _write(level: int, message: str, args: tuple[object, ...], *, is_failure: bool = False) -> None:
    with suppress(BaseException):
        _log.log(level, message, *args, exc_info=is_failure, stacklevel=_CALLER)
