"""Requests that wait: first come first served, woken by what was freed, and nothing lost on the way."""

import asyncio
import gc
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import uvloop

import memsafe
from memsafe import Budget, BudgetExceededError
from memsafe._native import ffi, lib
from memsafe.budget import refusal, wait

FOR_EVER_S = 60.0  # long enough that nobody sees the end of it
LOOPS = pytest.mark.parametrize(
    "loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)


class Requester(threading.Thread):
    """A thread that asks for *size* bytes and waits for them."""

    def __init__(self, budget, size, timeout_s=FOR_EVER_S, call=None):
        super().__init__(daemon=True)
        self.budget, self.size, self.timeout_s = budget, size, timeout_s
        self.call = call or budget.reserve
        self.result = self.error = None
        self.start()

    def run(self):
        try:
            self.result = self.call(self.size, timeout_s=self.timeout_s)
        except BaseException as error:
            self.error = error

    def stands_in_line(self):
        """Come back when it does."""
        root = self.budget._root()
        while not any(
            claim.budget is self.budget and claim.size_bytes == self.size and claim.in_line
            for claim in list(root._policy.claims)
        ):
            time.sleep(0.001)
            assert self.is_alive(), (self.result, self.error)
        return self

    def outcome(self):
        self.join(FOR_EVER_S)
        assert not self.is_alive()
        if self.error:
            raise self.error
        return self.result


def in_line(budget, size, **options):
    return Requester(budget, size, **options).stands_in_line()


def run(main, loop_factory=asyncio.new_event_loop):
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(main)


async def tasks_in_line(root, count):
    while sum(claim.in_line for claim in root._policy.claims) < count:
        await asyncio.sleep(0)


def test_a_request_waits_until_enough_is_released():
    budget = Budget(100)
    first, second = budget.reserve(60), budget.reserve(40)
    waiting = in_line(budget, 70)
    second.release()
    assert waiting.is_alive()
    first.shrink(10)
    assert waiting.is_alive()
    first.release()
    with waiting.outcome() as reservation:
        assert (reservation.size_bytes, budget.used_bytes) == (70, 70)
    stats = budget.stats()
    assert (stats.waits, stats.refusals, stats.waiting) == (1, 0, 0)
    assert stats.waited_s > 0


def test_what_fits_at_once_does_not_wait():
    with Budget(100).reserve(100, timeout_s=0.0), Budget(100).reserve("100", timeout_s=math.inf):
        pass


def test_first_come_first_served_and_small_ones_do_not_starve_a_large_one():
    budget = Budget(100)
    held = budget.reserve(80)
    large = in_line(budget, 90)
    small = in_line(budget, 10)
    assert budget.try_reserve(10) is None  # 20 are free, and promised
    assert budget.headroom_bytes == 20
    with budget.reserve(0):
        pass
    held.release()
    with large.outcome(), small.outcome():
        assert budget.used_bytes == 100


def test_who_gives_up_no_longer_holds_up_those_behind():
    budget = Budget(100)
    with budget.reserve(80):
        large = in_line(budget, 90, timeout_s=2)  # so long that both are in line before
        with in_line(budget, 10).outcome():
            with pytest.raises(BudgetExceededError):
                large.outcome()
            assert budget.used_bytes == 90


def test_who_waits_at_one_level_does_not_hold_up_those_who_do_not_go_through_it():
    root = Budget(100)
    tight, wide = root.child("tight", 10), root.child("wide")
    held = tight.reserve(10)
    waiting = in_line(tight, 5)
    with wide.reserve(90):
        held.release()
        with waiting.outcome():
            assert root.used_bytes == 95


def test_a_claim_moves_on_to_the_next_level_that_is_full():
    root = Budget(100)
    child = root.child("child", 50)
    others, mine = root.reserve(60), child.reserve(40)
    waiting = in_line(child, 50)
    others.shrink(1)
    mine.release()
    assert waiting.is_alive()
    assert root.try_reserve(1) is None
    others.shrink(9)
    with waiting.outcome():
        assert (root.used_bytes, child.used_bytes) == (100, 50)
    others.release()


def test_raising_a_limit_and_uncharging_serve_who_waits():
    root = Budget(100)
    child = root.child("child", 10)
    root.charge(95)
    waiting = in_line(child, 20 - 10)
    child_waiting = in_line(root, 50)
    root.uncharge(50)
    with waiting.outcome():
        root.limit_bytes = 200
        with child_waiting.outcome():
            assert root.used_bytes == 105
    root.uncharge(45)


def test_closing_a_tree_serves_nobody_who_waits_in_it():
    host = Budget(name="host")
    db = host.child("db", 100)
    held = db.child("first").reserve(51)
    waiter = in_line(db.child("second"), 50)
    with pytest.warns(ResourceWarning, match="51 B still charged: host/db/first 51 B"):
        assert db.close() == 51
    with pytest.raises(memsafe.BudgetClosedError):
        waiter.outcome()
    assert host.used_bytes == host.peak_bytes - 51 == 0
    held.release()
    assert host.used_bytes == 0


def test_closing_a_sibling_serves_who_waits():
    root = Budget(100)
    sibling = root.child("sibling")
    sibling.charge(100)
    waiting = in_line(root, 30)
    with pytest.warns(ResourceWarning):
        sibling.close()
    waiting.outcome().release()


def test_grow_waits_too():
    budget = Budget(100)
    held = budget.reserve(50)
    with budget.reserve(30) as reservation:
        waiting = in_line(budget, 40, call=reservation.grow)
        held.release()
        assert waiting.outcome() is None
        assert reservation.size_bytes == 70


def test_a_reservation_that_was_released_or_moved_while_it_waited_to_grow():
    root = Budget(name="root")
    budget, other = root.child("budget", 100), root.child("other", 100)
    for change in ("release", "move", "move to no room"):
        held, reservation = budget.reserve(50), budget.reserve(30)
        waiting = in_line(budget, 40, call=reservation.grow)
        other.limit_bytes = 60 if change == "move to no room" else 100
        if change == "release":
            reservation.release()
        else:
            reservation.move_to(other)
        held.release()
        if change == "release":
            with pytest.raises(memsafe.ReservationClosedError):
                waiting.outcome()
        elif change == "move":
            waiting.outcome()
            assert (reservation.size_bytes, other.used_bytes) == (70, 70)
        else:
            with pytest.raises(BudgetExceededError):
                waiting.outcome()
            assert (reservation.size_bytes, other.used_bytes) == (30, 30)
        reservation.release()
        assert root.used_bytes == 0


def test_a_timeout_is_a_refusal_that_says_how_long_who_holds_and_who_waits():
    budget = Budget(100, name="db")
    left, right = budget.child("left"), budget.child("right")
    with left.reserve(50), right.reserve(40):
        other = in_line(left, 30)
        with pytest.raises(BudgetExceededError, match=r"within \d+\.\d\d s") as caught:
            right.reserve(20, timeout_s=0.01)
        error = caught.value
        assert "In line there: db/left for 30 B since" in str(error)
        assert "while it holds 50 B" in str(error)
        assert "deadlocked" in str(error)
        assert [(waiter.path, waiter.requested_bytes, waiter.held_bytes) for waiter in error.waiters] == [
            ("db/left", 30, 50)
        ]
        assert (error.refused_by, error.available_bytes, error.waited_s >= 0.01) == (budget, 10, True)
        assert error.top_consumers == (("db/left", 50), ("db/right", 40))
        assert budget.stats().refusals == 1
        assert other.is_alive()
    other.outcome().release()
    assert budget.used_bytes == 0


def test_who_may_not_wait_is_refused_with_those_before_it_named():
    budget = Budget(100, name="db")
    held = budget.reserve(90)
    waiting = in_line(budget, 50)
    with pytest.raises(BudgetExceededError, match="In line there: db for 50 B") as caught:
        budget.reserve(10)
    assert caught.value.available_bytes == 10
    held.release()
    waiting.outcome().release()


def test_what_can_never_fit_does_not_wait_even_if_a_limit_is_lowered_meanwhile():
    root = Budget(100, name="root")
    child = root.child("child", 50)
    with pytest.raises(BudgetExceededError) as caught:
        child.reserve(51, timeout_s=FOR_EVER_S)
    assert caught.value.refused_by is child
    with child.reserve(20):
        waiting = in_line(child, 40)
        child.limit_bytes = 39
        with pytest.raises(BudgetExceededError, match="ask for less"):
            waiting.outcome()


@pytest.mark.parametrize("bad", [-1, math.nan, "1", object(), -math.inf])
def test_a_bad_timeout_is_a_value_error(bad):
    budget = Budget(10)
    with budget.reserve(10) as reservation:
        for call in (budget.reserve, reservation.grow):
            with pytest.raises(ValueError, match="timeout_s must be a number"):
                call(1, timeout_s=bad)
        with pytest.raises(ValueError, match="timeout_s must be a number"):
            run(budget.reserve_async(1, timeout_s=bad))


def test_abort_wakes_who_waits_at_once_and_leaves_the_others():
    root = Budget(100, name="root")
    query, other = root.child("query"), root.child("other")
    held = root.reserve(100)
    inside, outside = in_line(query.child("scan"), 10), in_line(other, 20)
    query.abort("cancelled by the user")
    with pytest.raises(memsafe.BudgetAbortedError, match="cancelled by the user"):
        inside.outcome()
    assert outside.is_alive()
    held.release()
    outside.outcome().release()
    query.abort("again")
    with pytest.raises(memsafe.BudgetAbortedError, match="cancelled by the user"):
        query.reserve(0, timeout_s=1)


def test_close_wakes_who_waits():
    root = Budget(100)
    child = root.child("child")
    with root.reserve(100):
        waiting = in_line(child, 10)
        child.close()
        with pytest.raises(memsafe.BudgetClosedError):
            waiting.outcome()


def test_closing_a_tree_grants_nothing_of_what_its_children_give_back():
    root = Budget(100)
    child = root.child("child")
    child.charge(60)
    waiting = in_line(root, 50)
    with pytest.warns(ResourceWarning):
        assert root.close() == 60
    assert child.closed
    with pytest.raises(memsafe.BudgetClosedError):
        waiting.outcome()


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


@pytest.fixture
def no_collector():
    """Else __del__ may run at any moment, and what is raised there goes to nobody."""
    gc.disable()
    yield
    gc.enable()


def forget_last(errors):
    errors[-1] = None
    gc.collect()


@pytest.mark.usefixtures("no_collector")
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


def test_a_soft_limit_that_was_passed_by_what_nobody_took_is_told_by_the_next():
    db, told = Budget(100, name="db", soft_limit=50), []
    db.on_soft_limit(lambda budget: told.append(budget.used_bytes))
    held = [db.reserve(25), db.reserve(25), db.reserve(0)]
    with db._stand_in_line(40, 0, 0):  # granted at once, and never taken
        assert db.used_bytes == 90
    assert told == []
    held[2].grow(10)
    assert told == [60]
    for each in held:
        each.release()


def test_the_soft_limit_is_told_by_who_waited():
    budget, told = Budget(100, soft_limit=50), []
    budget.on_soft_limit(lambda each: told.append((each, threading.current_thread())))
    held = budget.reserve(40)
    waiting = in_line(budget, 70)
    held.release()
    waiting.outcome().release()
    assert told == [(budget, waiting)]


def test_a_forked_child_starts_with_an_empty_line():
    script = """
import memsafe, os, threading
db = memsafe.Budget(100, name="db")
kept = db.reserve(40)
def wait():
    with db.reserve(70, timeout_s=60):
        pass
waiting = threading.Thread(target=wait)
waiting.start()
while not db.waiting:
    pass
pid = os.fork()
if pid == 0:
    assert db.waiting == 0
    with db.reserve(60):
        assert db.try_reserve(1) is None
    with db.reserve(1, timeout_s=1):
        os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert db.try_reserve(10) is None
kept.release()
waiting.join()
assert db.used_bytes == 0
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_interpreter_ends_quietly_while_threads_wait_and_reclaim():
    script = """
import memsafe, threading, time
db = memsafe.Budget(100, name="db")
kept = db.reserve(100)
inside = threading.Event()
@db.reclaimer
def slow(need_bytes):
    inside.set()
    time.sleep(60)
for _ in range(3):
    threading.Thread(target=db.reserve, args=(10,), kwargs={"timeout_s": 60}, daemon=True).start()
assert inside.wait(60)
while db.waiting < 3:
    pass
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_loop_without_a_descriptor_left_is_told_and_holds_nothing():
    script = """
import asyncio, errno, memsafe, os, resource
async def main():
    db = memsafe.Budget(100, name="db")
    with db.reserve(100):
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        try:
            await db.reserve_async(1, timeout_s=60)
        except memsafe.KernelError as error:
            assert error.errno == errno.EMFILE and error.call == "eventfd"
            assert db.waiting == 0
            print("told")
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "told\n", "")


def test_many_threads_that_wait_never_pass_the_limit_and_end_at_zero():
    root = Budget(100)
    leaves = [root.child(f"leaf{i}", 70) for i in range(4)]
    over = []

    def work(number):
        for i in range(300):
            with leaves[number % 4].reserve(1 + (i * (7 + number)) % 69, timeout_s=FOR_EVER_S) as reservation:
                if root.used_bytes > 100:
                    over.append(root.used_bytes)
                if i % 3 == 0:
                    reservation.shrink(1)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert over == []
    assert (root.used_bytes, root.waiting, root.peak_bytes <= 100) == (0, 0, True)
    assert not root._policy.claims


# ---------------------------------------------------------------------------------------------------- asyncio


@LOOPS
def test_a_task_waits_without_blocking_its_loop(loop_factory):
    async def main():
        budget = Budget(100)
        with await budget.reserve_async(60):
            waiting = asyncio.create_task(budget.reserve_async(70, timeout_s=FOR_EVER_S))
            await tasks_in_line(budget, 1)
        with await waiting as reservation:
            assert (reservation.size_bytes, budget.used_bytes) == (70, 70)
        assert budget.used_bytes == 0

    run(main(), loop_factory)
    assert not wait._mailboxes


@LOOPS
def test_tasks_and_threads_stand_in_one_line(loop_factory):
    async def main():
        budget, order = Budget(100), []
        held = budget.reserve(100)

        async def task(size):
            with await budget.reserve_async(size, timeout_s=math.inf):
                order.append(size)

        first = asyncio.create_task(task(91))
        await tasks_in_line(budget, 1)
        second = await asyncio.to_thread(in_line, budget, 92)
        third = asyncio.create_task(task(93))
        await tasks_in_line(budget, 3)
        await asyncio.to_thread(held.release)  # from another thread
        await first
        with await asyncio.to_thread(second.outcome):
            order.append(92)
        await third
        assert order == [91, 92, 93]

    run(main(), loop_factory)


@LOOPS
def test_a_cancelled_task_holds_nothing_even_if_it_was_granted_just_then(loop_factory):
    async def main():
        budget = Budget(100)
        for granted_first in (False, True):
            held = budget.reserve(100)
            waiting = asyncio.create_task(budget.reserve_async(50, timeout_s=FOR_EVER_S))
            await tasks_in_line(budget, 1)
            if granted_first:
                held.release()
                assert budget.used_bytes == 50  # charged to the task, which does not know it yet
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            held.release()
            assert budget.used_bytes == 0
        with budget.reserve(100):
            pass

    run(main(), loop_factory)


@LOOPS
def test_a_task_times_out_like_a_thread_and_by_asyncio_too(loop_factory):
    async def main():
        budget = Budget(100)
        with budget.reserve(100):
            with pytest.raises(BudgetExceededError, match="within"):
                await budget.reserve_async(1, timeout_s=0.001)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(budget.reserve_async(1, timeout_s=math.inf), 0.001)
            with pytest.raises(BudgetExceededError):
                await budget.reserve_async(1)
        with await budget.reserve_async("100 B"):
            pass

    run(main(), loop_factory)


def test_a_loop_that_ends_with_tasks_in_line_leaves_nothing_behind():
    budget = Budget(100)
    before = set(os.listdir("/proc/self/fd"))
    with budget.reserve(100):
        loop = asyncio.new_event_loop()
        task = loop.create_task(budget.reserve_async(10, timeout_s=FOR_EVER_S))
        loop.run_until_complete(tasks_in_line(budget, 1))
        task.cancel()
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()
    assert budget.waiting == 0
    assert not wait._mailboxes
    assert set(os.listdir("/proc/self/fd")) <= before


@LOOPS
def test_tasks_that_are_dropped_with_their_closed_loop_leave_the_line(loop_factory, capsys):
    db, errors = Budget(100, name="db"), []
    held = db.reserve(90)

    @db.reclaimer
    async def stay(need_bytes):
        await asyncio.get_running_loop().create_future()

    async def main():
        tasks = [asyncio.ensure_future(db.reserve_async(50, timeout_s=math.inf)) for _ in range(3)]
        await tasks_in_line(db, len(tasks))
        return tasks

    loop = loop_factory()
    loop.set_exception_handler(lambda loop, context: errors.append(context["message"]))
    tasks = loop.run_until_complete(main())
    loop.close()  # nobody cancelled them
    del tasks, loop
    gc.collect()
    assert errors == ["Task was destroyed but it is pending!"] * 3
    assert not db._policy.claims
    assert not wait._mailboxes
    held.release()
    with db.reserve(100):
        pass


def test_a_thousand_tasks_in_line_share_one_descriptor():
    async def main():
        budget = Budget(1000)
        held = budget.reserve(1000)
        descriptors = len(os.listdir("/proc/self/fd"))

        async def one():
            with await budget.reserve_async(1, timeout_s=math.inf):
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(one()) for _ in range(1000)]
        await tasks_in_line(budget, 1000)
        assert len(os.listdir("/proc/self/fd")) == descriptors + 1
        held.release()
        await asyncio.gather(*tasks)
        assert budget.used_bytes == 0

    run(main())


def test_abort_wakes_tasks():
    async def main():
        budget = Budget(100)
        with budget.reserve(100):
            waiting = asyncio.create_task(budget.reserve_async(1, timeout_s=math.inf))
            await tasks_in_line(budget, 1)
            budget.abort("over")
            with pytest.raises(memsafe.BudgetAbortedError, match="over"):
                await waiting

    run(main())


def test_what_is_missing_does_not_count_those_who_wait_elsewhere():
    db = Budget(name="db")
    left, right = db.child("left", 50), db.child("right", 50)
    with left.reserve(50), right.reserve(50), left._stand_in_line(30, 0, 0), right._stand_in_line(10, 0, 0) as claim:
        assert claim.shortfall() == (0, 10)


def test_a_claim_that_has_left_is_in_no_mail():
    db, token = Budget(100, name="db"), ffi.new("uint64_t *")
    mailbox = ffi.gc(lib.ms_mailbox_new(), lib.ms_mailbox_free)
    with db._stand_in_line(10, int(ffi.cast("uintptr_t", mailbox)), 7) as claim:  # granted at once, which is told
        assert not claim.in_line
    assert not lib.ms_mailbox_take(mailbox, token)
