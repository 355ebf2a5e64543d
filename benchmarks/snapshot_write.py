"""How fast an image gets to disk, beside dd with fsync and a plain loop of writes, the same bytes in one run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyperf import perf_counter

from benchmarks.report import Options, Outcome, compare, main
from benchmarks.rounds import Loop, alternate
from memsafe import fork_snapshot, format_size
from memsafe.snapshot import AtomicFile, SnapshotWriter
from memsafe.snapshot.writer import ImageFile, WriterOptions

MIB = 1 << 20
DD = "dd bs=1M conv=fsync"
PLAIN = "os.write of 1 MiB, fsync"
TARGET = "ratio ≤ 1.18 (85 % of dd's rate)"

PIECES = {"1 MiB": MIB, "16 KiB": 16 << 10, "256 B": 256}


def _timed_dd(source: Path, path: Path) -> float:
    began_s = perf_counter()
    subprocess.run(["dd", f"if={source}", f"of={path}", "bs=1M", "conv=fsync"], check=True, stderr=subprocess.DEVNULL)
    return perf_counter() - began_s


def _timed_plain(content: memoryview, path: Path) -> float:
    began_s = perf_counter()
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for start in range(0, len(content), MIB):
        os.write(fd, content[start : start + MIB])
    os.fsync(fd)
    os.close(fd)
    return perf_counter() - began_s


def _timed_writer(content: memoryview, path: Path, piece_bytes: int, options: dict[str, Any]) -> float:
    """Write as every engine does, in this process: without the fork, its assessment and the end of its child."""
    began_s = perf_counter()
    with AtomicFile(path) as file:
        out = SnapshotWriter(ImageFile(file.fd, WriterOptions.of(**options)), print)
        _put(out, content, piece_bytes)
        out.finish()
        file.commit()
    return perf_counter() - began_s


def _put(out: SnapshotWriter, content: memoryview, piece_bytes: int) -> None:
    put = out.write
    for start in range(0, len(content), piece_bytes):
        put(content[start : start + piece_bytes])


def _timed_snapshot(content: memoryview, path: Path, piece_bytes: int, options: dict[str, Any]) -> float:
    began_s = perf_counter()
    fork_snapshot(path, lambda out: _put(out, content, piece_bytes), **options).wait()
    return perf_counter() - began_s


def contenders(folder: Path, size_bytes: int) -> dict[str, Loop]:
    """Return what writes *size_bytes*, each to a new file that is removed in between."""
    content = memoryview(os.urandom(size_bytes))
    source = folder / "source"
    source.write_bytes(content)
    path = folder / "image"

    def fresh(timed: Loop) -> Loop:
        def loop(loops: int) -> float:
            path.unlink(missing_ok=True)
            os.sync()
            return timed(loops)

        return loop

    def ours(timed: Callable[..., float], piece_bytes: int, **options: Any) -> Loop:
        return fresh(lambda _loops: timed(content, path, piece_bytes, options))

    return {
        DD: fresh(lambda _loops: _timed_dd(source, path)),
        PLAIN: fresh(lambda _loops: _timed_plain(content, path)),
        **{f"writer, {name} a call": ours(_timed_writer, piece_bytes) for name, piece_bytes in PIECES.items()},
        "writer, 1 MiB a call, crc32": ours(_timed_writer, MIB, checksum="crc32"),
        "writer, 1 MiB a call, sha256": ours(_timed_writer, MIB, checksum="sha256"),
        "fork_snapshot of it all, 1 MiB a call": ours(_timed_snapshot, MIB),
    }


def measure(options: Options) -> Iterator[Outcome]:
    for size_bytes in (32 * MIB,) if options.quick else (64 * MIB, 256 * MIB, 1024 * MIB):
        with tempfile.TemporaryDirectory(prefix="memsafe-bench-", dir=os.environ.get("MEMSAFE_BENCH_DIR")) as folder:
            seconds = alternate(contenders(Path(folder), size_bytes), rounds=options.rounds(9))
        for name, ours in seconds.items():
            if name in (DD, PLAIN):
                continue
            what = f"{format_size(size_bytes)} to disk, {name}"
            yield compare(what, DD, ours, seconds[DD], target=TARGET)
            yield compare(what, PLAIN, ours, seconds[PLAIN])


if __name__ == "__main__":
    sys.exit(main({"snapshot_write": measure}))
