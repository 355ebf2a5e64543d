"""What goes from one process to another, and into files, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Self


@dataclass(frozen=True)
class Plain:
    """Values that can be written down and read again."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        return cls(**{field.name: plain[field.name] for field in fields(cls)})
