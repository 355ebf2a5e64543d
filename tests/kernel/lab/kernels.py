"""Debian's cloud kernels, fetched from its mirror into .build/kernels/: unpacked there, never installed.

python -m tests.kernel.lab.kernels      fetch the newest that there are
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

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

# What tests load; with what each needs, as far as it is not built in. zram of 6.1 asks for its compressor by name.
_MODULES = ("lzo-rle", "zram")


class UnavailableError(Exception):
    """A kernel, or a program that boots it, is not there; the message says how to get it."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that can be booted.

    Attributes:
        name: As "6.1".
        release: As uname tells it.
        image: What QEMU boots.
        modules: Those that tests load, in an order in which it goes.
    """

    name: str
    release: str
    image: Path
    modules: tuple[Path, ...] = ()


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


def of_suite(suite: str) -> Kernel:
    """Return the kernel of a suite: the one fetched before, or else the newest.

    Raises:
        UnavailableError: It is not here and could not be fetched.
    """
    return _cached(suite) or fetch(suite)


def fetch(suite: str) -> Kernel:
    """Fetch the newest kernel of *suite*; the one fetched before stays until this one is whole.

    Raises:
        UnavailableError: It could not be had.
    """
    part = CACHE / f"{suite}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        _fetch(suite, part)
        # A name is given only to what is whole.
        shutil.rmtree(CACHE / suite, ignore_errors=True)
        part.rename(CACHE / suite)
    except UnavailableError as error:
        raise UnavailableError(f"{_META_PACKAGE} of {suite} could not be had from {_MIRROR}: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    kernel = _cached(suite)
    if kernel is None:
        raise UnavailableError(f"{_META_PACKAGE} of {suite} holds no kernel image")
    return kernel


def _cached(suite: str) -> Kernel | None:
    images = sorted((CACHE / suite).glob("vmlinuz-*"))
    modules = CACHE / suite / "modules"
    if not images or not modules.is_dir():
        return None
    release = images[-1].name.removeprefix("vmlinuz-")
    return Kernel(_short(release), release, images[-1], tuple(sorted(modules.iterdir())))


def _short(release: str) -> str:
    numbers = re.match(r"\d+\.\d+", release)
    return numbers[0] if numbers else release


def _version(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _fetch(suite: str, folder: Path) -> None:
    """Fetch into *folder* with apt, whose own state and sources are left alone."""
    for program in ("apt-get", "apt-cache", "dpkg"):
        if shutil.which(program) is None:
            raise UnavailableError(
                f"kernels are fetched with {program}: on another distribution, pass --kernel=PATH/vmlinuz"
            )
    apt = _Apt(folder / "apt", suite)
    apt.update()
    packages = [name for name in apt.closure(_META_PACKAGE) if re.match(r"linux-(image|binary|modules)-\d", name)]
    unpacked = folder / "unpacked"
    for package in packages:
        subprocess.run(["dpkg", "-x", apt.download(package), unpacked], check=True)
    for image in [*unpacked.glob("boot/vmlinuz-*"), *unpacked.glob("usr/lib/modules/*/vmlinuz")]:
        release = image.parent.name if image.name == "vmlinuz" else image.name.removeprefix("vmlinuz-")
        shutil.move(image, folder / f"vmlinuz-{release}")
    (folder / "modules").mkdir()
    for number, (name, module) in enumerate(_modules(unpacked)):
        (folder / "modules" / f"{number:02}-{name}.ko").write_bytes(module)
    shutil.rmtree(unpacked)
    shutil.rmtree(folder / "apt")


def _modules(unpacked: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the names and contents of _MODULES, each after those that it needs."""
    paths = {path.name.partition(".")[0].replace("-", "_"): path for path in unpacked.rglob("*.ko*")}
    seen: set[str] = set()

    def with_needed(name: str) -> Iterator[tuple[str, bytes]]:
        if name in seen or name not in paths:
            return  # a module that is not there is built in, or not of this kernel
        seen.add(name)
        data = paths[name].read_bytes()
        module = lzma.decompress(data) if paths[name].suffix == ".xz" else data
        needed = re.search(rb"\0depends=([^\0]*)\0", module)
        for other in needed[1].decode().split(",") if needed else ():
            yield from with_needed(other.replace("-", "_"))
        yield name, module

    for name in _MODULES:
        yield from with_needed(name.replace("-", "_"))


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
            # Or it takes lists that it could not get for empty ones.
            "APT::Update::Error-Mode": "any",
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
            for needed in re.findall(r"Depends: (linux-(?:image|binary|modules)-\S+)", told):
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


def main() -> None:
    """Fetch the kernels to test on, and say which they are."""
    try:
        for suite in DEFAULT_SUITES:
            kernel = fetch(suite)
            print(f"{kernel.name}: {kernel.release} of {suite}")
    except UnavailableError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
