"""memkv's dumps: saved, loaded, shared with redis-server, and never harmed by what goes wrong."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from examples.memkv import rdb
from tests.integration.memkv_process import (
    MIB,
    ROOT,
    SAVES_STOP,
    WITHIN_S,
    Server,
    free_port,
    limit_file_size,
    memkv,
    memkv_command,
    redis_server,
    tool,
    until,
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with memkv(tmp_path, limit="256 MiB") as server:
        yield server


@pytest.fixture
def stopping_server(tmp_path: Path) -> Iterator[Server]:
    """One whose children that save stop themselves at first."""
    with memkv(tmp_path, limit="256 MiB", before=SAVES_STOP) as server:
        yield server


def contents() -> dict[bytes, bytes]:
    chosen = random.Random(3)
    return {
        b"": b"empty key",
        b"empty": b"",
        b"binary\r\n\0\xff": bytes(range(256)) * 3,
        b"number": b"-12345",
        b"compressible": b"again and " * 5000,
        b"big": chosen.randbytes(3 * MIB),
        **{b"key:%d" % i: chosen.randbytes(chosen.randint(0, 300)) for i in range(5000)},
    }


def fill(client: redis.Redis) -> dict[bytes, bytes]:
    values = contents()
    client.mset(values)
    return values


def values_of(client: redis.Redis) -> dict[bytes, bytes]:
    keys = list(client.scan_iter(count=1000))
    return dict(zip(keys, client.mget(keys), strict=True)) if keys else {}


def large(client: redis.Redis, size_bytes: int = 64 * MIB) -> None:
    """Fill with what takes a moment to save."""
    block = random.Random(4).randbytes(MIB)
    for i in range(size_bytes // MIB):
        client.set(f"large:{i}", block)


def save(server: Server, command: str) -> None:
    if command == "SAVE":
        server.client.save()
    else:
        server.bgsave()
        server.until_saved()


# ---- saving and loading


@pytest.mark.parametrize("command", ["SAVE", "BGSAVE"])
def test_what_was_saved_is_there_after_a_restart(tmp_path: Path, command: str) -> None:
    far_ms = int(time.time() * 1000) + 3_600_000
    with memkv(tmp_path) as server:
        values = fill(server.client)
        server.client.set("expiring", "v", pxat=far_ms)
        server.client.set("gone by then", "v", px=1)
        save(server, command)
        assert server.info("rdb_last_bgsave_status") == "ok"
        assert server.info("rdb_changes_since_last_save") == 0
        assert server.end() == 0
    with memkv(tmp_path) as server:
        assert server.client.pexpiretime("expiring") == far_ms
        assert server.info("rdb_changes_since_last_save") == 0
        server.client.delete("expiring")
        assert values_of(server.client) == values


def test_bgsave_saves_one_moment_while_writes_go_on(stopping_server: Server) -> None:
    server, client = stopping_server, stopping_server.client
    large(client)
    client.set("counter", 0)
    server.bgsave()
    child = server.stopped_child()
    during = client.incr("counter")
    child.resume()
    while server.info("rdb_bgsave_in_progress"):
        during = client.incr("counter")
    assert server.info("rdb_last_bgsave_status") == "ok"
    saved = {key: value for key, value, _ in rdb.read(server.dump)}
    assert saved[b"counter"] == b"0"
    assert len(saved) == 65
    assert server.info("rdb_changes_since_last_save") == during


def test_info_tells_of_the_save_as_clients_poll_it(stopping_server: Server) -> None:
    server, client = stopping_server, stopping_server.client
    large(client, 32 * MIB)
    before = client.lastsave()
    assert client.info("persistence")["rdb_saves"] == 0
    server.bgsave()
    child = server.stopped_child()
    told = client.info("everything")
    assert told["rdb_bgsave_in_progress"] == 1
    assert told["rdb_current_bgsave_time_sec"] >= 0
    with pytest.raises(redis.ResponseError, match="Background save already in progress"):
        client.bgsave(schedule=False)
    with pytest.raises(redis.ResponseError, match="Background save already in progress"):
        client.save()
    child.resume()
    server.until_saved()
    told = client.info("everything")
    assert told["rdb_saves"] == 1
    assert told["rdb_last_bgsave_status"] == "ok"
    assert told["rdb_last_save_time"] >= int(before.timestamp())
    assert told["latest_fork_usec"] > 0
    assert told["memsafe_last_fork_pause_us"] == told["latest_fork_usec"]
    assert told["memsafe_last_save_bytes"] == server.dump.stat().st_size
    assert told["rdb_last_cow_size"] >= 0
    assert told["memsafe_copy_peak_bytes"] >= told["rdb_last_cow_size"]


def test_save_points_save_unasked(server: Server) -> None:
    client = server.client
    client.config_set("save", "1 10")
    client.mset({f"key:{i}": i for i in range(20)})  # at once: one that saves a part of them would be the first
    until(lambda: server.info("rdb_saves") == 1, "the save point is reached")
    assert len(list(rdb.read(server.dump))) == 20
    client.config_set("save", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(server: Server, number: int) -> None:
    server.client.set("a", 1)
    server.process.send_signal(number)
    assert server.process.wait(WITHIN_S) == 0
    assert not server.dump.exists()


def test_a_signal_saves_first_where_there_are_save_points(tmp_path: Path) -> None:
    with memkv(tmp_path, "--save", "3600 1") as server:
        server.client.set("a", 1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(WITHIN_S) == 0
        assert [key for key, _, _ in rdb.read(server.dump)] == [b"a"]


def test_shutdown_saves_when_told_to(server: Server) -> None:
    server.client.set("a", 1)
    server.client.shutdown(save=True)
    assert server.process.wait(WITHIN_S) == 0
    assert [key for key, _, _ in rdb.read(server.dump)] == [b"a"]


def test_flushall_calls_off_the_save_that_runs(stopping_server: Server) -> None:
    server, client = stopping_server, stopping_server.client
    large(client)
    server.bgsave()
    server.stopped_child()
    client.flushall()
    assert server.info("rdb_bgsave_in_progress") == 0
    assert psutil.Process(server.process.pid).children() == []
    assert client.set("a", 1)
    server.bgsave()
    server.stopped_child().resume()
    server.until_saved()
    assert [key for key, _, _ in rdb.read(server.dump)] == [b"a"]


# ---- beside Redis's own tools


@pytest.mark.redis
@pytest.mark.parametrize("command", ["SAVE", "BGSAVE"])
def test_redis_check_rdb_accepts_the_dump_and_redis_server_serves_it(tmp_path: Path, command: str) -> None:
    far_ms = int(time.time() * 1000) + 3_600_000
    with memkv(tmp_path) as server:
        values = fill(server.client)
        server.client.set("expiring", "v", pxat=far_ms)
        save(server, command)
        dump = server.dump
    said = subprocess.run([tool("redis-check-rdb"), str(dump)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout
    assert "Checksum OK" in said.stdout
    with redis_server(tmp_path) as server:
        assert server.client.pexpiretime("expiring") == far_ms
        server.client.delete("expiring")
        assert values_of(server.client) == values


@pytest.mark.redis
def test_a_dump_of_redis_server_is_served(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        values = fill(server.client)
        server.client.save()
    with memkv(tmp_path) as server:
        assert values_of(server.client) == values


# ---- what goes wrong while saving


def test_a_saving_child_that_is_killed_leaves_the_old_dump(stopping_server: Server) -> None:
    server, client = stopping_server, stopping_server.client
    client.set("first", 1)
    client.save()
    old = server.dump.read_bytes()
    large(client)
    server.bgsave()
    server.stopped_child().kill()
    server.until_saved()
    assert server.info("rdb_last_bgsave_status") == "err"
    assert "SIGKILL" in str(server.info("memsafe_last_save_error"))
    assert server.dump.read_bytes() == old
    assert sorted(path.name for path in server.directory.iterdir()) == ["dump.rdb", "memkv.log"]

    with server.raw() as raw:
        assert raw.ask(b"SET", b"more", b"v").startswith(b"-MISCONF Redis is configured to save RDB snapshots, but ")
        assert raw.ask(b"DEL", b"first").startswith(b"-MISCONF ")
        assert raw.ask(b"PING").startswith(b"-MISCONF ")
        assert raw.ask(b"GET", b"first") == b"$1\r\n1\r\n"
    client.config_set("stop-writes-on-bgsave-error", "no")
    assert client.set("more", "v")
    client.config_set("stop-writes-on-bgsave-error", "yes")
    with pytest.raises(redis.ResponseError, match="MISCONF"):
        client.set("more", "v")
    server.bgsave()
    server.stopped_child().resume()
    server.until_saved()
    assert server.info("rdb_last_bgsave_status") == "ok"
    assert client.set("more", "v")
    assert server.dump.read_bytes() != old


@pytest.mark.parametrize("command", ["SAVE", "BGSAVE"])
def test_a_full_disk_fails_the_save_and_leaves_the_old_dump(server: Server, command: str) -> None:
    client = server.client
    client.set("first", 1)
    client.save()
    old = server.dump.read_bytes()
    large(client, 8 * MIB)
    limit_file_size(server, MIB)
    if command == "SAVE":
        with pytest.raises(redis.ResponseError, match="File too large"):
            client.save()
    else:
        server.bgsave()
    server.until_saved()
    assert server.info("rdb_last_bgsave_status") == "err"
    assert server.dump.read_bytes() == old
    assert sorted(path.name for path in server.directory.iterdir()) == ["dump.rdb", "memkv.log"]
    with pytest.raises(redis.ResponseError, match="MISCONF"):
        client.set("more", "v")
    limit_file_size(server, -1)
    assert client.save()
    assert client.set("more", "v")
    assert len(list(rdb.read(server.dump))) == 9


def test_a_save_that_copies_too_much_is_ended_alone(server: Server) -> None:
    client = server.client
    client.set("first", 1)
    client.save()
    old = server.dump.read_bytes()
    large(client)
    client.config_set("snapshot-max-copy", "1")
    server.bgsave()
    server.until_saved()
    assert server.info("rdb_last_bgsave_status") == "err"
    assert "max_copy" in str(server.info("memsafe_last_save_error"))
    assert server.dump.read_bytes() == old
    assert client.exists("large:0")
    client.config_set("snapshot-max-copy", "auto")
    server.bgsave()
    server.until_saved()
    assert server.info("rdb_last_bgsave_status") == "ok"


def test_a_folder_that_is_gone_is_told_in_the_reply(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    with memkv(tmp_path, "--dir", str(directory)) as server:
        server.client.set("a", 1)
        directory.rmdir()
        with pytest.raises(redis.ResponseError, match="No such file or directory"):
            server.client.bgsave(schedule=False)
        directory.mkdir()
        assert server.client.save()


# ---- what goes wrong at the start


def fails_to_start(directory: Path, *arguments: str, limit: str = "64 MiB", port: int = 0) -> str:
    """Return what memkv says when it does not start."""
    command = memkv_command(directory, *arguments, limit=limit, port=port)
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    assert ended.returncode in (1, 2), ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    path = tmp_path / "dump.rdb"
    with open(path, "wb") as out:
        rdb.write(out, ((b"key:%d" % i, b"v" * 10_000, None) for i in range(1000)))
    return path


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda data: data[: len(data) // 2], "the end of the file"),
        (lambda data: data[:-1], "the end of the file"),
        (lambda data: data[:5000] + b"X" + data[5001:], "expected"),
        (lambda data: b"no dump at all", "an RDB file"),
        (lambda data: b"", "an empty file"),
        (lambda data: b"REDIS9999" + data[9:], "format version 9999"),
    ],
    ids=["truncated", "a byte short", "altered", "not one", "empty", "too new"],
)
def test_a_dump_that_is_not_whole_is_refused_and_left_alone(dump: Path, damage: object, told: str) -> None:
    damaged = damage(dump.read_bytes())
    dump.write_bytes(damaged)
    said = fails_to_start(dump.parent)
    assert told in said
    assert str(dump) in said
    assert "at byte" in said
    assert dump.read_bytes() == damaged


@pytest.mark.parametrize("policy", ["noeviction", "allkeys-lru"])
def test_a_limit_smaller_than_the_data_is_refused_and_the_dump_left_alone(dump: Path, policy: str) -> None:
    before = dump.read_bytes()
    said = fails_to_start(dump.parent, "--policy", policy, limit="4 MiB")
    assert "the limit of 4 MiB is smaller than the data" in said
    assert dump.read_bytes() == before
    with memkv(dump.parent, "--policy", policy, limit="16 MiB") as server:
        assert server.client.dbsize() == 1000


def test_a_dump_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "dump.rdb").mkdir()
    assert "Is a directory" in fails_to_start(tmp_path)


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        ("lots", "the limit must look like '64 MiB', '64M' or '65536': 'lots'"),
        ("-1", "the limit must look like"),
        ("1.5", "the limit must be a whole number of bytes: '1.5'"),
        ("0", "the limit must be above 0"),
        ("", "the limit must look like"),
        ("99999999999 TiB", "the limit must be below 8 EiB"),
        ("nan", "the limit must look like"),
    ],
)
def test_a_limit_that_is_junk_is_refused_with_a_sentence(tmp_path: Path, limit: str, told: str) -> None:
    said = fails_to_start(tmp_path, f"--limit={limit}")
    assert "argument --limit: " in said
    assert told in said


def test_a_port_in_use_is_told(server: Server, tmp_path: Path) -> None:
    said = fails_to_start(tmp_path, port=server.port)
    assert f"port {server.port} of 127.0.0.1 is in use" in said
    assert server.client.ping()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--port", "99999"), "argument --port"),
        (("--dir", "/no/such/folder"), "'/no/such/folder' is not a directory"),
        (("--policy", "random"), "argument --policy"),
        (("--save", "60"), "argument --save"),
        (("--snapshot-max-copy", "much"), "argument --snapshot-max-copy"),
    ],
)
def test_other_junk_is_refused_too(tmp_path: Path, arguments: tuple[str, str], told: str) -> None:
    assert told in fails_to_start(tmp_path, *arguments)


def test_a_given_port_is_the_one(tmp_path: Path) -> None:
    port = free_port()
    with memkv(tmp_path, "--port", str(port)) as server:
        assert server.port == port
