"""RDB files between memkv and Redis's own tools: each reads what the other wrote."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from examples.memkv import rdb

pytestmark = pytest.mark.redis

FAR_MS = int(time.time() * 1000) + 3_600_000
ENTRIES: list[tuple[bytes, bytes, int | None]] = [
    (b"plain", b"value", None),
    (b"", b"", None),
    (b"binary\r\n\0", bytes(range(256)), None),
    (b"number", b"-12345", None),
    (b"expiring", b"v", FAR_MS),
    (b"compressible", b"the same again, " * 500, None),
    (b"incompressible", random.Random(1).randbytes(40_000), FAR_MS + 999),
    (b"big", random.Random(2).randbytes(3 << 20), None),
    (b"k" * 20_000, b"long key", None),
    *((b"n:%d" % i, b"%d" % (i * i), None) for i in range(5000)),
]


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian packages redis-server, redis-tools)")
    return path


@contextlib.contextmanager
def redis_server(directory: Path, *options: str) -> Iterator[redis.Redis]:
    """A redis-server of our own, on a Unix socket in *directory*, serving *directory*/dump.rdb."""
    socket = directory / "s"
    command = [tool("redis-server"), "--port", "0", "--unixsocket", str(socket), "--dir", str(directory), "--save", ""]
    log = directory / "log"
    with subprocess.Popen([*command, "--logfile", str(log), *options]) as process:
        try:
            with redis.Redis(unix_socket_path=str(socket)) as client:
                _wait_until_loaded(client, process, log)
                yield client
        finally:
            process.terminate()


def _wait_until_loaded(client: redis.Redis, process: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        if process.poll() is not None:
            pytest.fail(f"redis-server ended with {process.returncode}:\n{log.read_text()}")
        with contextlib.suppress(redis.ConnectionError, redis.BusyLoadingError):
            client.ping()
            return
        time.sleep(0.01)


def write(directory: Path, **options: bool) -> Path:
    path = directory / "dump.rdb"
    with path.open("wb") as out:
        rdb.write(out, ENTRIES, total_hint=len(ENTRIES), aux={"used-mem": 1 << 20}, **options)
    return path


@pytest.mark.parametrize("compress", [True, False])
def test_redis_check_rdb_accepts_what_is_written(tmp_path: Path, compress: bool) -> None:
    path = write(tmp_path, compress=compress)
    done = subprocess.run([tool("redis-check-rdb"), str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "Checksum OK" in done.stdout
    assert f"{len(ENTRIES)} keys read" in done.stdout
    assert "2 expires" in done.stdout


@pytest.mark.parametrize("compress", [True, False])
def test_redis_server_serves_what_is_written(tmp_path: Path, compress: bool) -> None:
    write(tmp_path, compress=compress)
    with redis_server(tmp_path) as client:
        assert client.dbsize() == len(ENTRIES)
        assert client.mget([key for key, _, _ in ENTRIES]) == [value for _, value, _ in ENTRIES]
        for key, _, expires_at_ms in ENTRIES[:10]:
            assert client.pexpiretime(key) == (-1 if expires_at_ms is None else expires_at_ms)


@pytest.mark.parametrize("options", [(), ("--rdbcompression", "no"), ("--rdbchecksum", "no"),
                                     ("--maxmemory-policy", "allkeys-lfu"), ("--maxmemory-policy", "allkeys-lru")],
                         ids=" ".join)  # fmt: skip
def test_what_redis_server_saved_is_read(tmp_path: Path, options: tuple[str, ...]) -> None:
    with redis_server(tmp_path, *options) as client:
        for key, value, expires_at_ms in ENTRIES:
            client.set(key, value, pxat=expires_at_ms)
        if int(client.info("server")["redis_version"].split(".")[0]) >= 7:
            client.function_load("#!lua name=f\nredis.register_function('f', function() return 1 end)")
        client.save()
    path = tmp_path / "dump.rdb"
    assert sorted(rdb.read(path)) == sorted(ENTRIES)
    assert rdb.check(path).checksummed == ("--rdbchecksum" not in options)


def test_a_type_that_memkv_does_not_have_is_named(tmp_path: Path) -> None:
    with redis_server(tmp_path) as client:
        client.rpush("the-list", "a", "b")
        client.save()
    with pytest.raises(rdb.RDBError, match=r"list .* under key b'the-list'"):
        list(rdb.read(tmp_path / "dump.rdb"))
