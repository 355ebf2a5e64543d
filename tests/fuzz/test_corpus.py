"""What fuzzing once found stays found, and hypothesis looks a little further on every run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from tests.fuzz import targets

CORPUS = Path(__file__).parent / "corpus"
KEPT = sorted(file for file in CORPUS.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return targets.Bench(tmp_path_factory.mktemp("machine"))


@pytest.mark.parametrize("file", KEPT, ids=lambda file: f"{file.parent.name}-{file.name[:20]}")
def test_what_was_found_once_is_answered(bench, file):
    targets.CHECKS[file.parent.name](bench, file.read_bytes())


def test_every_kept_input_belongs_to_a_target():
    assert {file.parent.name for file in KEPT} <= set(targets.CHECKS)


@pytest.mark.parametrize("name", targets.CHECKS)
@settings(max_examples=50)
@given(data=st.data())
def test_no_content_raises_anything_but_a_memsafe_error_that_names_the_file(bench, name, data):
    sound = data.draw(st.sampled_from(bench.seeds(name)))
    at, gone = data.draw(st.integers(0, len(sound))), data.draw(st.integers(0, 12))
    targets.CHECKS[name](bench, sound[:at] + data.draw(st.binary(max_size=30)) + sound[at + gone :])
