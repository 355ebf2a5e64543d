"""How much a budget is asked for, and for how long."""

from __future__ import annotations

import pytest

from memsafe import Budget, PressureLevel
from memsafe.pressure.levels import Judgement
from memsafe.pressure.responder import Responder

MIB = 1024 * 1024
LOW = PressureLevel.LOW
NOW_S = 1000.0


def short_by(shortage_bytes):
    return Judgement(LOW, LOW, None, 10 * MIB, 128 * MIB, shortage_bytes, "")


@pytest.fixture
def cache():
    """A budget of 64 MiB, all in use, and what it was asked for."""
    asked = []
    with Budget(name="db") as budget, budget.reserve("64 MiB"):
        budget.reclaimer(lambda need_bytes: asked.append(need_bytes) or 0)
        yield budget, asked


@pytest.mark.parametrize(("judged_s", "asked_bytes"), [(NOW_S - 0.01, 5 * MIB + 8 * 3 * MIB), (NOW_S - 2, 5 * MIB)])
def test_growth_is_asked_for_ahead_only_where_it_is_known_over_how_long(cache, judged_s, asked_bytes):
    budget, asked = cache
    Responder(budget, lambda: NOW_S, lambda: 5 * MIB).respond(LOW, short_by(2 * MIB), judged_s)
    assert asked == [asked_bytes]


def test_what_is_filled_again_for_ever_is_not_reclaimed_for_ever():
    asked, shortage_bytes = [], 8 * MIB

    def look():
        nonlocal shortage_bytes
        shortage_bytes += 1 * MIB
        return shortage_bytes

    with Budget(name="db") as budget, budget.reserve("64 MiB") as held:

        @budget.reclaimer
        def give_and_take(need_bytes):
            nonlocal shortage_bytes
            asked.append(need_bytes)
            assert len(asked) < 100
            shortage_bytes = 4 * MIB
            held.shrink(1)
            return 1

        Responder(budget, lambda: NOW_S, look).respond(LOW, short_by(8 * MIB), NOW_S)
    assert 1 < len(asked) <= 8
