"""The server: connections, the loop's regular work, and what is refused when memory or the disk is short."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Final, cast

from examples.memkv import resp
from examples.memkv.admin import CONNECTION, SERVER
from examples.memkv.commands import DENYOOM, PING, WRITE, Command, CommandError, unknown_command, wrong_arity
from examples.memkv.config import Settings
from examples.memkv.keys import KEYS
from examples.memkv.persistence import Persistence, SaveError
from examples.memkv.requests import REFUSED, Request, RequestParser
from examples.memkv.store import Store, StoreFullError
from examples.memkv.strings import STRINGS
from examples.memkv.transactions import TRANSACTIONS, Transaction, forget, queue
from memsafe import (
    Budget,
    MemsafeError,
    PressureEvent,
    PressureLevel,
    PressureMonitor,
    Reservation,
    format_size,
    memory_status,
    trim,
)

if TYPE_CHECKING:
    from examples.memkv.commands import Handler
    from examples.memkv.config import Config

_log = logging.getLogger("memkv")

OUT_OF_MEMORY: Final = resp.error("OOM command not allowed when used memory > 'maxmemory'.")
_MISCONF: Final = resp.error(
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk. Commands that "
    "may modify the data set are disabled, because this instance is configured to report errors during writes if RDB "
    "snapshotting fails (stop-writes-on-bgsave-error option). Please check the Redis logs for details about the RDB "
    "error."
)

_CRON_S: Final = 0.1
_EXPIRE_CYCLE_S: Final = 0.01  # of each tenth of a second; of each fiftieth while many keys expire at once
_SHED_AGAIN_S: Final = 1.0
_LOOK_S: Final = 0.05
_STEP_BYTES_MIN: Final = 1024 * 1024
_FOREVER: Final = 2**31

COMMANDS: Final[dict[bytes, Command]] = {
    **STRINGS.commands,
    **KEYS.commands,
    **TRANSACTIONS.commands,
    **CONNECTION.commands,
    **SERVER.commands,
}


def _dispatch_table() -> dict[bytes, tuple[Handler, int, int, int]]:
    """Return what is looked up for each request: handler, least and most words, bits; upper case and lower case."""
    table = {}
    for name, command in COMMANDS.items():
        least, most = abs(command.arity), command.arity if command.arity > 0 else _FOREVER
        table[name] = table[name.upper()] = (command.handler, least, most, command.bits)
    return table


class Stats:
    """What was counted since the start, or since CONFIG RESETSTAT."""

    __slots__ = (
        "bytes_in", "bytes_out", "commands", "connections", "errors", "latest_commands", "operations_per_s", "rejected",
    )  # fmt: skip

    def __init__(self) -> None:
        self.connections = self.rejected = self.commands = self.errors = 0
        self.bytes_in = self.bytes_out = 0
        self.latest_commands = 0
        self.operations_per_s = 0.0

    def sample(self, since_s: float) -> None:
        """Note the rate of commands since the last sample."""
        rate = (self.commands - self.latest_commands) / since_s
        self.latest_commands = self.commands
        self.operations_per_s += 0.3 * (rate - self.operations_per_s)


class Server:
    """One store, and everybody who talks to it. All of it runs on one event loop.

    Attributes:
        denied: The bits of commands that are refused now; refusal() says why.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.settings = Settings(config)
        self.budget = Budget(config.limit_bytes, name="memkv")
        self.data_budget = self.budget.child("data")
        self.clients_budget = self.budget.child("clients")
        self.store = Store(self.data_budget)
        self.persistence = Persistence(config, self.store, self.update_denied)
        self.monitor = PressureMonitor()
        self.pressure: PressureEvent | None = None
        self.pressure_changes = 0
        self.shed_bytes = 0
        self.stats = Stats()
        self.commands = COMMANDS
        self.table = _dispatch_table()
        self.connections: dict[int, Connection] = {}
        self.denied = 0
        self.started_s = time.time()
        self._next_id = 0
        self._shed_at_s = 0.0
        self._step_bytes = _STEP_BYTES_MIN
        self._listener: asyncio.Server | None = None
        self._stopped: asyncio.Event | None = None

    # ---- life

    async def run(self) -> None:
        """Load the dump, serve until told to end.

        Raises:
            RDBError, LoadError, OSError: The dump cannot be loaded, or the port not be had.
        """
        try:
            await self._serve()
        finally:
            self.monitor.close()
            self.persistence.call_off()
            if self._listener is not None:
                self._listener.close()
            for connection in list(self.connections.values()):
                connection.close()
            self.store.close()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._listen_for_pressure(loop)
        self.persistence.load(self._is_critical)
        self.store.evicts = self.config.policy == "allkeys-lru"
        self._listener = await loop.create_server(
            lambda: Connection(self), self.config.host, self.config.port, backlog=511
        )
        self.config.port = self._listener.sockets[0].getsockname()[1]
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._terminated, signal.Signals(number).name)
        _log.info("ready to accept connections on %s port %d", self.config.host, self.config.port)
        cron = asyncio.create_task(self._cron())
        try:
            await self._stopped.wait()
        finally:
            cron.cancel()

    def _listen_for_pressure(self, loop: asyncio.AbstractEventLoop) -> None:
        def tell(event: PressureEvent) -> None:
            loop.call_soon_threadsafe(self._pressure_changed, event)

        self.monitor.on(PressureLevel.LOW, tell)
        self.monitor.on(PressureLevel.NORMAL, tell)
        try:
            self.monitor.start()
        except MemsafeError as error:
            _log.warning("nobody will warn of low memory: %s", error)
        else:
            self.budget.on_soft_limit(self._look)
            self._look(self.budget)

    def stop(self) -> None:
        """Have run() return."""
        assert self._stopped is not None
        self._stopped.set()

    def _terminated(self, name: str) -> None:
        _log.info("%s received, shutting down", name)
        try:
            self.shut_down(save=bool(self.config.save_points))
        except SaveError as error:
            _log.error("not shutting down, for the data could not be saved: %s", error)

    def shut_down(self, *, save: bool) -> None:
        """Stop, saved or not.

        Raises:
            SaveError: It could not be saved; the server goes on.
        """
        self.persistence.call_off()
        if save:
            self.persistence.save()
        self.stop()

    async def _cron(self) -> None:
        """Do the regular work ten times a second, each part bounded in time."""
        last_s = time.monotonic()
        more_expire = False
        while True:
            await asyncio.sleep(_EXPIRE_CYCLE_S if more_expire else _CRON_S)
            now_s = time.monotonic()
            try:
                more_expire = self.store.expire_due(budget_s=_EXPIRE_CYCLE_S)
                self.stats.sample(now_s - last_s)
                self.persistence.save_if_due()
                self._shed_on(now_s)
                self._lower_tripwire()
                self._close_idle(now_s)
                self.update_denied()
            except Exception:
                _log.exception("the regular work failed; it goes on")
            last_s = now_s

    def _close_idle(self, now_s: float) -> None:
        timeout_s = self.config.timeout_s
        if timeout_s:
            for connection in list(self.connections.values()):
                if now_s - connection.active_at_s > timeout_s:
                    connection.close()

    def reset_stats(self) -> None:
        """Count from zero again."""
        self.stats = Stats()
        self.store.reset_stats()

    # ---- connections

    def admit(self, connection: Connection) -> bool:
        """Take in a new connection, if there may be one more."""
        if len(self.connections) >= self.config.clients_max:
            self.stats.rejected += 1
            return False
        self._next_id += 1
        connection.id = self._next_id
        self.connections[connection.id] = connection
        self.stats.connections += 1
        return True

    # ---- limits

    def configure(self, changes: dict[str, object]) -> None:
        """Set attributes of the configuration, and have them take effect."""
        for attribute, value in changes.items():
            setattr(self.config, attribute, value)
        if "policy" in changes or "limit_bytes" in changes:
            self.store.evicts = self.config.policy == "allkeys-lru"
            self.budget.limit_bytes = self.config.limit_bytes
            self._set_ceiling()
        self.update_denied()

    def update_denied(self) -> None:
        """Find out which commands are to be refused now."""
        denied = WRITE | PING if self.persistence.stops_writes else 0
        if self._is_over_limit() or self._is_critical():
            denied |= DENYOOM
        self.denied = denied

    def refusal(self, bits: int) -> bytes | None:
        """Return why a command with *bits* is refused, or None if it is not any more."""
        self.update_denied()
        if bits & DENYOOM:
            if self._is_over_limit():
                return OUT_OF_MEMORY
            if self._is_critical():
                why = self.pressure.detail if self.pressure is not None else "memory is nearly gone"
                return resp.error(f"OOM command not allowed under critical memory pressure: {why}")
        return _MISCONF if bits & self.denied & (WRITE | PING) else None

    def _is_over_limit(self) -> bool:
        limit_bytes = self.config.limit_bytes
        if limit_bytes is None or self.budget.used_bytes <= limit_bytes:
            return False
        self.budget.reclaim(self.budget.used_bytes - limit_bytes)
        return self.budget.used_bytes > limit_bytes

    # ---- pressure

    def drill(self, level: PressureLevel) -> None:
        """Go to *level* as if memory were so short; does not wait."""
        asyncio.get_running_loop().run_in_executor(None, self.monitor.simulate, level)

    def _look(self, budget: Budget) -> None:
        """Have the monitor look at the machine before much more is written: its warning may come late on a busy one.

        The budget's soft limit is the tripwire: it is crossed, and so this called, by the very write that grows beyond
        it, and is set anew to where an eighth of what the machine leaves will be taken.
        """
        with suppress(TimeoutError, RuntimeError):  # it is busy with answering already, or closed
            self.monitor.check(timeout_s=_LOOK_S)
        available_bytes = memory_status().available_bytes
        self._step_bytes = _STEP_BYTES_MIN if available_bytes is None else max(_STEP_BYTES_MIN, available_bytes // 8)
        budget.soft_limit_bytes = budget.used_bytes + self._step_bytes
        self.update_denied()

    def _lower_tripwire(self) -> None:
        """What was given back may be written again only under the same watch."""
        limit_bytes = self.budget.used_bytes + self._step_bytes
        if (self.budget.soft_limit_bytes or 0) > limit_bytes:
            self.budget.soft_limit_bytes = limit_bytes

    def _is_critical(self) -> bool:
        return self.monitor.level is PressureLevel.CRITICAL

    def _pressure_changed(self, event: PressureEvent) -> None:
        """Answer a change of level; on the loop, told by the monitor's thread."""
        self.pressure = event
        self.pressure_changes += 1
        _log.warning("memory pressure %s, was %s: %s", event.level.name, event.previous.name, event.detail)
        if event.level > event.previous:
            self._shed()
        self._set_ceiling()
        self.update_denied()

    def _set_ceiling(self) -> None:
        """While memory is short, let nothing grow if room can be made instead; take that back with the all-clear."""
        short = self.pressure is not None and self.pressure.level > PressureLevel.NORMAL
        self.data_budget.limit_bytes = self.data_budget.used_bytes if short and self.store.evicts else None

    def _shed_on(self, now_s: float) -> None:
        """Go on shedding while it is critical."""
        if self._is_critical() and now_s - self._shed_at_s >= _SHED_AGAIN_S:
            self._shed()
            self._set_ceiling()

    def _shed(self) -> None:
        """Give back what is kept for speed, a share of the data if that may go, and tell the kernel."""
        self._shed_at_s = time.monotonic()
        for connection in self.connections.values():
            connection.drop_buffers()
        if self.store.evicts:
            freed = self.store.evict(int(self.store.used_bytes * self.config.shed_ratio))
            self.shed_bytes += freed
            _log.warning("shed %s of data", format_size(freed))
        self.store.compact()
        trim()


class Connection(asyncio.Protocol):
    """One client."""

    __slots__ = (
        "_backlog", "_charged_bytes", "_held", "_out", "_parser", "_parts", "_paused", "_transport", "active_at_s",
        "address", "closing", "created_s", "id", "last_command", "library", "library_version", "local_address", "name",
        "nil", "protocol", "server", "store", "transaction", "watched",
    )  # fmt: skip

    def __init__(self, server: Server) -> None:
        self.server = server
        self.store = server.store
        self.id = 0
        self.name = self.library = self.library_version = b""
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
        # Where the limit was lowered below what is used, even nothing is refused.
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
