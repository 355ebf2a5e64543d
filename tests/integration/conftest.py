"""Fixtures of the tests on this machine's kernel."""

import pytest


@pytest.fixture
def path(tmp_path):
    target = tmp_path / "dump.db"
    target.write_bytes(b"old")
    return target
