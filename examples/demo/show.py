"""What the demo says: phases, promises as they are kept or broken, and one table at the end."""

from __future__ import annotations

import shutil
import textwrap
import time
from dataclasses import dataclass, field

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:  # the extra `cli` has it; plain lines say the same
    Console = None  # type: ignore[assignment, misc]


@dataclass(frozen=True, slots=True)
class Promise:
    """One thing that must be so, and whether it was."""

    phase: str
    name: str
    kept: bool
    detail: str


@dataclass(slots=True)
class Report:
    """Collects the promises and prints as it goes."""

    promises: list[Promise] = field(default_factory=list)
    _numbers: dict[str, str] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)
    _phase: str = ""
    _began: float = field(default_factory=time.monotonic)
    _width: int = field(default_factory=lambda: shutil.get_terminal_size((120, 0)).columns)
    _console: Console | None = field(init=False)

    def __post_init__(self) -> None:
        self._console = None if Console is None else Console(highlight=False, width=self._width)

    def phase(self, name: str, title: str) -> None:
        """Begin a phase: *name* stands in the table, *title* says what is about to be shown."""
        self._end_phase()
        self._phase, self._numbers[name] = name, ""
        self._seconds[name] = -time.monotonic()
        self._line("")
        self._line(f"{name.upper():<10}{title}", "bold cyan")

    def say(self, text: str) -> None:
        """Print one line of what is going on."""
        self._line(f"  · {text}", "dim")

    def promise(self, name: str, kept: object, detail: str = "") -> bool:
        """Note whether a promise was kept; the demo goes on, and fails at its end if it was not."""
        promise = Promise(self._phase, name, bool(kept), detail)
        self.promises.append(promise)
        mark, style = ("✓", "green") if promise.kept else ("✗", "bold red")
        self._line(f"  {mark} {name}" + (f": {detail}" if detail else ""), style)
        return promise.kept

    def numbers(self, text: str) -> None:
        """Say in one line what the phase came to; it stands in the table."""
        self._numbers[self._phase] = text

    def warn(self, text: str) -> None:
        """Print a line that should not be missed."""
        self._line(text, "bold yellow")

    def table(self) -> None:
        """Print what happened, a line a phase, then each promise that was broken."""
        self._end_phase()
        self._line("")
        if self._console:
            self._console.print(self._rich_table())
        else:
            for phase, numbers in self._numbers.items():
                print(f"{phase:<10} {self._seconds[phase]:5.1f} s  {self._tally(phase):<9} {numbers}")
        broken = [promise for promise in self.promises if not promise.kept]
        for promise in broken:
            self._line(f"BROKEN in {promise.phase}: {promise.name}: {promise.detail}", "bold red")
        kept = f"{len(self.promises) - len(broken)} of {len(self.promises)} promises kept"
        self._line(f"{kept} in {time.monotonic() - self._began:.0f} s", "bold red" if broken else "bold green")

    def _rich_table(self) -> Table:
        table = Table("phase", "what happened", title="memsafe demo", title_justify="left")
        table.add_column("took", justify="right", no_wrap=True)
        table.add_column("promises", justify="right", no_wrap=True)
        for phase, numbers in self._numbers.items():
            clean = all(promise.kept for promise in self.promises if promise.phase == phase)
            took = f"{self._seconds[phase]:.1f} s"
            table.add_row(phase, numbers, took, self._tally(phase), style=None if clean else "red")
        return table

    @property
    def all_kept(self) -> bool:
        """Whether every promise made so far was kept."""
        return all(promise.kept for promise in self.promises)

    def _tally(self, phase: str) -> str:
        mine = [promise.kept for promise in self.promises if promise.phase == phase]
        return f"{sum(mine)} of {len(mine)}" if mine else ""

    def _end_phase(self) -> None:
        if self._phase:
            self._seconds[self._phase] += time.monotonic()
            self._phase = ""

    def _line(self, text: str, style: str | None = None) -> None:
        text = "\n".join(
            textwrap.fill(line, self._width - 1, subsequent_indent="    ", break_on_hyphens=False)
            for line in text.split("\n")
        )
        if self._console:
            self._console.print(text, style=style, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)
