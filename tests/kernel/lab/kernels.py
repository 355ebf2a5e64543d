"""Debian's cloud kernels, fetched from its mirror into .build/kernels/: unpacked there, never installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parents[3]
CACHE = PROJECT / ".build" / "kernels"

_MIRROR = os.environ.get("MEMSAFE_DEBIAN_MIRROR", "http://deb.debian.org")
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_META_PACKAGE = "linux-image-cloud-amd64"

# The suites in which to look: the stable distribution's kernel, and those of its successor and that one's backports.
_SUITES = {
    "bookworm": ["debian bookworm", "debian-security bookworm-security"],
    "trixie": ["debian trixie", "debian-security trixie-security"],
    "trixie-backports": ["debian trixie-backports"],
}
DEFAULT_SUITES = ("bookworm", "trixie-backports")


class UnavailableError(Exception):
    """A kernel, or a program that boots it, is not there; the message says how to get it."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that can be booted: its name as "6.1", its release as uname tells it, its image."""

    name: str
    release: str
    image: Path


def names() -> list[str]:
    """Return the names of the kernels to test on when none is asked for, oldest first; fetches what is missing."""
    return sorted({of_suite(suite).name for suite in DEFAULT_SUITES}, key=_version)


def find(name: str) -> Kernel:
    """Return the kernel of a name ("6.1"), of a suite ("trixie"), or an image given by its path.

    Raises:
        UnavailableError: No suite has it, or it could not be fetched.
    """
    if "/" in name:
        image = Path(name)
        if not image.is_file():
            raise UnavailableError(f"there is no kernel image {name}")
        release = image.name.partition("-")[2] or image.name
        return Kernel(_short(release), release, image)
    if name in _SUITES:
        return of_suite(name)
    cached = [kernel for suite in _SUITES if (kernel := _cached(suite))]
    for kernel in cached:
        if kernel.name == name:
            return kernel
    for suite in _SUITES:
        kernel = of_suite(suite)
        if kernel.name == name:
            return kernel
    has = ", ".join(f"{of_suite(suite).name} in {suite}" for suite in _SUITES)
    raise UnavailableError(f"no kernel {name}: there is {has}, or give the path of an image")


def of_suite(suite: str, *, refresh: bool = False) -> Kernel:
    """Return the kernel of a suite: the one fetched before, unless it is to be looked for again.

    Raises:
        UnavailableError: It is not here and could not be fetched.
    """
    kernel = None if refresh else _cached(suite)
    if kernel is None:
        _fetch(suite)
        kernel = _cached(suite)
    if kernel is None:
        raise UnavailableError(f"the package of {suite} holds no kernel image")
    return kernel


def _cached(suite: str) -> Kernel | None:
    images = sorted((CACHE / suite).glob("vmlinuz-*"))
    if not images:
        return None
    release = images[-1].name.removeprefix("vmlinuz-")
    return Kernel(_short(release), release, images[-1])


def _short(release: str) -> str:
    numbers = re.match(r"\d+\.\d+", release)
    return numbers[0] if numbers else release


def _version(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _fetch(suite: str) -> None:
    """Fetch the newest kernel of *suite* with apt, whose own state and sources are left alone."""
    for program in ("apt-get", "apt-cache", "dpkg"):
        if shutil.which(program) is None:
            raise UnavailableError(
                f"kernels are fetched with {program}: on another distribution, pass --kernel=PATH/vmlinuz"
            )
    folder = CACHE / suite
    shutil.rmtree(folder, ignore_errors=True)
    apt = _Apt(folder / "apt", suite)
    apt.update()
    packages = [name for name in apt.closure(_META_PACKAGE) if re.match(r"linux-(image|binary)-\d", name)]
    unpacked = folder / "unpacked"
    for package in packages:
        subprocess.run(["dpkg", "-x", apt.download(package), unpacked], check=True)
    for image in [*unpacked.glob("boot/vmlinuz-*"), *unpacked.glob("usr/lib/modules/*/vmlinuz")]:
        release = image.parent.name if image.name == "vmlinuz" else image.name.removeprefix("vmlinuz-")
        # A name is given only to what is whole.
        shutil.move(image, folder / f"vmlinuz-{release}")
    shutil.rmtree(unpacked)
    shutil.rmtree(folder / "apt")


class _Apt:
    """apt with sources, lists and caches of its own."""

    def __init__(self, folder: Path, suite: str) -> None:
        self._folder = folder
        for part in ("lists/partial", "cache/archives/partial"):
            (folder / part).mkdir(parents=True)
        signed = f"[signed-by={_KEYRING}] " if Path(_KEYRING).exists() else ""
        sources = "".join(
            f"deb {signed}{_MIRROR}/{archive} {name} main\n"
            for archive, _, name in (line.partition(" ") for line in _SUITES[suite])
        )
        (folder / "sources.list").write_text(sources)
        settings = {
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": folder / "cache",
            "Acquire::Languages": "none",
            "Acquire::Retries": 5,
            # The folder is this user's, whom apt's own user may not be able to follow there.
            "APT::Sandbox::User": "root",
            "APT::Architecture": "amd64",
        }
        self._options = [f"-o{name}={value}" for name, value in settings.items()]

    def update(self) -> None:
        self._run("apt-get", "-qq", "update")

    def closure(self, package: str) -> list[str]:
        """Return *package* and what it depends on, as far as kernels go."""
        found = [package]
        for name in found:
            told = self._run("apt-cache", "depends", "--no-recommends", "--no-suggests", name)
            for needed in re.findall(r"Depends: (linux-(?:image|binary)-\S+)", told):
                if needed not in found:
                    found.append(needed)
        return found

    def download(self, package: str) -> Path:
        folder = self._folder / package
        folder.mkdir()
        self._run("apt-get", "-qq", "download", package, cwd=folder)
        (file,) = folder.glob("*.deb")
        return file

    def _run(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            [program, *self._options, *arguments], capture_output=True, text=True, check=False, cwd=cwd
        )
        if done.returncode:
            raise UnavailableError(f"{program} {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout
