"""One client: its bytes in and out, its requests run in order, and the memory that waits for it charged."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, cast

from examples.memkv import resp
from examples.memkv.admin import CONNECTION, SERVER
from examples.memkv.commands import Command, CommandError, unknown_command, wrong_arity
from examples.memkv.keys import KEYS
from examples.memkv.requests import REFUSED, Request, RequestParser
from examples.memkv.store import StoreFullError
from examples.memkv.strings import STRINGS
from examples.memkv.transactions import TRANSACTIONS, Transaction, forget, queue

if TYPE_CHECKING:
    from examples.memkv.commands import Handler
    from examples.memkv.server import Server
    from memsafe import Reservation

_log = logging.getLogger("memkv")

OUT_OF_MEMORY: Final = resp.error("OOM command not allowed when used memory > 'maxmemory'.")

_FOREVER: Final = 2**31

COMMANDS: Final[dict[bytes, Command]] = {
    **STRINGS.commands,
    **KEYS.commands,
    **TRANSACTIONS.commands,
    **CONNECTION.commands,
    **SERVER.commands,
}


def dispatch_table() -> dict[bytes, tuple[Handler, int, int, int]]:
    """Return what is looked up for each request: handler, least and most words, bits; upper case and lower case."""
    table = {}
    for name, command in COMMANDS.items():
        least, most = abs(command.arity), command.arity if command.arity > 0 else _FOREVER
        table[name] = table[name.upper()] = (command.handler, least, most, command.bits)
    return table


class Connection(asyncio.Protocol):
    """One client."""

    __slots__ = (
        "_backlog", "_charged_bytes", "_held", "_out", "_parser", "_parts", "_paused", "_transport", "active_at_s",
        "address", "closing", "created_s", "id", "last_command", "lib_name", "lib_ver", "local_address", "name",
        "nil", "protocol", "server", "store", "transaction", "watched",
    )  # fmt: skip

    def __init__(self, server: Server) -> None:
        self.server = server
        self.store = server.store
        self.id = 0
        self.name = self.lib_name = self.lib_ver = b""
        self.address = self.local_address = "?:0"
        self.created_s = self.active_at_s = time.monotonic()
        self.last_command = b"NULL"
        self.closing = False
        self.transaction: Transaction | None = None
        self.watched: dict[bytes, tuple[bytes | None, int | None]] = {}
        self.speak(2)
        self._parser = RequestParser(self._hold)
        self._out: list[bytes] = []
        self._parts: Iterator[bytes | memoryview] | None = None  # of a long reply that is being sent
        self._backlog: list[Request] = []  # requests that wait until the client takes its replies
        self._paused = False
        self._held: Reservation | None = None  # for a request that is arriving
        self._charged_bytes = 0  # for what waits here though nobody was asked

    # ---- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self._transport.set_write_buffer_limits(high=resp.PIECE_BYTES)
        self.address = _shown(transport.get_extra_info("peername"))
        self.local_address = _shown(transport.get_extra_info("sockname"))
        if not self.server.admit(self):
            self._transport.write(resp.error("ERR max number of clients reached"))
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.pop(self.id, None)
        self.closing = True
        self._backlog = []
        self._parts = None
        forget(self)
        if self._held is not None:
            self._held.release()
        if self._charged_bytes:
            self.server.clients_budget.uncharge(self._charged_bytes)
            self._charged_bytes = 0

    def data_received(self, data: bytes) -> None:
        self.server.stats.bytes_in += len(data)
        parser = self._parser
        requests = parser.parse(data)
        if self._backlog:
            self._backlog += requests
            self._account()
            return
        if requests:
            self._run(requests)
        if parser.partial or self._charged_bytes:
            self._account()
        if parser.failure is not None:
            self._finish()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        asyncio.get_running_loop().call_soon(self._go_on)

    # ---- running

    def speak(self, protocol: int) -> None:
        """Answer in RESP version *protocol* from now on."""
        self.protocol = protocol
        self.nil = resp.NIL if protocol == 2 else resp.NIL3

    def _run(self, requests: list[Request]) -> None:
        """Run *requests* in order and send the replies together; stop where the client does not take them."""
        server, out, table = self.server, self._out, self.server.table
        server.stats.commands += len(requests)
        self.active_at_s = time.monotonic()
        if self._held is not None:
            self._held.resize(self._parser.held_bytes)  # from here on, what it was for is charged as data
        size = 0
        pending = iter(requests)
        for request in pending:
            entry = table.get(request[0]) if self.transaction is None else None
            if entry is None:
                reply = self._answer_unusual(request)
            else:
                handler, least, most, bits = entry
                try:
                    if least <= len(request) <= most:
                        reply = (bits & server.denied and server.refusal(bits)) or handler(self, request)
                        if reply is resp.NIL:
                            reply = self.nil
                    else:
                        raise wrong_arity(COMMANDS[request[0].lower()])
                except Exception as error:
                    reply = self._failure(request, error)
            out.append(reply)
            size += len(reply)
            if self._parts is not None or size >= resp.PIECE_BYTES:
                size = 0
                self._flush()
                if self._paused or self.closing:
                    break
            elif self.closing:
                break
        self.last_command = request[0].lower() if request else b"NULL"
        if out:
            self._flush()
        if self.closing:
            self._transport.close()
        elif self._paused:
            self._backlog = list(pending)
            self._transport.pause_reading()
            self._account()

    def _answer_unusual(self, request: Request) -> bytes:
        """Answer a request in mixed case, one inside a transaction, and what is no command."""
        if request is REFUSED:
            self.server.stats.errors += 1
            if self.transaction is not None:
                self.transaction.broken = True
            return OUT_OF_MEMORY
        if self.transaction is not None:
            try:
                return queue(self, request)
            except (CommandError, StoreFullError) as error:
                return self._failure(request, error)
        if request[0].lower() in (b"post", b"host:"):
            _log.warning("%s speaks HTTP: somebody may be abusing a browser to get at the data", self.address)
            self._out.clear()
            self.closing = True
            return b""
        return self.answer(request, whole=False)

    def answer(self, request: Request, *, whole: bool = True) -> bytes:
        """Run one request and return the reply, of any kind; *whole*: also a long one, in one piece."""
        command = COMMANDS.get(request[0].lower())
        try:
            if command is None:
                raise unknown_command(request)
            if not command.accepts(len(request)):
                raise wrong_arity(command)
            bits = command.bits
            reply = (bits & self.server.denied and self.server.refusal(bits)) or command.handler(self, request)
        except Exception as error:
            return self._failure(request, error)
        if whole and self._parts is not None:
            reply, self._parts = b"".join(self._parts), None
        return self.nil if reply is resp.NIL else reply

    def _failure(self, request: Request, error: Exception) -> bytes:
        """Return the reply for a command that raised."""
        self.server.stats.errors += 1
        if isinstance(error, CommandError):
            return resp.error(str(error).encode("latin-1", "replace"))
        if isinstance(error, StoreFullError):
            return OUT_OF_MEMORY
        _log.error("command %r failed", request[:1], exc_info=error)
        return resp.error("ERR internal error, see the log")

    def send(self, parts: Iterator[bytes | memoryview]) -> bytes:
        """Answer with *parts*, which are sent as the client takes them; returns what the command is to return."""
        self._parts = parts
        return b""

    def _flush(self) -> None:
        """Hand the replies to the transport, and as much of a long one as it takes."""
        out = self._out
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        if data:
            self.server.stats.bytes_out += len(data)
            self._transport.write(data)
        while self._parts is not None and not self._paused and not self._transport.is_closing():
            part = next(self._parts, None)
            if part is None:
                self._parts = None
            else:
                self.server.stats.bytes_out += len(part)
                self._transport.write(part)

    def _go_on(self) -> None:
        """Send and run what had to wait."""
        if self._paused or self._transport.is_closing():
            return
        self._flush()
        if self._paused:
            self._account()
            return
        requests, self._backlog = self._backlog, []
        if requests:
            self._run(requests)
        if not self._paused and not self.closing:
            self._account()
            self._transport.resume_reading()
            if self._parser.failure is not None:
                self._finish()

    def _finish(self) -> None:
        """Tell the client what was wrong with what it sent, and end."""
        assert self._parser.failure is not None
        if not self._backlog and self._parts is None and not self.closing:
            self.closing = True
            self.server.stats.errors += 1
            self._transport.write(self._parser.failure.reply)
            self._transport.close()

    def close(self) -> None:
        """End the connection once what was sent has gone out."""
        self.closing = True
        self._transport.close()

    # ---- memory

    @property
    def charged_bytes(self) -> int:
        """What the budget is charged for this connection."""
        return self._charged_bytes + (self._held.size_bytes if self._held is not None else 0)

    @property
    def fileno(self) -> int:
        """The socket's descriptor; -1 once it is closed."""
        sock = self._transport.get_extra_info("socket")
        return sock.fileno() if sock is not None else -1

    @property
    def pending_bytes(self) -> int:
        """What has arrived of a request that is not complete."""
        return self._parser.pending_bytes

    @property
    def output_bytes(self) -> int:
        """What waits to be sent."""
        return self._transport.get_write_buffer_size()

    def drop_buffers(self) -> None:
        """Give back what is kept for speed only."""
        self._parser.drop_buffers()

    def _hold(self, need_bytes: int) -> bool:
        """Ask for *need_bytes* for a request that is arriving."""
        if self._held is not None:
            return self._held.try_grow(need_bytes)
        self._held = self.server.clients_budget.try_reserve(need_bytes)
        return self._held is not None

    def _account(self) -> None:
        """Charge what waits here: the beginning of a request, replies, requests not run yet."""
        waiting = max(0, self._parser.pending_bytes - self._parser.held_bytes)
        if self._paused:
            waiting += self._transport.get_write_buffer_size()
            waiting += sum(len(word) for request in self._backlog for word in request)
        budget = self.server.clients_budget
        if waiting > self._charged_bytes:
            budget.charge(waiting - self._charged_bytes)
            self.server.update_denied()
        elif waiting < self._charged_bytes:
            budget.uncharge(self._charged_bytes - waiting)
        self._charged_bytes = waiting


def _shown(address: object) -> str:
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address or "?:0")
