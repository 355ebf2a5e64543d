"""Budgets: accounting that refuses.

The counters, and the path of a charge that is taken at once, are in C (memsafe_native/src/budget.c, budget_py.c). Here
is the policy: what happens when a limit stands in the way, who is asked to make room, and what the refusal says.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload
from warnings import warn

from memsafe._native import BudgetCore, Reservation
from memsafe.errors import BudgetAbortedError, BudgetClosedError, BudgetExceededError
from memsafe.sizes import MAX_SIZE_BYTES, Size, format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self, Unpack

    from memsafe.numpy import Handler
    from memsafe.region import Region, RegionOptions

    Reclaimer = Callable[[int], int]
    SoftLimitCallback = Callable[["Budget"], object]
    ReclaimerT = TypeVar("ReclaimerT", bound=Reclaimer)
    SoftLimitCallbackT = TypeVar("SoftLimitCallbackT", bound=SoftLimitCallback)

_log = logging.getLogger("memsafe.budget")
_current: ContextVar[_Scope | None] = ContextVar("memsafe.current_budget", default=None)

# A limit that no charge can meet, not even one of 0 bytes: how the C path learns of an abort at no cost of its own.
_REFUSE_ALL = -1

# A request that fits only after this many rounds of reclaiming is losing a race against other requesters.
_ROUNDS_MAX = 8
_TOP_CONSUMERS = 5

# The registry of a tree is cleared of lost reclaimers each time that it has doubled, from this length on.
_REGISTRY_MIN = 32


class _Scope(NamedTuple):
    """A with block of a budget and the one around it. Kept in the context alone: blocks of other tasks are not seen."""

    budget: Budget
    outer: _Scope | None

    def without(self, budget: Budget) -> _Scope | None:
        """Leave the innermost block of *budget*, which need not be the last entered: generators end in any order."""
        if self.budget is budget:
            return self.outer
        return _Scope(self.budget, self.outer and self.outer.without(budget))


class Consumer(NamedTuple):
    """One budget's own part of what an ancestor holds."""

    path: str
    used_bytes: int


@dataclass(frozen=True, slots=True)
class BudgetStats:
    """What a budget held and did, at one moment.

    Attributes:
        own_bytes: The part of used_bytes that is not in a child.
        headroom_bytes: Until this budget or an ancestor refuses; None where nothing is limited.
        refusals: Requests that this budget's limit refused, in itself and below, after reclaiming.
        reclaims: Calls of reclaimers that are registered here.
        reclaimed_bytes: What they gave back, by their own word.
    """

    path: str
    used_bytes: int
    own_bytes: int
    peak_bytes: int
    limit_bytes: int | None
    soft_limit_bytes: int | None
    headroom_bytes: int | None
    refusals: int
    reclaims: int
    reclaimed_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """A tree of budgets at one moment, largest first; ``str()`` of it is for people."""

    name: str
    stats: BudgetStats
    children: tuple[BudgetReport, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the tree as plain data."""
        return {
            "name": self.name,
            **self.stats.as_dict(),
            "children": [child.as_dict() for child in self.children],
        }

    def __str__(self) -> str:
        rows = list(self._rows(0))
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)

    def _rows(self, depth: int) -> Iterator[tuple[str, str]]:
        stats = self.stats
        limit = "no limit" if stats.limit_bytes is None else f"of {format_size(stats.limit_bytes)}"
        text = f"{format_size(stats.used_bytes):>10} {limit:<13} peak {format_size(stats.peak_bytes)}"
        if stats.refusals:
            text += f", refused {stats.refusals}"
        if stats.reclaims:
            text += f", reclaimed {format_size(stats.reclaimed_bytes)} in {stats.reclaims}"
        yield "  " * depth + self.name, text
        for child in self.children:
            yield from child._rows(depth + 1)


class _ReclaimerEntry:
    """A reclaimer and where it is registered. The budget owns it, the root of the tree knows it weakly."""

    __slots__ = ("__weakref__", "budget", "function", "priority")

    def __init__(self, budget: Budget, function: Reclaimer, priority: int) -> None:
        self.budget = weakref.ref(budget)
        self.function = function
        self.priority = priority

    def run(self, need_bytes: int) -> int:
        """Ask for *need_bytes*; return what it says that it freed, 0 if it failed."""
        budget = self.budget()
        if budget is None:
            return 0
        outer, _reclaiming.active = _reclaiming.active, True
        try:
            freed_bytes = parse_size(self.function(need_bytes), what="what a reclaimer freed")
        except Exception:
            _log.exception("the reclaimer %r of budget %r failed; the next one is asked", self.function, budget.path)
            freed_bytes = 0
        finally:
            _reclaiming.active = outer
        budget._count_reclaim(freed_bytes)
        return freed_bytes


class _Reclaiming(threading.local):
    """Whether this thread is inside a reclaimer: what it reserves there must not ask reclaimers again."""

    active = False


_reclaiming = _Reclaiming()

# Guards the shape of all trees: who is whose child, who reclaims for whom. One for all, because it is held for a few
# operations on dicts and never while user code runs; reentrant, because the collector may run __del__ inside it.
_shape_lock = threading.RLock()


def _renew_lock_after_fork() -> None:
    global _shape_lock
    _shape_lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock_after_fork)


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

    __slots__ = (
        "__weakref__",
        "_abort_reason",
        "_children",
        "_entered",
        "_limit_bytes",
        "_reclaimed_bytes",
        "_reclaimers",
        "_reclaims",
        "_refusals",
        "_registry",
        "_registry_prune_at",
        "_soft_callbacks",
        "_soft_limit_bytes",
        "name",
        "parent",
    )

    def __init__(self, limit: Size | None = None, *, name: str = "budget", soft_limit: Size | None = None) -> None:
        self._open(None, name, limit, soft_limit)

    def _open(self, parent: Budget | None, name: str, limit: Size | None, soft_limit: Size | None) -> None:
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"a budget's name must be a string, not empty and without '/': {name!r}")
        limit_bytes = _optional_size(limit, "a limit")
        soft_limit_bytes = _optional_size(soft_limit, "a soft limit")
        super().__init__(parent, _native_limit(limit_bytes))
        self._set_soft_limit(_native_limit(soft_limit_bytes))
        self._limit_bytes = limit_bytes
        self._soft_limit_bytes = soft_limit_bytes
        self.name = name
        self.parent = parent
        self._abort_reason: str | None = None
        self._children: dict[str, weakref.ref[Budget]] = {}
        self._entered = 0  # with blocks that are in it
        self._reclaimers: tuple[_ReclaimerEntry, ...] = ()
        self._registry: list[weakref.ref[_ReclaimerEntry]] = []  # of the whole tree; used at the root only
        self._registry_prune_at = _REGISTRY_MIN
        self._soft_callbacks: tuple[SoftLimitCallback, ...] = ()
        self._refusals = self._reclaims = self._reclaimed_bytes = 0

    # ------------------------------------------------------------------------------------------------ the tree

    def child(self, name: str, limit: Size | None = None, *, soft_limit: Size | None = None) -> Budget:
        """Return a new budget below this one, which bounds it too.

        Args:
            name: Unique among the children that are open.
            limit: As of Budget; None: bounded by its ancestors only.
            soft_limit: As of Budget.

        Raises:
            ValueError: As Budget; or the name is taken; or the tree would be deeper than 64.
            BudgetClosedError: This budget was closed.
            BudgetAbortedError: It, or an ancestor, was aborted.
        """
        self._raise_if_unusable()
        budget = Budget.__new__(Budget)
        budget._open(self, name, limit, soft_limit)
        with _shape_lock:
            taken = self._children.get(name)
            sibling = taken() if taken else None
            if sibling is None or sibling.closed:
                self._children[name] = weakref.ref(budget)
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
        with _shape_lock:
            references = list(self._children.values())  # in one step: the collector may close a child between two
        found = [reference() for reference in references]
        return tuple(child for child in found if child is not None and not child.closed)

    def _upwards(self) -> Iterator[Budget]:
        budget: Budget | None = self
        while budget is not None:
            yield budget
            budget = budget.parent

    def _holders(self) -> Iterator[tuple[int, Budget]]:
        """Yield the budgets at and below this one that hold something themselves, each after its own_bytes."""
        pending: list[Budget] = [self]
        while pending:
            budget = pending.pop()
            children = budget.children
            if own_bytes := budget._own_bytes(children):
                yield own_bytes, budget
            pending += children

    # ------------------------------------------------------------------------------------------------ limits

    @property
    def limit_bytes(self) -> int | None:
        """The limit, None for none of its own. May be set at any time, to a size.

        Lowering it below what is used asks reclaimers for the difference; what they cannot give stays charged, and
        the budget refuses until enough was released.
        """
        return self._limit_bytes

    @limit_bytes.setter
    def limit_bytes(self, limit: Size | None) -> None:
        limit_bytes = _optional_size(limit, "a limit")
        with _shape_lock:  # else an abort that comes between is undone
            self._limit_bytes = limit_bytes
            if self._abort_reason is None:
                self._set_limit(_native_limit(limit_bytes))
        if limit_bytes is not None and (over_bytes := self.used_bytes - limit_bytes) > 0:
            self.reclaim(over_bytes)

    @property
    def soft_limit_bytes(self) -> int | None:
        """The soft limit, None for none. May be set at any time, to a size."""
        return self._soft_limit_bytes

    @soft_limit_bytes.setter
    def soft_limit_bytes(self, soft_limit: Size | None) -> None:
        soft_limit_bytes = _optional_size(soft_limit, "a soft limit")
        with _shape_lock:
            self._soft_limit_bytes = soft_limit_bytes
            self._set_soft_limit(_native_limit(soft_limit_bytes))

    def on_soft_limit(self, callback: SoftLimitCallbackT) -> SoftLimitCallbackT:
        """Have *callback* called with this budget each time that used_bytes passes the soft limit.

        Once a crossing: it is armed again when used_bytes has fallen to nine tenths of the soft limit. It runs in the
        thread whose reservation passed it, after that stands; a failure is logged, but KeyboardInterrupt and its kind
        pass through reserve(), which then holds nothing. Usable as a decorator.
        """
        with _shape_lock:
            self._soft_callbacks = (*self._soft_callbacks, callback)
        return callback

    def _soft_limit_passed(self) -> None:
        """Called from C when a charge to this budget passed a soft limit, here or above."""
        for budget in self._upwards():
            if budget._take_soft_passed():
                for callback in budget._soft_callbacks:
                    try:
                        callback(budget)
                    except Exception:
                        _log.exception("the soft limit callback %r of budget %r failed", callback, budget.path)

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

    # What follows is called from C, by name, when an exact int was not taken at once.

    def _reserve(self, size: Size) -> Reservation:
        size_bytes = parse_size(size, what="a reservation")
        reservation: Reservation = self._obtain_or_raise(size_bytes, lambda: self._attempt(size_bytes))
        return reservation

    def _try_reserve(self, size: Size) -> Reservation | None:
        size_bytes = parse_size(size, what="a reservation")
        reservation, refused_by = self._obtain(size_bytes, lambda: self._attempt(size_bytes))
        return None if refused_by else reservation

    def _grow(self, reservation: Reservation, size: Size) -> None:
        size_bytes = parse_size(size, what="the growth of a reservation")
        self._obtain_or_raise(size_bytes, lambda: reservation._grow_once(size_bytes))

    def _try_grow(self, reservation: Reservation, size: Size) -> bool:
        size_bytes = parse_size(size, what="the growth of a reservation")
        _, refused_by = self._obtain(size_bytes, lambda: reservation._grow_once(size_bytes))
        return refused_by is None

    def _shrink(self, reservation: Reservation, size: Size) -> None:
        reservation.shrink(parse_size(size, what="the shrinking of a reservation"))

    def _resize(self, reservation: Reservation, size: Size) -> None:
        size_bytes = parse_size(size, what="the size of a reservation")
        more_bytes = max(0, size_bytes - reservation.size_bytes)
        # From its size at each attempt: a reclaimer may well shrink this very reservation.
        self._obtain_or_raise(more_bytes, lambda: reservation._resize_once(size_bytes))

    def _split(self, reservation: Reservation, size: Size) -> Reservation:
        return reservation.split(parse_size(size, what="a part of a reservation"))

    def _receive(self, reservation: Reservation) -> None:
        self._obtain_or_raise(reservation.size_bytes, lambda: reservation._move_once(self))

    def _obtain_or_raise(self, size_bytes: int, attempt: Callable[[], Any]) -> Any:
        result, refused_by = self._obtain(size_bytes, attempt)
        if refused_by is not None:
            raise self._exceeded(size_bytes, refused_by)
        return result

    def _obtain(self, size_bytes: int, attempt: Callable[[], Any]) -> tuple[Any, Budget | None]:
        """Make *attempt* succeed if reclaimers can: its result, and None or the budget that refuses.

        *attempt* returns an int, how many levels up it was refused, or anything else on success.
        """
        stalled: set[_ReclaimerEntry] = set()
        for _ in range(_ROUNDS_MAX):
            asked = False
            outcome = attempt()
            if type(outcome) is not int:
                return outcome, None
            self._raise_if_unusable()
            refused_by = self._at(outcome)
            for entry in refused_by._reclaimers_for(self, size_bytes):
                if entry in stalled:
                    continue
                asked = True
                if not entry.run(refused_by._shortfall_bytes(size_bytes)):
                    stalled.add(entry)
                outcome = attempt()
                if type(outcome) is not int:
                    return outcome, None
            if not asked:
                break
        with _shape_lock:
            refused_by._refusals += 1
        return None, refused_by

    def _at(self, level: int) -> Budget:
        """Return the budget *level* levels up."""
        budget = self
        for _ in range(level):
            assert budget.parent is not None
            budget = budget.parent
        return budget

    def _shortfall_bytes(self, size_bytes: int) -> int:
        return max(1, self.used_bytes + size_bytes - _native_limit(self._limit_bytes))

    def _raise_if_unusable(self) -> None:
        for budget in self._upwards():
            if budget._abort_reason is not None:
                raise BudgetAbortedError(f"budget {budget.path!r} was aborted: {budget._abort_reason}")
            if budget.closed:
                raise BudgetClosedError(f"budget {budget.path!r} was closed")

    def _exceeded(self, requested_bytes: int, refused_by: Budget) -> BudgetExceededError:
        limit_bytes = _native_limit(refused_by._limit_bytes)
        # It was less than what was asked for, whatever other threads have released since.
        available_bytes = max(0, min(limit_bytes - refused_by.used_bytes, requested_bytes - 1))
        consumers = refused_by.top_consumers()
        held = ", ".join(f"{path} {format_size(used_bytes)}" for path, used_bytes in consumers) or "nobody"
        remedy = (
            "ask for less, or raise the limit"
            if requested_bytes > limit_bytes
            else "release reservations, raise the limit, or register a reclaimer"
        )
        return BudgetExceededError(
            f"budget {self.path!r} cannot reserve {format_size(requested_bytes)}: {refused_by.path!r} has "
            f"{format_size(available_bytes)} of {format_size(limit_bytes)} left; held by {held}. To help: {remedy}.",
            requested_bytes=requested_bytes,
            budget=self,
            refused_by=refused_by,
            available_bytes=available_bytes,
            top_consumers=consumers,
        )

    # ------------------------------------------------------------------------------------------------ reclaiming

    @overload
    def reclaimer(self, function: ReclaimerT, *, priority: int = 0) -> ReclaimerT: ...
    @overload
    def reclaimer(self, function: None = None, *, priority: int = 0) -> Callable[[ReclaimerT], ReclaimerT]: ...

    def reclaimer(
        self, function: ReclaimerT | None = None, *, priority: int = 0
    ) -> ReclaimerT | Callable[[ReclaimerT], ReclaimerT]:
        """Register a function that makes room: ``fn(need_bytes) -> freed_bytes``.

        It is called when a reservation meets a limit at or above this budget, in the thread that asks, with no lock
        held. It frees what it can, at best *need_bytes*, releases the reservations for it, and returns how much that
        was. The lowest priority is asked first, among equals the budget that uses most, the requester's own last.
        What it reserves itself is refused without asking reclaimers again. If it fails, that is logged and the next
        one is asked.

        Usable as a decorator, bare or with a priority. Returns the function.
        """
        if function is None:
            return lambda decorated: self.reclaimer(decorated, priority=priority)
        entry = _ReclaimerEntry(self, function, priority)
        *_, root = self._upwards()
        alive: list[_ReclaimerEntry] = []  # outlives the lock: the last reference to somebody's function may be here
        with _shape_lock:
            self._reclaimers = (*self._reclaimers, entry)
            root._registry.append(weakref.ref(entry))
            if len(root._registry) >= root._registry_prune_at:
                alive += [known for reference in root._registry if (known := reference()) is not None]
                root._registry = [weakref.ref(known) for known in alive]
                root._registry_prune_at = max(_REGISTRY_MIN, 2 * len(alive))
        return function

    def remove_reclaimer(self, function: Reclaimer) -> None:
        """Ask *function* no more.

        Raises:
            ValueError: It is not registered here.
        """
        while True:
            before = self._reclaimers
            rest = tuple(entry for entry in before if entry.function != function)
            if len(rest) == len(before):
                raise ValueError(f"{function!r} is not a reclaimer of budget {self.path!r}")
            with _shape_lock:
                if self._reclaimers is before:
                    self._reclaimers = rest
                    return

    def reclaim(self, need: Size) -> int:
        """Ask the reclaimers of this budget and of those below it to free *need* bytes.

        Returns:
            The bytes by which used_bytes fell.
        """
        need_bytes = parse_size(need, what="what is to be reclaimed")
        before_bytes = self.used_bytes
        for entry in self._reclaimers_for(None, 0):
            missing_bytes = need_bytes - (before_bytes - self.used_bytes)
            if missing_bytes <= 0:
                break
            entry.run(missing_bytes)
        return max(0, before_bytes - self.used_bytes)

    def _reclaimers_for(self, requester: Budget | None, size_bytes: int) -> list[_ReclaimerEntry]:
        """Return the reclaimers at and below this budget, in the order in which to ask them."""
        if _reclaiming.active or size_bytes > _native_limit(self._limit_bytes):
            return []
        *_, root = self._upwards()
        ranked = []
        for known in tuple(root._registry):
            entry = known()
            budget = entry.budget() if entry else None
            if entry is None or budget is None or budget.closed:
                continue
            if self is root or any(above is self for above in budget._upwards()):
                ranked.append(((budget is requester, entry.priority, -budget.used_bytes), entry))
        ranked.sort(key=lambda pair: pair[0])
        return [entry for _, entry in ranked]

    def _count_reclaim(self, freed_bytes: int) -> None:
        with _shape_lock:
            self._reclaims += 1
            self._reclaimed_bytes += freed_bytes

    # ------------------------------------------------------------------------------------------------ telling

    @property
    def own_bytes(self) -> int:
        """The part of used_bytes that is not in a child."""
        return self._own_bytes(self.children)

    def _own_bytes(self, children: tuple[Budget, ...]) -> int:
        return max(0, self.used_bytes - sum(child.used_bytes for child in children))

    def top_consumers(self, count: int = _TOP_CONSUMERS) -> tuple[Consumer, ...]:
        """Return the *count* largest holders among this budget and those below it, each with its own part."""
        largest = sorted(self._holders(), key=lambda holder: -holder[0])[:count]
        return tuple(Consumer(budget.path, own_bytes) for own_bytes, budget in largest)

    def stats(self) -> BudgetStats:
        """Return what this budget holds and did."""
        return self._stats(self.path, self.children)

    def _stats(self, path: str, children: tuple[Budget, ...]) -> BudgetStats:
        return BudgetStats(
            path=path,
            used_bytes=self.used_bytes,
            own_bytes=self._own_bytes(children),
            peak_bytes=self.peak_bytes,
            limit_bytes=self.limit_bytes,
            soft_limit_bytes=self.soft_limit_bytes,
            headroom_bytes=self.headroom_bytes,
            refusals=self._refusals,
            reclaims=self._reclaims,
            reclaimed_bytes=self._reclaimed_bytes,
        )

    def report(self) -> BudgetReport:
        """Return the tree at and below this budget, top consumers first; print() it, or take its as_dict()."""
        return self._report(self.path)

    def _report(self, path: str) -> BudgetReport:
        children = self.children
        reports = [child._report(f"{path}/{child.name}") for child in children]
        reports.sort(key=lambda report: -report.stats.used_bytes)
        return BudgetReport(self.name, self._stats(path, children), tuple(reports))

    def __repr__(self) -> str:
        limit = "no limit" if self._limit_bytes is None else f"limit {format_size(self._limit_bytes)}"
        state = ", closed" if self.closed else ", aborted" if self._abort_reason is not None else ""
        return f"<Budget {self.path!r} {format_size(self.used_bytes)} used, {limit}{state}>"

    # ------------------------------------------------------------------------------------------------ the end

    def abort(self, reason: str) -> None:
        """Refuse every later reservation in this budget and below: BudgetAbortedError with *reason*.

        What is reserved stays so until it is released. There is no way back.
        """
        reason = str(reason)
        with _shape_lock:
            self._abort_reason = reason
            self._set_limit(_REFUSE_ALL)

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
        left_bytes = sum(child._close_tree() for child in self.children) + self._close()
        with _shape_lock:
            _dropped, self._reclaimers = self._reclaimers, ()  # they go when the lock is free again
            siblings = self.parent._children if self.parent else {}
            mine = siblings.get(self.name)
            if mine is not None and mine() in (self, None):
                del siblings[self.name]
        return left_bytes

    def __enter__(self) -> Self:
        self._raise_if_unusable()
        with _shape_lock:
            self._entered += 1
        _current.set(_Scope(self, _current.get()))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if scope := _current.get():
            _current.set(scope.without(self))
        with _shape_lock:
            self._entered -= 1
            last = self._entered == 0
        if last:
            try:
                self._close_and_tell()
            except ResourceWarning:  # where warnings are errors; the error that ends the block says more
                if error is None:
                    raise

    def __del__(self) -> None:
        # Only what was charged without a reservation can be left: a reservation or a child keeps its budget alive.
        if hasattr(self, "_refusals"):  # else __init__ failed
            self._close_and_tell()

    def __reduce__(self) -> Any:
        raise TypeError("a Budget belongs to one process: it cannot be pickled or copied")


def current_budget() -> Budget | None:
    """Return the budget whose ``with`` block this code runs in, None outside of any.

    Context-local: asyncio tasks and asyncio.to_thread inherit it, new threads do not.
    """
    scope = _current.get()
    return scope.budget if scope else None


def _optional_size(size: Size | None, what: str) -> int | None:
    return None if size is None else parse_size(size, what=what)


def _native_limit(limit_bytes: int | None) -> int:
    return MAX_SIZE_BYTES if limit_bytes is None else limit_bytes


__all__ = ["Budget", "BudgetReport", "BudgetStats", "Consumer", "Reservation", "current_budget"]
