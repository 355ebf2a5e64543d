"""What memkv answers, beside what redis-server answers, byte for byte."""

from __future__ import annotations

import random
import re
import shlex
import time
from collections.abc import Iterator

import pytest

from tests.integration.memkv_process import MIB, Raw, Server, memkv, packed, redis_server, until
from tests.integration.memkv_scripts import SCRIPTS


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with memkv(tmp_path_factory.mktemp("memkv")) as server:
        yield server


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        version = str(server.client.info("server")["redis_version"])
        if not version.startswith("7.0."):
            pytest.skip(f"redis-server here is {version}; memkv answers as 7.0 does")
        yield server


def words(line: str) -> list[bytes]:
    """Return the words of a line, with quotes as in a shell and escapes as in Python."""
    return [word.encode("latin-1").decode("unicode_escape").encode("latin-1") for word in shlex.split(line)]


def outcome(port: int, script: str) -> list[tuple[str, bytes]]:
    """Return each command of *script* with its reply, from an empty store."""
    began_s = time.monotonic()
    with Raw(port) as connection:
        connection.ask(b"FLUSHALL")
        pairs = [(line, connection.ask(*words(line))) for line in script.splitlines() if line.strip()]
    took_s = time.monotonic() - began_s
    return [(line, _at_first(reply, took_s) if line.startswith("TTL ") else reply) for line, reply in pairs]


def _at_first(reply: bytes, took_s: float) -> bytes:
    """Return a reply to TTL, which rounds, as it was at first: the scripts set tens of seconds, and nothing else."""
    seconds = int(reply[1:])
    whole = -(-seconds // 10) * 10
    return b":%d\r\n" % (whole if seconds > 0 and whole - seconds <= int(took_s + 0.5) else seconds)


@pytest.mark.redis
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_every_reply_is_redis_servers(server: Server, reference: Server, script: str) -> None:
    ours, theirs = (outcome(each.port, _without_ids(script)) for each in (server, reference))
    assert [_comparable(*pair) for pair in ours] == [_comparable(*pair) for pair in theirs]


def _without_ids(script: str) -> str:
    return "\n".join(line.strip() for line in script.splitlines())


def _comparable(line: str, reply: bytes) -> tuple[str, bytes]:
    if line.startswith("HELLO 3"):
        reply = re.sub(rb"\$2\r\nid\r\n:\d+", b"", reply.replace(b"7.0.11", b"7.0.15"))
    return line, reply


@pytest.mark.redis
def test_patterns_match_what_redis_server_has_them_match(server: Server, reference: Server) -> None:
    chosen = random.Random(5)
    keys = [bytes(chosen.choices(b"ab-^]\\[*?", k=chosen.randint(1, 4))) for _ in range(60)]
    patterns = [bytes(chosen.choices(b"ab-^]\\[*?", k=chosen.randint(0, 7))) for _ in range(400)]
    for each in (server, reference):
        each.client.flushall()
        each.client.mset(dict.fromkeys(keys, b""))
    for pattern in patterns:
        assert sorted(server.client.keys(pattern)) == sorted(reference.client.keys(pattern)), pattern


PING = packed(b"PING")
RAW = {
    "inline": [b"PING\r\n"],
    "inline with a bare newline": [b"PING\n"],
    "inline, empty lines": [b"\r\n   \r\nPING\r\n"],
    "inline in quotes": [b"SET a \"b c\"\r\nGET a\r\nSET a 'd e'\r\nGET a\r\n"],
    "inline with escapes": [b'SET a "\\x41\\n\\r\\t\\b\\a\\q\\\\\\"\\x4"\r\nGET a\r\n'],
    "inline in single quotes with an escape": [b"SET a '\\x41\\'q'\r\nGET a\r\n"],
    "inline, quotes in a word": [b'SET a b"c"\r\nGET a\r\n'],
    "inline, an empty argument": [b'ECHO ""\r\n'],
    "inline, an open quote": [b'SET a "b\r\n'],
    "inline, an open single quote": [b"SET a 'b\r\n"],
    "inline, text after a quote": [b'SET a "b"c\r\n'],
    "inline, a quote escaped": [b'ECHO "a\\"\r\n'],
    "inline, tabs": [b"ECHO a\tb\r\n"],
    "inline and arrays": [PING + b"PING\r\n" + PING],
    "an integer in an array": [b"*1\r\n:5\r\n"],
    "a status in an array": [b"*1\r\n+PING\r\n"],
    "an array in an array": [b"*1\r\n*1\r\n$4\r\nPING\r\n"],
    "an integer after a string": [b"*2\r\n$4\r\nECHO\r\n:5\r\n"],
    "requests before an error": [PING * 3 + b"*1\r\n:5\r\n" + PING],
    "an array of none": [b"*0\r\n" + PING],
    "an array of less than none": [b"*-5\r\n" + PING + b"*-1\r\n" + PING],
    "a length that is none": [b"*abc\r\n"],
    "no length": [b"*\r\n"],
    "a length and a blank": [b"*1 \r\n"],
    "a length with a zero in front": [b"*01\r\n"],
    "a length with a sign": [b"*+1\r\n"],
    "more elements than an int": [b"*2147483648\r\n"],
    "more elements than a long": [b"*99999999999999999999\r\n"],
    "a bulk of no length": [b"*1\r\n$\r\n"],
    "a bulk of negative length": [b"*1\r\n$-1\r\n"],
    "a bulk length that is none": [b"*1\r\n$abc\r\n"],
    "a bulk of 600 MiB": [b"*1\r\n$629145600\r\n"],
    "a bulk one beyond the limit": [b"*1\r\n$536870913\r\n"],
    "a bulk length with a zero in front": [b"*1\r\n$04\r\nPING\r\n"],
    "no bulk": [b"*1\r\n\r\n"],
    "text for a bulk": [b"*1\r\nfoo\r\n"],
    "a high byte for a bulk": [b"*1\r\n\xff4\r\nPING\r\n"],
    "a bulk that ends in anything": [b"*1\r\n$4\r\nPINGxx" + PING],
    "a bulk": [b"$4\r\nPING\r\n"],
    "an integer": [b":5\r\n"],
    "replies for requests": [b"+OK\r\n-ERR\r\n%1\r\n#t\r\n_\r\n,1.5\r\n"],
    "no name": [b"*1\r\n$0\r\n\r\n" + PING],
    "split anywhere": [PING[:5], PING[5:] + PING[:1], PING[1:3], PING[3:9], PING[9:] + PING[:-1], PING[-1:]],
    "an endless line": [b"x" * 70_000],
    "a line at the limit": [b"x" * 65_535 + b"\r\n"],
    "an endless array head": [b"*" + b"1" * 70_000],
    "an endless bulk head": [b"*1\r\n$" + b"1" * 70_000],
    "endless text for a bulk": [b"*1\r\n" + b"x" * 70_000],
    "a big value in parts": [packed(b"SET", b"big", b"v" * 100_000)[:50_000], b"v" * 50_034 + b"\r\n" + PING],
    "a value that looks like a head": [packed(b"SET", b"a", b"*99999\r\n") + packed(b"GET", b"a")],
    "many words": [packed(b"DEL", *[b"k%d" % i for i in range(20_000)])],
    "many requests": [packed(b"GET", b"a") * 500],
    "quit": [b"QUIT\r\n" + PING],
    "http, get": [b"GET /index.html HTTP/1.1\r\nHost: x\r\n\r\n"],
    "http, post": [b"POST / HTTP/1.1\r\nHost: x\r\n\r\n"],
    "control characters": [b"\x01\x02\r\n"],
    "high bytes": [b"\xff\xfe\r\n"],
}


@pytest.mark.redis
@pytest.mark.parametrize("chunks", RAW.values(), ids=RAW)
def test_odd_bytes_are_answered_as_redis_server_does(server: Server, reference: Server, chunks: list[bytes]) -> None:
    ours, theirs = (_exchange(each.port, chunks) for each in (server, reference))
    assert ours == theirs
    with server.raw() as other:
        assert other.ask(b"PING") == b"+PONG\r\n"


def _exchange(port: int, chunks: list[bytes]) -> bytes:
    with Raw(port) as connection:
        connection.ask(b"FLUSHALL")
        for chunk in chunks:
            connection.send(chunk)
        return connection.to_the_end()


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"*1\r\n$629145600\r\n", b"-ERR Protocol error: invalid bulk length\r\n"),
        (b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$-1\r\n", b"-ERR Protocol error: invalid bulk length\r\n"),
        (b"*2147483648\r\n", b"-ERR Protocol error: invalid multibulk length\r\n"),
        (b"*1\r\n:1\r\n", b"-ERR Protocol error: expected '$', got ':'\r\n"),
        (b'GET "a\r\n', b"-ERR Protocol error: unbalanced quotes in request\r\n"),
        (b"x" * 70_000, b"-ERR Protocol error: too big inline request\r\n"),
        (b"*" + b"1" * 70_000, b"-ERR Protocol error: too big mbulk count string\r\n"),
        (b"*1\r\n$" + b"1" * 70_000, b"-ERR Protocol error: too big bulk count string\r\n"),
    ],
)
def test_a_protocol_error_ends_that_connection_only(server: Server, sent: bytes, answer: bytes) -> None:
    with server.raw() as bystander, server.raw() as connection:
        connection.send(PING + sent)
        assert connection.reply() == b"+PONG\r\n"
        assert connection.reply() == answer
        assert connection.reply() == b""
        assert bystander.ask(b"PING") == b"+PONG\r\n"


def test_an_array_that_promises_much_takes_nothing(server: Server) -> None:
    before = server.rss_bytes()
    with server.raw() as connection:
        connection.send(b"*2147483647\r\n$4\r\nPING\r\n")
        with server.raw() as other:
            assert other.ask(b"PING") == b"+PONG\r\n"
        assert server.rss_bytes() - before < 16 * MIB


def test_a_key_expires_by_itself_and_gives_back_its_bytes(server: Server) -> None:
    client = server.client
    client.flushall()
    client.config_resetstat()
    for i in range(100):
        client.set(f"k{i}", b"x" * 1000, px=1 + i % 20)
    until(lambda: not client.dbsize(), "all keys have expired, though nobody asks for them")
    assert server.info("expired_keys") == 100
    assert server.info("memsafe_data_bytes") == 0
