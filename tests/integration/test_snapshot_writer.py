"""The writer under a real fork: page cache in a cgroup, checksums, compression, and failures that reach the owner."""

import errno
import hashlib
import io
import os
import subprocess
import time
import zlib
from contextlib import suppress
from pathlib import Path

import pytest

import memsafe
from memsafe.snapshot import Zstd
from tests.integration import cgroups, scenario
from tests.page_cache import skip_unless_droppable

MIB = 1024 * 1024
PATIENCE_S = 60


@pytest.fixture
def folder_of_v1_cgroup(tmp_path):
    skip_unless_droppable(tmp_path)
    with cgroups.v1_memory_group() as group:  # on v2 the kernel lab looks
        yield group


# The page cache.


def peak_of_256_mib(path, folder, limit_bytes, spared):
    """Write 256 MiB from within a cgroup; return by how much its memory rose at most."""
    group = Path(folder)
    if limit_bytes:
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    data = bytes(range(256)) * 4096

    def write(out):
        for _ in range(256):
            out.write(data)

    memsafe.assess_fork()  # what it imports and caches is there before it is measured
    used_bytes = int((group / "memory.usage_in_bytes").read_text())
    (group / "memory.max_usage_in_bytes").write_text("0")
    if spared:
        result = memsafe.fork_snapshot(path, write, max_copy="32 MiB").wait(PATIENCE_S)
        assert result.size_bytes == 256 * MIB
    else:
        with open(path, "wb") as out:
            write(out)
            os.fsync(out.fileno())
    return {
        "peak": int((group / "memory.max_usage_in_bytes").read_text()) - used_bytes,
        "hit": int((group / "memory.failcnt").read_text()),
    }


@pytest.mark.cgroup
@pytest.mark.parametrize("spared", [True, False])
def test_an_image_takes_a_few_windows_of_page_cache_where_a_plain_file_takes_its_size(
    path, folder_of_v1_cgroup, spared
):
    got = scenario.run(peak_of_256_mib, path, folder_of_v1_cgroup, 0, spared)
    assert path.read_bytes() == bytes(range(256)) * MIB
    if spared:
        assert got["peak"] < 40 * MIB  # two windows, and what the child copies of its interpreter
    else:
        assert got["peak"] > 250 * MIB


@pytest.mark.cgroup
def test_an_image_of_four_times_the_cgroup_never_meets_its_limit(path, folder_of_v1_cgroup):
    got = scenario.run(peak_of_256_mib, path, folder_of_v1_cgroup, 64 * MIB, True)
    assert got["hit"] == 0
    assert path.stat().st_size == 256 * MIB


# Options.


def with_options(path, options):
    def write(out):
        for number in range(300_000):
            out.write(b"line %d\n" % number)

    if "threads" in options:
        options = {"compress": Zstd(level=1, threads=options["threads"])}
    return memsafe.fork_snapshot(path, write, **options).wait(PATIENCE_S).as_dict()


CONTENT = b"".join(b"line %d\n" % number for number in range(300_000))


def test_the_result_has_the_checksum_of_the_file(path):
    got = scenario.run(with_options, path, {"checksum": "crc32"})
    assert path.read_bytes() == CONTENT
    assert got["checksum"] == f"crc32:{zlib.crc32(CONTENT):08x}"
    assert got["content_bytes"] == got["size_bytes"] == len(CONTENT)


@pytest.mark.parametrize("options", [{"compress": "zstd", "checksum": "sha256"}, {"threads": 2}])
def test_an_image_is_compressed_in_the_child_with_threads_too(path, options):
    got = scenario.run(with_options, path, options)
    stored = path.read_bytes()
    assert got["content_bytes"] == len(CONTENT)
    assert got["size_bytes"] == len(stored) < len(CONTENT) / 2
    assert unpacked(stored) == CONTENT
    if "checksum" in options:
        assert got["checksum"] == f"sha256:{hashlib.sha256(stored).hexdigest()}"


def unpacked(stored):
    try:
        from compression import zstd
    except ImportError:
        from backports import zstd
    return zstd.decompress(stored)


def with_bad_options(path):
    raised = []
    for options in ({"checksum": "md4"}, {"compress": "rar"}, {"max_bytes_per_s": 0}):
        try:
            memsafe.fork_snapshot(path, print, **options)
        except ValueError as error:
            raised.append(str(error))
    return {"raised": raised, "works": memsafe.fork_snapshot(path, lambda out: None).wait(PATIENCE_S).size_bytes}


def test_options_that_make_no_sense_are_refused_before_anything_is_done(path):
    got = scenario.run(with_bad_options, path)
    assert [text.split()[0] for text in got["raised"]] == ["checksum", "compress", "max_bytes_per_s"]
    assert got["works"] == 0


def at_a_rate(path):
    calls = []

    def write(out):
        out.write(bytes(2 * MIB))

    began_s = time.monotonic()
    memsafe.fork_snapshot(path, write, max_bytes_per_s="4 MiB").wait(PATIENCE_S)
    return {"took_s": time.monotonic() - began_s, "calls": calls}


def test_a_rate_is_kept_by_the_child(path):
    # At least: a limit that is kept is a promise, unlike a speed.
    assert scenario.run(at_a_rate, path)["took_s"] > 0.4


# Failures.


def a_disk_that_loses_a_page(path, when):
    """Every answer but one is the kernel's; `write` swallows that one."""
    from memsafe.snapshot import writer

    real = writer.Disk.write_back

    def write_back(self, fd, pages, *, wait):
        real(self, fd, pages, wait=wait)
        if wait == (when == "wait"):
            writer.Disk.write_back = real
            raise memsafe.KernelError(errno.EIO, "sync_file_range")

    writer.Disk.write_back = write_back

    def write(out):
        for _ in range(20):
            with suppress(OSError):
                out.write(bytes(MIB))

    return _failure(path, write)


def _failure(path, write):
    try:
        memsafe.fork_snapshot(path, write).wait(PATIENCE_S)
    except memsafe.SnapshotFailedError as error:
        return {"type": error.child_type, "message": error.child_message, "names": os.listdir(os.path.dirname(path))}
    return {}


@pytest.mark.parametrize("when", ["start", "wait"])
def test_a_lost_page_ends_the_image_even_if_write_swallows_the_error(path, when):
    got = scenario.run(a_disk_that_loses_a_page, path, when)
    assert got["type"] == "OSError"
    assert "an earlier write of this image failed: sync_file_range: Input/output error" in got["message"]
    assert path.read_bytes() == b"old"
    assert got["names"] == ["dump.db"]


def no_room(path):
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
    return _failure(path, lambda out: out.write(bytes(8 * MIB)))


def test_a_write_that_fails_is_reported_with_its_reason(path):
    got = scenario.run(no_room, path)
    assert got["type"] == "OSError"
    assert "File too large" in got["message"]
    assert path.read_bytes() == b"old"
    assert got["names"] == ["dump.db"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB that is really full."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "memsafe", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"may not mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fills(path):
    return _failure(path, lambda out: [out.write(bytes(MIB)) for _ in range(20)])


def test_a_full_disk_is_reported_and_left_as_it_was(small_disk):
    target = small_disk / "dump.db"
    target.write_bytes(b"old")
    got = scenario.run(fills, target)
    assert got["type"] == "OSError"
    assert "No space left on device" in got["message"]
    assert target.read_bytes() == b"old"
    assert got["names"] == ["dump.db"]


# Progress on a terminal.


def on_a_bar(path):
    from rich.console import Console
    from rich.progress import Progress

    from memsafe.integrations.rich import SnapshotBar

    def write(out):
        for done in range(1, 5):
            out.write(b"part")
            out.progress(done, 4)

    with Progress(console=Console(file=io.StringIO()), auto_refresh=False) as progress:
        bar = SnapshotBar(progress, "dump.db")
        before = progress.tasks[0].total
        memsafe.fork_snapshot(path, write, on_progress=bar).wait(PATIENCE_S)
        task = progress.tasks[0]
        return {"before": before, "task": [task.description, task.completed, task.total, task.finished]}


def test_rich_shows_how_far_it_is(path):
    pytest.importorskip("rich", reason="rich, of the extra cli, is not installed")
    got = scenario.run(on_a_bar, path)
    assert got["before"] is None
    assert got["task"] == ["dump.db", 4, 4, True]
