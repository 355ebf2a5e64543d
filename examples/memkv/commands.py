"""The table of commands: what each is called, what it takes, what it does, and how its arguments are read.

The commands themselves are in strings, keys and admin, by family.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from examples.memkv.requests import Request, parse_integer

if TYPE_CHECKING:
    from examples.memkv.connection import Connection

Handler: TypeAlias = "Callable[[Connection, Request], bytes]"
"""Does the command and returns the reply. The request has the right number of arguments."""

INTEGER_MAX: Final = 2**63 - 1
INTEGER_MIN: Final = -(2**63)

SYNTAX: Final = "ERR syntax error"
NOT_AN_INTEGER: Final = "ERR value is not an integer or out of range"
NO_SUCH_KEY: Final = "ERR no such key"

WRITE: Final = 1
DENYOOM: Final = 2
PING: Final = 4  # refused together with writes when saving fails, so that health checks see it

_FLAG_BITS: Final = {"write": WRITE, "denyoom": DENYOOM, "ping": PING}


class CommandError(Exception):
    """A command's error reply; the message begins with its code."""


@dataclass(frozen=True, slots=True)
class Command:
    """What COMMAND tells of a command, and what does it.

    Attributes:
        arity: How many words a request has; negative: at least as many.
        flags: As redis-server names them, and "ping" (see PING).
        keys: First key, last key (negative: from the end), step; all 0 if it takes none.
    """

    name: str
    handler: Handler
    arity: int
    flags: tuple[str, ...]
    keys: tuple[int, int, int]
    group: str
    summary: str
    subcommands: dict[bytes, Command] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        """The flags that matter before the command is run."""
        return sum(_FLAG_BITS.get(flag, 0) for flag in self.flags)

    def accepts(self, words: int) -> bool:
        """Whether a request of *words* words has the right number."""
        return words == self.arity if self.arity >= 0 else words >= -self.arity


class Family:
    """Commands of one family, collected by decorators."""

    def __init__(self, group: str) -> None:
        self.group = group
        self.commands: dict[bytes, Command] = {}

    def command(
        self, name: str, arity: int, flags: str, summary: str, *, keys: tuple[int, int, int] = (0, 0, 0)
    ) -> Callable[[Handler], Handler]:
        """Register a handler; a *name* such as "config get" is a subcommand of one registered before it."""

        def register(handler: Handler) -> Handler:
            command = Command(name.replace(" ", "|"), handler, arity, tuple(flags.split()), keys, self.group, summary)
            container, _, subcommand = name.encode().partition(b" ")
            if subcommand:
                self.commands[container].subcommands[subcommand] = command
            else:
                self.commands[container] = command
            return handler

        return register


def run_subcommand(command: Command, client: Connection, request: Request) -> bytes:
    """Run the subcommand of *command* that *request* names.

    Raises:
        CommandError: There is none of that name, or it takes another number of arguments.
    """
    subcommand = command.subcommands.get(request[1].lower())
    if subcommand is None:
        shown = request[1][:128].decode("latin-1")
        raise CommandError(f"ERR unknown subcommand '{shown}'. Try {command.name.upper()} HELP.")
    if not subcommand.accepts(len(request)):
        raise wrong_arity(subcommand)
    return subcommand.handler(client, request)


def wrong_arity(command: Command) -> CommandError:
    """Return the error for a request with too many or too few words."""
    return CommandError(f"ERR wrong number of arguments for '{command.name}' command")


def unknown_command(request: Request) -> CommandError:
    """Return the error for a command that does not exist."""
    shown, room = "", 128
    for argument in request[1:]:
        if len(shown) >= 128:
            break
        shown += f"'{argument[: room - len(shown)].decode('latin-1')}' "
    name = request[0][:128].decode("latin-1")
    return CommandError(f"ERR unknown command '{name}', with args beginning with: {shown}")


# ---- arguments


def integer_argument(argument: bytes, message: str = NOT_AN_INTEGER) -> int:
    """Return *argument* as a 64-bit integer.

    Raises:
        CommandError: It is none.
    """
    number = parse_integer(argument)
    if number is None:
        raise CommandError(message)
    return number


def now_ms() -> int:
    """Return the time, in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def expiry_argument(argument: bytes, command: str, *, unit_ms: int, relative: bool, positive: bool = True) -> int:
    """Return when something expires, in milliseconds since 1970.

    Args:
        argument: The client's number.
        command: Its name, for the error.
        unit_ms: 1000 if the number is of seconds, 1 if of milliseconds.
        relative: Whether it counts from now.
        positive: Whether it must be above 0.

    Raises:
        CommandError: It is no integer, not above 0, or too far away.
    """
    number = integer_argument(argument)
    expires_at_ms = number * unit_ms
    if relative and expires_at_ms <= INTEGER_MAX:
        expires_at_ms += now_ms()
    if (positive and number <= 0) or not INTEGER_MIN <= number * unit_ms <= INTEGER_MAX or expires_at_ms > INTEGER_MAX:
        raise CommandError(f"ERR invalid expire time in '{command}' command")
    return expires_at_ms


def glob(pattern: bytes) -> Callable[[bytes], object]:
    r"""Return whether a key matches *pattern*: ``*``, ``?``, ``[a-z]``, ``[^a]``, ``\``, as redis-server reads them."""
    return re.compile(_glob_expression(pattern), re.DOTALL).fullmatch


def _glob_expression(pattern: bytes) -> bytes:
    """Return *pattern* as a regular expression that never goes back on what a ``*`` but the last has matched.

    Matching as early as possible loses nothing, since a later ``*`` takes what is left; and it keeps a pattern of many
    from taking time without bound.
    """
    pieces = [b""]  # what stands between the stars
    at = 0
    while at < len(pattern):
        char = pattern[at : at + 1]
        at += 1
        if char == b"*":
            pieces.append(b"")
        elif char == b"?":
            pieces[-1] += b"."
        elif char == b"[":
            at, expression = _glob_class(pattern, at)
            pieces[-1] += expression
        else:
            if char == b"\\" and at < len(pattern):
                char = pattern[at : at + 1]
                at += 1
            pieces[-1] += re.escape(char)
    first, *middle = pieces
    if not middle:
        return first
    *middle, last = middle
    return first + b"".join(b"(?>.*?%b)" % piece for piece in middle if piece) + b".*" + last


def _glob_class(pattern: bytes, at: int) -> tuple[int, bytes]:
    """Return where the class that begins at *at* ends, and its expression; one that is not closed ends the pattern."""
    negated = pattern[at : at + 1] == b"^"
    at += negated
    codes: set[int] = set()
    while at < len(pattern) and pattern[at : at + 1] != b"]":
        if pattern[at : at + 1] == b"\\" and at + 1 < len(pattern):
            codes.add(pattern[at + 1])
            at += 2
        elif pattern[at + 1 : at + 2] == b"-" and at + 2 < len(pattern):
            low, high = sorted((pattern[at], pattern[at + 2]))
            codes.update(range(low, high + 1))
            at += 3
        else:
            codes.add(pattern[at])
            at += 1
    if not codes:
        return at + 1, b"." if negated else b"(?!)"
    members = b"".join(re.escape(bytes([code])) for code in sorted(codes))
    return at + 1, b"[" + (b"^" if negated else b"") + members + b"]"
