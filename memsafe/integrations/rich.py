"""Snapshots on rich's progress bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


class SnapshotBar:
    """An ``on_progress`` that moves a task of a rich.progress.Progress. Thread-safe, as that is.

    Example:
        >>> from rich.progress import Progress
        >>> with Progress(disable=True) as progress:
        ...     bar = SnapshotBar(progress, "dump.db")
        ...     bar(3, 4)  # as fork_snapshot(..., on_progress=bar) does
        ...     progress.tasks[0].percentage
        75.0
    """

    def __init__(self, progress: Progress, description: str = "snapshot") -> None:
        """Add a task of that *description* to *progress*; its length is known with the first report."""
        self._progress = progress
        self._task = progress.add_task(description, total=None)

    def __call__(self, done: int, total: int) -> None:
        """Show that *done* of *total* is written."""
        self._progress.update(self._task, completed=done, total=total)


__all__ = ["SnapshotBar"]
