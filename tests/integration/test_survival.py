"""A program whose memory fills up behind its budget's back: who survives. The full tables are docs/survival.md's."""

import subprocess
import sys

import pytest

from benchmarks.survival import place
from benchmarks.survival.cells import MIB
from tests import survival


@pytest.fixture(autouse=True)
def needs_a_cgroup():
    try:
        place.Place(64 * MIB).remove()
    except place.UnavailableError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")


@pytest.mark.parametrize("kind", ["native", "python"])
def test_with_a_monitor_it_survives_and_without_it_is_killed(tmp_path, kind):
    told = survival.outcomes(
        tmp_path, "--limit", "64MiB", "--rate", "50MiB", "--kind", kind, "--responder", "none", "memsafe", "--runs", "4"
    )
    assert told == {"none": {"killed": 4}, "memsafe": {"survived": 4}}


def test_at_full_speed_it_survives_where_there_is_more_room(tmp_path):
    told = survival.outcomes(
        tmp_path,
        *("--limit", "1GiB", "--rate", "full", "--responder", "none", "memsafe"),
        *("--runs", "4", "--baseline-runs", "1"),
    )
    assert told["none"] == {"killed": 1}
    # A host that takes this machine's processor away for 50 ms decides a run; the table is of many.
    assert told["memsafe"]["survived"] >= 3


def test_what_others_do_runs_as_well(tmp_path):
    told = survival.outcomes(
        tmp_path, "--limit", "64MiB", "--rate", "50MiB", "--responder", "psutil 100 ms", "dask", "--runs", "1"
    )
    # Whether who polls looks in time is luck on a busy machine, and not ours.
    assert [told[name].keys() <= {"survived", "killed"} for name in ("psutil 100 ms", "dask")] == [True, True]


def test_every_cgroup_is_removed(tmp_path):
    _, parent = place._parent()
    before = set(parent.glob("memsafe-survival-*"))
    survival.outcomes(tmp_path, "--limit", "64MiB", "--rate", "full", "--responder", "none", "--runs", "2")
    assert set(parent.glob("memsafe-survival-*")) <= before


def test_where_no_cgroup_can_be_made_it_says_so():
    hide = "from benchmarks.survival import __main__, place; place.memory_cgroups = lambda: (); "
    run = "place.unified_directory = lambda: None; raise SystemExit(__main__.main())"
    done = subprocess.run([sys.executable, "-c", hide + run], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "UnavailableError: no memory controller is to be seen\n"
