"""Which cgroups hold a process, where their directories are, and what stands in them.

Sources: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst; proc(5) for mountinfo; cgroup_namespaces(7).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

from memsafe._kernel import files
from memsafe._kernel.files import Flat, Root

_CONTROLLERS = "cgroup.controllers"
_NAMES = re.compile(rb"[a-z0-9_ ]*")


@dataclass(frozen=True, slots=True)
class Membership:
    """One line of /proc/<pid>/cgroup; the unified hierarchy has number 0 and no controllers."""

    hierarchy: int
    controllers: tuple[str, ...]
    path: str


@dataclass(frozen=True, slots=True)
class Mount:
    """One cgroup line of /proc/<pid>/mountinfo: the cgroup *root* and what lies below it is seen at *point*."""

    version: int
    root: str
    point: str
    options: frozenset[str]


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A cgroup that holds the process, itself or as an ancestor.

    Attributes:
        version: 1 or 2.
        path: Its path in its hierarchy, as /proc/<pid>/cgroup tells it.
        directory: The directory to open, already under the root.
    """

    version: int
    path: str
    directory: str

    def file(self, name: str) -> str:
        """Return the path of its file *name*."""
        return f"{self.directory}/{name}"

    def is_frozen(self) -> bool:
        """Whether what joins it stands still: it or an ancestor is frozen, or is about to be.

        Raises:
            KernelError: A file that says so is there and cannot be read.
        """
        if self.version == 1:
            return files.read_optional(self.file("freezer.state")) not in {None, b"THAWED\n"}
        # A task that the kernel cannot stop now keeps "frozen" at 0, which says nothing of the next one.
        if files.read_count(self.file("cgroup.freeze")):
            return True
        events = self._flat("cgroup.events")
        return events is not None and events.get(b"frozen") == 1

    def _flat(self, name: str) -> Flat | None:
        path = self.file(name)
        text = files.read_optional(path)
        return None if text is None else Flat(text, path)


@dataclass(frozen=True, slots=True)
class MemoryCgroup(Cgroup):
    """A cgroup of the memory controller. Each reader answers None where the file does not exist (a root cgroup).

    Every reader raises KernelError for a file that is there and cannot be read, or makes no sense.
    """

    def limit_bytes(self) -> int | None:
        """Return the limit past which the OOM killer comes; files.UNLIMITED where there is none."""
        return files.read_limit(self.file("memory.max" if self.version == 2 else "memory.limit_in_bytes"))

    def high_bytes(self) -> int | None:
        """Return the limit past which allocations are throttled; v1 has none."""
        return files.read_limit(self.file("memory.high")) if self.version == 2 else None

    def usage_bytes(self, *, again: bool = False) -> int | None:
        """Return what is charged to it and its descendants, page cache included; *again* is as of files.read()."""
        name = "memory.current" if self.version == 2 else "memory.usage_in_bytes"
        return files.read_count(self.file(name), again=again)

    def stat(self) -> Flat | None:
        """Return memory.stat."""
        return self._flat("memory.stat")

    def file_cache_bytes(self) -> tuple[int, int] | None:
        """Return the (inactive, active) file cache of it and its descendants: clean or dirty, never tmpfs."""
        stat = self.stat()
        # v1's plain keys leave the descendants out, whose pages are in the usage.
        prefix = b"" if self.version == 2 else b"total_"
        inactive_bytes = stat.get(prefix + b"inactive_file") if stat else None
        if stat is None or inactive_bytes is None:
            return None
        return inactive_bytes, stat.get(prefix + b"active_file") or 0

    def events(self, *, local: bool = False) -> Flat | None:
        """Return memory.events (it and its descendants), or memory.events.local; v1 has neither."""
        return self._flat("memory.events.local" if local else "memory.events") if self.version == 2 else None

    def oom_kills(self) -> int | None:
        """Return how many processes the OOM killer has taken: v2 with the descendants', v1 its own (since 4.13)."""
        counters = self.events() if self.version == 2 else self._flat("memory.oom_control")
        return counters.get(b"oom_kill") if counters else None

    def swap_limit_bytes(self) -> int | None:
        """Return the limit of its swap; v1 limits memory and swap together instead, see memsw_limit_bytes()."""
        return files.read_limit(self.file("memory.swap.max")) if self.version == 2 else None

    def swap_high_bytes(self) -> int | None:
        """Return the use of swap past which allocations are throttled; v1 has none."""
        return files.read_limit(self.file("memory.swap.high")) if self.version == 2 else None

    def swap_usage_bytes(self) -> int | None:
        """Return the swap that it and its descendants use."""
        if self.version == 2:
            return files.read_count(self.file("memory.swap.current"))
        stat = self.stat()
        return stat.get(b"total_swap") if stat else None

    def memsw_limit_bytes(self) -> int | None:
        """Return v1's limit of memory and swap together."""
        return files.read_limit(self.file("memory.memsw.limit_in_bytes")) if self.version == 1 else None

    def memsw_usage_bytes(self) -> int | None:
        """Return what v1 counts of memory and swap together."""
        return files.read_count(self.file("memory.memsw.usage_in_bytes")) if self.version == 1 else None


@dataclass(frozen=True, slots=True)
class Located:
    """Where a controller keeps the process.

    Attributes:
        version: 1 or 2; None where the controller is not to be found.
        cgroups: Own first, then each visible ancestor.
        problem: Why there are none, or why they cannot be trusted; None when all is well.
    """

    version: int | None
    cgroups: tuple[Cgroup, ...]
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a process stands in every hierarchy, and where the hierarchies are mounted: the kernel's word, unjudged."""

    root: Root
    memberships: tuple[Membership, ...]
    mounts: tuple[Mount, ...]
    pid: int | str = "self"

    def locate(self, controller: str) -> Located:
        """Return the cgroups by which *controller* holds the process."""
        # A named hierarchy is "name=…", and hierarchy 0 is v2: neither can hold a v1 controller.
        member = next((m for m in self.memberships if m.hierarchy and controller in m.controllers), None)
        version = 2 if member is None else 1
        if member is None:
            member = self._unified()
        told = _membership_path(self.root, self.pid)
        if member is None:
            return Located(None, (), f"{told} names no hierarchy with the {controller} controller")
        mounts = [m for m in self.mounts if m.version == version and (version == 2 or controller in m.options)]
        mount = _best_mount(mounts, member.path, self.root)
        if mount is None:
            seen = ", ".join(f"{m.root} at {m.point}" for m in mounts) or "not mounted"
            shown = f"shows the v{version} {controller} cgroup {member.path} of {told} ({seen})"
            return Located(None, (), f"no mount in {_mounts_path(self.root, self.pid)} {shown}")
        levels = _levels(version, member.path, mount, os.fspath(self.root))
        if version == 1:
            levels = _accounting_upwards(levels)
        elif not _has_controller(levels[-1], controller):
            return Located(None, (), f"{levels[-1].file(_CONTROLLERS)} names no {controller} controller")
        else:
            # Below where subtree_control stops, the charge goes to the nearest cgroup that has the controller.
            levels = tuple(level for level in levels if _has_controller(level, controller))
        problem = None
        if not files.is_directory(levels[0].directory):
            problem = f"the {controller} cgroup {levels[0].path} of {told} has no directory at {levels[0].directory}"
        return Located(version, levels, problem)

    def unified_directory(self) -> str | None:
        """Return the directory of the cgroup2 that holds the process, or None; it may have PSI files but no memory."""
        member = self._unified()
        if member is None:
            return None
        mount = _best_mount([m for m in self.mounts if m.version == 2], member.path, self.root)
        return None if mount is None else files.under(self.root, _seen_at(member.path, mount))

    def _unified(self) -> Membership | None:
        return next((m for m in self.memberships if m.hierarchy == 0 and not m.controllers), None)


def placement(root: Root = "/", pid: int | str = "self") -> Placement:
    """Return where *pid* stands.

    Raises:
        KernelError: /proc/<pid>/cgroup or mountinfo cannot be read or makes no sense.
    """
    path, mounts_path = _membership_path(root, pid), _mounts_path(root, pid)
    memberships = _memberships(files.read(path), path)
    # A host of containers has thousands of mounts: 64 MiB is far beyond mount-max.
    return Placement(root, memberships, _mounts(files.read(mounts_path, max_bytes=2**26), mounts_path), pid)


def _membership_path(root: Root, pid: int | str) -> str:
    return files.under(root, f"/proc/{pid}/cgroup")


def _mounts_path(root: Root, pid: int | str) -> str:
    return files.under(root, f"/proc/{pid}/mountinfo")


def locate(controller: str, root: Root = "/", pid: int | str = "self") -> Located:
    """Return the cgroups by which *controller* holds *pid*.

    Raises:
        KernelError: /proc/<pid>/cgroup or mountinfo cannot be read or makes no sense.
    """
    return placement(root, pid).locate(controller)


def memory_cgroups(root: Root = "/", pid: int | str = "self") -> tuple[MemoryCgroup, ...]:
    """Return the memory cgroup of *pid* and every visible ancestor, own first; none where there is no controller.

    Raises:
        KernelError: /proc/<pid>/cgroup or mountinfo cannot be read or makes no sense.
    """
    return as_memory(locate("memory", root, pid))


def as_memory(located: Located) -> tuple[MemoryCgroup, ...]:
    """Return the cgroups of locate("memory") with their readers."""
    return tuple(MemoryCgroup(c.version, c.path, c.directory) for c in located.cgroups)


def unified_directory(root: Root = "/", pid: int | str = "self") -> str | None:
    """Return the directory of the cgroup2 that holds *pid*, or None.

    Raises:
        KernelError: /proc/<pid>/cgroup or mountinfo cannot be read or makes no sense.
    """
    return placement(root, pid).unified_directory()


def parse_membership(line: str, file: str) -> Membership:
    """Return one line of /proc/<pid>/cgroup. The path may hold colons.

    Raises:
        KernelError: The line makes no sense.
    """
    number, _, rest = line.partition(":")
    controllers, colon, path = rest.partition(":")
    if not colon or not number.isascii() or not number.isdigit() or len(number) > 10 or not path.startswith("/"):
        raise files.garbage(file, f"{line[:80]!r} is not hierarchy:controllers:/path")
    return Membership(int(number), tuple(controllers.split(",")) if controllers else (), path)


def parse_mount(line: str, file: str) -> Mount | None:
    """Return one line of mountinfo, or None where it is no cgroup's.

    Raises:
        KernelError: The line makes no sense.
    """
    # Optional fields, none or several, end at the lone hyphen; super options may hold spaces.
    left, hyphen, right = line.partition(" - ")
    before, after = left.split(" "), right.split(" ", 2)
    if not hyphen or len(before) < 6 or len(after) < 3:
        raise files.garbage(file, f"{line[:120]!r} is not a line of mountinfo")
    version = {"cgroup": 1, "cgroup2": 2}.get(after[0])
    if version is None:
        return None
    return Mount(version, _unescape(before[3]), _unescape(before[4]), frozenset(after[2].split(",")))


# Both texts change seldom and are asked for often: neither they nor what follows from them is worked out twice.
@lru_cache(maxsize=2)
def _memberships(text: bytes, path: str) -> tuple[Membership, ...]:
    return tuple(parse_membership(line, path) for line in os.fsdecode(text).split("\n") if line)


@lru_cache(maxsize=2)
def _mounts(text: bytes, path: str) -> tuple[Mount, ...]:
    lines = (os.fsdecode(line) for line in text.split(b"\n") if b" - cgroup" in line)
    return tuple(mount for line in lines if (mount := parse_mount(line, path)) is not None)


_ESCAPES = {"040": " ", "011": "\t", "012": "\n", "134": "\\"}


def _unescape(text: str) -> str:
    r"""Decode ``\040`` and its three sisters once: a decoded backslash begins no new escape."""
    first, *rest = text.split("\\")
    decoded = [first]
    for part in rest:
        char = _ESCAPES.get(part[:3])
        decoded += ("\\", part) if char is None else (char, part[3:])
    return "".join(decoded)


def _relative(path: str, mount: Mount) -> str | None:
    """Return *path* below the root of *mount* ("" or "/…"), or None where this mount does not show it."""
    base = mount.root.rstrip("/")
    if path != base and not path.startswith(base + "/"):
        return None
    relative = path[len(base) :].rstrip("/")
    # "/.." is a place outside of the cgroup namespace: the parent of a mount point would be another file system's.
    return None if ".." in relative.split("/") else relative


def _seen_at(path: str, mount: Mount) -> str:
    return (mount.point.rstrip("/") + (_relative(path, mount) or "")) or "/"


def _best_mount(mounts: list[Mount], path: str, root: Root) -> Mount | None:
    """Of several mounts of a hierarchy, take one that shows *path*, and the most of its ancestors."""

    def rank(mount: Mount) -> tuple[bool, int, bool]:
        exists = files.is_directory(files.under(root, _seen_at(path, mount)))
        at_home = mount.point == "/sys/fs/cgroup" or mount.point.startswith("/sys/fs/cgroup/")
        return exists, len(_relative(path, mount) or ""), at_home

    on_top = {mount.point: mount for mount in mounts}.values()  # a later mount covers an earlier one
    showing = [mount for mount in on_top if _relative(path, mount) is not None]
    # As a rule there is one: its directory need not be looked at.
    return max(showing, key=rank) if len(showing) > 1 else next(iter(showing), None)


@lru_cache(maxsize=8)
def _levels(version: int, path: str, mount: Mount, root: str) -> tuple[Cgroup, ...]:
    """Return the cgroup at *path* and each ancestor up to the root of *mount*."""
    base, point = mount.root.rstrip("/"), files.under(root, mount.point).rstrip("/")
    relative = _relative(path, mount) or ""
    levels = []
    while relative:
        levels.append(Cgroup(version, base + relative, point + relative))
        relative = relative.rpartition("/")[0]
    return (*levels, Cgroup(version, base or "/", point or "/"))


def _accounting_upwards(levels: tuple[Cgroup, ...]) -> tuple[Cgroup, ...]:
    """Return v1 levels up to the first ancestor that does not count its children (possible before Linux 5.11)."""
    ancestors = takewhile(lambda level: _text_or_none(level.file("memory.use_hierarchy")) != b"0", levels[1:])
    return (levels[0], *ancestors)


def _has_controller(level: Cgroup, controller: str) -> bool:
    """Whether a v2 cgroup has the controller's files; where nobody tells, assume so and let the reader say."""
    text = _text_or_none(level.file(_CONTROLLERS))
    return text is None or not _NAMES.fullmatch(text) or controller.encode() in text.split()


def _text_or_none(path: str) -> bytes | None:
    """Return what a file that only steers the search holds; not being able to read it is no reason to stop."""
    try:
        return files.read(path).strip()
    except OSError:
        return None
