"""Paths and file systems that take no image: refused at once, or told with the old file in place."""

import ctypes
import errno
import os
import resource
import stat
import tempfile
from pathlib import Path

import pytest

import memsafe
from tests.integration import scenario
from tests.integration.snapshots import MIB, Gate, content, describe, gated, hello, outcome, temporaries

NOBODY = 65534


def begins(path):
    try:
        memsafe.fork_snapshot(path, hello)
    except OSError as error:
        first = describe(error)
    folder = tempfile.mkdtemp()
    again = outcome(memsafe.fork_snapshot(folder + "/next", hello))
    os.unlink(folder + "/next")
    os.rmdir(folder)
    return {**first, "again": again}


def test_a_folder_at_the_path_is_refused(tmp_path):
    got = scenario.run(begins, tmp_path)
    assert got["error"] == "IsADirectoryError"
    assert "result" in got["again"]


def test_a_missing_folder_is_refused(tmp_path):
    got = scenario.run(begins, tmp_path / "none" / "dump.db")
    assert got["error"] == "FileNotFoundError"


def test_something_else_than_a_regular_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    got = scenario.run(begins, tmp_path / "fifo")
    assert got["errno"] == errno.EINVAL
    assert stat.S_ISFIFO(os.stat(tmp_path / "fifo").st_mode)


def without_permission():
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o555)
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
    try:
        memsafe.fork_snapshot(folder + "/dump.db", hello)
    except OSError as error:
        got = describe(error)
    os.seteuid(os.getuid())
    got["left_in_folder"] = os.listdir(folder)
    os.rmdir(folder)
    return got


def test_a_folder_without_permission_is_refused():
    got = scenario.run(without_permission)
    assert got["error"] == "PermissionError"
    assert got["left_in_folder"] == []


def file_size_limit(path, size_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    return outcome(memsafe.fork_snapshot(path, lambda out: out.write(bytes(size_bytes))))


@pytest.mark.parametrize("size_bytes", [1001, 2 * MIB], ids=["when flushed", "when written"])
def test_a_file_that_may_not_grow_is_a_failed_write(path, size_bytes):
    got = scenario.run(file_size_limit, path, size_bytes)
    assert got["child_type"] == "OSError"
    assert "File too large" in got["message"]
    assert path.read_bytes() == b"old"


def full_disk(folder):
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, private = 0x00020000, 1 << 18 | 1 << 14
    if libc.unshare(new_namespace) or libc.mount(b"none", b"/", None, private, None):
        return {"skip": f"no mount namespace: {os.strerror(ctypes.get_errno())}"}
    if libc.mount(b"none", folder.encode(), b"tmpfs", 0, b"size=1m"):
        return {"skip": f"no tmpfs: {os.strerror(ctypes.get_errno())}"}
    path = folder + "/dump.db"
    Path(path).write_bytes(b"old")
    got = outcome(memsafe.fork_snapshot(path, lambda out: out.write(bytes(2 * MIB))))
    free = os.statvfs(folder)
    got.update(content=content(path), names=os.listdir(folder), used=free.f_blocks - free.f_bfree)
    return got


def test_a_full_disk_is_a_failed_write_that_takes_no_room(tmp_path):
    got = scenario.run(full_disk, tmp_path)
    if "skip" in got:
        pytest.skip(got["skip"])
    assert (got["error"], got["child_type"]) == ("SnapshotFailedError", "OSError")
    assert "No space left" in got["message"]
    assert (got["content"], got["names"], got["used"]) == ("old", ["dump.db"], 1)


def rename_fails(path):
    gate = Gate()
    job = memsafe.fork_snapshot(path, gated(gate))
    os.unlink(path)
    os.mkdir(path)
    gate.open()
    got = outcome(job)
    gate.close()
    return got


def test_a_path_that_became_a_folder_meanwhile_is_a_failure_with_its_cause(path):
    got = scenario.run(rename_fails, path)
    assert got["error"] == "SnapshotFailedError"
    assert "Is a directory" in got["message"]
    assert os.listdir(path) == []
    assert temporaries(path) == []


def with_a_folder_that_cannot_be_synced(path):
    real = os.fsync

    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    os.fsync = fsync
    return {**outcome(memsafe.fork_snapshot(path, hello)), "content": content(path)}


def test_where_the_folder_cannot_be_synced_it_says_that_the_new_file_is_there(path):
    path.write_text("old")
    got = scenario.run(with_a_folder_that_cannot_be_synced, path)
    assert got["error"] == "SnapshotFailedError"
    assert "may not survive a power cut" in got["message"]
    assert got["content"] == "new"
