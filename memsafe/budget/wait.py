"""Requests that were not met at once: reclaimers are asked, then the request waits its turn.

What has to happen is one generator, _course(), for threads and for tasks alike: it yields what its driver has to do,
to ask a reclaimer or to pause, and the driver does it by blocking or by awaiting.

While all this goes on the request stands in line (memsafe_native/cdef/claim.h): what is released, by reclaimers or by
anybody, is charged to it before somebody who comes later can take it.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakValueDictionary

from memsafe._native import ffi, lib
from memsafe.budget import policy, reclaim
from memsafe.budget.refusal import Refusal
from memsafe.errors import KernelError

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future
    from collections.abc import Callable, Generator, Iterator

    from memsafe._native import Claim, Reservation
    from memsafe.budget.reclaim import ReclaimerEntry
    from memsafe.budget.tree import Budget

# A request that fits only after this many rounds of reclaiming is losing a race against other requesters.
_ROUNDS_MAX = 8

# How long a request waits for a reclaimer that another one is running, one without a timeout for all such reclaimers
# together: long enough to write a buffer out, and bounded, because that reclaimer may be waiting for this very thread.
_JOIN_MAX_S = 10.0


@dataclass(slots=True)
class _Ask:
    """Run a reclaimer; answered with what it says that it freed."""

    entry: ReclaimerEntry
    need_bytes: int


@dataclass(slots=True)
class _Pause:
    """Sleep until the claim has something to see, at most so long."""

    timeout_s: float


# Answered with what a reclaimer says that it freed, None after a pause.
_Course: TypeAlias = "Generator[_Ask | _Pause, int | None, Reservation | Refusal]"


def parse_timeout(timeout_s: float | None) -> float | None:
    """Return it as a float.

    Raises:
        ValueError: It is negative, NaN, or no number.
    """
    if timeout_s is None:
        return None
    try:
        seconds = float(timeout_s)
    except (TypeError, ValueError):
        seconds = -1.0
    if isinstance(timeout_s, (str, bytes)) or not seconds >= 0:
        raise ValueError(f"timeout_s must be a number of seconds, not negative, or None: {timeout_s!r}")
    return seconds


def at_once(budget: Budget, size_bytes: int) -> Reservation | Refusal:
    """Return a reservation, or who refuses it; asks nobody for room."""
    root = budget._root()
    inside = reclaim.is_inside(root)
    attempt = budget._overdraw if inside else budget._attempt
    outcome = attempt(size_bytes)
    if isinstance(outcome, int) and (root._follow() | root._collect_slack()):
        outcome = attempt(size_bytes)
    if not isinstance(outcome, int):
        return outcome
    budget._raise_if_unusable()
    remark = (
        "It was asked inside a reclaimer, which may neither wait for room nor have others make it." if inside else ""
    )
    return Refusal(budget, budget._at(outcome), size_bytes, remark=remark)


def obtain(budget: Budget, size_bytes: int, timeout_s: float | None = None) -> Reservation | Refusal:
    """Return a reservation, or who refuses it after reclaimers were asked and the time has passed.

    Raises:
        BudgetAbortedError, BudgetClosedError: It was, or was while this waited.
    """
    outcome = at_once(budget, size_bytes)
    if not isinstance(outcome, Refusal):
        return outcome
    if not _is_worth_it(outcome, timeout_s):
        return outcome.count()
    with budget._stand_in_line(size_bytes, 0, 0) as claim:
        course = _course(claim, timeout_s, asynchronous=False)
        try:  # and not closing(): its __exit__ is Python, and a signal handler may raise before it does anything
            answer: int | None = None
            while True:
                match course.send(answer):
                    case _Ask(entry, need_bytes):
                        answer = entry.run(need_bytes)
                    case _Pause(pause_s):
                        answer = None
                        claim.wait(pause_s)
        except StopIteration as end:
            return _outcome(end)
        finally:
            course.close()


async def obtain_async(budget: Budget, size_bytes: int, timeout_s: float | None = None) -> Reservation | Refusal:
    """As obtain(), for a task."""
    outcome = at_once(budget, size_bytes)
    if not isinstance(outcome, Refusal):
        return outcome
    if not _is_worth_it(outcome, timeout_s):
        return outcome.count()
    with _mailbox() as mailbox, mailbox.stand_in_line(budget, size_bytes) as claim:
        course = _course(claim, timeout_s, asynchronous=True)
        try:
            answer: int | None = None
            while True:
                match course.send(answer):
                    case _Ask(entry, need_bytes):
                        answer = await entry.run_async(need_bytes)
                    case _Pause(pause_s):
                        answer = None
                        await mailbox.pause(claim, pause_s)
        except StopIteration as end:
            return _outcome(end)
        finally:
            course.close()


def _outcome(end: StopIteration) -> Reservation | Refusal:
    outcome: Reservation | Refusal = end.value
    return outcome


def make_room(budget: Budget, refusal: Refusal, attempt: Callable[[], int | None]) -> Refusal | None:
    """Ask reclaimers until *attempt* succeeds, without a place in line; return the refusal where it does not.

    Args:
        budget: The one that asks.
        refusal: Of the attempt before this.
        attempt: Returns how many levels up it was refused, None on success.
    """
    if reclaim.is_inside(budget._root()) or not _could_fit(refusal):
        return refusal.count()
    for entry in reclaim.in_order(refusal.refused_by, budget):
        limit_bytes = refusal.refused_by.limit_bytes or 0
        need_bytes = refusal.refused_by.used_bytes + refusal.requested_bytes - limit_bytes
        entry.run_alone(max(1, need_bytes))
        if attempt() is None:
            return None
    return refusal.count()


def _is_worth_it(refusal: Refusal, timeout_s: float | None) -> bool:
    """Whether reclaiming or waiting could turn a refusal into a reservation."""
    if refusal.remark or not _could_fit(refusal):
        return False
    return bool(timeout_s) or bool(refusal.budget._root()._policy.registry)


def _could_fit(refusal: Refusal) -> bool:
    """Whether every level would take the request if it were empty: else emptying caches for it helps nobody."""
    return _too_small(refusal.budget, refusal.requested_bytes) is None


def _too_small(budget: Budget, size_bytes: int) -> Budget | None:
    """Return the topmost budget whose limit is below *size_bytes*."""
    found: Budget | None = None
    level: Budget | None = budget
    while level is not None:
        if (limit_bytes := level._limit) is not None and limit_bytes < size_bytes:
            found = level
        level = level.parent
    return found


def _course(claim: Claim, timeout_s: float | None, *, asynchronous: bool) -> _Course:
    budget, size_bytes = claim.budget, claim.size_bytes
    claims = _claims_of(budget)
    began_s = time.monotonic()
    until_s = began_s + (_JOIN_MAX_S if timeout_s is None else timeout_s)
    try:
        with policy.lock:
            claims[claim] = began_s
        budget._root()._collect_slack()  # as long as somebody stands in line, none is kept
        yield from _ask_reclaimers(claim, until_s, asynchronous)
        if timeout_s and claim.in_line:
            yield from _wait(claim, until_s)
        waited_s = time.monotonic() - began_s if timeout_s else None
        level, _ = claim.shortfall()
        reservation = claim.take()
        if reservation is not None:
            return reservation
        budget._raise_if_unusable()
        refused_by = _too_small(budget, size_bytes) or budget._at(level)
        return Refusal(budget, refused_by, size_bytes, waited_s, _still_running(budget)).count()
    finally:
        with policy.lock:
            claims.pop(claim, None)


def _claims_of(budget: Budget) -> dict[Claim, float]:
    with policy.lock:
        return policy.of(budget._root()).claims


def _ask_reclaimers(claim: Claim, until_s: float, asynchronous: bool) -> Generator[_Ask | _Pause, int | None, None]:
    """Ask round after round, in order, each for what is missing by then, until nobody has more to give.

    Those that run for others are waited for, but not beyond *until_s*.
    """
    stalled: set[ReclaimerEntry] = set()
    for _ in range(_ROUNDS_MAX):
        asked = False
        level, _ = claim.shortfall()
        for entry in reclaim.in_order(claim.budget._at(level), claim.budget, asynchronous=asynchronous):
            if not claim.in_line:
                return
            if entry in stalled:
                continue
            asked = True
            before = claim.shortfall()
            try:
                if begun := entry.begin(claim):
                    freed_bytes = yield _Ask(entry, before[1])
            finally:
                if entry.runs_for is claim:
                    entry.runs_for = None
                    entry.tell_joined()
            if not begun:
                if not (yield from _join(entry, claim, until_s)):
                    stalled.add(entry)
                continue
            level_after, need_after_bytes = claim.shortfall()
            if not freed_bytes or (level_after == before[0] and need_after_bytes >= before[1]):
                stalled.add(entry)  # whatever it says
        if not asked or not claim.in_line:
            return


def _join(entry: ReclaimerEntry, claim: Claim, until_s: float) -> Generator[_Pause, int | None, bool]:
    """Wait for a reclaimer that is at work for somebody else: what it frees is shared out along the line.

    Returns whether it has ended.
    """
    until_s = min(until_s, time.monotonic() + _JOIN_MAX_S)
    if entry.join(claim):
        while claim.in_line and entry.is_running:
            if (left_s := until_s - time.monotonic()) <= 0:
                return False
            yield _Pause(left_s)
    return True


def _wait(claim: Claim, until_s: float) -> Generator[_Pause, int | None, None]:
    """Wait for the claim's turn."""
    level, _ = claim.shortfall()
    root, refuser, began_s = claim.budget._root(), claim.budget._at(level), time.monotonic()
    try:
        while claim.in_line and (left_s := until_s - time.monotonic()) > 0:
            yield _Pause(min(left_s, root._follow_every_s))
            root._follow()
    finally:
        with policy.lock:
            counts = policy.of(refuser)
            counts.waits += 1
            counts.waited_s += time.monotonic() - began_s


def _still_running(budget: Budget) -> str:
    running = {owner.path for owner, entry in reclaim.below(budget._root()) if entry.is_running}
    return f"Reclaimers are still at work in {', '.join(sorted(running))}." if running else ""


class _Mailbox:
    """The claims of one event loop's tasks: one eventfd for all of them, however many there are."""

    def __init__(self, loop: AbstractEventLoop) -> None:
        native = lib.ms_mailbox_new()
        if native == ffi.NULL:
            raise KernelError(ffi.errno, "eventfd")
        self._loop = loop
        self._native = ffi.gc(native, lib.ms_mailbox_free)
        self._address = int(ffi.cast("uintptr_t", native))
        self._token = ffi.new("uint64_t *")
        self._sleepers: dict[int, Future[None]] = {}
        self._last_token = 0
        self.users = 0
        loop.add_reader(lib.ms_mailbox_fd(native), self._deliver)

    def stand_in_line(self, budget: Budget, size_bytes: int) -> Claim:
        self._last_token += 1
        return budget._stand_in_line(size_bytes, self._address, self._last_token)

    async def pause(self, claim: Claim, timeout_s: float) -> None:
        future = self._sleepers[claim.token] = self._loop.create_future()
        timer = self._loop.call_later(min(timeout_s, 3600.0), _wake, future)
        try:
            if claim.in_line:
                await future
        finally:
            timer.cancel()
            del self._sleepers[claim.token]

    def _deliver(self) -> None:
        while lib.ms_mailbox_take(self._native, self._token):
            if future := self._sleepers.get(self._token[0]):
                _wake(future)

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.remove_reader(lib.ms_mailbox_fd(self._native))
        ffi.release(self._native)


def _wake(future: Future[None]) -> None:
    if not future.done():
        future.set_result(None)


# By the loop's id: a mailbox keeps its loop alive, and goes with its last user. Weakly, because it keeps the tasks that
# wait alive too: those of a loop that was closed must be collected, or they would stand in line for ever.
_mailboxes: WeakValueDictionary[int, _Mailbox] = WeakValueDictionary()
os.register_at_fork(after_in_child=_mailboxes.clear)


@contextmanager
def _mailbox() -> Iterator[_Mailbox]:
    """Give the running loop's mailbox."""
    from asyncio import get_running_loop

    loop = get_running_loop()
    mailbox = _mailboxes.get(id(loop))
    if mailbox is None:
        mailbox = _mailboxes[id(loop)] = _Mailbox(loop)
    mailbox.users += 1
    try:
        yield mailbox
    finally:
        mailbox.users -= 1
        if mailbox.users == 0 and _mailboxes.get(id(loop)) is mailbox:
            del _mailboxes[id(loop)]
            mailbox.close()
