from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, strategies as st

from memsafe._kernel import files, psi
from memsafe.errors import KernelError
from tests.unit.proc_tree import ProcTree, only_memsafe_errors

if TYPE_CHECKING:
    from pathlib import Path

TEXT = b"some avg10=1.50 avg60=0.20 avg300=0.03 total=123456\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=77\n"


def test_both_lines_are_read() -> None:
    pressure = psi.parse_pressure(TEXT, "p")
    assert pressure.some == psi.Stall(avg10=1.5, avg60=0.2, avg300=0.03, total_us=123456)
    assert pressure.full.total_us == 77
    assert pressure.as_dict()["full"]["avg10"] == 0.5


def test_unknown_lines_and_fields_are_left_alone() -> None:
    assert psi.parse_pressure(TEXT.replace(b"some ", b"some avg1=9.00 ") + b"most avg10=x\n", "p").some.avg10 == 1.5


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"garbage",
        TEXT.splitlines()[0],
        TEXT + TEXT,
        TEXT.replace(b"total=77", b"total=-7"),
        TEXT.replace(b"total=77", b""),
        TEXT.replace(b"avg10=0.50", b"avg10=nan"),
        TEXT.replace(b"avg10=0.50", b"avg10=0.50 avg10=0.50"),
        TEXT.replace(b"avg10=0.50", b"avg10"),
    ],
)
def test_what_is_missing_doubled_or_no_number_is_an_error(text: bytes) -> None:
    with pytest.raises(KernelError, match=r"/p"):
        psi.parse_pressure(text, "/p")


def test_psi_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert psi.read_pressure(str(tmp_path / "memory")) is None


def test_psi_that_is_off_is_none_and_forbidden_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(number: int) -> None:
        def read(path: str) -> bytes:
            raise KernelError(number, f"read {path}")

        monkeypatch.setattr(files, "read", read)

    answer(errno.EOPNOTSUPP)
    assert psi.read_pressure("/p") is None
    answer(errno.EACCES)
    with pytest.raises(KernelError, match="/p"):
        psi.read_pressure("/p")


def test_the_cgroups_own_file_is_found_where_memory_is_on_v1(tmp_path: Path) -> None:
    tree = ProcTree(tmp_path)
    tree.v1("/m")
    assert psi.cgroup_path(tmp_path) == f"{tmp_path}/sys/fs/cgroup/unified/memory.pressure"


@given(st.binary(max_size=200))
def test_no_content_raises_anything_but_a_memsafe_error(text: bytes) -> None:
    for whole in (text, TEXT + text, TEXT.replace(b"0.50", text)):
        with only_memsafe_errors(naming="/p"):
            psi.parse_pressure(whole, "/p")
