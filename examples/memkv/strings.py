"""Commands on values: GET, SET and all that read or change one."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from examples.memkv import resp
from examples.memkv.commands import (
    INTEGER_MAX,
    INTEGER_MIN,
    SYNTAX,
    CommandError,
    Family,
    expiry_argument,
    integer_argument,
    now_ms,
)
from examples.memkv.requests import BULK_BYTES_MAX, Request

if TYPE_CHECKING:
    from examples.memkv.connection import Connection

STRINGS: Final = Family("string")
_command = STRINGS.command

_ONE_KEY: Final = (1, 1, 1)

# option: (is the number of seconds or milliseconds, does it count from now)
_EXPIRIES: Final = {b"EX": (1000, True), b"PX": (1, True), b"EXAT": (1000, False), b"PXAT": (1, False)}


@_command("get", 2, "readonly fast", "Return the value of a key", keys=_ONE_KEY)
def get(client: Connection, request: Request) -> bytes:
    return _reply(client, client.store.get(request[1]))


def _reply(client: Connection, value: bytes | None) -> bytes:
    if value is None:
        return resp.NIL
    return resp.bulk(value) if len(value) < resp.PIECE_BYTES else client.send(resp.parts([value], b""))


@_command("set", -3, "write denyoom", "Set a key to a value, with an expiry, or if it is there or not", keys=_ONE_KEY)
def set_(client: Connection, request: Request) -> bytes:
    store = client.store
    if len(request) == 3:
        store.set(request[1], request[2])
        return resp.OK
    expiry, keywords = _options(request, 3, frozenset((b"NX", b"XX", b"GET", b"KEEPTTL")))
    expires_at_ms = _expires_at_ms(expiry, "set")
    answers_old = b"GET" in keywords
    old = store.get(request[1]) if answers_old else store.peek(request[1])
    if (b"NX" in keywords and old is not None) or (b"XX" in keywords and old is None):
        return _reply(client, old) if answers_old else resp.NIL
    store.set(request[1], request[2], expires_at_ms, keep_expiry=b"KEEPTTL" in keywords)
    return _reply(client, old) if answers_old else resp.OK


def _options(request: Request, at: int, allowed: frozenset[bytes]) -> tuple[tuple[bytes, bytes] | None, set[bytes]]:
    """Return the expiry's option and number, not looked at yet, and the keywords, of the options that begin at *at*."""
    keywords: set[bytes] = set()
    expiry: tuple[bytes, bytes] | None = None
    while at < len(request):
        option = request[at].upper()
        if option in allowed:
            keywords.add(option)
        elif option in _EXPIRIES and expiry is None and at + 1 < len(request):
            at += 1
            expiry = option, request[at]
        else:
            raise CommandError(SYNTAX)
        at += 1
    if {b"NX", b"XX"} <= keywords or (expiry and keywords & {b"KEEPTTL", b"PERSIST"}):
        raise CommandError(SYNTAX)
    return expiry, keywords


def _expires_at_ms(expiry: tuple[bytes, bytes] | None, command: str) -> int | None:
    if expiry is None:
        return None
    unit_ms, relative = _EXPIRIES[expiry[0]]
    return expiry_argument(expiry[1], command, unit_ms=unit_ms, relative=relative)


@_command("setnx", 3, "write denyoom fast", "Set a key if it is not there", keys=_ONE_KEY)
def setnx(client: Connection, request: Request) -> bytes:
    if request[1] in client.store:
        return resp.ZERO
    client.store.set(request[1], request[2])
    return resp.ONE


@_command("setex", 4, "write denyoom", "Set a key with an expiry in seconds", keys=_ONE_KEY)
def setex(client: Connection, request: Request) -> bytes:
    expires_at_ms = expiry_argument(request[2], "setex", unit_ms=1000, relative=True)
    client.store.set(request[1], request[3], expires_at_ms)
    return resp.OK


@_command("psetex", 4, "write denyoom", "Set a key with an expiry in milliseconds", keys=_ONE_KEY)
def psetex(client: Connection, request: Request) -> bytes:
    expires_at_ms = expiry_argument(request[2], "psetex", unit_ms=1, relative=True)
    client.store.set(request[1], request[3], expires_at_ms)
    return resp.OK


@_command("getset", 3, "write denyoom fast", "Set a key and return what it held", keys=_ONE_KEY)
def getset(client: Connection, request: Request) -> bytes:
    old = client.store.get(request[1])
    client.store.set(request[1], request[2])
    return _reply(client, old)


@_command("getdel", 2, "write fast", "Return the value of a key and remove it", keys=_ONE_KEY)
def getdel(client: Connection, request: Request) -> bytes:
    old = client.store.get(request[1])
    client.store.delete(request[1])
    return _reply(client, old)


@_command("getex", -2, "write fast", "Return the value of a key and change its expiry", keys=_ONE_KEY)
def getex(client: Connection, request: Request) -> bytes:
    store, key = client.store, request[1]
    expiry, keywords = _options(request, 2, frozenset((b"PERSIST",)))
    value = store.get(key)
    if value is None:
        return resp.NIL
    expires_at_ms = _expires_at_ms(expiry, "getex")
    if expires_at_ms is not None:
        if expires_at_ms <= now_ms():
            store.delete(key)
        else:
            store.set_expiry(key, expires_at_ms)
    elif keywords and store.expiry(key) is not None:
        store.set_expiry(key, None)
    return _reply(client, value)


@_command("mget", -2, "readonly fast", "Return the values of several keys", keys=(1, -1, 1))
def mget(client: Connection, request: Request) -> bytes:
    get = client.store.get
    values = [get(key) for key in request[1:]]
    return client.send(resp.parts(values, b"*%d\r\n" % len(values), client.nil))


@_command("mset", -3, "write denyoom", "Set several keys", keys=(1, -1, 2))
def mset(client: Connection, request: Request) -> bytes:
    _write_pairs(client, request, "mset")
    return resp.OK


@_command("msetnx", -3, "write denyoom", "Set several keys if none of them is there", keys=(1, -1, 2))
def msetnx(client: Connection, request: Request) -> bytes:
    if len(request) % 2 and any(key in client.store for key in request[1::2]):
        return resp.ZERO
    _write_pairs(client, request, "msetnx")
    return resp.ONE


def _write_pairs(client: Connection, request: Request, command: str) -> None:
    if len(request) % 2 == 0:
        raise CommandError(f"ERR wrong number of arguments for '{command}' command")
    pairs = dict(zip(request[1::2], request[2::2], strict=True))
    client.store.write([(key, value, None) for key, value in pairs.items()])


@_command("append", 3, "write denyoom fast", "Append to the value of a key", keys=_ONE_KEY)
def append(client: Connection, request: Request) -> bytes:
    old = client.store.peek(request[1]) or b""
    _check_length(len(old) + len(request[2]))
    client.store.set(request[1], old + request[2], keep_expiry=True)
    return resp.integer(len(old) + len(request[2]))


@_command("strlen", 2, "readonly fast", "Return the length of a value", keys=_ONE_KEY)
def strlen(client: Connection, request: Request) -> bytes:
    return resp.integer(len(client.store.get(request[1]) or b""))


@_command("getrange", 4, "readonly", "Return a part of a value", keys=_ONE_KEY)
@_command("substr", 4, "readonly", "Return a part of a value", keys=_ONE_KEY)
def getrange(client: Connection, request: Request) -> bytes:
    start, end = integer_argument(request[2]), integer_argument(request[3])
    value = client.store.get(request[1]) or b""
    if start < 0 and end < 0 and start > end:
        return resp.bulk(b"")
    if start < 0:
        start = max(0, len(value) + start)
    if end < 0:
        end = max(0, len(value) + end)
    return _reply(client, value[start : end + 1])


@_command("setrange", 4, "write denyoom", "Overwrite a part of a value", keys=_ONE_KEY)
def setrange(client: Connection, request: Request) -> bytes:
    offset, part = integer_argument(request[2]), request[3]
    if offset < 0:
        raise CommandError("ERR offset is out of range")
    old = client.store.peek(request[1])
    if not part:
        return resp.integer(len(old or b""))
    _check_length(offset + len(part))
    value = (old or b"").ljust(offset, b"\0")
    value = value[:offset] + part + value[offset + len(part) :]
    client.store.set(request[1], value, keep_expiry=True)
    return resp.integer(len(value))


def _check_length(size: int) -> None:
    if size > BULK_BYTES_MAX:
        raise CommandError("ERR string exceeds maximum allowed size (proto-max-bulk-len)")


# ---- numbers


@_command("incr", 2, "write denyoom fast", "Add one to a number", keys=_ONE_KEY)
def incr(client: Connection, request: Request) -> bytes:
    return _add(client, request[1], 1)


@_command("decr", 2, "write denyoom fast", "Subtract one from a number", keys=_ONE_KEY)
def decr(client: Connection, request: Request) -> bytes:
    return _add(client, request[1], -1)


@_command("incrby", 3, "write denyoom fast", "Add to a number", keys=_ONE_KEY)
def incrby(client: Connection, request: Request) -> bytes:
    return _add(client, request[1], integer_argument(request[2]))


@_command("decrby", 3, "write denyoom fast", "Subtract from a number", keys=_ONE_KEY)
def decrby(client: Connection, request: Request) -> bytes:
    amount = integer_argument(request[2])
    if amount == INTEGER_MIN:
        raise CommandError("ERR decrement would overflow")
    return _add(client, request[1], -amount)


def _add(client: Connection, key: bytes, amount: int) -> bytes:
    old = client.store.peek(key)
    total = amount if old is None else integer_argument(old) + amount
    if not INTEGER_MIN <= total <= INTEGER_MAX:
        raise CommandError("ERR increment or decrement would overflow")
    client.store.set(key, b"%d" % total, keep_expiry=True)
    return resp.integer(total)


@_command("incrbyfloat", 3, "write denyoom fast", "Add to a number with a fraction", keys=_ONE_KEY)
def incrbyfloat(client: Connection, request: Request) -> bytes:
    old = client.store.peek(request[1])
    held = Fraction(0) if old is None else _long_double(old)
    added = _long_double(request[2])
    if held is None or added is None:
        raise CommandError("ERR increment would produce NaN or Infinity")
    text = _shown(_rounded(held + added))
    client.store.set(request[1], text, keep_expiry=True)
    return resp.bulk(text)


# redis-server counts in C's long double. On x86-64 that has 64 bits of mantissa, 11 more than a float here.
_MANTISSA_BITS: Final = 64
_EXPONENT_MAX: Final = 16383
_DECIMAL: Final = re.compile(rb"([+-]?)(?=[0-9]|\.[0-9])([0-9]*)\.?([0-9]*)(?:[eE]([+-]?[0-9]{1,6}))?")
_INFINITY: Final = re.compile(rb"[+-]?inf(inity)?", re.IGNORECASE)


def _long_double(text: bytes) -> Fraction | None:
    """Return the number in *text* as a long double holds it; None for an infinity.

    Raises:
        CommandError: It is no number, or beyond a long double.
    """
    if len(text) < 5 * 1024:
        if match := _DECIMAL.fullmatch(text):
            sign, whole, part, exponent = match.groups()
            tens = int(exponent or 0) - len(part)
            if abs(tens) < 10_000:
                number = int(sign + whole + part) * Fraction(10) ** tens
                if abs(number) < 2 ** (_EXPONENT_MAX + 1) and (not number or abs(number) > Fraction(1, 2**16445)):
                    return _rounded(number)
        elif _INFINITY.fullmatch(text):
            return None
    raise CommandError("ERR value is not a valid float")


def _rounded(number: Fraction) -> Fraction:
    """Return the long double nearest to *number*."""
    if not number:
        return number
    exponent = abs(number.numerator).bit_length() - number.denominator.bit_length() - _MANTISSA_BITS
    while abs(number) >= Fraction(2) ** (exponent + _MANTISSA_BITS):
        exponent += 1
    return round(number / Fraction(2) ** exponent) * Fraction(2) ** exponent


def _shown(number: Fraction) -> bytes:
    """Return *number* as redis-server does: 17 digits after the point, less the zeros at the end."""
    scaled = round(abs(number) * 10**17)
    whole, part = divmod(scaled, 10**17)
    text = f"{whole}.{part:017}".rstrip("0").rstrip(".")
    return (f"-{text}" if number < 0 and scaled else text).encode()
