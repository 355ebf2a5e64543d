"""The data: every file of the running Python's standard library, and pages whose history can be proved."""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Mapping
from pathlib import Path

Corpus = dict[bytes, bytes]

_NOT_STANDARD = {"site-packages", "dist-packages"}
_NOT_QUICK = {"test", "tests"}

PAGE_BYTES = 4096
PAGES_PER_WRITER = 500
_NOISE = random.Random(20_26).randbytes(64 * 1024)


def standard_library(*, quick: bool = False) -> Corpus:
    """Return path → contents of every readable file of the standard library, third-party packages left out.

    Args:
        quick: Only its Python sources, the tests left out.
    """
    library = Path(sysconfig.get_path("stdlib"))
    corpus: Corpus = {}
    for here, folders, names in os.walk(library):
        folders[:] = sorted(set(folders) - _NOT_STANDARD - (_NOT_QUICK if quick else set()))
        for path in (Path(here, name) for name in sorted(names)):
            if path.is_file() and os.access(path, os.R_OK) and (not quick or path.suffix == ".py"):
                corpus[bytes(path.relative_to(library))] = path.read_bytes()
    return corpus


def page_key(writer: int, n: int) -> bytes:
    """Return the key that write *n* of *writer* goes to: round and round through its pages."""
    return b"page:%d:%d" % (writer, n % PAGES_PER_WRITER)


def page(writer: int, n: int) -> bytes:
    """Return what write *n* of *writer* writes: 4 KiB that name it, and that no other write gives."""
    start = (n * 997 + writer * 131) % (len(_NOISE) - PAGE_BYTES)
    return (b"%d:%d:" % (writer, n) + _NOISE[start:])[:PAGE_BYTES]


def pages_after(writer: int, count: int) -> Corpus:
    """Return all pages of *writer* as they are after its first *count* writes."""
    return {page_key(writer, n): page(writer, n) for n in range(max(0, count - PAGES_PER_WRITER), count)}


def writes_in(image: Mapping[bytes, bytes], writer: int) -> int | None:
    """Return how many writes of *writer* an image holds, or None if it is no moment in that writer's history.

    An image of one moment is a prefix of what each connection wrote: the newest write that it holds, and for every
    other page the last one before that. One page too old or too new, or torn, and it is none.
    """
    mine = {key: value for key, value in image.items() if key.startswith(b"page:%d:" % writer)}
    count = 1 + max((_number(value) for value in mine.values()), default=-1)
    return count if mine == pages_after(writer, count) else None


def _number(value: bytes) -> int:
    digits = value.split(b":", 2)[1:2]
    return int(digits[0]) if digits and digits[0].isdigit() else -1
