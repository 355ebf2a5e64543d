"""MULTI, EXEC and WATCH: several commands as one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from examples.memkv import resp
from examples.memkv.commands import CommandError, Family, unknown_command, wrong_arity
from examples.memkv.requests import Request
from examples.memkv.store import StoreFullError

if TYPE_CHECKING:
    from examples.memkv.connection import Connection
    from memsafe import Budget, Reservation

TRANSACTIONS: Final = Family("transactions")
_command = TRANSACTIONS.command

_AT_ONCE: Final = frozenset((b"exec", b"discard", b"multi", b"watch", b"quit", b"reset"))


_REQUEST_BYTES: Final = 64  # of a queued request beside its words, and of each word beside its content


class Transaction:
    """What a connection has queued since MULTI, charged, and whether EXEC may still run it."""

    __slots__ = ("_budget", "_charged", "broken", "requests")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._charged: list[Reservation] = []
        self.requests: list[Request] = []
        self.broken = False

    def add(self, request: Request) -> bool:
        """Queue *request*, if there is room."""
        reservation = self._budget.try_reserve(sum(map(len, request)) + _REQUEST_BYTES * (len(request) + 1))
        if reservation is None:
            return False
        self._charged.append(reservation)
        self.requests.append(request)
        return True

    def end(self) -> None:
        """Give back what was charged."""
        for reservation in self._charged:
            reservation.release()


def queue(client: Connection, request: Request) -> bytes:
    """Take *request* for later, or run it now if it is one that ends or rules the transaction."""
    transaction = client.transaction
    assert transaction is not None
    name = request[0].lower()
    if name in _AT_ONCE:
        return client.answer(request)
    command = client.server.commands.get(name)
    try:
        if command is None:
            raise unknown_command(request)
        if not command.accepts(len(request)):
            raise wrong_arity(command)
    except CommandError:
        transaction.broken = True
        raise
    if refusal := client.server.refusal(command.bits):
        transaction.broken = True
        return refusal
    if not transaction.add(request):
        transaction.broken = True
        raise StoreFullError
    return b"+QUEUED\r\n"


@_command("multi", 1, "fast", "Begin to queue commands")
def multi(client: Connection, request: Request) -> bytes:
    if client.transaction is not None:
        raise CommandError("ERR MULTI calls can not be nested")
    client.transaction = Transaction(client.server.clients_budget)
    return resp.OK


@_command("discard", 1, "fast", "Forget the queued commands")
def discard(client: Connection, request: Request) -> bytes:
    if client.transaction is None:
        raise CommandError("ERR DISCARD without MULTI")
    forget(client)
    return resp.OK


@_command("exec", 1, "", "Run the queued commands, if no watched key was changed")
def exec_(client: Connection, request: Request) -> bytes:
    transaction, watched = client.transaction, client.watched
    if transaction is None:
        raise CommandError("ERR EXEC without MULTI")
    forget(client)
    if transaction.broken:
        raise CommandError("EXECABORT Transaction discarded because of previous errors.")
    store = client.store
    if any(store.peek(key) is not value or store.expiry(key) != expiry for key, (value, expiry) in watched.items()):
        return b"*-1\r\n" if client.protocol == 2 else resp.NIL3
    return resp.array([client.answer(queued) for queued in transaction.requests])


@_command("watch", -2, "fast", "Have EXEC do nothing if a key is changed before", keys=(1, -1, 1))
def watch(client: Connection, request: Request) -> bytes:
    if client.transaction is not None:
        raise CommandError("ERR WATCH inside MULTI is not allowed")
    store = client.store
    for key in request[1:]:
        # The very object that is there now: another one, even if equal, was written since.
        client.watched.setdefault(key, (store.peek(key), store.expiry(key)))
    return resp.OK


@_command("unwatch", 1, "fast", "Forget the watched keys")
def unwatch(client: Connection, request: Request) -> bytes:
    client.watched.clear()
    return resp.OK


def forget(client: Connection) -> None:
    """End a transaction, and forget the watched keys."""
    if client.transaction is not None:
        client.transaction.end()
        client.transaction = None
    client.watched = {}
