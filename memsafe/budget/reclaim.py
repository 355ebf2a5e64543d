"""Reclaimers: who is asked to make room, in which order, and what becomes of the answer."""

from __future__ import annotations

import logging
import weakref
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeAlias

from memsafe.budget import policy
from memsafe.sizes import format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextvars import Token
    from types import TracebackType
    from typing import Self

    from memsafe._native import Claim
    from memsafe.budget.tree import Budget

    Reclaimer: TypeAlias = Callable[[int], int | Awaitable[int]]
    Reclaimable: TypeAlias = Callable[[], int]

_log = logging.getLogger("memsafe.budget")

_CO_COROUTINE = 0x80  # inspect.CO_COROUTINE, without the price of importing it


class ReclaimerEntry:
    """A reclaimer and where it is registered. The budget owns it, the root of the tree knows it weakly.

    It never runs twice at once: whoever needs it meanwhile joins, and is nudged when it has ended.

    Attributes:
        runs_for: Who called begin(), while it runs; that one sets it to None at the end, then calls tell_joined(). By
            itself, because a signal handler may raise at the start of any call, and then nobody could run it again.
    """

    __slots__ = (
        "__weakref__",
        "_joined",
        "_running_in",
        "budget",
        "function",
        "is_async",
        "priority",
        "reclaimable",
        "runs_for",
    )

    def __init__(self, budget: Budget, function: Reclaimer, priority: int, reclaimable: Reclaimable | None) -> None:
        self.budget = weakref.ref(budget)
        self.function = function
        self.priority = priority
        self.reclaimable = reclaimable
        self.is_async = is_coroutine_function(function)
        self.runs_for: object | None = None
        self._running_in = 0  # the policy.generation of the process it runs in
        self._joined: list[Claim] = []

    @property
    def is_running(self) -> bool:
        """Whether somebody is in the middle of it."""
        return self.runs_for is not None and self._running_in == policy.generation

    def begin(self, owner: object) -> bool:
        """Take it for *owner* alone: False where it runs already.

        Call it in a try block: a signal handler may raise while this returns.
        """
        with policy.lock:
            if self.is_running:
                return False
            self._joined = []
            self._running_in = policy.generation
            self.runs_for = owner
            return True

    def join(self, claim: Claim) -> bool:
        """Have *claim* nudged when it has ended: False where it does not run any more."""
        with policy.lock:
            if self.is_running:
                self._joined.append(claim)
            return self.is_running

    def tell_joined(self) -> None:
        """Nudge those who joined."""
        with policy.lock:
            joined, self._joined = self._joined, []
        for claim in joined:
            claim.nudge()

    def run(self, need_bytes: int) -> int:
        """Ask for *need_bytes*; return what it says that it freed, 0 if it failed. pre: begin()."""
        asking = _Asking(self)
        try:
            with asking:
                asking.answer = self.function(need_bytes)
        finally:
            asking.active = False
        return asking.freed_bytes

    def run_alone(self, need_bytes: int) -> int:
        """As run(), in a begin() of its own; 0 where it runs already."""
        owner = object()
        try:
            return self.run(need_bytes) if self.begin(owner) else 0
        finally:
            if self.runs_for is owner:
                self.runs_for = None
                self.tell_joined()

    async def run_async(self, need_bytes: int) -> int:
        """As run(), for coroutine functions too."""
        asking = _Asking(self)
        try:
            with asking:
                asking.answer = self.function(need_bytes)
                if hasattr(asking.answer, "__await__"):  # also of a plain function that wraps one which is not
                    asking.answer = await asking.answer
        finally:
            asking.active = False
        return asking.freed_bytes

    def available_bytes(self) -> int | None:
        """Return what it says that it could free; None where it does not tell."""
        if self.reclaimable is None:
            return None
        inside = _Inside(self)
        try:
            with inside:
                told = self.reclaimable()
            return parse_size(told, what="what a reclaimer could free")
        except Exception:
            _log.exception("reclaimable() of the reclaimer %r failed", self.function)
            return None
        finally:
            inside.active = False


class _Inside:
    """Code of a reclaimer, at work: marks the context.

    Attributes:
        active: Until whoever made it sets it to False: what it started and left behind is no reclaimer any more. Not
            in __exit__, at whose start a signal handler may raise: the thread would count as a reclaimer for ever.
    """

    def __init__(self, entry: ReclaimerEntry) -> None:
        self._entry = entry
        self._budget = entry.budget()
        self.root = self._budget._root() if self._budget else None
        self.outer = _inside.get()
        self.active = True

    def __enter__(self) -> Self:
        self._token: Token[_Inside | None] = _inside.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        with suppress(ValueError):  # a task that is collected ends in another context: there is nothing to reset
            _inside.reset(self._token)
        return None


class _Asking(_Inside):
    """One call of a reclaimer: judges the answer, and counts."""

    answer: Any = 0
    freed_bytes = 0

    def __init__(self, entry: ReclaimerEntry) -> None:
        super().__init__(entry)
        self._before_bytes = self.root.used_bytes if self.root else 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        super().__exit__(kind, error, traceback)
        budget, function = self._budget, self._entry.function
        if budget is None or (error is not None and not isinstance(error, Exception)):
            return False
        try:
            if error is not None:
                raise error
            self.freed_bytes = parse_size(self.answer, what="what a reclaimer freed")
        except Exception:
            _log.exception("the reclaimer %r of budget %r failed; the next one is asked", function, budget.path)
        if self.freed_bytes > self._before_bytes:
            told = format_size(self.freed_bytes)
            held = format_size(self._before_bytes)
            _log.warning("the reclaimer %r of %r says it freed %s, of %s in use", function, budget.path, told, held)
            self.freed_bytes = self._before_bytes
        with policy.lock:
            counts = policy.of(budget)
            counts.reclaims += 1
            counts.reclaimed_bytes += self.freed_bytes
        return True


# The reclaimer that this code runs in. Tasks and to_thread() that it starts inherit it.
_inside: ContextVar[_Inside | None] = ContextVar("memsafe.budget.reclaim", default=None)


def is_inside(root: Budget) -> bool:
    """Whether this code runs in a reclaimer of the tree: it must neither ask reclaimers there nor wait."""
    inside = _inside.get()
    while inside is not None:
        if inside.active and inside.root is root:
            return True
        inside = inside.outer
    return False


def register(entry: ReclaimerEntry, budget: Budget) -> None:
    """Let budget own the entry and the root of its tree know it."""
    root = budget._root()
    alive: list[ReclaimerEntry] = []  # outlives the lock: the last reference to somebody's function may be here
    with policy.lock:
        mine, known = policy.of(budget), policy.of(root)
        mine.reclaimers = (*mine.reclaimers, entry)
        known.registry.append(weakref.ref(entry))
        if len(known.registry) >= known.registry_prune_at:
            alive += [each for reference in known.registry if (each := reference()) is not None]
            known.registry = [weakref.ref(each) for each in alive]
            known.registry_prune_at = max(policy.REGISTRY_MIN, 2 * len(alive))


def unregister(function: Reclaimer, budget: Budget) -> bool:
    """Ask *function* no more; whether it was registered."""
    with policy.lock:
        before = budget._policy.reclaimers
        rest = tuple(entry for entry in before if entry.function != function)
        if len(rest) < len(before):
            policy.of(budget).reclaimers = rest
    return len(rest) < len(before)  # `before` is dropped here, with no lock held


def below(budget: Budget) -> list[tuple[Budget, ReclaimerEntry]]:
    """Return the reclaimers at and below the budget, each with the budget that it belongs to."""
    root = budget._root()
    found = []
    for known in tuple(root._policy.registry):
        entry = known()
        owner = entry.budget() if entry else None
        if entry is None or owner is None or owner.closed:
            continue
        if budget is root or any(above is budget for above in owner._upwards()):
            found.append((owner, entry))
    return found


def in_order(budget: Budget, requester: Budget | None = None, *, asynchronous: bool = False) -> list[ReclaimerEntry]:
    """Return the reclaimers at and below the budget, in the order in which to ask them.

    Args:
        budget: The one that is too full.
        requester: Its own come last.
        asynchronous: Coroutine functions too.
    """
    ranked = []
    for owner, entry in below(budget):
        if entry.is_async and not asynchronous:
            continue
        used_bytes = owner.used_bytes
        available_bytes = entry.available_bytes()
        gives_bytes = used_bytes if available_bytes is None else available_bytes
        ranked.append(((owner is requester, entry.priority, -gives_bytes, -used_bytes), entry))
    ranked.sort(key=lambda pair: pair[0])
    return [entry for _, entry in ranked]


def ask(
    budget: Budget,
    missing: Callable[[], int],
    ask_one: Callable[[ReclaimerEntry, int], object] = ReclaimerEntry.run_alone,
) -> int:
    """Ask the reclaimers at and below the budget once each, in order, until nothing is missing any more.

    Coroutine functions are not asked, nor those that are at work for somebody else.

    Args:
        budget: The one to make room in.
        missing: Called before each: how many bytes to ask for; 0 or less ends it.
        ask_one: Asks one of them for so many bytes. What it raises ends it, as does what is no Exception here.

    Returns:
        The bytes by which the budget's use fell.
    """
    before_bytes = budget.used_bytes
    if is_inside(budget._root()):
        return 0
    for entry in in_order(budget):
        if (missing_bytes := missing()) <= 0:
            break
        ask_one(entry, missing_bytes)
    return max(0, before_bytes - budget.used_bytes)


def is_coroutine_function(function: Any) -> bool:
    """Whether calling it makes a coroutine: also bound methods, partials, and objects whose __call__ is one."""
    while (inner := getattr(function, "func", None) or getattr(function, "__func__", None)) is not None:
        function = inner
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return code is not None and bool(code.co_flags & _CO_COROUTINE)
