"""What the owner of a snapshot is told when there is no image: why, what it means for the file, what would help."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

from memsafe.errors import OOMKilledError, SnapshotFailedError, SnapshotOverrunError
from memsafe.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from memsafe.snapshot.atomic import StrPath
    from memsafe.snapshot.reports import Raised


class Verdicts:
    """Words the errors of one snapshot. Each says which file is at the path, as that is what its owner goes on with."""

    def __init__(self, path: StrPath, max_copy_bytes: int | None, is_in_place: Callable[[], bool]) -> None:
        """Speak of the snapshot of *path*; *is_in_place* says whether the new file is there already."""
        self._path = os.fsdecode(path)
        self._max_copy_bytes = max_copy_bytes
        self._is_in_place = is_in_place

    # Of a snapshot that was ended, and of one that could not be finished.

    def ended(self, what: str, child_traceback: str | None = None) -> SnapshotFailedError:
        """It was ended from here, because of *what*."""
        return SnapshotFailedError(self._ended(what), child_traceback=child_traceback)

    def overrun(self, what: str, copy_bytes: int) -> SnapshotOverrunError:
        """It was ended because of *what* its copies took, *copy_bytes* when last measured."""
        return SnapshotOverrunError(self._ended(what), copy_bytes=copy_bytes, max_copy_bytes=self._max_copy_bytes)

    def shortage(self, what: str, copy_bytes: int | None) -> SnapshotOverrunError:
        """It was ended because memory ran short; its copies may never have been measured."""
        return self.overrun(f"{what}; {_copies(copy_bytes)}", copy_bytes or 0)

    def not_begun(self) -> SnapshotFailedError:
        """There never was a child."""
        return SnapshotFailedError(f"the snapshot of {self._path} was not begun")

    def not_committed(self, cause: OSError) -> SnapshotFailedError:
        """The image could not be put in place for good."""
        if self._is_in_place():
            return self.ended(f"its folder could not be synced: {cause}")
        return SnapshotFailedError(f"the image is complete, but could not be put at {self._path}: {cause}")

    def _ended(self, what: str) -> str:
        if self._is_in_place():
            return f"the new image is at {self._path}, but may not survive a power cut: {what}"
        return f"the snapshot of {self._path} was ended, the file there is as it was: {what}"

    # Of a child that ended by itself.

    def raised(self, report: Raised) -> SnapshotFailedError:
        """*write* raised, or what follows it in the child."""
        return SnapshotFailedError(
            self._failed(f"write raised {report.type}: {report.message}\n\nIn the child:\n{report.traceback}"),
            child_type=report.type,
            child_message=report.message,
            child_traceback=report.traceback,
        )

    def shot(self, evidence: str, copy_bytes: int | None) -> OOMKilledError:
        """The OOM killer chose it, as *evidence* says."""
        return OOMKilledError(
            self._failed(
                f"the kernel's OOM killer ended the child ({evidence}); {_copies(copy_bytes)}. Give the group more "
                "memory, or pass max_copy"
            )
        )

    def died(self, status: os.waitid_result | None) -> SnapshotFailedError:
        """Its *status* is all that is known; None: not even that."""
        return SnapshotFailedError(self._failed(_how_it_ended(status)))

    def _failed(self, what: str) -> str:
        return f"the snapshot of {self._path} failed, the file there is as it was: {what}"


def _copies(copy_bytes: int | None) -> str:
    if copy_bytes is None:
        return "its copies were not measured yet"
    return f"{format_size(copy_bytes)} of copies when last measured"


def where_it_stood(stack: str, witnesses: str) -> str:
    """Say of a child that waits where it does, and who may hold what it waits for; either may be "", for unknown."""
    where = f"\n\nWhere the child stood:\n{stack}" if stack else ""
    if witnesses:
        where += (
            "\n\nThe child has only the thread that forked; what another one held then is held there for ever. In this "
            f"process there are {witnesses}"
        )
    return where


def _how_it_ended(status: os.waitid_result | None) -> str:
    if status is None:
        return "the child ended without a word, and something else in this process took its exit status"
    if status.si_code == os.CLD_EXITED:
        return f"the child exited with status {status.si_status} before the image was complete (os._exit in write?)"
    with suppress(ValueError):
        return f"the child was ended by {signal.Signals(status.si_status).name}"
    return f"the child was ended by signal {status.si_status}"
