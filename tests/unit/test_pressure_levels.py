from __future__ import annotations

import math

import pytest

from memsafe.pressure.levels import (
    LOOK_S_MIN,
    RECOVERY_S,
    Cause,
    Ladder,
    Needs,
    PressureEvent,
    PressureLevel,
    Thresholds,
    has_room,
    judge,
    next_level_bytes,
    poll_after_s,
)
from memsafe.status import CommitStatus, Constraint, MemoryStatus, ProcessMemory, SwapStatus

MIB = 1024**2
GIB = 1024**3
NAN = math.nan
NORMAL, LOW, CRITICAL = PressureLevel
DEFAULTS = Thresholds()
SOME = Cause(LOW, "psi.some", "stalled", Needs.SHORT_HEADROOM)
OOM = Cause(CRITICAL, "memory.events", "oom +1")


def constraint(limit, left, *, active=0, kind="memory.max", path="/app", used=None):
    used = limit - left if used is None else used
    return Constraint(kind, path, limit, used, 0, left, "kill", active)


def status(*constraints):
    return MemoryStatus(
        None, None, None, constraints, CommitStatus(0, None, None, None, None),
        SwapStatus(None, None, None, ()), None, ProcessMemory(None, None, None, None, None), (),
    )  # fmt: skip


def judged(*constraints, causes=(), thresholds=DEFAULTS):
    return judge(status(*constraints), thresholds, causes)


@pytest.mark.parametrize(
    ("limit", "low", "critical"),
    [
        (0, 0, 0),
        (16 * MIB, 4 * MIB, 2 * MIB),
        (64 * MIB, 16 * MIB, 6 * MIB),
        (1 * GIB, int(1 * GIB * 0.15), int(1 * GIB * 0.05)),
        (1024 * GIB, 2 * GIB, 512 * MIB),
    ],
)
def test_levels_begin_at_a_share_that_fits_the_limit(limit, low, critical):
    assert (DEFAULTS.begins_at(LOW, limit), DEFAULTS.begins_at(CRITICAL, limit)) == (low, critical)


@pytest.mark.parametrize("limit", [64 * MIB, 1 * GIB, 1024 * GIB])
def test_a_level_begins_exactly_at_its_threshold(limit):
    for level in (LOW, CRITICAL):
        begins = DEFAULTS.begins_at(level, limit)
        assert judged(constraint(limit, begins)).raised == level
        assert judged(constraint(limit, begins + 1)).raised == level - 1


def test_page_cache_alone_raises_nothing():
    # The headroom counts inactive cache already; active cache is what the status keeps apart.
    assert judged(constraint(128 * MIB, 0, active=100 * MIB)).raised == NORMAL
    assert judged(constraint(128 * MIB, 0, active=100 * MIB), causes=[SOME]).raised == NORMAL
    assert judged(constraint(128 * MIB, 0, active=10 * MIB)).raised == LOW


def test_the_shortest_limit_decides_whichever_it_is():
    own, host = constraint(64 * MIB, 40 * MIB), constraint(64 * GIB, 1 * GIB, kind="physical", path=None)
    judgement = judged(own, host)
    assert judgement.raised == LOW
    assert (judgement.available_bytes, judgement.limit_bytes) == (1 * GIB, 64 * GIB)
    assert "physical" in judgement.detail
    assert judged(own).limit_bytes == 64 * MIB


def test_the_shortage_and_what_lasts_are_those_of_all_limits():
    small, large = constraint(64 * MIB, 10 * MIB), constraint(16 * GIB, 1900 * MIB, kind="physical", path=None)
    both = judged(small, large)
    assert (both.raised, both.available_bytes, both.limit_bytes) == (LOW, 10 * MIB, 64 * MIB)
    assert both.shortage_bytes == judged(large).shortage_bytes > judged(small).shortage_bytes > 0
    slow = Thresholds(clear_ratio=3)
    calm, low = constraint(100 * MIB, 17 * MIB), constraint(64 * GIB, 2 * GIB, path="/other")
    alone = judged(low, thresholds=slow), judged(calm, thresholds=slow)
    assert [(each.raised, each.held) for each in alone] == [(LOW, LOW), (NORMAL, CRITICAL)]
    both = judged(calm, low, thresholds=slow)
    assert (both.raised, both.held) == (LOW, CRITICAL)


def test_where_nothing_is_short_the_limit_that_is_met_first_is_told():
    own, host = constraint(64 * MIB, 60 * MIB), constraint(64 * GIB, 20 * GIB, kind="physical", path=None)
    assert judged(own, host).limit_bytes == 64 * MIB


def test_a_cause_lasts_until_there_is_more_than_where_it_began():
    begins = DEFAULTS.begins_at(LOW, GIB)
    held = judged(constraint(GIB, int(begins * DEFAULTS.clear_ratio)))
    assert (held.raised, held.held, held.shortage_bytes) == (NORMAL, LOW, 1)
    passed = judged(constraint(GIB, int(begins * DEFAULTS.clear_ratio) + 1))
    assert (passed.raised, passed.held, passed.shortage_bytes) == (NORMAL, NORMAL, 0)


def test_a_stall_counts_only_where_headroom_is_short():
    assert judged(constraint(GIB, 600 * MIB), causes=[SOME]).raised == NORMAL
    judgement = judged(constraint(GIB, 400 * MIB), causes=[SOME])
    assert (judgement.raised, judgement.held, judgement.source) == (LOW, LOW, "psi.some")
    assert judgement.detail.startswith("stalled; 400 MiB")


@pytest.mark.parametrize(("left", "raised"), [(154 * MIB, NORMAL), (153 * MIB, CRITICAL)])
def test_a_reclaim_that_frees_nothing_counts_only_where_low_has_begun(left, raised):
    # The kernel says so of page cache that is being written back, too.
    judgement = judged(constraint(GIB, left), causes=[Cause(CRITICAL, "pressure_level.critical", "no", Needs.LOW)])
    assert judgement.raised == raised
    assert judgement.source == ("pressure_level.critical" if raised else None)
    assert judged(causes=[Cause(CRITICAL, "pressure_level.critical", "no", Needs.LOW)]).raised == NORMAL


def test_a_stall_counts_where_the_headroom_is_unknown():
    unknown = Constraint("memory.max", "/app", GIB, None, None, None, "kill")
    assert judged(unknown).raised == NORMAL
    assert judged(unknown, causes=[SOME]).raised == LOW
    assert judged(causes=[SOME]).raised == LOW


def test_an_oom_is_critical_whatever_the_headroom():
    judgement = judged(constraint(GIB, GIB), causes=[SOME, OOM])
    assert (judgement.raised, judgement.source) == (CRITICAL, "memory.events")


def test_headroom_below_the_loudest_cause_keeps_its_own_reason():
    judgement = judged(constraint(GIB, 0), causes=[SOME])
    assert (judgement.raised, judgement.source) == (CRITICAL, None)


def test_polling_is_slow_far_from_a_threshold_and_fast_near_it():
    def after_s(left, limit=64 * GIB):
        return poll_after_s(status(constraint(limit, left)), DEFAULTS)

    assert after_s(60 * GIB) == DEFAULTS.poll_s_max
    assert after_s(2 * GIB + 4 * GIB) == pytest.approx(1.0)
    assert after_s(2 * GIB + 1) == LOOK_S_MIN
    # Past LOW, CRITICAL is what may come next; past that only the recovery.
    assert after_s(2 * GIB) == pytest.approx(1.5 / 4)
    assert after_s(0) == LOOK_S_MIN


def test_a_guarded_limit_is_left_to_who_guards_it_but_for_the_recovery():
    def after_s(*constraints):
        return poll_after_s(status(*constraints), DEFAULTS, lambda each: each.kind == "memory.max")

    low = DEFAULTS.begins_at(LOW, GIB)
    assert after_s(constraint(GIB, low + 200 * MIB)) == DEFAULTS.poll_s_max
    assert after_s(constraint(GIB, low)) == RECOVERY_S
    assert after_s(constraint(GIB, 0)) == LOOK_S_MIN
    assert after_s(constraint(GIB, low + 200 * MIB), constraint(GIB, low + MIB, kind="memory.high")) == LOOK_S_MIN


def test_the_bounds_of_polling_hold_for_looks_too():
    near = status(constraint(GIB, 200 * MIB))
    assert poll_after_s(near, Thresholds(poll_s_min=0.001, poll_s_max=0.001)) == 0.001
    assert poll_after_s(near, Thresholds(poll_s_min=7, poll_s_max=9)) == 7


def test_the_next_level_is_the_next_one_down():
    low, critical = (DEFAULTS.begins_at(level, GIB) for level in (LOW, CRITICAL))
    lefts = (GIB, low + 1, low, critical + 1, critical, 0)
    assert [next_level_bytes(left, DEFAULTS, GIB) for left in lefts] == [low, low, critical, critical, None, None]


def test_there_is_room_where_no_limit_comes_near_low():
    clear = int(DEFAULTS.begins_at(LOW, GIB) * DEFAULTS.clear_ratio)
    roomy = constraint(64 * GIB, 32 * GIB)
    assert has_room(status(roomy, constraint(GIB, clear + MIB + 1)), DEFAULTS, MIB)
    assert not has_room(status(roomy, constraint(GIB, clear + MIB)), DEFAULTS, MIB)
    assert has_room(status(), DEFAULTS, MIB)


def test_up_at_once_and_down_after_the_cooldown():
    ladder = Ladder(cooldown_s=3)
    assert ladder.move(CRITICAL, CRITICAL, 0) == CRITICAL
    assert ladder.falls_after_s(0) is None
    assert ladder.move(NORMAL, NORMAL, 10) == CRITICAL
    assert ladder.falls_after_s(11) == 2
    assert ladder.move(NORMAL, NORMAL, 12.9) == CRITICAL
    assert ladder.move(NORMAL, NORMAL, 13) == NORMAL
    assert ladder.falls_after_s(13) is None


def test_a_cause_that_returns_starts_the_cooldown_anew():
    ladder = Ladder(cooldown_s=3)
    ladder.move(LOW, LOW, 0)
    ladder.move(NORMAL, NORMAL, 1)
    ladder.move(NORMAL, LOW, 2)
    assert ladder.move(NORMAL, NORMAL, 4) == LOW
    assert ladder.move(NORMAL, NORMAL, 6) == LOW
    assert ladder.move(NORMAL, NORMAL, 7) == NORMAL


def test_a_level_falls_only_as_far_as_its_causes_have_passed():
    ladder = Ladder(cooldown_s=3)
    ladder.move(CRITICAL, CRITICAL, 0)
    ladder.move(NORMAL, LOW, 1)
    assert ladder.move(NORMAL, LOW, 4) == LOW
    assert ladder.falls_after_s(4) is None
    ladder.move(NORMAL, NORMAL, 5)
    assert ladder.falls_after_s(6) == 2
    assert ladder.move(NORMAL, NORMAL, 8) == NORMAL


def test_a_forced_level_falls_by_the_cooldown_unless_it_is_real():
    ladder = Ladder(cooldown_s=3)
    ladder.force(CRITICAL, 0)
    assert ladder.falls_after_s(0) == 3
    assert ladder.move(NORMAL, LOW, 1) == CRITICAL
    assert ladder.move(NORMAL, LOW, 3) == LOW
    assert ladder.move(NORMAL, LOW, 9) == LOW


@pytest.mark.parametrize(
    "junk",
    [
        {"low_ratio": 1.5},
        {"critical_ratio": -0.1},
        {"low_bytes_min": 10, "low_bytes_max": 9},
        {"clear_ratio": 0.9},
        {"cooldown_s": -1},
        {"poll_s_min": 0},
        {"poll_s_min": 9},
        {"fill_bytes_per_s": 0},
        {"some_stall_us": 0},
        {"full_stall_us": 2_000_001},
        {"some_stall_us": 1.5},
        {"low_ratio": NAN},
        {"low_bytes_min": NAN},
        {"critical_bytes_max": 1e9},
        {"clear_ratio": NAN},
        {"clear_ratio": math.inf},
        {"stall_headroom_ratio": -3},
        {"stall_headroom_ratio": 1.5},
        {"stall_headroom_ratio": NAN},
        {"cooldown_s": NAN},
        {"cooldown_s": math.inf},
        {"poll_s_min": NAN},
        {"poll_s_max": math.inf},
        {"poll_s_max": 1e12},
        {"fill_bytes_per_s": 2**70},
        {"fill_bytes_per_s": 1e9},
        {"fill_bytes_per_s": NAN},
        {"clear_ratio": 1e300},
        {"low_bytes_max": "1 GiB"},
        {"low_ratio": "0.1"},
        {"cooldown_s": None},
    ],
)
def test_thresholds_that_make_no_sense_are_refused(junk):
    with pytest.raises(ValueError, match="must"):
        Thresholds(**junk)


def test_events_and_thresholds_are_plain_data_on_request():
    event = PressureEvent(CRITICAL, LOW, "polling", 1, 2, 3.0, "why")
    assert event.as_dict()["level"] == "CRITICAL"
    assert event.as_dict()["previous"] == "LOW"
    assert DEFAULTS.as_dict()["low_ratio"] == DEFAULTS.low_ratio
