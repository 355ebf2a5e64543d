"""Commands on keys, whatever they hold: existence, names, expiry, and walks over all of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from examples.memkv import resp
from examples.memkv.commands import (
    NO_SUCH_KEY,
    SYNTAX,
    CommandError,
    Family,
    expiry_argument,
    glob,
    integer_argument,
    now_ms,
)
from examples.memkv.requests import Request

if TYPE_CHECKING:
    from examples.memkv.connection import Connection

KEYS: Final = Family("generic")
_command = KEYS.command

_ONE_KEY: Final = (1, 1, 1)
_ALL_KEYS: Final = (1, -1, 1)
_CURSOR: Final = re.compile(rb"[+-]?[0-9]{1,20}")
_CURSOR_MAX: Final = 2**64 - 1


@_command("del", -2, "write", "Remove keys", keys=_ALL_KEYS)
@_command("unlink", -2, "write fast", "Remove keys", keys=_ALL_KEYS)
def delete(client: Connection, request: Request) -> bytes:
    remove = client.store.delete
    return resp.integer(sum(remove(key) for key in request[1:]))


@_command("exists", -2, "readonly fast", "Count which of the keys are there", keys=_ALL_KEYS)
def exists(client: Connection, request: Request) -> bytes:
    store = client.store
    return resp.integer(sum(key in store for key in request[1:]))


@_command("touch", -2, "readonly fast", "Count a use of each key that is there", keys=_ALL_KEYS)
def touch(client: Connection, request: Request) -> bytes:
    get = client.store.get
    return resp.integer(sum(get(key) is not None for key in request[1:]))


@_command("type", 2, "readonly fast", "Return what kind of value a key has", keys=_ONE_KEY)
def type_(client: Connection, request: Request) -> bytes:
    return b"+string\r\n" if request[1] in client.store else b"+none\r\n"


@_command("rename", 3, "write", "Give a value another key", keys=(1, 2, 1))
def rename(client: Connection, request: Request) -> bytes:
    _rename(client, request[1], request[2])
    return resp.OK


@_command("renamenx", 3, "write fast", "Give a value another key, if that is not there", keys=(1, 2, 1))
def renamenx(client: Connection, request: Request) -> bytes:
    if request[1] in client.store and request[2] in client.store:
        return resp.ZERO
    _rename(client, request[1], request[2])
    return resp.ONE


def _rename(client: Connection, old: bytes, new: bytes) -> None:
    store = client.store
    value = store.peek(old)
    if value is None:
        raise CommandError(NO_SUCH_KEY)
    if old != new:
        store.write([(old, None, None), (new, value, store.expiry(old))])


@_command("dbsize", 1, "readonly fast", "Return how many keys there are")
def dbsize(client: Connection, request: Request) -> bytes:
    return resp.integer(len(client.store))


@_command("randomkey", 1, "readonly", "Return some key")
def randomkey(client: Connection, request: Request) -> bytes:
    return resp.bulk_or_nil(client.store.random_key())


@_command("keys", 2, "readonly", "Return all keys that match a pattern")
def keys(client: Connection, request: Request) -> bytes:
    found = client.store.keys(glob(request[1]))
    return client.send(resp.parts(found, b"*%d\r\n" % len(found)))


@_command("scan", -2, "readonly", "Walk over the keys in steps")
def scan(client: Connection, request: Request) -> bytes:
    cursor = _cursor(request[1])
    count, accept, wants_strings = 10, None, True
    at = 2
    while at < len(request):
        option = request[at].upper()
        if at + 1 == len(request) or option not in (b"COUNT", b"MATCH", b"TYPE"):
            raise CommandError(SYNTAX)
        argument = request[at + 1]
        if option == b"COUNT":
            count = integer_argument(argument)
            if count < 1:
                raise CommandError(SYNTAX)
        elif option == b"MATCH":
            accept = glob(argument)
        else:
            wants_strings = argument.lower() == b"string"
        at += 2
    cursor, found = client.store.scan(cursor, count)
    if not wants_strings:
        found = []
    elif accept is not None:
        found = [key for key in found if accept(key)]
    return client.send(resp.parts(found, b"*2\r\n%b*%d\r\n" % (resp.bulk(b"%d" % cursor), len(found))))


def _cursor(argument: bytes) -> int:
    """Return *argument* as strtoul() reads it: modulo 2**64, and nothing at all is 0."""
    if not argument:
        return 0
    if not _CURSOR.fullmatch(argument) or abs(int(argument)) > _CURSOR_MAX:
        raise CommandError("ERR invalid cursor")
    return int(argument) % (_CURSOR_MAX + 1)


@_command("flushall", -1, "write", "Remove every key")
@_command("flushdb", -1, "write", "Remove every key")
def flushall(client: Connection, request: Request) -> bytes:
    if len(request) > 2 or (len(request) == 2 and request[1].upper() not in (b"SYNC", b"ASYNC")):
        raise CommandError(SYNTAX)
    client.store.clear()
    if request[0].lower() == b"flushall":
        client.server.persistence.flushed()
    return resp.OK


# ---- expiry


@_command("expire", -3, "write fast", "Have a key expire in so many seconds", keys=_ONE_KEY)
def expire(client: Connection, request: Request) -> bytes:
    return _expire(client, request, "expire", unit_ms=1000, relative=True)


@_command("pexpire", -3, "write fast", "Have a key expire in so many milliseconds", keys=_ONE_KEY)
def pexpire(client: Connection, request: Request) -> bytes:
    return _expire(client, request, "pexpire", unit_ms=1, relative=True)


@_command("expireat", -3, "write fast", "Have a key expire at a time in seconds", keys=_ONE_KEY)
def expireat(client: Connection, request: Request) -> bytes:
    return _expire(client, request, "expireat", unit_ms=1000, relative=False)


@_command("pexpireat", -3, "write fast", "Have a key expire at a time in milliseconds", keys=_ONE_KEY)
def pexpireat(client: Connection, request: Request) -> bytes:
    return _expire(client, request, "pexpireat", unit_ms=1, relative=False)


def _expire(client: Connection, request: Request, command: str, *, unit_ms: int, relative: bool) -> bytes:
    store, key = client.store, request[1]
    options = _expire_options(request[3:])
    expires_at_ms = expiry_argument(request[2], command, unit_ms=unit_ms, relative=relative, positive=False)
    if key not in store:
        return resp.ZERO
    now = store.expiry(key)
    if (
        (b"NX" in options and now is not None)
        or (b"XX" in options and now is None)
        or (b"GT" in options and (now is None or expires_at_ms <= now))
        or (b"LT" in options and now is not None and expires_at_ms >= now)
    ):
        return resp.ZERO
    if expires_at_ms <= now_ms():
        store.delete(key)
    else:
        store.set_expiry(key, expires_at_ms)
    return resp.ONE


def _expire_options(words: list[bytes]) -> set[bytes]:
    options = {word.upper() for word in words}
    for word in words:
        if word.upper() not in (b"NX", b"XX", b"GT", b"LT"):
            raise CommandError(f"ERR Unsupported option {word.decode('latin-1')}")
    if b"NX" in options and len(options) > 1:
        raise CommandError("ERR NX and XX, GT or LT options at the same time are not compatible")
    if {b"GT", b"LT"} <= options:
        raise CommandError("ERR GT and LT options at the same time are not compatible")
    return options


@_command("persist", 2, "write fast", "Have a key not expire", keys=_ONE_KEY)
def persist(client: Connection, request: Request) -> bytes:
    store, key = client.store, request[1]
    if key not in store or store.expiry(key) is None:
        return resp.ZERO
    store.set_expiry(key, None)
    return resp.ONE


@_command("ttl", 2, "readonly fast", "Return in how many seconds a key expires", keys=_ONE_KEY)
def ttl(client: Connection, request: Request) -> bytes:
    return _expiry_reply(client, request[1], unit_ms=1000, relative=True)


@_command("pttl", 2, "readonly fast", "Return in how many milliseconds a key expires", keys=_ONE_KEY)
def pttl(client: Connection, request: Request) -> bytes:
    return _expiry_reply(client, request[1], unit_ms=1, relative=True)


@_command("expiretime", 2, "readonly fast", "Return when a key expires, in seconds", keys=_ONE_KEY)
def expiretime(client: Connection, request: Request) -> bytes:
    return _expiry_reply(client, request[1], unit_ms=1000, relative=False)


@_command("pexpiretime", 2, "readonly fast", "Return when a key expires, in milliseconds", keys=_ONE_KEY)
def pexpiretime(client: Connection, request: Request) -> bytes:
    return _expiry_reply(client, request[1], unit_ms=1, relative=False)


def _expiry_reply(client: Connection, key: bytes, *, unit_ms: int, relative: bool) -> bytes:
    if key not in client.store:
        return resp.integer(-2)
    expires_at_ms = client.store.expiry(key)
    if expires_at_ms is None:
        return resp.integer(-1)
    shown_ms = max(0, expires_at_ms - now_ms()) if relative else expires_at_ms
    return resp.integer((shown_ms + unit_ms // 2) // unit_ms)
