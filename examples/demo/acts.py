"""The acts of the demo: each shows one thing, promises what must hold, and says its numbers."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import redis

from examples.demo import clients, corpus
from examples.demo.clients import CONNECTIONS, Writers
from examples.demo.pressure import Watch, squeeze, watching
from examples.demo.processes import DemoError, Store, memkv, redis_server, version_of
from examples.demo.show import Report
from examples.memkv import rdb
from memsafe import format_size
from memsafe._kernel.cgroup import MemoryCgroup

MIB = 1 << 20
SNAPSHOTS = 3
_HOT_KEYS = 300
_EVICTION_STEPS = 8
_EXPIRING_KEYS = 1000
_SETTLE_WITHIN_S = 20.0
_SAVE_WITHIN_S = 60.0


@dataclass(slots=True)
class Stage:
    """What the acts share."""

    report: Report
    files: corpus.Corpus
    directory: Path
    limit_bytes: int
    cgroup: MemoryCgroup | None
    store: Store
    stack: ExitStack
    state: corpus.Corpus = field(default_factory=dict)

    @property
    def dump(self) -> Path:
        """Where the store saves."""
        return self.directory / "dump.rdb"

    @contextmanager
    def client(self) -> Iterator[redis.Redis]:
        """Open a connection for a moment."""
        with self.store.connect() as client:
            yield client


def load(stage: Stage) -> None:
    """Every file of the standard library becomes a value, and reads back as it was."""
    report, files = stage.report, stage.files
    size_bytes = sum(map(len, files.values()))
    report.phase(
        "load",
        f"{len(files):,} files of Python's standard library, {format_size(size_bytes)}, over {CONNECTIONS} connections",
    )
    began = time.monotonic()
    clients.store(stage.store.connect, files)
    took_s = time.monotonic() - began
    info = stage.store.info()
    report.promise("every file is a key", info["db0"]["keys"] == len(files), f"{info['db0']['keys']:,} keys")
    compared = clients.compare(stage.store.connect, files)
    report.promise("every value reads back byte for byte", compared.equal, str(compared))
    used = info["used_memory"]
    report.promise(
        "the budget knows of them",
        size_bytes <= used <= info["maxmemory"],
        f"{format_size(used)} of {format_size(info['maxmemory'])}",
    )
    report.numbers(f"{len(files):,} files, {format_size(size_bytes)} at {size_bytes / took_s / 1e6:.0f} MB/s")


def refuse(stage: Stage) -> None:
    """A lowered limit refuses writes, loses nothing, and gives way when room is made."""
    report, store = stage.report, stage.store
    report.phase("refuse", "lower the limit under policy noeviction, and write on")
    loaded = store.info()["used_memory"]
    accepted: list[bytes] = []
    refused = 0
    for limit in (loaded + 16 * MIB, loaded + 8 * MIB, loaded):
        before = store.info()["used_memory"]
        _set(stage, "maxmemory", limit)
        more, refusals = _fill(stage, len(accepted))
        accepted += more
        refused += refusals
        used = store.info()["used_memory"]
        report.promise(
            f"at a limit of {format_size(limit)} it refuses",
            refusals and used <= max(limit, before) and (not more or before < limit),
            f"{format_size(before)} used, {len(more)} writes of 64 KiB accepted, then {refusals} answered -OOM",
        )
    compared = clients.compare(store.connect, stage.files)
    report.promise("a refusal loses nothing", compared.equal, str(compared))
    with stage.client() as client:
        deleted = sum(client.delete(key) for key in accepted)
        client.config_set("maxmemory", loaded + MIB)
        room = client.set("room", b"x" * 1024) and client.delete("room")
    report.promise("DEL makes room", room, f"{deleted} keys deleted, the next SET was taken")
    report.numbers(f"limit down to {format_size(loaded)}: {refused} writes refused, nothing lost")


def _fill(stage: Stage, start: int) -> tuple[list[bytes], int]:
    """Write new values from every connection until each was refused; return the keys written, and the refusals."""
    value = b"\0" * (64 * 1024)
    written: list[bytes] = []
    refusals = 0
    with ExitStack() as stack:
        connections = [stack.enter_context(stage.client()) for _ in range(CONNECTIONS)]
        for i in range(start, start + 10_000):
            key = b"extra:%d" % i
            try:
                connections[i % CONNECTIONS].set(key, value)
            except redis.exceptions.OutOfMemoryError:
                refusals += 1
                if refusals >= 2 * CONNECTIONS:
                    return written, refusals
            else:
                written.append(key)
    return written, refusals


def evict(stage: Stage) -> None:
    """Under allkeys-lru a lowered limit evicts what was not used, keeps what was, and writes go on."""
    report, store = stage.report, stage.store
    report.phase(
        "evict", f"lower the limit to the half in {_EVICTION_STEPS} steps under policy allkeys-lru, some keys in use"
    )
    small = [key for key, value in stage.files.items() if len(value) < 32 * 1024]
    hot = random.Random(7).sample(small, min(_HOT_KEYS, len(small) // 5))
    before = store.info()
    _set(stage, "maxmemory-policy", "allkeys-lru")
    within = 0
    limit = before["used_memory"]
    with stage.client() as client:
        for step in range(1, _EVICTION_STEPS + 1):
            client.mget(hot)
            limit = before["used_memory"] * (2 * _EVICTION_STEPS - step) // (2 * _EVICTION_STEPS)
            _set(stage, "maxmemory", limit)
            within += _wait_for(partial(_uses_at_most, store, limit))
        after = store.info()
        kept = sum(value is not None for value in client.mget(hot))
        client.set("newcomer", b"x" * 65536)
        newcomer = client.getdel("newcomer")
    evicted = after["evicted_keys"] - before["evicted_keys"]
    gone = before["db0"]["keys"] - after["db0"]["keys"]
    report.promise(
        "each step gets within its limit",
        within == _EVICTION_STEPS,
        f"{format_size(after['used_memory'])} of {format_size(limit)} at the last",
    )
    report.promise(
        "every key that went was counted", gone == evicted > 0, f"{gone:,} keys gone, evicted_keys rose by {evicted:,}"
    )
    rest = after["db0"]["keys"] / before["db0"]["keys"]
    report.promise(
        "what is in use stays",
        kept >= 0.95 * len(hot) and kept / len(hot) > rest,
        f"{kept} of {len(hot)} used keys stayed, of all {rest:.0%}",
    )
    report.promise("writes go on at the limit", newcomer == b"x" * 65536)
    compared = clients.compare(store.connect, stage.files, evicted=True)
    report.promise("what stayed is right", compared.equal, str(compared))
    report.numbers(
        f"limit {format_size(before['used_memory'])} → {format_size(limit)}: {evicted:,} keys evicted, "
        f"{kept} of {len(hot)} in use stayed"
    )


def press(stage: Stage) -> None:
    """Memory runs out: the store is warned, refuses a save that may not fit, makes room, and hears the all-clear."""
    report, store = stage.report, stage.store
    report.phase("pressure", "real pressure: memory runs out for the store")
    _refill(stage)
    before = store.info()
    with watching(store) as watch, squeeze(store, stage.cgroup) as squeezing:
        report.say(f"{squeezing.what}: {squeezing.told()}")
        while watch.level != "CRITICAL" and squeezing.tighten(watch.level):
            _wait_for(partial(_differs, watch, watch.level), squeezing.pace_s)
        _wait_for(lambda: watch.level == "CRITICAL")
        tightest = squeezing.told()
        heard = _show_callbacks(stage, 0)
        report.promise(
            "it hears that memory is low, then that it is critical", _heard(watch, "LOW", "CRITICAL"), tightest
        )
        if stage.cgroup:  # an rlimit is each process's own: what a child copies does not count there
            reason = _shown(stage, _refused_save(stage))
            report.promise("a save that may not fit is refused", "refused" in reason, reason)
        _set(stage, "maxmemory-policy", "allkeys-lru")
        _wait_for(lambda: store.info()["evicted_keys"] > before["evicted_keys"])
        if stage.cgroup:  # an rlimit counts what is mapped, and only large values give their mappings back
            relieved = _wait_for(lambda: watch.level != "CRITICAL")
            report.promise("by making room it is not critical any more", relieved, squeezing.told())
        after = store.info()
        evicted = after["evicted_keys"] - before["evicted_keys"]
        freed = format_size(before["used_memory"] - after["used_memory"])
        heard = _show_callbacks(stage, heard)
        report.promise("it makes room once it may", evicted, f"{evicted:,} keys shed, {freed} freed")
        squeezing.release()
        clear = _wait_for(lambda: watch.level == "NORMAL")
        _show_callbacks(stage, heard)
        report.promise("it hears the all-clear", clear, " → ".join(level for _, level in watch.levels))
    unharmed = store.alive() and watch.error is None and not (stage.cgroup and stage.cgroup.oom_kills())
    waited = str(watch.error or f"after {watch.longest_wait_s * 1000:.0f} ms at the longest")
    report.promise("nothing was killed, and every question answered", unharmed, waited)
    compared = clients.compare(store.connect, stage.files, evicted=True)
    report.promise("what stayed is right", compared.equal, str(compared))
    heard_of = " → ".join(level for _, level in watch.levels)
    report.numbers(f"{heard_of}; {tightest}; {evicted:,} keys shed, {freed}")


def _show_callbacks(stage: Stage, already: int) -> int:
    """Print what the store's callbacks logged, but for the *already* printed; return how many there are by now."""
    lines = stage.store.said("memory pressure")
    for line in lines[already:]:
        stage.report.say(_shown(stage, line))
    return len(lines)


def _shown(stage: Stage, text: str) -> str:
    """Return *text* with the names that the demo chose made short."""
    text = text.replace(str(stage.dump), "dump.rdb").replace("WARNING ", "")
    return text.replace(stage.cgroup.path, "its cgroup") if stage.cgroup else text


def _differs(watch: Watch, level: str) -> bool:
    return watch.level != level


def _heard(watch: Watch, *levels: str) -> bool:
    """Whether *levels* were seen, in that order."""
    seen = iter(level for _, level in watch.levels)
    return all(level in seen for level in levels)


def _refused_save(stage: Stage) -> str:
    """BGSAVE, and return why it was refused, "" if it was not."""
    try:
        with stage.client() as client:
            client.bgsave(schedule=False)
    except redis.ResponseError as error:
        return str(error)
    _wait_until_saved(stage)
    return ""


def snapshots(stage: Stage) -> None:
    """Images taken while every connection writes are each one moment of the store."""
    report, store = stage.report, stage.store
    report.phase("snapshot", f"{SNAPSHOTS} times BGSAVE while {CONNECTIONS} connections write")
    _refill(stage)
    writers = Writers(store.connect, stage.files)
    pauses: list[float] = []
    copies: list[int] = []
    began = time.monotonic()
    with writers.writing():
        _wait_for(lambda: min(writers.acknowledged) > corpus.PAGES_PER_WRITER)
        for number in range(1, SNAPSHOTS + 1):
            before = list(writers.acknowledged)
            started = time.monotonic()
            _bgsave(stage)
            sent = list(writers.sent)
            finished = _wait_until_saved(stage)
            took_s = time.monotonic() - started
            written = writers.total - sum(before)
            info = store.info()
            pauses.append(info["latest_fork_usec"] / 1000)
            copies.append(info["rdb_last_cow_size"])
            cost = f"{took_s:.1f} s, pause {pauses[-1]:.1f} ms, {format_size(copies[-1])} copied"
            report.promise(
                f"snapshot {number} succeeds",
                finished and info["rdb_last_bgsave_status"] == "ok",
                f"{cost}, {written:,} writes meanwhile",
            )
            _judge_image(stage, number, before, sent)
    rate = writers.total / (time.monotonic() - began)
    stage.state = writers.state()
    compared = clients.compare(store.connect, {**stage.files, **stage.state})
    report.promise("no acknowledged write is lost", compared.equal, str(compared))
    report.numbers(
        f"{SNAPSHOTS} under {rate:,.0f} writes/s: pause {max(pauses):.1f} ms, {format_size(max(copies))} copied, "
        f"no client waited over {writers.longest_wait_s * 1000:.0f} ms"
    )


def _judge_image(stage: Stage, number: int, before: list[int], sent: list[int]) -> None:
    """Promise that the dump is the store at one moment between BGSAVE's being asked for and answered."""
    image = {key: value for key, value, _ in rdb.read(stage.dump)}
    wrong = sum(image.get(key) != value for key, value in stage.files.items())
    counts = [corpus.writes_in(image, writer) for writer in range(CONNECTIONS)]
    within = [count is not None and low <= count <= high for count, low, high in zip(counts, before, sent, strict=True)]
    moments = ", ".join("torn" if count is None else f"{count:,}" for count in counts)
    stage.report.promise(
        f"snapshot {number} is one moment",
        not wrong and all(within),
        f"{len(image):,} values; the connections' writes up to {moments}" + (f"; {wrong} files wrong" if wrong else ""),
    )


def kill(stage: Stage) -> None:
    """A saving child that is shot harms nothing: not the old dump, not the store, not the next save."""
    report, store = stage.report, stage.store
    report.phase("kill", "SIGKILL to the saving child, while connections write")
    old = stage.dump.read_bytes()
    writers = Writers(store.connect, stage.files)
    with writers.writing():
        shot = _shoot_saving_child(stage)
        info = store.info()
        report.promise("the save counts as failed", info["rdb_last_bgsave_status"] == "err", f"shot {shot}")
        same = stage.dump.read_bytes() == old
        report.promise(
            "the old dump is unharmed",
            same and rdb.check(stage.dump).checksummed,
            f"{format_size(len(old))}, checksum right",
        )
        left = sorted(path.name for path in stage.directory.iterdir() if path.name not in {"dump.rdb", store.log.name})
        report.promise("no temporary file stays", not left, ", ".join(left))
        misconf = _wait_for(lambda: writers.refused.get("MISCONF", 0) > 0)
        report.promise(
            "writes stop, as Redis has it, until a save succeeds",
            misconf,
            f"{writers.refused.get('MISCONF', 0)} answered -MISCONF",
        )
        _bgsave(stage)
        _wait_until_saved(stage)
        report.promise("the next save succeeds", store.info()["rdb_last_bgsave_status"] == "ok")
        count = writers.total
        report.promise("writes go on", _wait_for(lambda: writers.total > count), f"{writers.total:,} acknowledged")
    stage.state |= writers.state()
    report.promise("the new dump is whole", rdb.check(stage.dump).checksummed and stage.dump.read_bytes() != old)
    report.numbers(f"shot {shot}: the old dump of {format_size(len(old))} byte for byte the same, the next save fine")


def _shoot_saving_child(stage: Stage) -> str:
    """BGSAVE, and kill the child while it writes; return how that went."""
    for _ in range(5):
        others = {child.pid for child in stage.store.children()}
        began = time.monotonic()
        _bgsave(stage)
        for child in stage.store.children():
            if child.pid not in others:
                _wait_for(partial(_writes, child), 1.0)
                written = _written_bytes(child)
                child.send_signal(signal.SIGKILL)
                took_ms = (time.monotonic() - began) * 1000
                _wait_until_saved(stage)
                if stage.store.info()["rdb_last_bgsave_status"] != "ok":
                    return f"{took_ms:.0f} ms after BGSAVE, {format_size(written)} written"
        _wait_until_saved(stage)
    raise DemoError("no saving child could be caught before it was done")


def _writes(child: psutil.Process) -> bool:
    return _written_bytes(child) >= 64 * 1024 or not child.is_running()


def _written_bytes(child: psutil.Process) -> int:
    """Return what *child* has written since it was forked; its file has no name before it is whole."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return int(child.io_counters().write_chars)
    return 0


def restore(stage: Stage) -> None:
    """What was saved is loaded by another server, and is the same to the last value and expiry."""
    report, store = stage.report, stage.store
    program = shutil.which("redis-server")
    name = f"redis-server {version_of(program)}" if program else "a second memkv"
    report.phase("restore", f"save, end the store, load the dump with {name}, compare everything")
    expires_ms = int((time.time() + 3600) * 1000)
    expiring = {b"expiring:%d" % i: b"%d" % (i * i) for i in range(_EXPIRING_KEYS)}
    with stage.client() as client:
        with client.pipeline(transaction=False) as pipeline:
            for i, (key, value) in enumerate(expiring.items()):
                pipeline.set(key, value, pxat=expires_ms + i)
            pipeline.execute()
        client.save()
        keys = client.dbsize()
    report.promise(
        "the store ends in order",
        store.shut_down() == 0,
        f"{keys:,} keys saved, {format_size(stage.dump.stat().st_size)}",
    )
    if checker := shutil.which("redis-check-rdb"):
        said = subprocess.run([checker, str(stage.dump)], capture_output=True, text=True, check=False)
        report.promise("redis-check-rdb accepts the dump", said.returncode == 0 and "Checksum OK" in said.stdout)
    began = time.monotonic()
    other = redis_server(program, stage.directory) if program else memkv(stage.directory, stage.limit_bytes)
    stage.stack.callback(other.close)
    took_s = time.monotonic() - began
    expected = {**stage.files, **stage.state, **expiring}
    with other.connect() as client:
        loaded = client.dbsize()
        asked_ms = time.time() * 1000
        with client.pipeline(transaction=False) as pipeline:
            for key in expiring:
                pipeline.pttl(key)
            ttls = pipeline.execute()
        told_ms = time.time() * 1000
    report.promise("it has every key and no other", loaded == keys == len(expected), f"{loaded:,} of {len(expected):,}")
    compared = clients.compare(other.connect, expected)
    report.promise("every value is the same", compared.equal, str(compared))
    answered_ms = [expires_ms + i - ttl for i, ttl in enumerate(ttls)]
    off_ms = max(0, asked_ms - min(answered_ms), max(answered_ms) - told_ms)
    report.promise(
        "every expiry is the same",
        off_ms < 1000,
        f"{len(ttls):,} expiries, at most {off_ms:.0f} ms apart from what the time of asking allows",
    )
    other.close()
    report.numbers(f"{name} loaded {loaded:,} keys in {took_s:.1f} s: {compared}")


# ---- what the acts have in common


def _uses_at_most(store: Store, limit_bytes: int) -> bool:
    return int(store.info()["used_memory"]) <= limit_bytes


def _set(stage: Stage, name: str, value: str | int) -> None:
    with stage.client() as client:
        client.config_set(name, value)


def _bgsave(stage: Stage) -> None:
    """Begin a save. What else runs on this machine may have memsafe put it off for a moment."""
    with stage.client() as client:
        if not _wait_for(partial(_begins_save, client), _SAVE_WITHIN_S):
            raise DemoError("a save was put off again and again: memory is short on this machine")


def _begins_save(client: redis.Redis) -> bool:
    try:
        client.bgsave(schedule=False)
    except redis.ResponseError as error:
        if "(defer)" not in str(error):
            raise
        return False
    return True


def _wait_until_saved(stage: Stage) -> bool:
    return _wait_for(lambda: not stage.store.info()["rdb_bgsave_in_progress"], _SAVE_WITHIN_S)


def _refill(stage: Stage) -> None:
    """Undo what evictions took."""
    _set(stage, "maxmemory-policy", "noeviction")
    _set(stage, "maxmemory", stage.limit_bytes)
    with stage.client() as client:
        client.flushall()
    clients.store(stage.store.connect, stage.files)


def _wait_for(condition: Callable[[], Any], within_s: float = _SETTLE_WITHIN_S) -> bool:
    """Ask until *condition* holds, or time is up; return whether it held."""
    give_up = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.02)
    return True
