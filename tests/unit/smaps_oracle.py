"""What smaps says of a fork, plainly and slowly: the oracle that memsafe_native/src/smaps.c is held against."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memsafe._kernel import files, machine
from memsafe._kernel.files import Labelled
from memsafe._kernel.overcommit import ForkCost

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(frozen=True, slots=True)
class Mapping:
    """One entry of smaps.

    Attributes:
        start, end: Addresses.
        size_bytes: What it spans: Size, which is end - start.
        private: Not MAP_SHARED.
        resident_bytes, swap_bytes: In RAM; swapped out.
        anonymous_bytes: Resident and of this process alone to keep: private pages, a file's written ones included.
        flags: The two-letter VmFlags, such as ``ac`` (its commit is accounted) and ``dc`` (not copied by fork).
    """

    start: int
    end: int
    size_bytes: int
    private: bool
    resident_bytes: int
    anonymous_bytes: int
    swap_bytes: int
    flags: frozenset[str]


# "start-end perms …": the head of an entry; every other line begins with a capital's label.
_HEAD = re.compile(rb"^([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([r-][w-][x-][sp]) [^\n]*", re.MULTILINE)


def mappings(text: bytes, path: str) -> list[Mapping]:
    return list(_entries(text, path))


def _entries(text: bytes, path: str) -> Iterator[Mapping]:
    heads = list(_HEAD.finditer(text))
    if not heads:
        # A live process has some: this is a zombie, a kernel thread, or no smaps.
        raise files.garbage(path, "it has no mapping")
    ends = [head.start() for head in heads[1:]] + [len(text)]
    for head, end in zip(heads, ends, strict=True):
        lines = Labelled(text[head.end() : end], path)
        flags = lines.get(b"VmFlags")
        if flags is None:
            # Without it nothing can be said about the charge (it is there since Linux 3.8).
            raise files.lacking(path, "VmFlags")
        yield Mapping(
            start=int(head[1], 16),
            end=int(head[2], 16),
            size_bytes=lines.required_bytes(b"Size"),
            private=head[3].endswith(b"p"),
            resident_bytes=lines.size_bytes(b"Rss") or 0,
            anonymous_bytes=lines.size_bytes(b"Anonymous") or 0,
            swap_bytes=lines.size_bytes(b"Swap") or 0,
            flags=frozenset(flag.decode("ascii", "replace") for flag in flags.split()),
        )


def fork_cost(mappings: Iterable[Mapping], page_table_bytes: int | None = None) -> ForkCost:
    """Return what fork() would ask for.

    Source: kernel/fork.c, dup_mmap(): MADV_DONTFORK (``dc``) skips a mapping whole; MADV_WIPEONFORK (``wf``) is
    charged but starts empty; page tables are copied only where anonymous pages are (vma_needs_copy()).

    Args:
        mappings: All mappings of the process that would fork.
        page_table_bytes: What its own page tables take, where known: the child's take no more.
    """
    charge_bytes = largest_bytes = tables = copyable_bytes = 0
    for mapping in mappings:
        if "dc" in mapping.flags:
            continue
        if "ac" in mapping.flags:
            charge_bytes += mapping.size_bytes
            largest_bytes = max(largest_bytes, mapping.size_bytes)
        private_bytes = mapping.anonymous_bytes + mapping.swap_bytes
        if not mapping.private or "wf" in mapping.flags or not private_bytes:
            continue
        tables += _tables(mapping)
        if "wr" in mapping.flags:
            copyable_bytes += private_bytes
    tables_bytes = tables * machine.PAGE_BYTES
    if page_table_bytes is not None:
        tables_bytes = min(tables_bytes, page_table_bytes)
    return ForkCost(charge_bytes, largest_bytes, tables_bytes, copyable_bytes)


def _tables(mapping: Mapping) -> int:
    """Return the most last-level page tables that the pages of *mapping* can need: one a page, one a slot."""
    table_span_bytes = machine.PAGE_BYTES * (machine.PAGE_BYTES // 8)
    slots = -(-mapping.end // table_span_bytes) - mapping.start // table_span_bytes
    pages = (mapping.resident_bytes + mapping.swap_bytes) // machine.PAGE_BYTES
    return min(pages, slots)
