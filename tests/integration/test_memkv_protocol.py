"""What memkv answers, beside what redis-server answers, byte for byte."""

from __future__ import annotations

import random
import re
import shlex
from collections.abc import Iterator

import pytest

from tests.integration.memkv_process import MIB, Raw, Server, memkv, packed, redis_server, until


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
    with Raw(port) as connection:
        connection.ask(b"FLUSHALL")
        return [(line, connection.ask(*words(line))) for line in script.splitlines() if line.strip()]


SCRIPTS = {
    "get and set": r"""
        SET
        SET a
        SET a 1
        GET a
        GET
        GET a b
        get missing
        SET a 1 NX
        SET a 1 XX
        SET b 1 XX
        SET b 1 NX
        SET a 2 GET
        SET nope 2 GET
        SET nope 3 NX GET
        SET nope2 3 NX GET
        SET nope3 3 XX GET
        SET a 1 NX XX
        SET a 1 NX NX
        SET a 1 GET GET
        SET a 1 FOO
        SET a 1 PERSIST
        SET "" ""
        GET ""
        SET \x00\r\n\xff \xff\x00\r\n
        GET \x00\r\n\xff
        SETNX a 1
        SETNX snx 1
        SETNX snx 2
        SETNX
        GETSET gs a
        GETSET gs b
        GETSET gs
        GETDEL gs
        GETDEL gs
        MSET a 1 b 2
        MSET a
        MSET a 1 b
        MGET a b c
        MGET
        MSETNX a 1 z 2
        MSETNX y 1 z 2
        MSETNX y 1 z
        MSETNX q
        MSET d 1 d 2 d 3
        GET d
        """,
    "set with an expiry": r"""
        SET a 1 EX
        SET a 1 EX 0
        SET a 1 EX -1
        SET a 1 EX abc
        SET a 1 EX 1.5
        SET a 1 EX " 5"
        SET a 1 EX +5
        SET a 1 EX 05
        SET a 1 EX 9223372036854775807
        SET a 1 PX 9223372036854775807
        SET a 1 PX 99999999999999999999
        SET a 1 EX 10 PX 10
        SET a 1 EX 10 KEEPTTL
        SET a 1 KEEPTTL EX 10
        SET a 1 EX 100
        TTL a
        SET a 2 KEEPTTL
        TTL a
        SET a 2
        TTL a
        SET a 1 EXAT 33177117420
        EXPIRETIME a
        PEXPIRETIME a
        SET a 1 PXAT 33177117420000
        PEXPIRETIME a
        SET a 1 EXAT 1
        GET a
        EXISTS a
        SET a 1 EXAT 0
        SET a 1 PXAT -5
        SETEX se 100 v
        TTL se
        SETEX se 0 v
        SETEX se -1 v
        SETEX se abc v
        SETEX se 9223372036854775 v
        SETEX se 9223372036854776 v
        PSETEX se 100000 v
        PSETEX se 0 v
        PSETEX se 9223372036854775807 v
        SET a v
        GETEX a
        GETEX a EX 100
        TTL a
        GETEX a PERSIST
        TTL a
        GETEX a EX 0
        GETEX a EX abc
        GETEX missing EX abc
        GETEX missing EX 0
        GETEX missing FOO
        GETEX a FOO
        GETEX a EX 10 PERSIST
        GETEX a PERSIST EX 10
        GETEX a KEEPTTL
        GETEX a EXAT 1
        GET a
        """,
    "parts of values": r"""
        APPEND ap hello
        APPEND ap world
        APPEND ap
        GET ap
        STRLEN ap
        STRLEN missing
        GETRANGE ap 0 -1
        GETRANGE ap -3 -1
        GETRANGE ap 3 1
        GETRANGE ap -1 -3
        GETRANGE ap 0 100
        GETRANGE ap 100 200
        GETRANGE ap -100 2
        GETRANGE ap 0 -100
        GETRANGE ap a b
        GETRANGE missing 0 1
        GETRANGE ap 0
        SUBSTR ap 1 3
        SETRANGE ap 5 XYZ
        GET ap
        SETRANGE new 3 abc
        GET new
        SETRANGE new2 3 ""
        EXISTS new2
        SETRANGE ap -1 x
        SETRANGE ap abc x
        SETRANGE ap 536870911 xx
        SETRANGE ap 9223372036854775807 xx
        SETRANGE ap 2 ""
        """,
    "numbers": r"""
        INCR n
        INCR n
        DECR n
        INCRBY n 10
        DECRBY n 3
        INCRBY n abc
        SET ap abc
        INCR ap
        SET big 9223372036854775807
        INCR big
        DECRBY big -1
        SET low -9223372036854775808
        DECR low
        DECRBY n -9223372036854775808
        DECRBY n 9223372036854775807
        INCRBY n 9223372036854775807
        SET sp " 1"
        INCR sp
        SET sp 01
        INCR sp
        SET sp +1
        INCR sp
        SET sp -0
        INCR sp
        SET sp ""
        INCR sp
        SET sp 1_0
        INCR sp
        SET sp 99999999999999999999999
        INCR sp
        SET kept 1 EX 100
        INCR kept
        APPEND kept 0
        SETRANGE kept 0 3
        INCRBYFLOAT kept 1.5
        TTL kept
        """,
    "numbers with a fraction": r"""
        INCRBYFLOAT f 10.5
        INCRBYFLOAT f 0.1
        INCRBYFLOAT f -5
        INCRBYFLOAT f 5.0e3
        INCRBYFLOAT f abc
        INCRBYFLOAT f inf
        INCRBYFLOAT f -inf
        INCRBYFLOAT f nan
        INCRBYFLOAT f " 1"
        INCRBYFLOAT f "1 "
        INCRBYFLOAT f ""
        INCRBYFLOAT f 1e400
        INCRBYFLOAT f -1e400
        INCRBYFLOAT f 1e5000
        INCRBYFLOAT f 1e99999999999
        SET f2 3.0e3
        INCRBYFLOAT f2 200
        SET f3 0.1
        INCRBYFLOAT f3 0.2
        INCRBYFLOAT f3 1e-17
        INCRBYFLOAT f3 1e-18
        INCRBYFLOAT f3 1e17
        INCRBYFLOAT f4 .5
        INCRBYFLOAT f4 5.
        INCRBYFLOAT f4 +.5e+1
        INCRBYFLOAT f4 -6
        INCRBYFLOAT f4 -4
        INCRBYFLOAT f4 -4.5
        INCRBYFLOAT f4 .
        INCRBYFLOAT f4 e5
        INCRBYFLOAT f4 -
        INCRBYFLOAT f4 --5
        INCRBYFLOAT f4 1.2.3
        INCRBYFLOAT f5 123456789012345678901234567890
        INCRBYFLOAT f5 1
        INCRBYFLOAT f6 3.14159265358979323846264338327950288
        INCRBYFLOAT f6 2.71828182845904523536028747135266249
        INCRBYFLOAT f
        """,
    "keys": r"""
        MSET a 1 b 2 n 1
        DEL a b c
        DEL
        UNLINK y z n
        SET n 1
        EXISTS n n missing
        EXISTS
        TYPE n
        TYPE missing
        TYPE
        TOUCH n missing
        RENAME missing x
        RENAME n n
        RENAME n m
        GET m
        SET o 1
        RENAMENX m o
        RENAMENX m p
        RENAMENX missing x
        RENAMENX p p
        SET r1 a EX 1000
        SET r2 b EX 2000
        RENAME r1 r2
        TTL r2
        GET r2
        SET r3 c
        RENAME r3 r2
        TTL r2
        DBSIZE
        DBSIZE x
        FLUSHALL FOO
        FLUSHALL ASYNC SYNC
        FLUSHALL sync
        FLUSHDB ASYNC
        FLUSHDB x
        DBSIZE
        RANDOMKEY
        SET k1 v
        RANDOMKEY
        """,
    "expiry": r"""
        SET e v
        EXPIRE e 100
        TTL e
        EXPIRE e 100 NX
        EXPIRE e 200 XX
        EXPIRE e 100 GT
        EXPIRE e 300 GT
        EXPIRE e 400 LT
        EXPIRE e 100 LT
        EXPIRE e 10 xx gt
        EXPIRE e 100 NX XX
        EXPIRE e 100 NX GT
        EXPIRE e 100 GT LT
        EXPIRE e 100 FOO
        EXPIRE e 100 NX FOO
        EXPIRE e abc
        EXPIRE e 9223372036854775807
        EXPIRE e 9223372036854775
        EXPIRE e -9223372036854775807
        PEXPIRE e 9223372036854775807
        PEXPIRE missing 9223372036854775807
        EXPIRE missing 10
        EXPIRE e
        PERSIST e
        PERSIST e
        PERSIST missing
        TTL e
        PTTL e
        EXPIRE e 10 GT
        EXPIRE e 10 LT
        EXPIRE e 10 XX LT
        TTL missing
        PTTL missing
        EXPIRETIME missing
        EXPIREAT e 33177117420
        EXPIRETIME e
        PEXPIREAT e 33177117420123
        PEXPIRETIME e
        EXPIRETIME e
        PEXPIREAT e 33177117420600
        EXPIRETIME e
        EXPIREAT e abc
        EXPIREAT e 9223372036854775807
        EXPIREAT e -1
        GET e
        SET n 1
        EXPIRE n 0
        GET n
        SET n 1
        EXPIRE n -1
        GET n
        """,
    "walks": r"""
        SET k1 v
        KEYS *
        KEYS k?
        KEYS k[0-9]
        KEYS k[^0-9]
        KEYS k[a
        KEYS [
        KEYS [^
        KEYS []
        KEYS 'k\\1'
        KEYS [j-l]1
        KEYS [l-j]1
        KEYS '[k\\]]1'
        KEYS **1
        KEYS ""
        KEYS
        KEYS a b
        SCAN 0
        SCAN abc
        SCAN -1x
        SCAN " 0"
        SCAN ""
        SCAN 99999999999999999999999999
        SCAN 0 COUNT 0
        SCAN 0 COUNT abc
        SCAN 0 COUNT
        SCAN 0 FOO 1
        SCAN 0 MATCH k* COUNT 100
        SCAN 0 MATCH z* COUNT 100
        SCAN 0 TYPE string
        SCAN 0 TYPE list
        SCAN 0 TYPE foo
        SCAN
        """,
    "the connection": r"""
        PING
        PING hello
        PING a b
        PiNg
        ECHO hi
        ECHO
        SELECT 0
        SELECT 99
        SELECT abc
        SELECT -1
        SELECT 99999999999
        AUTH x
        AUTH default x
        AUTH foo x
        AUTH
        AUTH a b c
        HELLO abc
        HELLO 1
        HELLO 4
        HELLO 2 FOO
        HELLO 2 AUTH a
        HELLO 2 AUTH foo bar
        HELLO 2 SETNAME "a b"
        CLIENT GETNAME
        CLIENT SETNAME foo
        CLIENT GETNAME
        CLIENT SETNAME "a b"
        CLIENT SETNAME ""
        CLIENT GETNAME
        CLIENT FOO
        CLIENT
        CLIENT SETNAME
        CLIENT GETNAME x
        CLIENT NO-EVICT on
        CLIENT NO-EVICT foo
        CLIENT LIST FOO
        CLIENT LIST TYPE foo
        CLIENT LIST TYPE replica
        CLIENT LIST ID abc
        CLIENT KILL 1.2.3.4:5
        CLIENT KILL ID 99999
        CLIENT KILL ID abc
        CLIENT KILL FOO bar
        FOO
        FOO a b c
        FOO "a\nb" 'c'
        foo aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbbb cccccccccccccccccccccccccccccc
        FOO \xff\xfe \x00
        "" a
        RESET
        RESET x
        """,
    "the server": r"""
        CONFIG GET maxmemory-policy
        CONFIG GET save
        CONFIG GET appendonly
        CONFIG GET nosuch
        CONFIG GET
        CONFIG SET
        CONFIG SET maxmemory
        CONFIG SET nosuch 1
        CONFIG SET maxmemory abc
        CONFIG SET maxmemory 1 maxmemory 2
        CONFIG SET maxclients abc
        CONFIG SET maxclients 0
        CONFIG SET stop-writes-on-bgsave-error maybe
        CONFIG SET save foo
        CONFIG SET save "1"
        CONFIG SET save "0 1"
        CONFIG SET save "100 1 200 2"
        CONFIG GET save
        CONFIG SET save ""
        CONFIG GET save
        CONFIG SET maxmemory 100mb
        CONFIG GET maxmemory
        CONFIG SET maxmemory 1k
        CONFIG GET maxmemory
        CONFIG SET maxmemory 1GB
        CONFIG GET maxmemory
        CONFIG SET maxmemory 0
        CONFIG GET maxmemory
        CONFIG SET appendonly foo
        CONFIG SET dbfilename a/b
        CONFIG SET dir /nonexistent
        CONFIG RESETSTAT
        CONFIG RESETSTAT x
        CONFIG REWRITE
        CONFIG FOO
        CONFIG
        MEMORY USAGE missing
        MEMORY USAGE
        MEMORY USAGE k1 SAMPLES
        MEMORY USAGE k1 FOO 1
        MEMORY FOO
        MEMORY
        BGSAVE FOO
        BGSAVE SCHEDULE x
        SAVE x
        LASTSAVE x
        SHUTDOWN FOO
        SHUTDOWN SAVE NOSAVE
        SHUTDOWN ABORT
        SHUTDOWN ABORT NOW
        COMMAND COUNT x
        COMMAND FOO
        COMMAND INFO nosuch
        COMMAND GETKEYS GET a
        COMMAND GETKEYS MSET a 1 b 2
        COMMAND GETKEYS nosuch a
        COMMAND GETKEYS PING
        COMMAND GETKEYS GET
        TIME x
        ROLE
        ROLE x
        """,
    "transactions": r"""
        EXEC
        DISCARD
        MULTI
        MULTI
        SET a 1
        INCR
        EXEC
        MULTI
        SET a 1
        get a
        GET b
        APPEND a x
        INCR a
        MGET a b
        PING
        EXEC
        WATCH a
        MULTI
        WATCH b
        SET a 2
        EXEC
        WATCH a
        SET a 3
        MULTI
        SET a 4
        EXEC
        GET a
        WATCH a
        UNWATCH
        SET a 5
        MULTI
        SET a 6
        DISCARD
        GET a
        WATCH nokey
        MULTI
        SET nokey 1
        EXEC
        MULTI
        RESET
        EXEC
        WATCH
        MULTI
        EXEC
        """,
    "protocol 3": r"""
        HELLO 3 AUTH default x SETNAME foo
        GET missing
        SET a 1
        MGET a b
        GETDEL x
        CONFIG GET maxmemory-policy
        CLIENT GETNAME
        SET a 1 NX
        SET q 1 GET
        ROLE
        COMMAND INFO nosuch
        COMMAND DOCS nosuch
        WATCH a
        SET a 2
        MULTI
        EXEC
        RESET
        GET missing
        """,
}


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
