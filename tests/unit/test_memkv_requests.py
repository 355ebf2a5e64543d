"""The parser of requests: whatever way the bytes come, the same requests come out."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given, strategies as st

from examples.memkv.requests import (
    BIG_BYTES,
    REFUSED,
    ProtocolError,
    Request,
    RequestParser,
    parse_integer,
    split_inline,
)

words = st.binary(max_size=40) | st.sampled_from(
    [b"*0\r\n", b"*99999\r\n", b"$5\r\n", b"\r\n", b"*1\r\n$4\r\nPING\r\n"]
)
requests = st.lists(words, min_size=1, max_size=5)


def packed(request: Request) -> bytes:
    return b"*%d\r\n" % len(request) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in request)


class Holder:
    """Grants what is asked for up to a limit, and remembers."""

    def __init__(self, limit_bytes: int = 1 << 40) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0

    def __call__(self, need_bytes: int) -> bool:
        if self.held_bytes + need_bytes > self.limit_bytes:
            return False
        self.held_bytes += need_bytes
        return True


def fed(data: bytes, cuts: list[int], holder: Holder | None = None) -> tuple[list[Request], str | None]:
    """Return what comes out of *data* in chunks that end at *cuts*, and the failure."""
    parser = RequestParser(holder or Holder())
    found: list[Request] = []
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    for start, end in zip([0, *ends], ends, strict=False):
        if start < end and parser.failure is None:
            found += parser.parse(data[start:end])
    return found, str(parser.failure) if parser.failure else None


@given(st.lists(requests, max_size=6), st.lists(st.integers(0, 300), max_size=8))
def test_requests_come_out_as_they_were_packed_however_they_are_cut(sent: list[Request], cuts: list[int]) -> None:
    assert fed(b"".join(map(packed, sent)), cuts) == (sent, None)


@given(
    st.lists(
        requests.map(packed)
        | st.sampled_from(
            [
                *(
                    b"PING\r\n",
                    b"\r\n",
                    b"*0\r\n",
                    b"*-1\r\n",
                    b'SET "a b" c\n',
                    b"*1\r\n:5\r\n",
                    b"*x\r\n",
                    b"*1\r\n$-1\r\n",
                ),
                *(
                    b"*1\r\n$4\r\nPINGxx",
                    b"+OK\r\n",
                    b'"open\r\n',
                    b"*1\r\n$600000000\r\n",
                    b"*2147483647\r\n",
                    b"*1\r",
                ),
            ]
        )
        | st.binary(max_size=10),
        max_size=6,
    ).map(b"".join),
    st.lists(st.integers(0, 200), max_size=8),
)
@example(b"*1\r\n+PING\r\n", [])
@example(b":0\r\n", [])
@example(b"*1\r\n#f\r\n", [])
def test_any_bytes_mean_the_same_however_they_are_cut(data: bytes, cuts: list[int]) -> None:
    whole, byte_by_byte = fed(data, []), fed(data, list(range(len(data))))
    assert fed(data, cuts) == whole == byte_by_byte


def test_a_partial_request_is_told_and_counted() -> None:
    parser = RequestParser(Holder())
    assert parser.parse(b"*2\r\n$4\r\nECHO\r\n$10\r\nabc") == []
    assert parser.partial
    assert 0 < parser.pending_bytes < 50
    assert parser.parse(b"defghij\r\n*1\r\n$4\r\nPING\r\n") == [[b"ECHO", b"abcdefghij"], [b"PING"]]
    assert not parser.partial
    assert parser.pending_bytes == 0


def test_a_big_value_is_asked_for_before_it_is_kept() -> None:
    holder = Holder()
    parser = RequestParser(holder)
    value = random.Random(1).randbytes(BIG_BYTES * 3)
    data = packed([b"SET", b"k", value])
    assert parser.parse(data[:100]) == []
    assert holder.held_bytes >= len(value)
    assert parser.held_bytes == holder.held_bytes
    assert parser.parse(data[100:-1]) == []
    assert parser.parse(data[-1:]) == [[b"SET", b"k", value]]
    assert parser.held_bytes == 0


@pytest.mark.parametrize("piece", [7, 1000, BIG_BYTES])
def test_what_may_not_be_kept_is_skipped_and_the_next_request_found(piece: int) -> None:
    holder = Holder(limit_bytes=BIG_BYTES * 2)
    value = b"*3\r\n" * BIG_BYTES
    data = packed([b"MSET", b"a", value, b"b", value, b"c", b"small"]) + packed([b"PING"])
    parser = RequestParser(holder)
    found: list[Request] = []
    for start in range(0, len(data), piece):
        found += parser.parse(data[start : start + piece])
        assert parser.pending_bytes <= piece + 100
    assert found == [REFUSED, [b"PING"]]
    assert found[0] is REFUSED


def test_many_small_words_are_asked_for_too() -> None:
    holder = Holder(limit_bytes=1 << 20)
    request = [b"DEL", *(b"k%d" % i for i in range(100_000))]
    assert fed(packed(request), list(range(0, 2_000_000, 1 << 16)), holder)[0] == [REFUSED]
    assert fed(packed(request), list(range(0, 2_000_000, 1 << 16)))[0] == [request]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (b"0", 0),
        (b"-1", -1),
        (b"9223372036854775807", 2**63 - 1),
        (b"-9223372036854775808", -(2**63)),
        *((text, None) for text in (b"", b"-", b"-0", b"+1", b"01", b" 1", b"1 ", b"1_0", b"0x1", b"1e1", b"\xd9\xa1")),
        (b"9223372036854775808", None),
        (b"-9223372036854775809", None),
        (b"1" * 10_000, None),
    ],
)
def test_integers_are_what_redis_takes_for_one(text: bytes, number: int | None) -> None:
    assert parse_integer(text) == number


@pytest.mark.parametrize("line", [b'"', b"'", b'a "b', b'"a"b', b"'a'b", b'a"b"c', b'"a\\"', b"'a\\'"])
def test_quotes_that_do_not_match_are_an_error(line: bytes) -> None:
    with pytest.raises(ProtocolError, match="unbalanced quotes"):
        split_inline(line)
