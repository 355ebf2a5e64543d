from contextlib import suppress
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, strategies as st

from memsafe import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("65536", 65536),
        ("7 B", 7),
        ("64 MiB", 64 * 2**20),
        ("64M", 64 * 2**20),
        ("64MiB", 64 * 2**20),
        ("64mib", 64 * 2**20),
        ("64 MB", 64 * 10**6),
        ("1 kB", 1000),
        ("1k", 1024),
        ("1.5 GiB", 3 * 2**29),
        ("  2 T ", 2 * 2**40),
        ("0.5K", 512),
        ("7.99 EiB", None),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_strings_mean_what_systemd_and_docker_read(text, size_bytes):
    if size_bytes is None:
        with pytest.raises(ValueError, match="whole number"):
            parse_size(text)
    else:
        assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "junk",
    [
        "", " ", "junk", "-1", "-1 MiB", "1.5", "0.3 K", "nan", "inf", "1e9", "64 MiBs", "64 iB", "1_000", "٣",
        "1 M iB", "0x10", "8 EiB", "9" * 100, -1, 2**63, 1.0, 1.5, float("nan"), float("inf"), True,
    ],
)  # fmt: skip
def test_junk_is_a_value_error(junk):
    with pytest.raises(ValueError, match="a limit must"):
        parse_size(junk, what="a limit")


@pytest.mark.parametrize("other", [None, b"64", [], 1j, Decimal("NaN"), Decimal("1.5"), Fraction(3, 2)])
def test_what_is_neither_int_nor_string_is_a_value_error_too(other):
    with pytest.raises(ValueError, match="int of bytes"):
        parse_size(other)


def test_anything_with_index_is_an_int():
    class Index:
        def __index__(self):
            return 4096

    size = parse_size(Index())
    assert size == 4096
    assert type(size) is int


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1 MiB"),
        (64 * 2**20, "64 MiB"),
        (2**62, "4194304 TiB"),
        (-2048, "-2 KiB"),
        (None, "unknown"),
    ],
)
def test_sizes_for_people(size_bytes, text):
    assert format_size(size_bytes) == text


@given(st.integers(min_value=0, max_value=2**63 - 1))
def test_every_int_is_itself(size_bytes):
    assert parse_size(size_bytes) == parse_size(str(size_bytes)) == size_bytes
    assert format_size(size_bytes)


@given(st.text())
def test_any_text_is_a_size_or_a_value_error(text):
    with suppress(ValueError):
        assert parse_size(text) >= 0
