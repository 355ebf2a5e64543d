from __future__ import annotations

import errno
import os
import threading

import pytest

from memsafe._kernel import files
from memsafe._kernel.ahead import ReadAhead
from memsafe.errors import KernelError
from memsafe.status import memory_status
from memsafe.testing import FakeKernel


@pytest.fixture
def ahead():
    return ReadAhead()


def learn(ahead, *paths):
    with ahead:
        for path in paths:
            try:
                files.read(str(path))
            except KernelError:
                files.is_directory(str(path))


def test_what_was_asked_for_before_is_read_when_it_is_entered(ahead, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1")
    second.write_bytes(b"")
    learn(ahead, first, second)
    first.write_bytes(b"22")
    with ahead:
        first.write_bytes(b"333")
        assert files.read(str(first)) == b"22"
        assert files.read(str(second)) == b""
        assert files.read(str(first)) == b"22"
    assert files.read(str(first)) == b"333"


def test_what_is_new_is_read_by_itself(ahead, tmp_path):
    (tmp_path / "known").write_bytes(b"1")
    (tmp_path / "new").write_bytes(b"2")
    learn(ahead, tmp_path / "known")
    with ahead:
        assert files.read(str(tmp_path / "new")) == b"2"


def test_errors_are_those_of_a_reading_of_its_own(ahead, tmp_path):
    for path in (tmp_path / "absent", tmp_path / "absent" / "below", tmp_path):
        with pytest.raises(KernelError) as alone:
            files.read(str(path))
        learn(ahead, path)
        with ahead, pytest.raises(KernelError) as together:
            files.read(str(path))
        assert (together.value.errno, str(together.value)) == (alone.value.errno, str(alone.value))
    with ahead, pytest.raises(KernelError) as junk:
        files.read("a\0b")
    assert junk.value.errno == errno.EINVAL


def test_directories_are_told_from_files_and_from_nothing(ahead, tmp_path):
    (tmp_path / "file").write_bytes(b"1")
    paths = [tmp_path, tmp_path / "file", tmp_path / "absent"]
    learn(ahead, *paths)
    with ahead:
        assert [files.is_directory(str(path)) for path in paths] == [True, False, False]


def test_a_file_that_does_not_fit_is_read_by_itself_and_the_others_together(ahead, tmp_path):
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(os.urandom(300_000))
    small.write_bytes(b"1")
    learn(ahead, large, small)
    with ahead:
        small.write_bytes(b"2")
        assert files.read(str(small)) == b"1"
        assert files.read(str(large)) == large.read_bytes()


def test_another_thread_reads_for_itself(ahead, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"1")
    learn(ahead, file)
    heard = []
    with ahead:
        file.write_bytes(b"2")
        thread = threading.Thread(target=lambda: heard.append(files.read(str(file))))
        thread.start()
        thread.join()
    assert heard == [b"2"]


def test_it_does_not_grow_without_bound(ahead, tmp_path):
    for batch in range(10):
        learn(ahead, *(tmp_path / f"{batch}-{number}" for number in range(50)))
    assert len(ahead._known) <= 128


def test_a_status_is_the_same_read_together(ahead, tmp_path):
    kernel = FakeKernel(tmp_path)
    kernel.cgroup("/pod", limit="256 MiB", usage=1)
    kernel.cgroup("/pod/app", limit="128 MiB", usage="32 MiB", high="100 MiB", active_file=5).join()
    for _ in range(3):
        with ahead:
            together = memory_status(root=tmp_path)
        assert together == memory_status(root=tmp_path)
