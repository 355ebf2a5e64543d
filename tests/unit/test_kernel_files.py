from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, strategies as st

from memsafe._kernel import files
from memsafe._kernel.files import UNLIMITED, Flat, Labelled
from memsafe.errors import KernelError
from tests.unit.proc_tree import only_memsafe_errors

if TYPE_CHECKING:
    from pathlib import Path


def test_missing_unreadable_and_garbage_stay_apart(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="absent") as missing:
        files.read(str(tmp_path / "absent"))
    with pytest.raises(KernelError, match=str(tmp_path)) as unreadable:
        files.read(str(tmp_path))
    with pytest.raises(KernelError, match="here: ") as garbage:
        files.count(b"x", "here")
    assert [e.value.errno for e in (missing, unreadable, garbage)] == [errno.ENOENT, errno.EISDIR, errno.EBADMSG]
    assert [files.is_missing(e.value) for e in (missing, unreadable, garbage)] == [True, False, False]


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ESRCH])
def test_a_file_goes_with_its_folder_its_cgroup_and_its_process(number: int) -> None:
    assert files.is_missing(KernelError(number, "read it"))


def test_an_optional_file_is_none_only_when_it_is_missing(tmp_path: Path) -> None:
    assert files.read_optional(str(tmp_path / "absent")) is None
    assert files.read_optional(str(tmp_path / "absent" / "below")) is None
    with pytest.raises(KernelError):
        files.read_optional(str(tmp_path))


def test_reads_a_file_longer_than_one_chunk(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    (tmp_path / "long").write_bytes(data)
    assert files.read(str(tmp_path / "long")) == data


def test_a_close_that_fails_takes_nothing_from_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"text")
    close = os.close

    def closed(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", closed)
        assert files.read(str(path)) == b"text"


def test_refuses_a_file_beyond_its_bound(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(bytes(4097))
    with pytest.raises(KernelError) as error:
        files.read(str(tmp_path / "long"), max_bytes=4096)
    assert error.value.errno == errno.EFBIG


def test_a_fifo_in_the_way_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert files.read(str(tmp_path / "fifo")) == b""


def test_a_nul_byte_in_a_path_is_a_kernel_error() -> None:
    with pytest.raises(KernelError):
        files.read("/proc/\0")


@pytest.mark.parametrize("root", ["/", "", "//"])
def test_the_root_of_the_machine_leaves_paths_alone(root: str) -> None:
    assert files.under(root, "/proc/meminfo") == "/proc/meminfo"


def test_another_root_goes_before_the_path(tmp_path: Path) -> None:
    assert files.under(tmp_path, "/proc") == f"{tmp_path}/proc"
    assert files.under(f"{tmp_path}/", "/proc") == f"{tmp_path}/proc"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"0\n", 0),
        (b"4096", 4096),
        (b"max\n", UNLIMITED),
        (b"9223372036854771712\n", UNLIMITED),
        (b"9223372036854710272\n", UNLIMITED),
        (b"18446744073709551615\n", UNLIMITED),
    ],
)
def test_limits_are_read_with_every_spelling_of_unlimited(text: bytes, value: int) -> None:
    assert files.limit(text, "memory.max") == value


@pytest.mark.parametrize("text", [b"", b"-1", b"+1", b"1_000", b"1 2", b"0x10", b"1.5", b"9" * 21, "٣".encode()])
def test_what_only_looks_like_a_number_is_garbage(text: bytes) -> None:
    with pytest.raises(KernelError) as error:
        files.count(text, "memory.current")
    assert error.value.errno == errno.EBADMSG


def test_a_flat_file_gives_its_keys_and_none_for_others() -> None:
    stat = Flat(b"anon 5\nfile 7\n", "memory.stat")
    assert (stat.get(b"file"), stat.get(b"shmem"), stat.as_dict()) == (7, None, {"anon": 5, "file": 7})
    with pytest.raises(KernelError, match=r"memory\.stat"):
        Flat(b"anon five\n", "memory.stat").get(b"anon")


def test_a_labelled_file_gives_bytes_for_kilobytes() -> None:
    lines = Labelled(b"MemTotal:   12 kB\nSwap: 5\nMemTotalX: 1 kB\n", "meminfo")
    assert lines.required_bytes(b"MemTotal") == 12 * 1024
    assert lines.count(b"Swap") == 5
    assert lines.size_bytes(b"Total") is None
    with pytest.raises(KernelError, match="not in kB"):
        lines.size_bytes(b"Swap")
    with pytest.raises(KernelError, match="no MemFree"):
        lines.required_bytes(b"MemFree")


@given(st.binary(max_size=200))
def test_no_content_raises_anything_but_a_memsafe_error(text: bytes) -> None:
    reads = (
        lambda: files.count(text, "f"),
        lambda: files.limit(text, "f"),
        lambda: Flat(text, "f").as_dict(),
        lambda: Labelled(text, "f").required_bytes(b"A"),
        lambda: Labelled(b"A:" + text, "f").required_bytes(b"A"),
    )
    for read in reads:
        with only_memsafe_errors(naming="f: "):
            read()
