"""The server: its life, the loop's regular work, and what is refused when memory or the disk is short."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from examples.memkv import resp
from examples.memkv.commands import DENYOOM, PING, WRITE
from examples.memkv.config import Settings
from examples.memkv.connection import COMMANDS, OUT_OF_MEMORY, Connection, dispatch_table
from examples.memkv.persistence import Persistence, SaveError
from examples.memkv.store import Store
from memsafe import (
    Budget,
    MemsafeError,
    PressureEvent,
    PressureLevel,
    PressureMonitor,
    format_size,
    memory_status,
    trim,
)

if TYPE_CHECKING:
    from examples.memkv.config import Config

_log = logging.getLogger("memkv")

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
        self.table = dispatch_table()
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
