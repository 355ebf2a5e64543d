"""What /proc/<pid> says about a process's memory (Documentation/filesystems/proc.rst)."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass

from memsafe._kernel import files
from memsafe._kernel.files import UNLIMITED, Labelled, Root
from memsafe.errors import KernelError

_MAPS_BYTES_MAX = 64 * 1024 * 1024  # 65,530 mappings by default, of up to 4 KiB a path

CAP_SYS_ADMIN = 21
CAP_SYS_RESOURCE = 24

# The inode that the kernel gives the first user namespace (include/uapi/linux/nsfs.h, USER_NS_INIT_INO).
_INITIAL_USER_NAMESPACE = "user:[4026531837]"


class ProcessStatus(Labelled):
    """The lines of /proc/<pid>/status that concern memory; None where the kernel does not say (a kernel thread).

    A line is looked at when it is asked for, so that garbage in one leaves the others readable.
    """

    __slots__ = ()

    @property
    def rss_bytes(self) -> int | None:
        """What is in RAM."""
        return self.size_bytes(b"VmRSS")

    @property
    def anonymous_bytes(self) -> int | None:
        """What is in RAM and in no file."""
        return self.size_bytes(b"RssAnon")

    @property
    def swap_bytes(self) -> int | None:
        """What is swapped out."""
        return self.size_bytes(b"VmSwap")

    @property
    def total_vm_bytes(self) -> int | None:
        """All mappings: what RLIMIT_AS limits."""
        return self.size_bytes(b"VmSize")

    @property
    def data_vm_bytes(self) -> int | None:
        """Private writable mappings but the stack: what RLIMIT_DATA limits."""
        return self.size_bytes(b"VmData")

    @property
    def page_table_bytes(self) -> int | None:
        """Its page tables, of all levels."""
        return self.size_bytes(b"VmPTE")

    @property
    def real_uid(self) -> int | None:
        """Its real user."""
        uids = self.get(b"Uid")
        return files.count(uids.split()[0], self.path) if uids else None

    @property
    def threads(self) -> int | None:
        """How many threads it has."""
        return self.count(b"Threads")

    @property
    def effective_capabilities(self) -> int:
        """Its capabilities as a set of bits; none where they are not told."""
        text = self.get(b"CapEff")
        if text is None:
            return 0
        if not re.fullmatch(rb"[0-9a-fA-F]{1,16}", text):
            raise files.garbage(self.path, f"CapEff is {text[:40]!r}")
        return int(text, 16)


class Limits:
    """Soft limits in /proc/<pid>/limits; files.UNLIMITED where there is none, None where the file does not tell."""

    __slots__ = ("_texts", "path")

    def __init__(self, text: bytes, path: str) -> None:
        self.path = path
        self._texts = dict(_LIMIT.findall(text))

    @property
    def data_bytes(self) -> int | None:
        """RLIMIT_DATA."""
        return self._soft(b"data size")

    @property
    def address_space_bytes(self) -> int | None:
        """RLIMIT_AS."""
        return self._soft(b"address space")

    @property
    def processes(self) -> int | None:
        """RLIMIT_NPROC: threads that the real user may have."""
        return self._soft(b"processes")

    def _soft(self, name: bytes) -> int | None:
        text = self._texts.get(name)
        if text is None or text == b"unlimited":
            return None if text is None else UNLIMITED
        return files.limit(text, self.path)


_LIMIT = re.compile(rb"^Max (data size|address space|processes) +(\S+) ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class SmapsRollup:
    """Sums over all mappings. Reading them walks the page tables: milliseconds per GiB."""

    rss_bytes: int
    pss_bytes: int
    shared_dirty_bytes: int
    private_dirty_bytes: int
    anonymous_bytes: int
    swap_bytes: int


def status(root: Root = "/", pid: int | str = "self") -> ProcessStatus:
    """Return /proc/<pid>/status.

    Raises:
        KernelError: It cannot be read.
    """
    path = files.under(root, f"/proc/{pid}/status")
    return ProcessStatus(files.read(path), path)


def pids(root: Root = "/") -> list[int]:
    """Return the processes that can be seen.

    Raises:
        KernelError: /proc cannot be listed.
    """
    return [int(name) for name in files.names(files.under(root, "/proc")) if name.isascii() and name.isdigit()]


def in_initial_user_namespace(root: Root = "/", pid: int | str = "self") -> bool:
    """Whether *pid* lives in the first user namespace, where its capabilities are worth what they say.

    A kernel without /proc/<pid>/ns/user has no user namespaces, hence only the first.

    Raises:
        KernelError: The link is there and cannot be read.
    """
    try:
        return files.read_link(files.under(root, f"/proc/{pid}/ns/user")) == _INITIAL_USER_NAMESPACE
    except KernelError as error:
        if files.is_missing(error):
            return True
        raise


def oom_score(root: Root = "/", pid: int | str = "self") -> int | None:
    """Return how likely the OOM killer is to take *pid*, or None where it is not told."""
    return files.read_count(files.under(root, f"/proc/{pid}/oom_score"))


def oom_score_adj(root: Root = "/", pid: int | str = "self") -> int | None:
    """Return the adjustment of *pid*, -1000 to 1000, or None where it is not told."""
    path = files.under(root, f"/proc/{pid}/oom_score_adj")
    text = files.read_optional(path)
    if text is None:
        return None
    text = text.strip()
    value = files.count(text.removeprefix(b"-"), path)
    return -value if text.startswith(b"-") else value


def limits(root: Root = "/", pid: int | str = "self") -> Limits:
    """Return /proc/<pid>/limits.

    Raises:
        KernelError: It cannot be read.
    """
    path = files.under(root, f"/proc/{pid}/limits")
    return Limits(files.read(path), path)


def smaps_rollup(pid: int | str = "self", root: Root = "/") -> SmapsRollup:
    """Return the sums over all mappings of *pid*.

    Raises:
        KernelError: It cannot be read (another user's process, no such process) or makes no sense.
    """
    path = files.under(root, f"/proc/{pid}/smaps_rollup")
    lines = Labelled(files.read(path), path)
    return SmapsRollup(
        rss_bytes=lines.required_bytes(b"Rss"),
        pss_bytes=lines.required_bytes(b"Pss"),
        shared_dirty_bytes=lines.required_bytes(b"Shared_Dirty"),
        private_dirty_bytes=lines.required_bytes(b"Private_Dirty"),
        anonymous_bytes=lines.required_bytes(b"Anonymous"),
        swap_bytes=lines.required_bytes(b"Swap"),
    )


def pss_bytes(pid: int | str = "self", root: Root = "/") -> int:
    """Return the proportional set size of *pid*, by a walk over its page tables.

    Raises:
        KernelError: smaps_rollup cannot be read or makes no sense.
    """
    path = files.under(root, f"/proc/{pid}/smaps_rollup")
    return Labelled(files.read(path), path).required_bytes(b"Pss")


def minor_faults(pid: int | str = "self", root: Root = "/") -> int:
    """Return how many page faults of *pid*, of all its threads, needed no reading: each copy of a page is one.

    Raises:
        KernelError: /proc/<pid>/stat cannot be read or makes no sense (proc_pid_stat(5), minflt).
    """
    path, (faults,) = _stat(pid, root, "minflt")
    return files.count(faults, path)


@dataclass(frozen=True, slots=True)
class Activity:
    """What tells whether a process does anything.

    Attributes:
        state: As in ps: R runs, S waits, D waits for a device, T is stopped.
        cpu_ticks: Processor time of all its threads, in ticks, of which a second has 100 (sysconf(3), _SC_CLK_TCK).
        written_bytes: What it has handed to write(2) and its like; None where that is not told.
    """

    state: str
    cpu_ticks: int
    written_bytes: int | None


def activity(pid: int | str = "self", root: Root = "/") -> Activity:
    """Return what *pid* does, and has done.

    Raises:
        KernelError: /proc/<pid>/stat cannot be read or makes no sense (proc_pid_stat(5)).
    """
    path, (state, *ticks) = _stat(pid, root, "state", "utime", "stime")
    cpu_ticks = sum(files.count(each, path) for each in ticks)
    written_bytes = None
    with suppress(KernelError):  # the child of a process that changed its user is root's
        path = files.under(root, f"/proc/{pid}/io")
        written_bytes = Labelled(files.read(path), path).count(b"wchar")
    return Activity(state.decode(errors="replace"), cpu_ticks, written_bytes)


_STAT_FIELDS = {"state": 0, "minflt": 7, "utime": 11, "stime": 12}  # behind the name


def _stat(pid: int | str, root: Root, *names: str) -> tuple[str, list[bytes]]:
    """Return the path of /proc/<pid>/stat, and these of its fields."""
    path = files.under(root, f"/proc/{pid}/stat")
    # The name in parentheses may hold anything, parentheses included.
    fields = files.read(path).rpartition(b")")[2].split()
    for name in names:
        if len(fields) <= _STAT_FIELDS[name]:
            raise files.lacking(path, name)
    return path, [fields[_STAT_FIELDS[name]] for name in names]


def thread_names(root: Root = "/", pid: int | str = "self") -> dict[int, str]:
    """Return the threads of *pid* by number, with the name that each has in comm.

    Raises:
        KernelError: /proc/<pid>/task cannot be listed.
    """
    folder = files.under(root, f"/proc/{pid}/task")
    named = {}
    for tid in files.names(folder):
        text = files.read_optional(f"{folder}/{tid}/comm")
        if text is not None and tid.isascii() and tid.isdigit():
            named[int(tid)] = text.decode(errors="replace").strip()
    return named


def mapped_files(root: Root = "/", pid: int | str = "self") -> set[str]:
    """Return the base names of the files that are mapped into *pid*, libraries among them.

    Raises:
        KernelError: /proc/<pid>/maps cannot be read.
    """
    lines = files.read(files.under(root, f"/proc/{pid}/maps"), max_bytes=_MAPS_BYTES_MAX).splitlines()
    paths = (line.partition(b"/")[2] for line in lines)  # address, permissions, offset, device, inode, then the path
    return {path.rpartition(b"/")[2].decode(errors="replace") for path in paths if path}
