"""How much a fork will copy: by the caller's word, by what was measured, by the worst."""

import pytest

from memsafe import forecast
from memsafe.forecast import ASSUMED_WRITE_BYTES_PER_S, VALID_S, DirtyRate, Forecast, LastSnapshot, Observations

MIB = 1024 * 1024
PRIVATE = 500 * MIB
HEAP = 40 * MIB


@pytest.fixture
def heap(monkeypatch):
    """An object heap of 40 MiB."""
    monkeypatch.setattr(forecast, "object_heap_bytes", lambda: HEAP)


def rate(dirty_bytes, duration_s=2.0, method="soft-dirty", at_s=1000.0):
    return DirtyRate(dirty_bytes / duration_s, dirty_bytes, duration_s, method, at_s)


def seen(*, rate=None, snapshot=None):
    observations = Observations()
    observations.rate, observations.snapshot = rate, snapshot
    return observations


def of(**more):
    return Forecast.of(PRIVATE, **{"now_s": 1000.0, **more})


def test_where_nothing_is_known_all_private_memory_is_assumed():
    assert (of().copy_bytes, of().source) == (PRIVATE, "private memory")


def test_where_even_private_memory_is_unknown_so_is_the_forecast():
    assert Forecast.of(None).copy_bytes is None


def test_a_measured_rate_counts_in_proportion_to_a_longer_time_and_objects_are_added(heap):
    told = of(seen=seen(rate=rate(10 * MIB)), duration_s=6)
    assert (told.copy_bytes, told.source) == (30 * MIB + HEAP, "soft-dirty")
    assert "30 MiB" in told.words
    assert "40 MiB" in told.words


def test_in_a_shorter_time_as_much_may_be_written_as_in_the_one_that_was_watched(heap):
    assert of(seen=seen(rate=rate(10 * MIB)), duration_s=0.1).copy_bytes == 10 * MIB + HEAP


def test_a_measured_rate_never_foretells_more_than_there_is(heap):
    assert of(seen=seen(rate=rate(10 * MIB)), duration_s=1e9).copy_bytes == PRIVATE


def test_without_a_time_all_private_memory_is_written_at_an_assumed_rate(heap):
    expected_s = PRIVATE / ASSUMED_WRITE_BYTES_PER_S
    told = of(seen=seen(rate=rate(10 * MIB, duration_s=1.0)))
    assert told.copy_bytes == int(10 * MIB * expected_s) + HEAP


def test_a_rate_that_is_too_old_is_forgotten(heap):
    fresh = of(seen=seen(rate=rate(MIB, at_s=0.0)), now_s=VALID_S)
    old = of(seen=seen(rate=rate(MIB, at_s=0.0)), now_s=VALID_S + 1)
    assert (fresh.source, old.source) == ("soft-dirty", "private memory")


def test_a_lower_bound_foretells_nothing(heap):
    assert of(seen=seen(rate=rate(MIB, method="minor-faults"))).source == "private memory"


def test_where_the_object_heap_cannot_be_told_a_rate_is_not_enough(monkeypatch):
    monkeypatch.setattr(forecast, "object_heap_bytes", lambda: None)
    assert of(seen=seen(rate=rate(MIB))).source == "private memory"


def test_whichever_was_seen_last_counts(heap):
    snapshot = LastSnapshot(7 * MIB, 3.0, PRIVATE, at_s=999.0)
    before, after = rate(MIB, at_s=998.0), rate(MIB, at_s=1000.0)
    assert of(seen=seen(rate=before, snapshot=snapshot)).source == "last snapshot"
    assert of(seen=seen(rate=after, snapshot=snapshot)).source == "soft-dirty"


def test_the_last_snapshot_grows_with_the_state_and_with_the_time():
    snapshot = LastSnapshot(7 * MIB, 3.0, PRIVATE // 2, at_s=999.0)
    assert of(seen=seen(snapshot=snapshot)).copy_bytes == 14 * MIB
    assert of(seen=seen(snapshot=snapshot), duration_s=6).copy_bytes == 28 * MIB
    assert of(seen=seen(snapshot=snapshot), duration_s=1).copy_bytes == 14 * MIB


def test_what_was_cut_short_counts_where_it_had_copied_more():
    observations = seen(snapshot=LastSnapshot(7 * MIB))
    observations.note_cut_short(3 * MIB)
    assert observations.snapshot.copy_bytes == 7 * MIB
    observations.note_cut_short(9 * MIB)
    assert observations.snapshot.copy_bytes == 9 * MIB


def test_a_snapshot_that_was_cut_short_is_none():
    observations = seen()
    observations.note_cut_short(3 * MIB)
    assert observations.snapshot is None


def test_the_callers_rate_goes_before_everything_that_was_seen(heap):
    told = of(dirty_bytes_per_s=MIB, duration_s=3, seen=seen(rate=rate(MIB), snapshot=LastSnapshot(7 * MIB)))
    assert (told.copy_bytes, told.source) == (3 * MIB, "caller")


def test_a_callers_rate_alone_lasts_as_the_last_snapshot_did():
    snapshot = LastSnapshot(7 * MIB, 4.0, PRIVATE, at_s=999.0)
    told = of(dirty_bytes_per_s=MIB, seen=seen(snapshot=snapshot))
    assert (told.copy_bytes, told.source) == (4 * MIB, "caller")
    assert "4.0 s" in told.words


@pytest.mark.parametrize(
    "observed",
    [
        {"rate": rate(0)},
        {"snapshot": LastSnapshot(0, 1.0, PRIVATE, 1000.0)},
    ],
    ids=["rate", "snapshot"],
)
def test_a_process_that_writes_nothing_writes_nothing_for_ever(heap, observed):
    told = of(seen=seen(**observed), duration_s=float("inf"))
    assert told.copy_bytes == (HEAP if "rate" in observed else 0)


def test_no_rate_is_too_fast_for_a_process_that_has_nothing():
    assert Forecast.of(0, dirty_bytes_per_s=float("inf")).copy_bytes == 0
