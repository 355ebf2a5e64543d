"""Saving and loading: when, by whom, and what follows from a failure, as redis-server has it."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from examples.memkv import rdb
from examples.memkv.store import Store, StoreFullError
from memsafe import (
    MemsafeError,
    SnapshotCancelledError,
    SnapshotInProgressError,
    SnapshotJob,
    SnapshotRefusedError,
    SnapshotResult,
    SnapshotSchedule,
    fork_snapshot,
    format_size,
)
from memsafe.snapshot import AtomicFile, SnapshotWriter

if TYPE_CHECKING:
    from pathlib import Path

    from examples.memkv.config import Config

_log = logging.getLogger("memkv")

_RETRY_AFTER_S: Final = 5  # a failed automatic save is not tried again sooner (CONFIG_BGSAVE_RETRY_DELAY)


class SaveError(Exception):
    """There is no new dump; the message says why. The old one is as it was."""


class LoadError(Exception):
    """The dump, though intact, does not fit; the message says into what. It is as it was."""


class Persistence:
    """The dump on disk: written in the background by a forked child, or here; read at the start.

    Attributes:
        job: The save that is running, or None.
        last_save_s: When the dump was last written, or the server begun, in seconds since 1970.
        last_error: Why the last save failed; None after one that succeeded.
        last_refused: Whether that was before it began.
        last_pause_s: For how long the last fork stopped the server.
        saves: How many succeeded.
        loaded, loaded_expired: Keys taken from the dump at the start, and left there because their time had come.
    """

    def __init__(self, config: Config, store: Store, on_change: Callable[[], object]) -> None:
        """Look after the dump of *store*; *on_change* is called when stops_writes may have changed."""
        self._config = config
        self._store = store
        self._on_change = on_change
        self.job: SnapshotJob | None = None
        self.last_save_s = int(time.time())
        self.last_error: str | None = None
        self.last_refused = False
        self.last_duration_s = -1.0
        self.last_pause_s = 0.0
        self.last_copy_bytes = self.copy_peak_bytes = 0
        self.saves = self.forks = 0
        self.loaded = self.loaded_expired = 0
        self._job_began_s = 0.0
        self._schedule = SnapshotSchedule(
            config.dump,
            self._write_in_child,
            points=config.save_points or (),
            changes=lambda: store.changes,
            retry_s=_RETRY_AFTER_S,
            retry_max_s=_RETRY_AFTER_S,
            take=self._begin,
        )

    @property
    def changes(self) -> int:
        """What was changed since the last save."""
        return self._schedule.changes_since

    @property
    def last_result(self) -> SnapshotResult | None:
        """Of the last save in the background that succeeded."""
        return self._schedule.last_result

    @property
    def job_age_s(self) -> float | None:
        """For how long the running save has run; None without one."""
        return time.monotonic() - self._job_began_s if self.job else None

    @property
    def stops_writes(self) -> bool:
        """Whether writes are refused because what they write may never be saved.

        redis-server does so only where it has save points. A server that was not told anything of save points counts
        every save that was begun and failed, but not one that was refused: that harmed nothing.
        """
        config = self._config
        if self.last_error is None or not config.stop_writes_on_bgsave_error:
            return False
        return bool(config.save_points) if config.save_points is not None else not self.last_refused

    # ---- saving

    def start(self) -> None:
        """Begin a save in the background.

        Raises:
            SaveError: One is running, or it would not be safe, or cannot be begun; the message says why.
        """
        if self.job is not None:
            raise SaveError("Background save already in progress")
        self._schedule.path = self._config.dump
        try:
            self._schedule.save_now()
        except (MemsafeError, OSError) as error:
            raise SaveError(f"Background saving {'refused' if self.last_refused else 'failed'}: {error}") from None

    def _begin(self, path: Path, write: Callable[[SnapshotWriter], object]) -> SnapshotJob:
        """Take a snapshot for the schedule."""
        self._job_began_s = time.monotonic()
        try:
            job = fork_snapshot(path, write, max_copy=self._config.snapshot_max_copy_bytes)
        except (MemsafeError, OSError) as error:
            self._failed(str(error), refused=isinstance(error, (SnapshotRefusedError, SnapshotInProgressError)))
            raise
        self.job = job
        self.forks += 1
        _log.info("background saving to %s started", path)
        loop = asyncio.get_running_loop()
        job.add_done_callback(lambda job: loop.call_soon_threadsafe(self._ended, job))
        return job

    def _write_in_child(self, out: SnapshotWriter) -> None:
        self._write(out, lambda done, total: out.progress(done, total or 0))

    def _write(self, out: rdb.Writer, progress: Callable[[int, int | None], object] | None = None) -> None:
        rdb.write(
            out,
            self._store.items(),
            total_hint=len(self._store),
            progress=progress,
            aux={"used-mem": self._store.used_bytes},
            compress=self._config.rdbcompression,
        )

    def _ended(self, job: SnapshotJob) -> None:
        """Take in how *job* ended; on the loop. One that was called off before has been taken in already."""
        if job is not self.job:
            return
        self.job = None
        self.last_duration_s = time.monotonic() - self._job_began_s
        self.last_copy_bytes = job.copy_bytes
        try:
            result = job.wait(0)
        except MemsafeError as error:
            self.copy_peak_bytes = max(self.copy_peak_bytes, job.peak_copy_bytes)
            self._failed(str(error))
            return
        self.last_pause_s = result.pause_s
        self.last_copy_bytes = result.peak_copy_bytes or 0
        self.copy_peak_bytes = max(self.copy_peak_bytes, self.last_copy_bytes)
        self._succeeded()
        _log.info("saved %d bytes to %s in %.2f s", result.size_bytes, self._config.dump, result.duration_s)

    def save(self) -> None:
        """Save here and now: nothing else is done meanwhile.

        Raises:
            SaveError: A save in the background is running, or it failed; the message says why.
        """
        if self.job is not None:
            raise SaveError("Background save already in progress")
        try:
            with AtomicFile(self._config.dump) as file:
                with open(file.fd, "wb", closefd=False) as out:
                    self._write(out)
                file.commit()
        except OSError as error:
            self._failed(f"{self._config.dump}: {error.strerror or error}")
            raise SaveError(self.last_error) from None
        self._schedule.note_saved()
        self._succeeded()
        _log.info("saved to %s", self._config.dump)

    def _succeeded(self) -> None:
        self.last_save_s = int(time.time())
        self.last_error, self.last_refused = None, False
        self.saves += 1
        self._on_change()

    def _failed(self, why: str, *, refused: bool = False) -> None:
        _log.warning("saving failed: %s", why)
        self.last_error, self.last_refused = why.partition("\n")[0], refused  # a child's traceback is for the log
        self._on_change()

    def save_if_due(self) -> None:
        """Begin a save if a save point is reached; not at once again after one that failed."""
        if self.job is None:
            self._schedule.path, self._schedule.points = self._config.dump, self._config.save_points or ()
            self._schedule.tick()

    def call_off(self) -> None:
        """End the running save, if there is one, and wait until its child is gone; the old dump stays."""
        job, self.job = self.job, None
        if job is None:
            return
        job.cancel()
        try:
            job.wait()
        except MemsafeError as error:
            if not isinstance(error, SnapshotCancelledError):
                _log.warning("the save that was called off had failed: %s", error)
        else:
            self._succeeded()

    def flushed(self) -> None:
        """Do what is to be done after every key was removed: a save of what was there is pointless."""
        self.call_off()
        if self._config.save_points:
            try:
                self.save()
            except SaveError as error:
                _log.warning("saving the empty store: %s", error)

    # ---- loading

    def load(self, is_critical: Callable[[], bool]) -> None:
        """Take in the dump, if there is one, whole; keys whose time has come are left out. Nothing is evicted for it.

        Args:
            is_critical: Whether memory is nearly gone.

        Raises:
            rdb.RDBError: It is no intact dump.
            LoadError: The limit, or the memory that there is, is smaller than the data.
            OSError: It cannot be read.
        """
        dump, store = self._config.dump, self._store
        if not os.path.lexists(dump):
            return
        began = time.monotonic()
        now_ms = time.time_ns() // 1_000_000
        for key, value, expires_at_ms in rdb.read(dump):
            if expires_at_ms is not None and expires_at_ms <= now_ms:
                self.loaded_expired += 1
                continue
            if is_critical():
                raise LoadError(f"the memory left is smaller than the data: {self._so_far()}")
            try:
                store.set(key, value, expires_at_ms)
            except StoreFullError:
                limit = format_size(self._config.limit_bytes)
                raise LoadError(f"the limit of {limit} is smaller than the data: {self._so_far()}") from None
            self.loaded += 1
        self._schedule.note_saved()
        _log.info("loaded %d keys from %s in %.2f s", self.loaded, dump, time.monotonic() - began)

    def _so_far(self) -> str:
        return (
            f"{self.loaded} keys of {self._config.dump} fit, {format_size(self._store.used_bytes)} with what they cost"
        )
