"""Who survives on cgroup v2; in short. The full tables are docs/survival.md's, and take an hour."""

import pytest

from tests import survival

# The program without a monitor may stand still for its patience of 46 s; and a busy machine takes its time.
pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("high", ["off", "on"])
def test_with_a_monitor_it_survives_and_without_it_does_not(tmp_path, high):
    told = survival.outcomes(
        tmp_path,
        *("--limit", "64MiB", "--rate", "50MiB", "--high", high),
        *("--responder", "none", "memsafe", "--runs", "3", "--baseline-runs", "1"),
    )
    # Beyond memory.high it is slowed down first, and killed at last, or does not come to its end.
    assert told["memsafe"] == {"survived": 3}
    assert "survived" not in told["none"]


def test_at_full_speed_it_survives_where_memory_high_gives_it_time(tmp_path):
    told = survival.outcomes(
        tmp_path, "--limit", "256MiB", "--rate", "full", "--high", "on", "--responder", "memsafe", "--runs", "3"
    )
    assert told == {"memsafe": {"survived": 3}}
