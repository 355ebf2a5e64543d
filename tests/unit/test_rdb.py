"""RDB files: what is written is read back, and nothing that is cut or altered passes for whole."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import tracemalloc
from pathlib import Path

import anycrc
import pytest
from hypothesis import given, settings, strategies as st

from examples.memkv import rdb
from examples.memkv.rdb import RDBError

Entry = tuple[bytes, bytes, int | None]

SAMPLE: list[Entry] = [
    (b"plain", b"value", None),
    (b"", b"", None),
    (b"expiring", b"v", 1_900_000_000_123),
    (b"compressible", b"the same again, " * 20, None),
    (b"incompressible", random.Random(1).randbytes(100), 0),
]


def dump(entries: list[Entry], **options: object) -> bytes:
    out = io.BytesIO()
    rdb.write(out, entries, **options)  # type: ignore[arg-type]
    return out.getvalue()


def load(data: bytes) -> list[Entry]:
    return list(rdb.read(io.BytesIO(data)))


def sealed(body: bytes, version: int = 9) -> bytes:
    """An RDB file of *body* with the right checksum: what only a faulty or hostile writer makes."""
    data = b"REDIS%04d" % version + body + b"\xff"
    if version < 5:
        return data
    return data + struct.pack("<Q", anycrc.Model("CRC64-REDIS").calc(data))


class Pipe(io.RawIOBase):
    """A source that cannot seek and gives at most seven bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._data.read(min(size, 7) if size >= 0 else 7)


entries = st.lists(
    st.tuples(
        st.binary(max_size=200),
        st.binary(max_size=2000)
        | st.binary(max_size=20).map(lambda b: b * 50)
        | st.integers().map(lambda n: b"%d" % n),
        st.none() | st.integers(0, 2**63 - 1),
    ),
    unique_by=lambda entry: entry[0],
)


@given(entries, st.booleans())
def test_what_is_written_is_read_back(written: list[Entry], compress: bool) -> None:
    data = dump(written, compress=compress)
    assert load(data) == written
    assert list(rdb.read(Pipe(data))) == written  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 1, 20, 21, 63, 64, 16383, 16384, 262_143, 262_144, 1 << 20, (1 << 20) + 1])
@pytest.mark.parametrize("fill", ["same", "random"])
def test_every_length_encoding_survives(size: int, fill: str) -> None:
    value = b"x" * size if fill == "same" else random.Random(size).randbytes(size)
    written: list[Entry] = [(b"k" * min(size, 20_000), value, None), (b"after", b"it", None)]
    assert load(dump(written)) == written


def test_a_64_bit_length_is_read() -> None:
    assert load(sealed(b"\0\x01k\x81" + struct.pack(">Q", 3) + b"abc")) == [(b"k", b"abc", None)]
    assert rdb._length(2**32) == b"\x81\x00\x00\x00\x01\x00\x00\x00\x00"
    assert rdb._length(2**32 - 1) == b"\x80\xff\xff\xff\xff"


def test_writing_hands_on_in_bounded_pieces_and_reports_progress() -> None:
    pieces: list[int] = []
    seen: list[tuple[int, int | None]] = []

    class Out:
        def write(self, data: bytes) -> int:
            pieces.append(len(data))
            return len(data)

    value = random.Random(2).randbytes(4096)
    assert (
        rdb.write(
            Out(), ((b"%d" % i, value, None) for i in range(1000)), total_hint=1000, progress=lambda *a: seen.append(a)
        )
        == 1000
    )
    assert max(pieces) < 300 * 1024
    assert len(seen) > 10
    assert seen == sorted(seen)
    assert seen[-1] == (1000, 1000)


def test_aux_fields_are_written_and_reported() -> None:
    summary = rdb.check(io.BytesIO(dump(SAMPLE, aux={"used-mem": 123, "redis-ver": "7.0.0"}, total_hint=5)))
    assert summary.aux["used-mem"] == "123"
    assert summary.aux["redis-ver"] == "7.0.0"
    assert summary.aux["redis-bits"] == "64"
    assert (summary.version, summary.entries, summary.expiring, summary.checksummed) == (9, 5, 2, True)
    assert summary.as_dict()["entries"] == 5


@pytest.mark.parametrize("expires_at_ms", [-1, 2**63])
def test_an_impossible_expiry_is_not_written(expires_at_ms: int) -> None:
    with pytest.raises(ValueError, match=str(expires_at_ms)):
        dump([(b"k", b"v", expires_at_ms)])


def test_integers_as_redis_encodes_them_are_read() -> None:
    values = {b"\xc0\xff": b"-1", b"\xc1\x39\x30": b"12345", b"\xc2" + struct.pack("<i", -(2**31)): b"-2147483648"}
    body = b"".join(b"\0\x01" + bytes([65 + i]) + encoded for i, encoded in enumerate(values))
    assert [value for _, value, _ in load(sealed(body))] == list(values.values())
    assert load(sealed(b"\0\xc0\x07\x01v")) == [(b"7", b"v", None)]  # keys too


def test_what_says_nothing_about_strings_is_skipped() -> None:
    module_aux = b"\xf7\x81" + bytes(8) + b"\x02\x01" + b"\x01\x05\x02\x40\x80\x03abcd\x04abcdefgh\x05\x02hi\x00"
    body = (
        b"\xfa\x03foo\x03bar" + b"\xf5\x0c#!lua name=f" + module_aux + b"\xf4\x01\x02\x03" + b"\xfe\x00\xfb\x02\x01"
        b"\xf8\x40\xc8" + b"\0\x01a\x011" + b"\xf9\x05" + b"\xfc" + struct.pack("<q", 5) + b"\0\x01b\x012" +
        b"\xfd" + struct.pack("<i", 7) + b"\0\x01c\x013"
    )  # fmt: skip
    assert load(sealed(body, 12)) == [(b"a", b"1", None), (b"b", b"2", 5), (b"c", b"3", 7000)]


@pytest.mark.parametrize("version", [1, 4])
def test_versions_before_5_have_no_checksum(version: int) -> None:
    assert load(sealed(b"\xfe\0\0\x01a\x011", version)) == [(b"a", b"1", None)]


def test_a_zero_checksum_means_that_there_is_none() -> None:
    data = dump(SAMPLE)[:-8] + bytes(8)
    assert load(data) == SAMPLE
    assert not rdb.check(io.BytesIO(data)).checksummed


def test_every_truncation_is_an_error_that_says_where(tmp_path: Path) -> None:
    data = dump(SAMPLE, total_hint=5)
    path = tmp_path / "dump.rdb"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        for source in (path, io.BytesIO(data[:size]), Pipe(data[:size])):
            with pytest.raises(RDBError, match="the end of the file" if size else "an empty file") as raised:
                list(rdb.read(source))  # type: ignore[arg-type]
            assert raised.value.offset <= size
        with pytest.raises(RDBError, match=r"dump\.rdb"):
            rdb.check(path)
    path.write_bytes(data)
    assert rdb.check(path).size_bytes == len(data)


def test_every_flipped_bit_is_an_error() -> None:
    data = dump(SAMPLE, total_hint=5)
    for position in range(len(data)):
        for bit in range(8):
            altered = bytearray(data)
            altered[position] ^= 1 << bit
            with pytest.raises(RDBError):
                load(bytes(altered))


@settings(max_examples=500)
@given(st.binary(max_size=300), st.sampled_from([1, 4, 9, 12]))
def test_junk_is_read_or_refused_but_never_crashes(junk: bytes, version: int) -> None:
    with contextlib.suppress(RDBError):
        assert all(len(entry) == 3 for entry in load(sealed(junk, version)))


@settings(max_examples=300)
@given(st.binary(min_size=1, max_size=100), st.integers(0, 10_000))
def test_junk_compressed_data_never_crashes(junk: bytes, plain_bytes: int) -> None:
    body = b"\0\x01k\xc3" + rdb._length(len(junk)) + rdb._length(plain_bytes) + junk
    with contextlib.suppress(RDBError):
        assert [len(value) for _, value, _ in load(sealed(body))] == [plain_bytes]


def test_data_after_the_end_is_an_error() -> None:
    with pytest.raises(RDBError, match="more data"):
        load(dump(SAMPLE) + b"*2\r\n")


@pytest.mark.parametrize(
    ("data", "offset", "words"),
    [
        (b"", 0, "an empty file"),
        (b"SQLite format 3\0", 0, "an RDB file"),
        (b"RED", 0, "9 of the header"),
        (b"REDIS00x9\xff", 5, "a format version"),
        (b"REDIS0000\xff", 5, "a format version"),
        (b"REDIS0013\xff", 5, "at most 12: a newer server"),
        (dump(SAMPLE)[:-8] + b"\1" * 8, len(dump(SAMPLE)) - 8, "checksum 0101010101010101"),
        (sealed(b"\x02\x03key"), 9, r"a set \(type 2\) under key b'key'"),
        (sealed(b"\x0e\x03key"), 9, r"a list \(type 14\) under key b'key'"),
        (sealed(b"\x18\x03key", 12), 9, r"a hash \(type 24\) under key b'key'"),
        (sealed(b"\x63"), 9, "unknown opcode 99"),
        (sealed(b"\xf6"), 9, "release candidate"),
        (sealed(b"\xfe\x03\0\x03key\x01v"), 11, "key b'key' in database 3"),
        (sealed(b"\0\x01k\x82"), 12, "length byte 0x82"),
        (sealed(b"\0\x01k\xc4"), 12, "string encoding 0xc4"),
        (sealed(b"\xfe\xc0\x01"), 10, "length byte 0xc0"),
        (sealed(b"\0\x01k\xc3\x02\x03\x05abc"), 12, "broken LZF data for the value of b'k'"),
        (sealed(b"\0\x01k\xc3\x00\x03"), 12, "compressed to 0"),
        (sealed(b"\0\x01k\xc3\x02\x80\x00\x01\x00\x00ab"), 12, "65536 bytes compressed to 2"),
        (sealed(b"\xf7\x01\x02\x00\x09"), 13, "module opcode 9"),
    ],
)
def test_an_error_names_file_offset_found_and_expected(tmp_path: Path, data: bytes, offset: int, words: str) -> None:
    path = tmp_path / "dump.rdb"
    path.write_bytes(data)
    with pytest.raises(RDBError, match=words) as raised:
        list(rdb.read(path))
    assert raised.value.offset == offset
    assert str(raised.value).startswith(f"{path}, at byte {offset}: found {raised.value.found}, expected ")


@pytest.mark.parametrize(
    "length",
    [
        b"\x81" + b"\xff" * 8,
        b"\x81" + b"\x00\x00\x00\x7f" * 2,
        b"\x80\xff\xff\xff\xff",
        b"\xc3\x02\x80\xff\xff\xff\xff",
    ],
    ids=["2**64", "beyond", "4 GiB", "bomb"],
)
@pytest.mark.parametrize("source", ["file", "memory", "pipe"])
def test_an_absurd_length_allocates_nothing(tmp_path: Path, length: bytes, source: str) -> None:
    data = sealed(b"\0\x03key" + length + b"some")
    path = tmp_path / "dump.rdb"
    path.write_bytes(data)
    sources = {"file": path, "memory": io.BytesIO(data), "pipe": Pipe(data)}
    tracemalloc.start()
    try:
        with pytest.raises(RDBError, match="b'key'"):
            list(rdb.read(sources[source]))  # type: ignore[arg-type]
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_missing_file_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(rdb.read(tmp_path / "none.rdb"))


def test_a_file_object_is_read_from_where_it_stands_and_left_open(tmp_path: Path) -> None:
    path = tmp_path / "dump.rdb"
    path.write_bytes(dump(SAMPLE))
    with path.open("rb") as file:
        assert list(rdb.read(file)) == SAMPLE
        assert not file.closed


def test_giving_up_half_way_closes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "dump.rdb"
    path.write_bytes(dump(SAMPLE))
    reading = rdb.read(path)
    assert next(reading) == SAMPLE[0]
    del reading  # an open file would be a ResourceWarning, which pytest makes an error
