"""What the parts of a made-up machine have in common: settings, and files that show them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from memsafe.sizes import Size, parse_size

if TYPE_CHECKING:
    from typing import Self

    from memsafe.testing.kernel import FakeKernel

PID = 4242  # of the made-up process


class Setting:
    """A number of a made-up part of the machine; setting it rewrites the files that show it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, part: Part, owner: type) -> int | None:
        return part._get(self._name)

    def __set__(self, part: Part, value: Size | None) -> None:
        part._values[self._name] = None if value is None else self._checked(value)
        part._render()

    def _checked(self, value: Size) -> int:
        return parse_size(value, what=self._name)


class Number(Setting):
    """As Setting, for what is not a size."""

    def _checked(self, value: Size) -> int:
        number = int(value)
        if number < 0:
            raise ValueError(f"{self._name} must not be negative: {value}")
        return number


class Signed(Setting):
    """As Number, for what may be negative."""

    def _checked(self, value: Size) -> int:
        return int(value)


class Part(ABC):
    """Something of the machine that has settings."""

    _defaults: ClassVar[dict[str, int | None]] = {}

    def __init__(self, kernel: FakeKernel) -> None:
        self._kernel = kernel
        self._tree = kernel._tree
        self._values: dict[str, int | None] = dict(self._defaults)

    def set(self, **settings: Any) -> Self:
        """Change several settings in one go, or none; returns itself.

        Raises:
            TypeError: There is no such setting.
            ValueError: A value makes no sense.
        """
        values: dict[str, int | None] = {}
        for name, value in settings.items():
            setting = next((vars(kind)[name] for kind in type(self).__mro__ if name in vars(kind)), None)
            if not isinstance(setting, Setting):
                raise TypeError(f"{type(self).__name__} has no setting {name!r}")
            values[name] = None if value is None else setting._checked(value)
        self._values.update(values)
        self._render()
        return self

    def _get(self, name: str) -> int | None:
        return self._values.get(name)

    @abstractmethod
    def _render(self) -> None:
        """Write the files that the settings are in."""


def labelled(sizes: dict[str, int | None]) -> str:
    return "".join(
        f"{label}:\t{size_bytes // 1024:8} kB\n" for label, size_bytes in sizes.items() if size_bytes is not None
    )


def stalls(some: float, full: float, some_us: int, full_us: int) -> str:
    return "".join(
        f"{kind} avg10={percent:.2f} avg60={percent:.2f} avg300={percent:.2f} total={total_us}\n"
        for kind, percent, total_us in (("some", some, some_us), ("full", full, full_us))
    )
