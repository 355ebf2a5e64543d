from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings, strategies as st

from memsafe._kernel import overcommit
from memsafe.errors import KernelError
from tests.unit import smaps_oracle
from tests.unit.proc_tree import ProcTree

if TYPE_CHECKING:
    from pathlib import Path

HEAD = "00400000-00800000 rw-p 00000000 00:00 0 "
LONG = "x" * (32768 - len(HEAD)) + "Size: 99 kB"  # its end begins what is read next
BODY = "Size:   4096 kB\nRss:  16 kB\nAnonymous:  8 kB\nSwap:  4 kB\nVmFlags: rd wr ac \n"


def cost(root: Path, text: str | bytes) -> overcommit.ForkCost:
    file = root / "proc/self/smaps"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return overcommit.fork_cost(root=root)


def expected(text: bytes) -> overcommit.ForkCost:
    return smaps_oracle.fork_cost(smaps_oracle.mappings(text, "smaps"))


@pytest.mark.parametrize("name", ["", "  Size: 99 kB", "/tmp/a\\012Size: 99 kB", "/" + "x" * 100_000, "[heap]", LONG])
def test_a_mapped_file_of_any_name_misleads_nobody(tmp_path: Path, name: str) -> None:
    assert cost(tmp_path, f"{HEAD}{name}\n{BODY}" * 3).charge_bytes == 3 * 4096 * 1024


@pytest.mark.parametrize("padding", range(0, 120, 7))
def test_a_line_may_end_anywhere_in_what_is_read_at_once(tmp_path: Path, padding: int) -> None:
    text = f"{HEAD}{'x' * padding}\n{BODY}" * 900
    assert len(text) > 2 * 32768
    assert cost(tmp_path, text) == expected(text.encode())


def test_the_last_line_needs_no_end(tmp_path: Path) -> None:
    assert cost(tmp_path, f"{HEAD}\n{BODY}".rstrip()).charge_bytes == 4096 * 1024


@pytest.mark.parametrize(
    ("text", "number", "says"),
    [
        ("", errno.EBADMSG, "it has no mapping"),
        ("Size: 4 kB\n", errno.EBADMSG, "it has no mapping"),
        (f"{HEAD}\nSize: 4 kB\n", errno.ENODATA, "no VmFlags for the mapping before line 2"),
        (f"{HEAD}\nVmFlags: rd\n{HEAD}\n{BODY}", errno.ENODATA, "no Size or no VmFlags for the mapping before line 3"),
        (f"{HEAD}\n{BODY}{HEAD}\nSize: many kB\n", errno.EBADMSG, "line 8 makes no sense"),
        (f"{HEAD}\nSize: 4096 MB\n", errno.EBADMSG, "line 2 makes no sense"),
        (f"{HEAD}\nSize: {10**15} kB\n", errno.EBADMSG, "line 2 makes no sense"),
        (f"{HEAD}\nSize:\n", errno.EBADMSG, "line 2 makes no sense"),
        ("00800000-00400000 rw-p 0 0:0 0\n", errno.EBADMSG, "line 1 makes no sense"),
        (f"{HEAD}\nSize: {10**15 - 1} kB\nVmFlags: ac\n" * 20, errno.EBADMSG, "line 58 makes no sense"),
    ],
)
def test_nonsense_is_told_with_its_line(tmp_path: Path, text: str, number: int, says: str) -> None:
    with pytest.raises(KernelError, match=re.escape(says)) as told:
        cost(tmp_path, text)
    assert told.value.errno == number
    assert str(tmp_path / "proc/self/smaps") in str(told.value)


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    for root, number in ((tmp_path, errno.ENOENT), (tmp_path / "a\0b", errno.EINVAL)):
        with pytest.raises(KernelError) as told:
            overcommit.fork_cost(root=root)
        assert told.value.errno == number


def test_this_process_is_the_same_to_both() -> None:
    with open("/proc/self/smaps", "rb") as file:
        before = file.read()
    ours, theirs = overcommit.fork_cost(), expected(before)
    assert ours.largest_charge_bytes == theirs.largest_charge_bytes
    assert ours.charge_bytes == pytest.approx(theirs.charge_bytes, rel=0.5)
    assert ours.copyable_bytes == pytest.approx(theirs.copyable_bytes, rel=0.5)


def entry(start: int, pages: int, resident: int, swapped: int, perms: str, flags: list[str]) -> str:
    end, kb = start + pages * 4096, pages * 4
    resident, swapped = min(resident, pages), min(swapped, pages)
    return (
        f"{start:x}-{end:x} {perms} 00000000 08:01 123  /lib/x y\nSize:  {kb} kB\nKernelPageSize: 4 kB\n"
        f"Rss: {resident * 4} kB\nPss: 0 kB\nAnonymous:  {resident * 4} kB\nSwap: {swapped * 4} kB\nSwapPss: 9 kB\n"
        f"VmFlags: {' '.join(flags)} \n"
    )


ENTRIES = st.lists(
    st.builds(
        entry,
        start=st.integers(1, 2**35).map(lambda page: page * 4096),
        pages=st.integers(1, 2**20),
        resident=st.integers(0, 2**20),
        swapped=st.sampled_from([0, 0, 1, 600]),
        perms=st.sampled_from(["rw-p", "r--p", "rw-s", "---p", "r-xp"]),
        flags=st.lists(
            st.sampled_from(["rd", "wr", "mr", "mw", "me", "ac", "dc", "wf", "nr", "sh", "acx"]), unique=True
        ),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(entries=ENTRIES)
def test_any_mappings_cost_what_the_plain_reading_says(
    tmp_path_factory: pytest.TempPathFactory, entries: list[str]
) -> None:
    text = "".join(entries)
    assert cost(tmp_path_factory.mktemp("smaps"), text) == expected(text.encode())


@settings(deadline=None, max_examples=300)
@given(entries=ENTRIES, data=st.data())
def test_what_is_torn_is_read_the_same_or_refused(
    tmp_path_factory: pytest.TempPathFactory, entries: list[str], data: st.DataObject
) -> None:
    text = "".join(entries).encode()
    at = data.draw(st.integers(0, len(text)))
    junk = data.draw(
        st.one_of(st.binary(max_size=12), st.sampled_from([b"\n", b"Size: 4 kB\n", b"ac ", b"-", b"9" * 16]))
    )
    text = text[:at] + junk + text[at + data.draw(st.integers(0, 40)) :]
    refused = ours = None
    try:
        ours = cost(tmp_path_factory.mktemp("smaps"), text)
    except KernelError as error:
        refused = error.errno
    assert refused in {errno.EBADMSG, errno.ENODATA} or ours == expected(text)


def test_a_tree_is_read_under_its_root(tmp_path: Path) -> None:
    tree = ProcTree(tmp_path)
    tree.smaps("2048 rw-p rd,wr,ac 1024")
    assert overcommit.fork_cost(root=tree.root).charge_bytes == 2048 * 1024
