"""Signals and interrupts of who asks a budget: nothing is lost, wherever they come."""

import gc
import signal
import sys
import threading
import time

import pytest

from memsafe import Budget
from memsafe.budget import refusal, wait
from tests.unit.budget_line import FOR_EVER_S


def test_an_interrupt_while_waiting_passes_through_and_nothing_is_lost():
    budget = Budget(100)

    def handler(number, frame):
        raise KeyboardInterrupt

    def interrupt():
        while not budget._policy.claims:
            time.sleep(0.001)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with budget.reserve(90):
            interrupter = threading.Thread(target=interrupt)
            interrupter.start()
            with pytest.raises(KeyboardInterrupt):
                budget.reserve(20, timeout_s=FOR_EVER_S)
            interrupter.join()
            with budget.reserve(10):  # nobody stands in line any more
                pass
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert budget.used_bytes == 0
    assert not budget._policy.claims


class Interrupted(BaseException):
    """What a signal handler raises."""


def interrupt_at(calls):
    """Raise at the n-th start of a function or generator of memsafe.budget: one of the places where handlers run."""
    left = calls

    def trace(frame, event, argument):
        nonlocal left
        if "/memsafe/budget/" in frame.f_code.co_filename:
            left -= 1
            if left == 0:
                raise Interrupted
        return

    sys.settrace(trace)


def forget_last(errors):
    errors[-1] = None
    gc.collect()


@pytest.mark.usefixtures("no_collector")  # else __del__ may run at any moment, and what is raised there goes to nobody
@pytest.mark.parametrize("call", ["reserve", "grow", "reclaim"])
def test_an_interrupt_at_any_moment_loses_nothing_though_its_traceback_is_kept(call):
    kept = []
    for moment in range(1, 2000):
        db = Budget(100, name="db")
        cache, query = db.child("cache").reserve(90), db.child("query").reserve(0)

        def shed(need_bytes, cache=cache):
            freed_bytes = min(10, cache.size_bytes)
            cache.shrink(freed_bytes)
            return freed_bytes

        cache.budget.reclaimer(shed)
        interrupt_at(moment)
        try:
            if call == "reserve":
                query.budget.reserve(30, timeout_s=FOR_EVER_S).release()
            elif call == "grow":
                query.grow(30, timeout_s=FOR_EVER_S)
            else:
                db.reclaim(30)
            break
        except Interrupted as error:
            kept.append(error)
        finally:
            sys.settrace(None)
        assert query.size_bytes in (0, 30)
        if db.used_bytes - cache.size_bytes - query.size_bytes == 30:  # granted, and on its way to the caller
            with pytest.warns(ResourceWarning, match="of 30 bytes"):
                forget_last(kept)
        assert db.used_bytes - cache.size_bytes == query.size_bytes
        assert query.budget.waiting == db.waiting == 0
        with query.budget.reserve(70 - query.size_bytes):  # the reclaimer can be asked, and the line is empty
            assert wait._still_running(db) == ""
        assert refusal.waiters_for(db) == ()
        assert not db._policy.claims  # the last one to look has forgotten whoever left without a word
        query.release()
        cache.release()
    assert len(kept) > 3
    query.release()
    cache.release()


def test_whoever_left_the_line_without_a_word_is_forgotten_by_the_next_look():
    db = Budget(100, name="db")
    with db.reserve(100):
        with db._stand_in_line(10, 0, 0) as claim:
            wait._claims_of(db)[claim] = time.monotonic()
            assert len(refusal.waiters_for(db)) == 1
        assert refusal.waiters_for(db) == ()
    assert not db._policy.claims


def test_a_signal_handler_that_returns_does_not_end_the_wait():
    budget, heard = Budget(100), []
    held = budget.reserve(90)

    def release_after_a_signal():
        while not budget._policy.claims:
            time.sleep(0.001)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        while not heard:
            time.sleep(0.001)
        held.release()

    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        threading.Thread(target=release_after_a_signal).start()
        with budget.reserve(20, timeout_s=FOR_EVER_S):
            assert heard
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_interrupt_in_a_reclaimer_passes_through_and_the_reclaimer_can_be_asked_again():
    db, ways = Budget(100, name="db"), [KeyboardInterrupt]
    hoard = db.reserve(100)

    @db.reclaimer
    def shed(need_bytes):
        if ways:
            raise ways.pop()
        hoard.shrink(need_bytes)
        return need_bytes

    with pytest.raises(KeyboardInterrupt):
        db.reserve(10)
    assert (db.used_bytes, db.waiting, len(db._policy.claims)) == (100, 0, 0)
    with db.reserve(10):
        pass
    hoard.release()
