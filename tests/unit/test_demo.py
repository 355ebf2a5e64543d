"""What the demo's promises rest on: a wrong image or a wrong value must not pass."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from examples.demo import cgroup, corpus
from examples.demo.clients import Comparison
from examples.demo.show import Report
from memsafe._kernel.cgroup import MemoryCgroup
from memsafe.errors import KernelError

PAGES = corpus.PAGES_PER_WRITER


@pytest.mark.parametrize("count", [0, 1, PAGES - 1, PAGES, PAGES + 1, 3 * PAGES + 17])
def test_an_image_of_one_moment_tells_how_many_writes_it_holds(count: int) -> None:
    other = corpus.pages_after(1, 33)
    assert corpus.writes_in({**corpus.pages_after(0, count), **other, b"os.py": b"..."}, 0) == count


def test_an_image_with_a_page_of_another_moment_is_none() -> None:
    count = 2 * PAGES + 5
    image = corpus.pages_after(0, count)
    for n in (count - PAGES - 2, count - 2 * PAGES + 3, count + 1):  # older than it should be, or newer
        assert corpus.writes_in({**image, corpus.page_key(0, n): corpus.page(0, n)}, 0) is None


@pytest.mark.parametrize("torn", [b"", b"junk", corpus.page(0, 7)[:-1], corpus.page(1, 7)])
def test_an_image_with_a_torn_or_missing_page_is_none(torn: bytes) -> None:
    image = corpus.pages_after(0, PAGES)
    assert corpus.writes_in({**image, corpus.page_key(0, 7): torn}, 0) is None
    del image[corpus.page_key(0, 8)]
    assert corpus.writes_in(image, 0) is None


def test_no_two_writes_write_the_same() -> None:
    assert len({corpus.page(writer, n) for writer in range(4) for n in range(2000)}) == 8000


def test_the_corpus_is_the_standard_library_and_nothing_else() -> None:
    files = corpus.standard_library(quick=True)
    assert files[b"os.py"] == Path(os.__file__).read_bytes()
    assert not any(b"site-packages" in path or b"dist-packages" in path for path in files)


def test_a_comparison_with_anything_missing_or_different_is_not_equal() -> None:
    assert Comparison(3, (), ()).equal
    assert not Comparison(3, (b"a",), ()).equal
    assert not Comparison(3, (), (b"a",)).equal
    assert "1 different: a" in str(Comparison(3, (), (b"a",)))


def test_a_broken_promise_is_told_and_fails_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.phase("load", "load it")
    report.promise("kept", kept=True)
    report.promise("a promise", kept=False, detail="why")
    report.table()
    said = capsys.readouterr().out
    assert not report.all_kept
    assert "BROKEN in load: a promise: why" in said
    assert "1 of 2 promises kept" in said


def test_where_no_cgroup_may_be_made_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> tuple[()]:
        raise KernelError(13, "open /proc/self/cgroup")

    monkeypatch.setattr(cgroup, "memory_cgroups", unreadable)
    with cgroup.own_cgroup(1 << 30) as made:
        assert isinstance(made, str)
        assert "open /proc/self/cgroup" in made


def test_a_v2_cgroup_is_made_where_the_parent_gives_memory_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, parent = tmp_path / "parent" / "own", tmp_path / "parent"
    own.mkdir(parents=True)
    (own / "cgroup.subtree_control").write_text("\n")
    (parent / "cgroup.subtree_control").write_text("cpu memory pids\n")
    levels = tuple(MemoryCgroup(2, "/" + path.name, str(path)) for path in (own, parent, tmp_path))
    monkeypatch.setattr(cgroup, "memory_cgroups", lambda: levels)

    assert [found.directory for found in cgroup._parents()] == [str(parent)]
    made = cgroup._make(levels[1], 64 << 20)

    assert made.limit_bytes() == 64 << 20
    assert Path(made.file("cgroup.procs")).read_text().isdigit()
    assert made.swap_limit_bytes() == 0
