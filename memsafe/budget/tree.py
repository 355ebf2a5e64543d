"""Budgets: accounting that refuses.

The counters, and the path of a charge that is taken at once, are in C (memsafe_native/src/budget.c, budget_py.c).
Here is the tree and what can be done with it; what happens when a limit stands in the way is in wait.py.
"""

from __future__ import annotations

import logging
import math
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar, overload
from warnings import warn

from memsafe._native import BudgetCore, Reservation, current_budget_by
from memsafe.blocks import Blocks
from memsafe.budget import policy, reclaim, report, wait
from memsafe.budget.policy import NO_POLICY
from memsafe.budget.refusal import Refusal
from memsafe.errors import BudgetAbortedError, BudgetClosedError
from memsafe.sizes import MAX_SIZE_BYTES, Size, format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self, Unpack

    from memsafe._kernel.files import Root
    from memsafe.budget.policy import Policy, SoftLimitCallback
    from memsafe.budget.process import ProcessBudget
    from memsafe.budget.reclaim import Reclaimable, Reclaimer
    from memsafe.budget.report import BudgetReport, BudgetStats, Consumer
    from memsafe.numpy import Handler
    from memsafe.region import Region, RegionOptions

    ReclaimerT = TypeVar("ReclaimerT", bound=Reclaimer)
    SoftLimitCallbackT = TypeVar("SoftLimitCallbackT", bound=SoftLimitCallback)

T = TypeVar("T")

_log = logging.getLogger("memsafe.budget")

# The budget whose block this code runs in, by itself because current_budget() must be fast; and all of the blocks.
_current: ContextVar[Budget | None] = ContextVar("memsafe.current_budget", default=None)
_blocks: Blocks[Budget] = Blocks("memsafe.budget.blocks")
current_budget = current_budget_by(_current.get)


class Budget(BudgetCore):
    """An amount of memory, and who may take how much of it.

    A budget is an account, not memory: it counts what the program says it allocates, and refuses when a limit would
    be passed, before the kernel has to. Budgets form a tree; a reservation is charged to its budget and to every
    ancestor, or, when one of them refuses, to none.

    As a context manager it is the current budget of its block (see current_budget()) and is closed at the end, of the
    last block where several are in it at once. All of it is thread-safe. A forked child has a copy of its own, which
    the parent never sees.

    Args:
        limit: The most that may be reserved, in bytes or as a string such as "512 MiB"; None: no limit of its own.
        name: What reports and errors call it.
        soft_limit: Passing it calls the on_soft_limit callbacks; low memory is answered by reclaiming down to it.

    Raises:
        ValueError: A size that is none, or a name that is empty or holds a slash.

    Example:
        >>> db = Budget("512 MiB", name="db")
        >>> with db.reserve("64 MiB") as reservation:
        ...     reservation.size_bytes
        67108864
    """

    __slots__ = ("__weakref__", "_children", "_policy", "name", "parent")

    _kernel_root: Root = "/"  # whose process this tree accounts for
    _follow_every_s = math.inf  # how often who waits should have the root _follow()

    def __init__(self, limit: Size | None = None, *, name: str = "budget", soft_limit: Size | None = None) -> None:
        self._open(None, name, limit, soft_limit)

    def _open(
        self,
        parent: Budget | None,
        name: str,
        limit: Size | None,
        soft_limit: Size | None,
        *,
        core_above: BudgetCore | None = None,
        quantum: Size = 0,
    ) -> None:
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"a budget's name must be a string, not empty and without '/': {name!r}")
        limit_bytes = _native_limit(limit, "a limit")
        soft_limit_bytes = _native_limit(soft_limit, "a soft limit")
        super().__init__(core_above or parent, limit_bytes, parse_size(quantum, what="a quantum"))
        if soft_limit is not None:
            self._set_soft_limit(soft_limit_bytes)
        self.name = name
        self.parent = parent
        self._children: dict[str, weakref.ref[Budget]] | None = None
        self._policy: Policy = NO_POLICY

    @classmethod
    def for_process(cls, fraction: float = 0.9, *, name: str = "process", root: Root = "/") -> ProcessBudget:
        """Return a root whose limit is a share of what binds this process, and follows it. See ProcessBudget.

        Args:
            fraction: Above 0, at most 1. The rest is for what no budget accounts for: the interpreter, libraries,
                fragmentation, the page tables.
            name: As of Budget.
            root: As of memory_status().

        Raises:
            ValueError: A fraction out of range, or a bad name.
            UnsupportedError: Nothing that binds this process could be read.
        """
        from memsafe.budget.process import ProcessBudget

        return ProcessBudget(fraction, name=name, root=root)

    # ------------------------------------------------------------------------------------------------ the tree

    def child(
        self, name: str, limit: Size | None = None, *, soft_limit: Size | None = None, quantum: Size = 0
    ) -> Budget:
        """Return a new budget below this one, which bounds it too.

        Args:
            name: Unique among the children that are open.
            limit: As of Budget; None: bounded by its ancestors only.
            soft_limit: As of Budget.
            quantum: 0: every level is exact. Else the child, itself exact, draws from its ancestors in multiples of
                this and keeps up to two of it for later (slack_bytes), so that threads with a child each seldom meet
                at the ancestors. They see that as used. It goes back before anybody is refused or has to wait.

        Raises:
            ValueError: As Budget; or the name is taken; or the tree would be deeper than 64.
            BudgetClosedError: This budget was closed.
            BudgetAbortedError: It, or an ancestor, was aborted.
        """
        self._raise_if_unusable()
        budget = Budget.__new__(Budget)
        budget._open(self, name, limit, soft_limit, quantum=quantum)
        with policy.lock:
            if quantum:
                known = policy.of(self._root())
                known.batched = known.batched or weakref.WeakSet()
                known.batched.add(budget)
            children = self._children = {} if self._children is None else self._children
            taken = children.get(name)
            sibling = taken() if taken else None
            if sibling is None or sibling.closed:
                children[name] = weakref.ref(budget)
                return budget
        budget._close()
        raise ValueError(f"budget {self.path!r} already has a child named {name!r}")

    @property
    def path(self) -> str:
        """The names from the root to here, joined by slashes."""
        return "/".join(budget.name for budget in reversed(list(self._upwards())))

    @property
    def children(self) -> tuple[Budget, ...]:
        """The open budgets directly below this one."""
        if not self._children:
            return ()
        with policy.lock:
            references = list(self._children.values())  # in one step: the collector may close a child between two
        found = [reference() for reference in references]
        return tuple(child for child in found if child is not None and not child.closed)

    def _upwards(self) -> Iterator[Budget]:
        budget: Budget | None = self
        while budget is not None:
            yield budget
            budget = budget.parent

    def _root(self) -> Budget:
        budget = self
        while budget.parent is not None:
            budget = budget.parent
        return budget

    def _at(self, level: int) -> Budget:
        """Return the budget *level* levels up, the root for what is above it (of a ProcessBudget, in C)."""
        budget = self
        for _ in range(level):
            budget = budget.parent or budget
        return budget

    # ------------------------------------------------------------------------------------------------ limits

    @property
    def limit_bytes(self) -> int | None:
        """The limit, None for none of its own. May be set at any time, to a size.

        Lowering it below what is used asks reclaimers for the difference; what they cannot give stays charged
        (over_bytes tells how much that is), and the budget refuses until enough was released. Raising it serves those
        who wait.
        """
        return self._limit

    @limit_bytes.setter
    def limit_bytes(self, limit: Size | None) -> None:
        self._set_limit(_native_limit(limit, "a limit"))
        if over_bytes := self.over_bytes:
            self.reclaim(over_bytes)

    @property
    def soft_limit_bytes(self) -> int | None:
        """The soft limit, None for none. May be set at any time, to a size."""
        return self._soft_limit

    @soft_limit_bytes.setter
    def soft_limit_bytes(self, soft_limit: Size | None) -> None:
        self._set_soft_limit(_native_limit(soft_limit, "a soft limit"))

    @property
    def over_bytes(self) -> int:
        """By how much used_bytes is beyond the limit: after charge(), or after the limit was lowered."""
        limit_bytes = self._limit
        return 0 if limit_bytes is None else max(0, self.used_bytes - limit_bytes)

    def _follow(self) -> bool:
        """Look whether the limit has to follow something; whether it was raised."""
        return False

    def on_soft_limit(self, callback: SoftLimitCallbackT) -> SoftLimitCallbackT:
        """Have *callback* called with this budget each time that used_bytes passes the soft limit.

        Once a crossing: it is armed again when used_bytes has fallen to nine tenths of the soft limit. It runs in the
        thread whose reservation passed it, after that stands; a failure is logged, but KeyboardInterrupt and its kind
        pass through reserve(), which then holds nothing. Usable as a decorator.
        """
        with policy.lock:
            mine = policy.of(self)
            mine.soft_callbacks = (*mine.soft_callbacks, callback)
        return callback

    def _forget_soft_limit_callback(self, callback: SoftLimitCallback) -> None:
        """Call it no more; one that is not registered is none."""
        with policy.lock:
            mine = policy.of(self)
            mine.soft_callbacks = tuple(each for each in mine.soft_callbacks if each != callback)

    def _soft_limit_passed(self) -> None:
        """Called from C when a charge to this budget passed a soft limit, here or above."""
        for budget in self._upwards():
            budget._tell_soft_limit()

    def _tell_soft_limit(self) -> None:
        if not self._take_soft_passed():
            return
        for callback in self._policy.soft_callbacks:
            try:
                callback(self)
            except Exception:
                _log.exception("the soft limit callback %r of budget %r failed", callback, self.path)

    # ------------------------------------------------------------------------------------------------ charging

    def charge(self, size: Size) -> None:
        """Charge bytes that exist already: no limit is asked, and the limit may be passed.

        Args:
            size: Bytes that the program has allocated; given back by uncharge().

        Raises:
            BudgetClosedError: This budget or an ancestor was closed.
            OverflowError: A counter would pass 8 EiB.
            ValueError: *size* is not a size.
        """
        level = self._charge_existing(parse_size(size, what="a charge"))
        if level is not None:
            raise BudgetClosedError(f"budget {self._at(level).path!r} was closed")

    def uncharge(self, size: Size) -> None:
        """Give back bytes that charge() charged here.

        Raises:
            ValueError: *size* is more than is charged here outside of reservations, or not a size.
        """
        size_bytes = parse_size(size, what="an uncharge")
        if not self._uncharge_existing(size_bytes):
            raise ValueError(
                f"cannot uncharge {size_bytes} bytes from budget {self.path!r}: "
                f"{self.charged_bytes} are charged there outside of reservations"
            )

    def map(self, size: Size, **options: Unpack[RegionOptions]) -> Region:
        """Return memory of its own mapping, charged to this budget until it is closed. See Region for the options.

        Args:
            size: Rounded up to whole pages (4 KiB on most machines; 2 MiB with *huge_pages*).
            options: committed, huge_pages, guard_pages, locked, shared, zero_on_close.

        Raises:
            BudgetExceededError: As reserve().
            KernelError: The kernel refused: mmap(2), memfd_create(2), mprotect(2) or mlock(2).
            ValueError: *size* is not a size, or is 0.
        """
        from memsafe.region import Region

        return Region(self, size, **options)

    def numpy(self) -> Handler:
        """Return a context manager: arrays that NumPy makes in its block are charged to this budget. See memsafe.numpy.

        They give the bytes back when they are freed, wherever and whenever that is. A refusal is a MemoryError.

        Raises:
            ImportError: NumPy is not installed.
            UnsupportedError: NumPy is older than 2.4.
        """
        from memsafe.numpy import Handler

        return Handler(self)

    async def reserve_async(self, size: Size, *, timeout_s: float | None = None) -> Reservation:
        """As reserve(), for tasks: waiting does not block the event loop, and async reclaimers are asked too.

        Where the task is cancelled, nothing is held. Plain reclaimers run in the event loop's thread.

        Args:
            size: As of reserve().
            timeout_s: As of reserve(). math.inf waits until the task is cancelled: asyncio.timeout() bounds that.

        Raises:
            KernelError: There is no descriptor left for the eventfd that the event loop's tasks share.
            Exceptions as reserve().
        """
        size_bytes = parse_size(size, what="a reservation")
        return _or_raise(await wait.obtain_async(self, size_bytes, wait.parse_timeout(timeout_s)))

    # What follows is called from C, by name, when an exact int was not taken at once.

    def _reserve(self, size: Size, timeout_s: float | None) -> Reservation:
        size_bytes = parse_size(size, what="a reservation")
        return _or_raise(wait.obtain(self, size_bytes, wait.parse_timeout(timeout_s)))

    def _try_reserve(self, size: Size) -> Reservation | None:
        outcome = wait.obtain(self, parse_size(size, what="a reservation"))
        return None if isinstance(outcome, Refusal) else outcome

    def _grow(self, reservation: Reservation, size: Size, timeout_s: float | None) -> None:
        more_bytes = self._parse_growth(reservation, size)
        with _or_raise(wait.obtain(self, more_bytes, wait.parse_timeout(timeout_s))) as more:
            reservation.merge(more)

    def _try_grow(self, reservation: Reservation, size: Size) -> bool:
        outcome = wait.obtain(self, self._parse_growth(reservation, size))
        if isinstance(outcome, Refusal):
            return False
        with outcome as more:
            reservation.merge(more)
        return True

    def _parse_growth(self, reservation: Reservation, size: Size) -> int:
        more_bytes = parse_size(size, what="the growth of a reservation")
        with reservation.split(0):  # says so where it was released
            return more_bytes

    def _shrink(self, reservation: Reservation, size: Size) -> None:
        reservation.shrink(parse_size(size, what="the shrinking of a reservation"))

    def _resize(self, reservation: Reservation, size: Size) -> None:
        size_bytes = parse_size(size, what="the size of a reservation")
        # What is obtained stays apart until it is enough: a reclaimer may well shrink this very reservation.
        with reservation.split(0) as more:
            while (missing_bytes := size_bytes - reservation.size_bytes - more.size_bytes) > 0:
                more.merge(_or_raise(wait.obtain(self, missing_bytes)))
            surplus_bytes = min(-missing_bytes, more.size_bytes)
            more.shrink(surplus_bytes)
            reservation.merge(more)
        if (surplus_bytes := reservation.size_bytes - size_bytes) > 0:
            reservation.shrink(surplus_bytes)

    def _split(self, reservation: Reservation, size: Size) -> Reservation:
        return reservation.split(parse_size(size, what="a part of a reservation"))

    def _receive(self, reservation: Reservation) -> None:
        level = reservation._move_once(self)
        if level is not None:
            self._raise_if_unusable()
            refusal = Refusal(self, self._at(level), reservation.size_bytes)
            _or_raise(wait.make_room(self, refusal, lambda: reservation._move_once(self)))

    def _collect_slack(self) -> bool:
        """Have every budget of the tree give its slack back; whether there are such budgets. self: the root."""
        if self._policy.batched is None:
            return False
        with policy.lock:
            batched = list(self._policy.batched)
        for budget in batched:
            budget._return_slack()
        return bool(batched)

    def _return_slack_below(self) -> None:
        for child in self.children:
            child._return_slack_below()
            child._return_slack()

    def _raise_if_unusable(self) -> None:
        for budget in self._upwards():
            if budget.aborted:
                reason = budget._policy.abort_reason
                raise BudgetAbortedError(f"budget {budget.path!r} was aborted: {reason}")
            if budget.closed:
                raise BudgetClosedError(f"budget {budget.path!r} was closed")

    # ------------------------------------------------------------------------------------------------ reclaiming

    @overload
    def reclaimer(
        self, function: ReclaimerT, *, priority: int = 0, reclaimable: Reclaimable | None = None
    ) -> ReclaimerT: ...
    @overload
    def reclaimer(
        self, function: None = None, *, priority: int = 0, reclaimable: Reclaimable | None = None
    ) -> Callable[[ReclaimerT], ReclaimerT]: ...

    def reclaimer(
        self, function: ReclaimerT | None = None, *, priority: int = 0, reclaimable: Reclaimable | None = None
    ) -> ReclaimerT | Callable[[ReclaimerT], ReclaimerT]:
        """Register a function that makes room: ``fn(need_bytes) -> freed_bytes``.

        It is called when a reservation meets a limit at or above this budget, in the thread that asks, with no lock
        held, and never twice at once: who needs it meanwhile waits for it, and shares in what it frees. It frees what
        it can, at best *need_bytes*, releases the reservations for it, and returns how much that was.

        The lowest priority is asked first, among equals the one that can free most, the requester's own last. What it
        reserves itself may pass each limit a little (a 64th, from 1 to 64 MiB, at most a 16th; for all who do so
        together), because it may need a buffer to write out what it frees; beyond that it is refused at once, without
        asking others or waiting. If it fails, that is logged and the next one is asked.

        Usable as a decorator, bare or with arguments. Returns the function.

        Args:
            function: A coroutine function is asked by reserve_async() only.
            priority: Any int.
            reclaimable: Called without arguments: the bytes that it could free now. Else what its budget uses counts.
        """
        if function is None:
            return lambda decorated: self.reclaimer(decorated, priority=priority, reclaimable=reclaimable)
        reclaim.register(reclaim.ReclaimerEntry(self, function, priority, reclaimable), self)
        return function

    def remove_reclaimer(self, function: Reclaimer) -> None:
        """Ask *function* no more.

        Raises:
            ValueError: It is not registered here.
        """
        if not reclaim.unregister(function, self):
            raise ValueError(f"{function!r} is not a reclaimer of budget {self.path!r}")

    def reclaim(self, need: Size) -> int:
        """Ask the reclaimers of this budget and of those below it to free *need* bytes.

        Coroutine functions are not asked, nor those that are at work for somebody else.

        Returns:
            The bytes by which used_bytes fell.
        """
        left_bytes = self.used_bytes - parse_size(need, what="what is to be reclaimed")
        return reclaim.ask(self, lambda: self.used_bytes - left_bytes)

    @property
    def reclaimable_bytes(self) -> int:
        """What the reclaimers of this budget and of those below it say that they could free.

        Those that were registered without *reclaimable* tell nothing and count as 0.
        """
        return sum(entry.available_bytes() or 0 for _, entry in reclaim.below(self))

    # ------------------------------------------------------------------------------------------------ telling

    @property
    def own_bytes(self) -> int:
        """The part of used_bytes that is not in a child."""
        return self._own_bytes(self.children)

    def _own_bytes(self, children: tuple[Budget, ...]) -> int:
        return max(0, self.used_bytes - sum(child.used_bytes + child.slack_bytes for child in children))

    def top_consumers(self, count: int = report.TOP_CONSUMERS) -> tuple[Consumer, ...]:
        """Return the *count* largest holders among this budget and those below it, each with its own part."""
        return report.top_consumers(self, count)

    def stats(self) -> BudgetStats:
        """Return what this budget holds and did."""
        return report.stats_of(self, self.path, self.children)

    def report(self) -> BudgetReport:
        """Return the tree at and below this budget, top consumers first; print() it, or take its as_dict().

        At a root it tells the drift too: what is charged beside the anonymous memory that the process really has.
        """
        return report.report_of(self, self.path)

    def _notes(self) -> tuple[str, ...]:
        """What a report should say of this budget beside its figures."""
        reason = self._policy.abort_reason
        return () if reason is None else (f"{self.path} was aborted: {reason}",)

    def __repr__(self) -> str:
        limit = "no limit" if self._limit is None else f"limit {format_size(self._limit)}"
        state = ", closed" if self.closed else ", aborted" if self.aborted else ""
        return f"<Budget {self.path!r} {format_size(self.used_bytes)} used, {limit}{state}>"

    # ------------------------------------------------------------------------------------------------ the end

    def abort(self, reason: str) -> None:
        """Refuse every waiting and later reservation in this budget and below: BudgetAbortedError with *reason*.

        Who waits is woken at once. What is reserved stays so until it is released. There is no way back; the first
        reason stays.
        """
        reason = str(reason)
        with policy.lock:
            mine = policy.of(self)
            if mine.abort_reason is None:
                mine.abort_reason = reason
        self._abort()

    def close(self) -> int:
        """Close this budget and those below it: nothing more can be reserved from them.

        What is still charged is given back to the ancestors, reported by a ResourceWarning and returned; releasing
        it afterwards is allowed and changes nothing. Closing twice is a no-op.

        Returns:
            The bytes that were still charged.
        """
        return self._close_and_tell()

    def _close_and_tell(self) -> int:
        if self.closed:
            return 0
        if self._root()._policy.batched:
            self._return_slack_below()  # it is nobody's
        consumers = self.top_consumers() if self.used_bytes else ()
        left_bytes = self._close_tree()
        told = self.parent is not None and any(above.closed for above in self.parent._upwards())
        if left_bytes and not told:
            held = ", ".join(f"{path} {format_size(used_bytes)}" for path, used_bytes in consumers)
            warn(
                f"budget {self.path!r} was closed with {format_size(left_bytes)} still charged: {held}",
                ResourceWarning,
                stacklevel=3,  # whoever called close(), left the block or dropped the budget
            )
        return left_bytes

    def _close_tree(self) -> int:
        # From the top down: that fails those who wait below before a child's closing could serve them.
        left_bytes = self._close()
        for child in self.children:
            child._close_tree()
        dropped: tuple[reclaim.ReclaimerEntry, ...] = ()
        with policy.lock:
            if self._policy is not NO_POLICY:
                dropped, self._policy.reclaimers = self._policy.reclaimers, ()
            siblings = (self.parent._children if self.parent else None) or {}
            mine = siblings.get(self.name)
            if mine is not None and mine() in (self, None):
                del siblings[self.name]
        del dropped  # with the lock free again: the last reference to somebody's function may be here
        return left_bytes

    def __enter__(self) -> Self:
        self._raise_if_unusable()
        with policy.lock:
            policy.of(self).entered += 1
        _blocks.enter(self)
        _current.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _current.set(_blocks.leave(self))
        with policy.lock:
            mine = policy.of(self)
            mine.entered -= 1
            last = mine.entered == 0
        if last:
            try:
                self._close_and_tell()
            except ResourceWarning:  # where warnings are errors; the error that ends the block says more
                if error is None:
                    raise

    def __del__(self) -> None:
        # Only what was charged without a reservation can be left: a reservation or a child keeps its budget alive.
        if hasattr(self, "_policy"):  # else __init__ failed
            self._close_and_tell()

    def __reduce__(self) -> Any:
        raise TypeError("a Budget belongs to one process: it cannot be pickled or copied")


def _or_raise(outcome: T | Refusal) -> T:
    """Return what was obtained, or raise the refusal."""
    if isinstance(outcome, Refusal):
        raise outcome.error()
    return outcome


def _native_limit(limit: Size | None, what: str) -> int:
    return MAX_SIZE_BYTES if limit is None else parse_size(limit, what=what)
