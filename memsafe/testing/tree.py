"""The folder that stands for "/" of a made-up machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


class Tree:
    """Files that show settings: each changes, appears or vanishes in one moment.

    Args:
        root: The folder; it is made where it is not there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self._shown: dict[str, str | None] = {}

    def at(self, path: str) -> Path:
        """Return where the file at *path* of the machine is."""
        return self.root / path.lstrip("/")

    def write(self, path: str, data: bytes) -> None:
        """Have a file hold *data*, whatever it should show."""
        file = self.at(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink() or not file.is_file():
            aside = self._aside(data)
            aside.replace(file)
        else:
            _rewrite(file, data)

    def show(self, path: str, text: str | None) -> None:
        """Write a file that shows settings, None for no file, if what it shows has changed."""
        if path in self._shown and self._shown[path] == text:
            return
        if text is None:
            self.at(path).unlink(missing_ok=True)
        else:
            self.write(path, os.fsencode(text))
        self._shown[path] = text

    def show_again(self, path: str, text: str | None) -> None:
        """As show(), also where something else was written over it since."""
        self._shown.pop(path, None)
        self.show(path, text)

    def repair(self, path: str) -> None:
        """Have a file show again what it should.

        Raises:
            KeyError: Nothing is shown there.
        """
        self.show_again(path, self._shown[path])

    def show_number(self, path: str, value: int | None) -> None:
        """Have a file hold a number, None for no file."""
        self.show(path, None if value is None else f"{value}\n")

    def show_link(self, path: str, target: str | None) -> None:
        """Have a symbolic link lead to *target*, None for no link."""
        link = self.at(path)
        link.unlink(missing_ok=True)
        if target is not None:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)

    def add_folder(self, path: str, texts: dict[str, str | None]) -> None:
        """Have a folder with its files appear in one moment."""
        folder = self.at(path)
        if folder.exists():
            for name, text in texts.items():
                self.show(f"{path}/{name}", text)
            return
        aside = Path(tempfile.mkdtemp(prefix=".new-", dir=self.root))
        aside.chmod(0o755)
        for name, text in texts.items():
            if text is not None:
                (aside / name).write_text(text)
            self._shown[f"{path}/{name}"] = text
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside.rename(folder)

    def remove_folder(self, path: str) -> None:
        """Have a folder with its files vanish in one moment."""
        folder = self.at(path)
        if folder.exists():
            aside = Path(tempfile.mkdtemp(prefix=".old-", dir=self.root))
            folder.rename(aside / "gone")
            shutil.rmtree(aside)
        for shown in [shown for shown in self._shown if shown.startswith(path.rstrip("/") + "/")]:
            del self._shown[shown]

    def _aside(self, data: bytes) -> Path:
        """Return a new file out of sight, to be moved to its place when it is whole."""
        descriptor, name = tempfile.mkstemp(prefix=".new-", dir=self.root)
        with open(descriptor, "wb") as file:
            file.write(data)
        return Path(name)


def _rewrite(file: Path, data: bytes) -> None:
    """Replace what *file* holds in place, as the kernel does: a descriptor that was kept open sees the change.

    Newlines, which every reader passes over, fill what the old and the new text differ in length: between the calls
    there is never half a number.
    """
    with open(file, "r+b", buffering=0) as raw:
        before_bytes = os.fstat(raw.fileno()).st_size
        if len(data) > before_bytes:
            os.pwrite(raw.fileno(), b"\n" * (len(data) - before_bytes), before_bytes)
        os.pwrite(raw.fileno(), data.ljust(before_bytes, b"\n"), 0)
        os.ftruncate(raw.fileno(), len(data))
