"""What the documentation shows works when it is pasted, and every public name is in it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import memsafe

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = [
    pytest.param(example, id=f"{page.stem}-{number}")
    for page in sorted(DOCS.rglob("*.md"))
    for number, example in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs_as_pasted(example, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-"], input=example, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_there_are_examples():
    assert len(EXAMPLES) >= 5


def test_every_public_name_is_in_the_api_page():
    documented = set(re.findall(r"^\.\. auto\w+:: memsafe\.(\w+)", (DOCS / "api.md").read_text(), re.MULTILINE))
    errors = {name for name in memsafe.__all__ if name.endswith("Error")}  # by automodule
    assert set(memsafe.__all__) - errors <= documented
