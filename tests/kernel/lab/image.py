"""The guest's file system: busybox, this Python and what it needs, the project; as archives that a kernel unpacks.

Everything but busybox lies where it lies on the host, so that paths in tracebacks mean the same on both sides.
"""

from __future__ import annotations

import compileall
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import threading
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tests.kernel.lab.kernels import CACHE, PROJECT, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

INIT = Path(__file__).with_name("init.sh")
COMMAND = "/lab.sh"
TASK = "/lab.json"
MODULES = "/modules"

_PACKAGES = ("cffi", "hypothesis", "psutil", "pytest", "pytest-timeout")
_PROJECT_PARTS = ("benchmarks", "memsafe", "memsafe_native", "tests")
# What holds on the host holds in the guest.
_ENVIRONMENT = ("MEMSAFE_FORBID_SKIPS",)
_STDLIB_LEFT_OUT = re.compile(
    r"config-.*|ensurepip|idlelib|lib2to3|pydoc_data|site-packages|dist-packages|tests?|tkinter|turtledemo"
)

_one_at_a_time = threading.Lock()  # or two machines would make the same archive


class Archive:
    """A cpio archive in the "newc" format, all of it owned by root (Documentation/driver-api/early-userspace/)."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._folders: set[str] = set()
        self._count = 0

    def file(self, path: str, data: bytes, mode: int = 0o644, mtime: int = 0) -> None:
        self._parents(path)
        self._entry(path, stat.S_IFREG | mode, data, mtime)

    def link(self, path: str, target: str) -> None:
        self._parents(path)
        self._entry(path, stat.S_IFLNK | 0o777, os.fsencode(target), 0)

    def folder(self, path: str) -> None:
        if path not in self._folders:
            self._parents(path)
            self._folders.add(path)
            self._entry(path, stat.S_IFDIR | (0o1777 if path == "/tmp" else 0o755), b"", 0)

    def device(self, path: str, major: int, minor: int) -> None:
        self._parents(path)
        self._entry(path, stat.S_IFCHR | 0o600, b"", 0, (major, minor))

    def copy(self, path: str) -> None:
        """Add a file or a symbolic link of the host, at the same place."""
        if os.path.islink(path):
            self.link(path, os.readlink(path))
            return
        facts = os.stat(path)
        mode = 0o755 if facts.st_mode & 0o111 else 0o644
        # With its time, by which Python knows that the compiled file beside it is good.
        self.file(path, Path(path).read_bytes(), mode, int(facts.st_mtime))

    def close(self) -> None:
        self._entry("TRAILER!!!", 0, b"", 0)

    def _parents(self, path: str) -> None:
        parent = os.path.dirname(path)
        if parent not in {"", "/"}:
            self.folder(parent)

    def _entry(self, path: str, mode: int, data: bytes, mtime: int, device: tuple[int, int] = (0, 0)) -> None:
        name = os.fsencode(path.lstrip("/")) + b"\0"
        self._count += 1
        fields = (self._count, mode, 0, 0, 1, mtime, len(data), 0, 0, *device, len(name), 0)
        self._padded(b"070701" + b"".join(b"%08x" % field for field in fields) + name)
        self._padded(data)

    def _padded(self, data: bytes) -> None:
        self._out.write(data + bytes(-len(data) % 4))


def base() -> Path:
    """Return the archive of everything that does not change from run to run, made when it is not there."""
    busybox = shutil.which("busybox")
    if busybox is None or "not a dynamic executable" not in _ldd(busybox):
        raise UnavailableError("a static busybox is needed: apt-get install busybox-static")
    paths = sorted({*_interpreter(), *_distributions()})
    listed = [(path, os.lstat(path).st_mtime_ns) for path in [busybox, *paths]]
    name = hashlib.sha256(json.dumps([listed, INIT.read_text(), 2]).encode()).hexdigest()[:16]
    target = CACHE / f"base-{name}.cpio"
    if not target.exists():
        for old in CACHE.glob("base-*.cpio"):
            old.unlink()
        CACHE.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        with part.open("wb") as out:
            _write_base(Archive(out), busybox, paths)
        part.rename(target)
    return target


def write_initrd(target: Path, modules: Iterable[Path], command: Sequence[str], work: object = None) -> None:
    """Write the guest's whole file system: base(), the project as it is now, the *command* to run, *work* to read.

    The kernel's *modules* are there, and left to be loaded by whoever needs one. Thread-safe.
    """
    with _one_at_a_time:
        shutil.copyfile(base(), target)
        for part in _PROJECT_PARTS:
            # Here it takes a moment, there each process would do it again.
            compileall.compile_dir(PROJECT / part, quiet=2)
    # The kernel unpacks one archive after the other.
    with target.open("ab") as out:
        archive = Archive(out)
        for path in (path for part in _PROJECT_PARTS for path in _files(PROJECT / part)):
            archive.copy(path)
        archive.copy(str(PROJECT / "pyproject.toml"))
        archive.folder(MODULES)
        for module in modules:
            archive.file(f"{MODULES}/{module.name}", module.read_bytes())
        archive.file(COMMAND, script(command).encode())
        archive.file(TASK, json.dumps(work).encode())
        archive.close()


def script(command: Sequence[str]) -> str:
    """Return what the guest's shell is to do, to run *command* as it would run here."""
    variables = {"PYTHONPATH": ".", **{name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}}
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    return f"cd {shlex.quote(str(PROJECT))} || exit\n{exports}exec {shlex.join(command)}\n"


def _write_base(archive: Archive, busybox: str, paths: Iterable[str]) -> None:
    archive.file("/bin/busybox", Path(busybox).read_bytes(), 0o755)
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in {*applets} - {"busybox"}:
        archive.link(f"/bin/{applet}", "busybox")
    for folder in ("/dev", "/proc", "/sys", "/etc", "/run", "/scratch", "/tmp"):
        archive.folder(folder)
    archive.device("/dev/console", 5, 1)
    archive.file("/etc/passwd", b"root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/tmp:/bin/sh\n")
    archive.file("/etc/group", b"root:x:0:\nnogroup:x:65534:\n")
    archive.file("/init", INIT.read_bytes(), 0o755)
    present = set(paths)
    for path in paths:
        archive.copy(path)
    for library in sorted(_libraries(path for path in paths if re.search(r"\.so(\.|$)|/bin/", path))):
        if library not in present:
            archive.file(library, Path(library).read_bytes(), 0o755)
    archive.close()


def _interpreter() -> Iterator[str]:
    """Yield the files of this interpreter: the virtual environment's links, the program, its standard library."""
    path = sys.executable
    while os.path.islink(path):
        yield path
        path = os.path.join(os.path.dirname(path), os.readlink(path))
    yield path
    environment = os.path.join(sys.prefix, "pyvenv.cfg")
    if os.path.exists(environment):
        yield environment
    for key in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib", vars=_base_variables())}:
        yield from _files(Path(key), _STDLIB_LEFT_OUT)


def _base_variables() -> dict[str, str]:
    return {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}


def _distributions() -> Iterator[str]:
    """Yield the files of the packages that the guest needs, and of those that they need."""
    names = list(_PACKAGES)
    for name in names:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another platform or Python
        for file in distribution.files or ():
            path = os.path.normpath(str(distribution.locate_file(file)))
            if os.path.exists(path) and not path.startswith(os.path.join(sys.prefix, "bin")):
                yield path
                yield from _compiled(path)
        needed = (re.match(r"[A-Za-z0-9._-]+", line) for line in distribution.requires or () if "extra ==" not in line)
        for match in needed:
            if match is not None and match[0] not in names:
                names.append(match[0])


def _compiled(path: str) -> Iterator[str]:
    if path.endswith(".py"):
        folder, name = os.path.split(path)
        compiled = os.path.join(folder, "__pycache__", f"{name[:-3]}.{sys.implementation.cache_tag}.pyc")
        if os.path.exists(compiled):
            yield compiled


def _files(top: Path, left_out: re.Pattern[str] | None = None) -> Iterator[str]:
    """Yield *top*, or the files below it; of compiled ones only those of this Python."""
    if top.is_file():
        yield str(top)
    for folder, folders, names in os.walk(top):
        if left_out is not None:
            folders[:] = [name for name in folders if not left_out.fullmatch(name)]
        for name in names:
            if not name.endswith(".pyc") or f".{sys.implementation.cache_tag}" in name:
                yield os.path.join(folder, name)


def _libraries(programs: Iterable[str]) -> set[str]:
    """Return the shared libraries that *programs* need, where the dynamic loader looks for them."""
    found: set[str] = set()
    for program in programs:
        found.update(re.findall(r"(?:=> |^\t)(/\S+) \(0x", _ldd(program), re.MULTILINE))
    return found


def _ldd(program: str) -> str:
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
