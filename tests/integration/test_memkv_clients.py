"""The programs and libraries that people use against redis-server, used against memkv."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import redis.asyncio

from tests.integration.memkv_process import WITHIN_S, WITHOUT_UVLOOP, Server, memkv, tool


@pytest.fixture(scope="module", params=[True, False], ids=["uvloop", "asyncio"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if request.param:
        pytest.importorskip("uvloop", reason="uvloop is not installed")
    with memkv(
        tmp_path_factory.mktemp("memkv"), limit="256 MiB", before="" if request.param else WITHOUT_UVLOOP
    ) as server:
        yield server


def cli(server: Server, *arguments: str, stdin: str = "") -> str:
    done = subprocess.run(
        [tool("redis-cli"), "-p", str(server.port), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.redis
def test_redis_cli_sets_gets_and_asks(server: Server) -> None:
    assert cli(server, "SET", "greeting", "hello world") == "OK\n"
    assert cli(server, "GET", "greeting") == "hello world\n"
    assert cli(server, "-3", "GET", "none") == "\n"
    assert "used_memory:" in cli(server, "INFO", "memory")
    assert "(error)" not in cli(server, stdin="COMMAND DOCS\nCOMMAND\nCLIENT LIST\nhelp set\n")


@pytest.mark.redis
@pytest.mark.parametrize("option", ["--scan", "--bigkeys", "--memkeys"])
def test_redis_cli_walks_over_the_keys(server: Server, option: str) -> None:
    server.client.mset({f"walk:{i}": "x" * i for i in range(499)} | {"walk:499": "x" * 10_000})
    said = cli(server, option)
    assert "walk:499" in said
    assert "rror" not in said


@pytest.mark.redis
def test_redis_cli_loads_in_bulk(server: Server) -> None:
    said = cli(server, "--pipe", stdin="".join(f"SET bulk:{i} {i}\r\n" for i in range(5000)))
    assert "errors: 0, replies: 5000" in said
    assert server.client.get("bulk:4999") == b"4999"


@pytest.mark.redis
@pytest.mark.parametrize("pipeline", [1, 16])
def test_redis_benchmark_runs(server: Server, pipeline: int) -> None:
    done = subprocess.run(
        [
            *(tool("redis-benchmark"), "-p", str(server.port), "-t", "set,get,incr,mset"),
            *("-n", "2000", "-c", "50", "-P", str(pipeline), "-q"),
        ],
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "rror" not in done.stdout + done.stderr
    finished = re.findall(r"(SET|GET|INCR|MSET \(10 keys\)): [\d.]+ requests per second", done.stdout)
    assert finished == ["SET", "GET", "INCR", "MSET (10 keys)"]


@pytest.mark.parametrize("protocol", [None, 2, 3])
def test_redis_py_talks_to_it_as_it_comes(server: Server, protocol: int | None) -> None:
    options = {} if protocol is None else {"protocol": protocol}
    with redis.Redis(port=server.port, client_name="me", **options) as client:
        client.delete("n")
        assert client.set("n", 1, ex=100, get=True) is None
        assert client.get("none") is None
        assert client.mget("n", "none") == [b"1", None]
        assert client.config_get("maxmemory")["maxmemory"] == str(256 * 1024 * 1024)
        assert client.client_getname() in (b"me", "me")
        assert [other["name"] for other in client.client_list()].count("me") >= 1
        assert client.info("memsafe")["memsafe_pressure_level"] == "normal"
        assert client.command()["get"]["arity"] == 2
        with client.pipeline() as pipeline:  # a transaction, unless told otherwise
            assert pipeline.incr("n").expire("n", 50).ttl("n").execute() == [2, True, 50]

        def double(pipeline: redis.client.Pipeline) -> None:
            value = int(pipeline.get("n"))
            pipeline.multi()
            pipeline.set("n", 2 * value)

        assert client.transaction(double, "n") == [True]
        assert client.get("n") == b"4"


def test_many_connections_at_once_lose_nothing(server: Server) -> None:
    async def count(client: redis.asyncio.Redis, times: int) -> None:
        for _ in range(times):
            await client.incr("many")

    async def main() -> int:
        async with redis.asyncio.Redis(port=server.port) as client:
            await client.delete("many")
            await asyncio.gather(*(count(client, 50) for _ in range(40)))
            return int(await client.get("many"))

    assert asyncio.run(main()) == 2000


def test_a_scan_sees_every_key_once_while_others_come_and_go(server: Server) -> None:
    client = server.client
    client.flushall()
    stays = {f"stays:{i}".encode() for i in range(3000)}
    client.mset(dict.fromkeys(stays, ""))
    client.mset({f"goes:{i}": "" for i in range(3000)})
    seen: list[bytes] = []
    cursor, number = 0, 0
    while True:
        cursor, keys = client.scan(cursor, count=50)
        seen += keys
        if not cursor:
            break
        # Enough come for the tables to be divided anew meanwhile.
        client.mset({f"comes:{number}:{i}": "" for i in range(200)})
        client.delete(*(f"goes:{i}" for i in range(number * 20, number * 20 + 20)))
        number += 1
    assert sorted(key for key in seen if key in stays) == sorted(stays)


def test_more_connections_than_allowed_are_told(tmp_path: Path) -> None:
    with memkv(tmp_path) as server:
        server.client.config_set("maxclients", 2)
        with server.raw() as one, server.raw() as many:
            assert one.ask(b"PING") == b"+PONG\r\n"
            assert many.reply() == b"-ERR max number of clients reached\r\n"
            assert many.reply() == b""


def test_an_idle_connection_is_closed_after_the_timeout(tmp_path: Path) -> None:
    with memkv(tmp_path) as server, server.raw() as idle:
        assert idle.ask(b"PING") == b"+PONG\r\n"
        server.client.config_set("timeout", 1)
        assert idle.reply() == b""
