"""What `write` gets to write to, driven by hand as an engine without a child would: options, disk, cache, failures."""

import builtins
import errno
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from memsafe import KernelError, UnsupportedError
from memsafe.snapshot import writer as writer_module
from memsafe.snapshot.writer import (
    BUFFER_BYTES,
    WINDOW_BYTES,
    Disk,
    ImageFile,
    Pace,
    SnapshotWriter,
    WriterOptions,
    Written,
    Zstd,
)
from tests.page_cache import resident_bytes, skip_unless_droppable

try:
    from compression import zstd
except ImportError:
    from backports import zstd

MIB = 1024 * 1024


@dataclass
class FakeDisk(Disk):
    """Notes what it is asked, and answers a call with an errno where one is given for it."""

    fails: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)

    def write_back(self, fd, pages, *, wait):
        self._ask("wait" if wait else "start", pages.start, pages.end)

    def drop(self, fd, pages):
        self._ask("drop", pages.start, pages.end)

    def sync(self, fd):
        self._ask("sync")

    def _ask(self, *call):
        self.asked.append(call)
        if (code := self.fails.get(call[0])) is not None:
            raise KernelError(code, call[0])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "image"


@pytest.fixture
def fd(path):
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    yield fd
    os.close(fd)


def writer(fd, disk=None, **options):
    return SnapshotWriter(ImageFile(fd, WriterOptions.of(**options), disk=disk), lambda done, total: None)


# A file like any other.


@pytest.mark.parametrize("compress", [None, "zstd"])
@pytest.mark.parametrize("checksum", [None, "crc32", "sha256"])
def test_what_is_written_arrives_and_is_counted(fd, path, compress, checksum):
    parts = [os.urandom(size) for size in (1, 1000, BUFFER_BYTES, BUFFER_BYTES + 1, 3 * MIB, WINDOW_BYTES + 7)]
    out = writer(fd, compress=compress, checksum=checksum)
    for part in parts:
        assert out.write(part) == len(part)
    content = b"".join(parts)
    assert out.tell() == len(content)
    written = out.finish()
    stored = path.read_bytes()
    assert (unpacked(path) if compress else stored) == content
    assert written.content_bytes == len(content)
    sums = {
        None: None,
        "crc32": f"crc32:{zlib.crc32(stored):08x}",
        "sha256": f"sha256:{hashlib.sha256(stored).hexdigest()}",
    }
    assert written.checksum == sums[checksum]


def unpacked(path):
    return zstd.decompress(path.read_bytes())


def test_a_file_that_nobody_wrote_to_is_empty_or_an_empty_frame(fd, path):
    assert writer(fd, checksum="crc32").finish() == Written(0, "crc32:00000000")
    assert path.read_bytes() == b""
    assert writer(fd, compress="zstd").finish() == Written(0, None)
    assert unpacked(path) == b""


def test_a_plain_file_may_be_patched_cut_and_closed(fd, path):
    out = writer(fd)
    out.write(b"???? body" + bytes(2 * WINDOW_BYTES))
    out.seek(0)
    out.write(b"head")
    out.seek(0, os.SEEK_END)
    assert out.tell() == 9 + 2 * WINDOW_BYTES
    out.truncate(9)
    out.close()
    assert out.finish().content_bytes == 9
    assert path.read_bytes() == b"head body"
    os.fstat(fd)


def test_a_compressed_file_may_be_closed(fd, path):
    with writer(fd, compress="zstd") as out:
        out.write(b"content")
    assert out.finish().content_bytes == 7
    assert unpacked(path) == b"content"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"checksum": "crc32"}, "crc32 is taken"),
        ({"compress": "zstd"}, "compressed"),
        ({"checksum": "sha256"}, "sha256"),
    ],
)
def test_seeking_is_refused_by_name_where_bytes_must_come_in_order(fd, options, why):
    out = writer(fd, **options)
    out.write(b"content")
    assert not out.seekable()
    for refused in (lambda: out.seek(0), lambda: out.truncate(1)):
        with pytest.raises(io.UnsupportedOperation, match=why):
            refused()
    assert out.tell() == 7
    assert out.finish().content_bytes == 7


@pytest.mark.parametrize("options", [{}, {"checksum": "crc32"}, {"compress": "zstd"}])
def test_what_others_write_to_files_works_on_this_one(fd, path, options):
    """Some seek, some would go past Python by the descriptor: where that is refused, they find another way."""
    numbers = np.arange(300_000)
    out = writer(fd, **options)
    pickle.dump({"key": bytes(MIB)}, out)
    out.write(b"\n")
    np.save(out, numbers)
    text = io.TextIOWrapper(out)
    json.dump([1, 2, 3], text)
    text.detach()
    start = out.tell()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("member", b"zipped")
    written = out.finish()
    content = unpacked(path) if options.get("compress") else path.read_bytes()
    source = io.BytesIO(content)
    assert written.content_bytes == len(content)
    assert pickle.load(source) == {"key": bytes(MIB)}
    assert source.read(1) == b"\n"
    assert np.array_equal(np.load(source), numbers)
    assert source.read(9) == b"[1, 2, 3]"
    assert source.tell() == start
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.read("member") == b"zipped"
    if options.get("checksum"):
        assert written.checksum == f"crc32:{zlib.crc32(content):08x}"


@pytest.mark.parametrize("options", [{}, {"checksum": "crc32"}, {"compress": "zstd"}])
def test_nobody_writes_past_it_through_its_descriptor(fd, path, options):
    numbers = np.arange(1000)
    out = writer(fd, **options)
    for write_past in (lambda: numbers.tofile(out), lambda: os.write(out.fileno(), b"past"), lambda: os.fsync(out)):
        with pytest.raises(io.UnsupportedOperation, match=r"by write\(\), and synced by the snapshot"):
            write_past()
    out.write(numbers)
    assert out.finish().content_bytes == numbers.nbytes
    content = unpacked(path) if options.get("compress") else path.read_bytes()
    assert content == numbers.tobytes()


def test_progress_takes_whole_numbers_of_any_kind(fd):
    seen = []
    out = SnapshotWriter(ImageFile(fd), lambda done, total: seen.append((done, total)))
    out.progress(np.int64(1), 2)
    assert seen == [(1, 2)]
    with pytest.raises(TypeError):
        out.progress(0.5, 1)


# Options.


def test_arguments_that_make_no_sense_are_refused_at_once():
    for bad, what in [
        ({"checksum": "md4"}, "checksum must be one of crc32, sha256"),
        ({"compress": "gzip"}, "compress must be 'zstd'"),
        ({"compress": 3}, "compress must be"),
        ({"compress": Zstd(level=1000)}, "Zstd.*makes no sense"),
        ({"compress": Zstd(level=1 << 40)}, "Zstd.*makes no sense"),
        ({"compress": Zstd(threads=-1)}, "Zstd.*makes no sense"),
        ({"max_bytes_per_s": 0}, "above 0"),
        ({"max_bytes_per_s": "fast"}, "max_bytes_per_s must look like"),
    ]:
        with pytest.raises(ValueError, match=what):
            WriterOptions.of(**bad)


def test_compression_that_is_not_installed_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    with pytest.raises(UnsupportedError, match=r"memsafe\[zstd\]"):
        WriterOptions.of(compress="zstd")


def test_the_standard_librarys_own_compression_goes_before_the_backport(fd, path, monkeypatch):
    made = []

    def compressor(options):
        made.append(options)
        return zstd.ZstdCompressor(options=options)

    own = SimpleNamespace(**{**vars(zstd), "ZstdCompressor": compressor})
    monkeypatch.setitem(sys.modules, "compression.zstd", own)
    with writer(fd, compress="zstd") as out:
        out.write(b"new")
        out.finish()
    assert len(made) == 2  # one to try the options
    assert unpacked(path) == b"new"


def test_nothing_is_imported_after_the_options_are_known(fd, path, monkeypatch):
    """In a forked child, whoever held the lock of an import may be gone."""
    options = WriterOptions.of(compress="zstd", checksum="sha256")
    image = ImageFile(fd, options)

    def forbidden(*arguments):
        raise AssertionError(f"import of {arguments[0]}")

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "import_module", forbidden)
        patch.setattr(builtins, "__import__", forbidden)
        out = SnapshotWriter(image, print)
        out.write(b"content")
        written = out.finish()
    assert written.content_bytes == 7
    assert unpacked(path) == b"content"


def test_levels_and_threads_are_the_library_s(fd, path):
    content = b"".join(b"%d" % number for number in range(2_000_000))
    out = writer(fd, compress=Zstd(level=-5, threads=2))
    out.write(content)
    assert out.finish().content_bytes == len(content)
    assert unpacked(path) == content
    fast_bytes = path.stat().st_size
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    out = writer(fd, compress=Zstd(level=9))
    out.write(content)
    out.finish()
    assert unpacked(path) == content
    assert path.stat().st_size < fast_bytes < len(content)


def test_a_frame_that_lost_a_bit_is_noticed_by_its_own_checksum(fd, path):
    out = writer(fd, compress="zstd")
    out.write(os.urandom(1000))
    out.finish()
    stored = bytearray(path.read_bytes())
    stored[500] ^= 1
    path.write_bytes(stored)
    with pytest.raises(Exception, match="checksum"):
        unpacked(path)


# The disk and the page cache.


def test_a_window_is_handed_over_when_full_and_the_one_before_waited_for_and_dropped(fd):
    disk = FakeDisk()
    out = writer(fd, disk)
    w = WINDOW_BYTES
    for _ in range(3 * w // MIB):
        out.write(bytes(MIB))
    out.write(b"tail")
    out.finish()
    assert disk.asked == [
        ("start", 0, w),
        ("start", w, 2 * w),
        ("wait", 0, w),
        ("drop", 0, w),
        ("start", 2 * w, 3 * w),
        ("wait", w, 2 * w),
        ("drop", w, 2 * w),
        ("sync",),
        ("drop", 0, 0),
    ]


def test_one_large_write_is_spread_too(fd):
    disk = FakeDisk()
    out = writer(fd, disk)
    out.write(bytes(2 * WINDOW_BYTES + 1))
    assert [call for call in disk.asked if call[0] == "start"] == [
        ("start", 0, WINDOW_BYTES),
        ("start", WINDOW_BYTES, 2 * WINDOW_BYTES),
    ]


def test_a_window_covers_what_was_patched(fd):
    disk = FakeDisk()
    out = writer(fd, disk)
    out.write(bytes(WINDOW_BYTES + 100))
    out.seek(10)
    out.write(b"patched")
    out.seek(0, os.SEEK_END)
    out.write(bytes(WINDOW_BYTES))
    out.flush()
    starts = [call[1:] for call in disk.asked if call[0] == "start"]
    assert starts == [(0, WINDOW_BYTES), (10, 2 * WINDOW_BYTES - 7)]


def test_a_small_file_costs_one_sync(fd):
    disk = FakeDisk()
    out = writer(fd, disk)
    out.write(b"small")
    out.finish()
    assert disk.asked == [("sync",), ("drop", 0, 0)]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EOPNOTSUPP, errno.EPERM])
def test_where_pages_cannot_be_handed_over_the_sync_at_the_end_does_it(fd, path, code):
    disk = FakeDisk({"start": code})
    out = writer(fd, disk)
    out.write(bytes(3 * WINDOW_BYTES))
    assert out.finish().content_bytes == path.stat().st_size == 3 * WINDOW_BYTES
    assert disk.asked == [("start", 0, WINDOW_BYTES), ("sync",), ("drop", 0, 0)]


def test_advice_that_is_refused_costs_nothing(fd, path):
    out = writer(fd, FakeDisk({"drop": errno.EINVAL}))
    out.write(bytes(3 * WINDOW_BYTES))
    assert out.finish().content_bytes == 3 * WINDOW_BYTES


def test_the_kernel_s_own_answers_are_passed_on(fd):
    disk, pages = Disk(), writer_module._Range()
    pages.add(0, MIB)
    os.write(fd, bytes(MIB))
    for wait in (False, True):
        disk.write_back(fd, pages, wait=wait)
    disk.drop(fd, pages)
    disk.sync(fd)
    read_fd, write_fd = os.pipe()
    for wrong_fd, code in [(write_fd, errno.ESPIPE), (-1, errno.EBADF)]:
        with pytest.raises(KernelError, match="sync_file_range") as raised:
            disk.write_back(wrong_fd, pages, wait=True)
        assert raised.value.errno == code
    os.close(read_fd)
    os.close(write_fd)


def test_what_was_written_back_is_out_of_the_page_cache(fd, tmp_path):
    skip_unless_droppable(tmp_path)
    disk = FakeDisk()
    for spared, left_bytes in [(disk, 2 * WINDOW_BYTES), (None, 0)]:
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        out = writer(fd, spared)
        out.write(bytes(2 * WINDOW_BYTES))
        out.finish()
        assert resident_bytes(fd, 2 * WINDOW_BYTES) == pytest.approx(left_bytes, abs=MIB)


# What the disk may answer.


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["start", "wait"])
@pytest.mark.parametrize("options", [{}, {"checksum": "crc32"}, {"compress": "zstd"}])
def test_a_failure_in_the_spread_sync_is_a_failed_write_and_cannot_be_swallowed(fd, options, call, code):
    """The kernel tells of a lost page once: the sync at the end would succeed."""
    disk = FakeDisk({call: code})
    out = writer(fd, disk, **options)
    with pytest.raises(OSError, match=os.strerror(code)):
        out.write(os.urandom(3 * WINDOW_BYTES))
    disk.fails.clear()
    with pytest.raises(OSError, match="an earlier write of this image failed") as again:
        out.write(bytes(2 * BUFFER_BYTES))
    assert again.value.errno == code
    with pytest.raises(OSError, match="an earlier write of this image failed"):
        out.finish()
    with suppress(OSError):
        out.close()
    with pytest.raises(OSError, match="an earlier write of this image failed"):
        out.finish()
    assert ("sync",) not in disk.asked


@pytest.mark.parametrize("options", [{}, {"checksum": "crc32"}, {"compress": "zstd"}])
def test_a_failure_of_the_last_sync_is_told(fd, options):
    out = writer(fd, FakeDisk({"sync": errno.EIO}), **options)
    out.write(b"content")
    with pytest.raises(OSError, match="sync: Input/output error"):
        out.finish()


@pytest.mark.parametrize("options", [{}, {"checksum": "sha256"}, {"compress": "zstd"}])
def test_a_full_disk_is_told_even_if_write_closes_the_file_and_swallows_it(options):
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        out = writer(fd, FakeDisk(), **options)
        out.write(b"fits the buffer")
        with suppress(OSError):
            out.close()
        with pytest.raises(OSError, match="No space left on device"):
            out.finish()
    finally:
        os.close(fd)


def test_a_file_that_may_not_grow_fails_by_name(tmp_path):
    script = f"""
import os, resource, signal
from memsafe.snapshot.writer import ImageFile, SnapshotWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
out = SnapshotWriter(ImageFile(os.open({str(tmp_path / "image")!r}, os.O_CREAT | os.O_RDWR)), print)
try:
    out.write(bytes(8 << 20))
except OSError as error:
    print(error.strerror)
try:
    out.finish()
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250)
    assert done.stdout.splitlines() == [
        "File too large",
        "an earlier write of this image failed: [Errno 27] File too large",
    ], done.stderr


def test_a_compressor_without_memory_is_not_forgotten(fd, monkeypatch):
    out = writer(fd, compress="zstd")

    class Starved:
        def compress(self, data):
            raise MemoryError

    monkeypatch.setattr(out.raw, "_compressor", Starved())
    with pytest.raises(MemoryError):
        out.write(bytes(MIB))
    monkeypatch.undo()
    with pytest.raises(OSError, match="an earlier write of this image failed"):
        out.finish()


# The rate.


class Clock:
    """Goes on only by sleeping, or when told."""

    def __init__(self):
        self.now_s = 100.0
        self.slept_s = 0.0

    def __call__(self):
        return self.now_s

    def sleep(self, seconds):
        assert seconds > 0
        self.now_s += seconds
        self.slept_s += seconds


def spend(pace, clock, total_bytes):
    """Write as ImageFile does; return the instants and sizes."""
    pieces = []
    while total_bytes:
        pace.wait()
        piece_bytes = min(pace.piece_bytes, total_bytes)
        pieces.append((clock.now_s, piece_bytes))
        pace.note(piece_bytes)
        total_bytes -= piece_bytes
    return pieces


@pytest.mark.parametrize("rate", [10_000, MIB, 1000 * MIB])
def test_a_rate_is_kept_over_any_stretch_of_time(rate):
    clock = Clock()
    pace = Pace(rate, clock, clock.sleep)
    pieces = spend(pace, clock, 5 * rate)
    assert clock.now_s - 100 == pytest.approx(5, abs=0.5)
    for first, (began_s, _) in enumerate(pieces):
        for last in range(first, min(first + 200, len(pieces))):
            stretch_s = pieces[last][0] - began_s
            written_bytes = sum(size for _, size in pieces[first : last + 1])
            assert written_bytes <= rate * (stretch_s + 0.05) + pace.piece_bytes + 1


def test_a_long_stall_is_not_made_up_for_by_a_burst():
    clock = Clock()
    pace = Pace(MIB, clock, clock.sleep)
    spend(pace, clock, MIB)
    clock.now_s += 3600
    began_s = clock.now_s
    spend(pace, clock, MIB)
    assert clock.now_s - began_s > 0.8


def test_a_disk_that_is_slower_than_the_rate_is_not_slowed_further():
    clock = Clock()
    pace = Pace(MIB, clock, clock.sleep)
    for _ in range(10):
        pace.wait()
        clock.now_s += 0.2  # the write itself
        pace.note(pace.piece_bytes)
    assert clock.slept_s == 0


def test_the_rate_counts_what_reaches_the_file_not_what_was_written(fd, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("memsafe.snapshot.writer.time.monotonic", clock)
    for options, least_s, most_s in [({}, 3.8, 4.2), ({"compress": "zstd"}, 0, 0.1)]:
        image = ImageFile(fd, WriterOptions.of(max_bytes_per_s=MIB, **options))
        image._pace = Pace(MIB, clock, clock.sleep)
        out = SnapshotWriter(image, print)
        began_s = clock.now_s
        out.write(bytes(4 * MIB))
        out.finish()
        assert least_s <= clock.now_s - began_s <= most_s
