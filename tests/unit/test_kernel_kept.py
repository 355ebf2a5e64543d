from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from memsafe import memory_status
from memsafe._kernel import files, kept
from memsafe._kernel.kept import DESCRIPTORS_MAX, KeptFiles
from memsafe._native import lib
from memsafe.errors import KernelError
from memsafe.status import status_once
from tests.unit.proc_tree import GIB, MIB, ProcTree

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def keeping(tmp_path: Path) -> Iterator[KeptFiles]:
    keeping = KeptFiles(tmp_path, believe_s=0)
    yield keeping
    keeping.close()


@pytest.fixture
def believing(tmp_path: Path) -> Iterator[KeptFiles]:
    """One that never tries again by itself what could not be opened."""
    believing = KeptFiles(tmp_path, believe_s=1e6)
    yield believing
    believing.close()


def look(keeping: KeptFiles, *paths: Path) -> list[bytes | int | None]:
    """What each path holds, or the number of the error."""
    found: list[bytes | int | None] = []
    with keeping.reading():
        for path in paths:
            try:
                found.append(files.read(str(path)))
            except KernelError as error:
                found.append(error.errno)
    return found


def open_in(folder: Path) -> dict[int, str]:
    """The descriptors of this process whose files are, or were, under *folder*."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue  # the listing's own
        if target.startswith(str(folder)):
            found[int(number)] = target
    return found


def test_descriptors_stay_open_and_what_is_written_is_seen(keeping: KeptFiles, tmp_path: Path) -> None:
    file = tmp_path / "file"
    for text in (b"1", b"22", b"", b"4" * 9000):
        file.write_bytes(text)
        assert look(keeping, file) == [text]
    first = open_in(tmp_path)
    assert list(first.values()) == [str(file)]
    look(keeping, file)
    assert open_in(tmp_path) == first


def test_what_is_asked_for_besides_leaves_the_others_open(keeping: KeptFiles, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for file in (one, two):
        file.write_bytes(b"1")
    for _ in range(2):
        look(keeping, one)
    look(keeping, one, two)
    assert [lib.ms_kept_read(keeping.native) for _ in range(2)] == [1, 0]


def test_a_second_reading_is_its_own_and_all_can_be_renewed_within_one(keeping: KeptFiles, tmp_path: Path) -> None:
    path = tmp_path / "number"
    path.write_text("1")
    with keeping.reading():
        files.read(str(path))
        files.read(str(path), again=True)
    path.write_text("2")
    with keeping.reading():
        assert [files.read(str(path), again=again) for again in (False, True)] == [b"2", b"2"]
        path.write_text("3")
        assert [files.read(str(path), again=again) for again in (False, True)] == [b"2", b"2"]
        files.renew()
        assert [files.read(str(path), again=again) for again in (False, True)] == [b"3", b"3"]
    files.renew()  # outside there is nothing to renew
    assert files.read(str(path)) == b"3"


def test_what_somebody_else_had_read_answers_one_look_and_no_more(keeping: KeptFiles, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    for _ in range(2):
        look(keeping, file)
    lib.ms_kept_read(keeping.native)
    keeping.was_read()
    file.write_bytes(b"2")
    assert [look(keeping, file), look(keeping, file)] == [[b"1"], [b"2"]]


def test_a_file_made_anew_under_the_same_name_is_the_one_that_is_read(keeping: KeptFiles, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    look(keeping, file)
    look(keeping, file)
    file.unlink()
    assert look(keeping, file) == [errno.ENOENT]
    file.write_bytes(b"new")
    assert look(keeping, file) == [b"new"]
    assert list(open_in(tmp_path).values()) == [str(file)]


def test_what_is_absent_is_believed_until_something_changes(believing: KeptFiles, tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    folder.mkdir()

    def seen() -> bytes | None:
        with believing.reading():
            assert files.is_directory(str(folder))
            assert not files.is_directory(str(tmp_path / "nowhere"))
            return files.read_optional(str(file))

    for _ in range(2):
        assert seen() is None
    file.write_bytes(b"new")
    assert seen() is None
    folder.rename(tmp_path / "away")
    folder.mkdir()
    assert seen() == b"new"


def test_what_is_absent_is_tried_again_after_a_while(keeping: KeptFiles, tmp_path: Path) -> None:
    file = tmp_path / "file"
    for _ in range(2):
        assert look(keeping, file) == [errno.ENOENT]
    file.write_bytes(b"new")
    assert look(keeping, file) == [b"new"]


OUT_OF_DESCRIPTORS = """
import resource
from memsafe._kernel import files
from memsafe._kernel.kept import KeptFiles
from memsafe.errors import KernelError
keeping = KeptFiles("/", believe_s=1e6)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
for limit, succeeds in ((0, False), (0, False), (soft, True)):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    with keeping.reading():
        try:
            files.read("/proc/self/status")
        except KernelError:
            assert not succeeds
        else:
            assert succeeds
"""


def test_running_out_of_descriptors_is_not_believed() -> None:
    subprocess.run([sys.executable, "-c", OUT_OF_DESCRIPTORS], check=True, timeout=60)


def test_what_is_held_is_open_at_once_and_stays_open_unasked_for(keeping: KeptFiles, tmp_path: Path) -> None:
    held, other = tmp_path / "held", tmp_path / "other"
    held.write_bytes(b"1")
    other.write_bytes(b"2")
    keeping.hold([str(held)])
    assert list(open_in(tmp_path).values()) == [str(held)]
    for _ in range(3):
        look(keeping, other)
    assert sorted(open_in(tmp_path).values()) == [str(held), str(other)]
    keeping.hold([])
    for _ in range(2):
        look(keeping, other)
    assert list(open_in(tmp_path).values()) == [str(other)]


def test_asking_for_nothing_closes_nothing(keeping: KeptFiles, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    for _ in range(2):
        look(keeping, tmp_path / "file")
    before = open_in(tmp_path)
    look(keeping)
    assert len(before) == 1
    assert open_in(tmp_path) == before


def test_a_folder_made_anew_under_the_same_name_opens_its_files_anew(keeping: KeptFiles, tmp_path: Path) -> None:
    folder = tmp_path / "group"
    for text in (b"old", b"new"):
        folder.mkdir()
        (folder / "file").write_bytes(text)
        for _ in range(3):
            with keeping.reading():
                assert files.is_directory(str(folder))
                assert files.read(str(folder / "file")) == text
        folder.rename(tmp_path / f"away-{text.decode()}")


def test_what_is_asked_for_no_longer_is_closed(keeping: KeptFiles, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    for _ in range(2):
        look(keeping, first, second)
    assert len(open_in(tmp_path)) == 2
    for _ in range(2):
        look(keeping, second)
    assert list(open_in(tmp_path).values()) == [str(second)]


def test_a_number_that_became_somebody_elses_is_neither_read_nor_closed(keeping: KeptFiles, tmp_path: Path) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_bytes(b"ours")
    other.write_bytes(b"theirs")
    for _ in range(2):
        look(keeping, file)
    (number,) = open_in(tmp_path)
    with other.open("rb") as theirs:
        os.dup2(theirs.fileno(), number)
    assert look(keeping, file) == [b"ours"]
    keeping.close()
    assert open_in(tmp_path) == {number: str(other)}
    os.close(number)


def test_no_more_descriptors_are_kept_than_it_says(keeping: KeptFiles, tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(2 * DESCRIPTORS_MAX)]
    for path in paths:
        path.write_bytes(b"1")
    for _ in range(3):
        assert look(keeping, *paths) == [b"1"] * len(paths)
    assert 0 < len(open_in(tmp_path)) <= DESCRIPTORS_MAX


@pytest.mark.parametrize("size_bytes", [300_000, 5_000_000])
def test_a_file_too_large_for_the_buffer_is_read_by_itself_until_there_is_a_larger_one(
    keeping: KeptFiles, tmp_path: Path, size_bytes: int
) -> None:
    large, small = tmp_path / "large", tmp_path / "small"
    small.write_bytes(b"1")
    large.write_bytes(os.urandom(size_bytes))
    whole = large.read_bytes()
    for _ in range(9):
        with keeping.reading():
            assert files.read(str(small)) == b"1"
            together = keeping.read(str(large))
            assert together in {None, whole}
    assert (together is not None) == (size_bytes < 4 * MIB)


def test_errors_are_those_of_a_reading_of_its_own(keeping: KeptFiles, tmp_path: Path) -> None:
    for _ in range(3):
        assert look(keeping, tmp_path / "absent", tmp_path) == [errno.ENOENT, errno.EISDIR]
    with keeping.reading(), pytest.raises(KernelError) as junk:
        files.read("a\0b")
    assert junk.value.errno == errno.EINVAL


def test_a_second_thread_and_a_nested_call_read_for_themselves(keeping: KeptFiles, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    look(keeping, file)
    heard: list[bytes | int | None] = []
    with keeping.reading():
        file.write_bytes(b"2")
        thread = threading.Thread(target=lambda: heard.extend(look(keeping, file)))
        thread.start()
        thread.join()
        assert files.read(str(file)) == b"1"
        assert look(keeping, file) == [b"1"]
    assert heard == [b"2"]


def test_directories_are_told_from_files_and_from_nothing(keeping: KeptFiles, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    paths = [tmp_path, tmp_path / "file", tmp_path / "absent"]
    for _ in range(3):
        with keeping.reading():
            assert [files.is_directory(str(path)) for path in paths] == [True, False, False]


def test_mounts_that_did_not_fit_are_read_again_where_there_is_room() -> None:
    keeping, path = KeptFiles("/"), Path("/proc/self/mountinfo")
    for _ in range(2):
        look(keeping, path)
    capacity, keeping.native.capacity = keeping.native.capacity, 8
    keeping.close()
    lib.ms_kept_read(keeping.native)
    keeping.native.capacity = capacity
    assert [lib.ms_kept_read(keeping.native) for _ in range(2)] == [1, 0]
    keeping.close()


def test_the_mounts_are_told_each_time_though_read_once() -> None:
    keeping = KeptFiles("/")
    path = Path("/proc/self/mountinfo")
    mounts = path.read_bytes()
    for _ in range(4):
        keeping.hold([])
        assert look(keeping, path) == [mounts]
    keeping.close()


def test_a_status_is_the_same_through_kept_descriptors(keeping: KeptFiles, tmp_path: Path) -> None:
    tree = ProcTree(tmp_path)
    tree.v2("/pod/app")
    tree.v2_group("/pod", limit=256 * MIB, used=1)
    for limit in (128 * MIB, 64 * MIB, "max", GIB):
        tree.v2_group("/pod/app", limit=limit, used=32 * MIB, high=100 * MIB, active=5)
        for _ in range(3):
            with keeping.reading():
                through = status_once(tmp_path)
            assert through == status_once(tmp_path)


def test_mounts_and_memberships_that_change_are_seen(keeping: KeptFiles, tmp_path: Path) -> None:
    tree = ProcTree(tmp_path)
    tree.v2("/a")
    for path, limit in (("/a", MIB), ("/b", 2 * MIB)):
        tree.v2_group(path, limit=limit)
    paths = []
    for path in ("/a", "/b", "/a"):
        tree.v2(path)
        for _ in range(2):
            with keeping.reading():
                paths.append(next(c.path for c in status_once(tmp_path).constraints if c.kind == "memory.max"))
    assert paths == ["/a", "/a", "/b", "/b", "/a", "/a"]
    tree.mounts()
    with keeping.reading():
        assert not [c for c in status_once(tmp_path).constraints if c.kind == "memory.max"]


def test_a_tree_that_stands_for_a_machine_is_never_kept_open(tmp_path: Path) -> None:
    ProcTree(tmp_path)
    for _ in range(3):
        memory_status(root=tmp_path)
    assert open_in(tmp_path) == {}


def test_while_others_ask_no_answer_is_torn() -> None:
    failures: list[str] = []

    def ask() -> None:
        failures.extend(warning for _ in range(200) for warning in memory_status().warnings)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert kept.DESCRIPTORS_MAX >= len(open_in("/proc")) > 0
