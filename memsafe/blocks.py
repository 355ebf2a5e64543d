"""The with blocks that a piece of code is in."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class _Block(NamedTuple, Generic[T]):
    """A block of *owner* and the one around it."""

    owner: T
    outer: _Block[T] | None

    def without(self, owner: T) -> _Block[T] | None:
        if self.owner is owner:
            return self.outer
        return self._replace(outer=self.outer and self.outer.without(owner))


class Blocks(Generic[T]):
    """Whose with blocks the code is in that asks. Kept in the context alone: blocks of other tasks are not seen."""

    __slots__ = ("_innermost",)

    def __init__(self, name: str) -> None:
        """Be in none; *name* is what a debugger shows."""
        self._innermost: ContextVar[_Block[T] | None] = ContextVar(name, default=None)

    def innermost(self) -> T | None:
        """Return the owner of the innermost block; None: the code is in none."""
        block = self._innermost.get()
        return block and block.owner

    def enter(self, owner: T) -> None:
        """Begin a block, inside of the others."""
        self._innermost.set(_Block(owner, self._innermost.get()))

    def leave(self, owner: T) -> T | None:
        """End the innermost block of *owner*, which need not be the last entered: generators end in any order.

        Returns:
            As innermost(), for what follows the block.
        """
        block = self._innermost.get()
        if block is not None:
            self._innermost.set(block.without(owner))
        return self.innermost()
