"""The made-up process, and its mappings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from memsafe.sizes import Size, parse_size
from memsafe.testing.parts import PID, Number, Part, Setting, Signed, labelled

if TYPE_CHECKING:
    from memsafe.testing.kernel import FakeKernel


@dataclass(frozen=True, slots=True)
class FakeMapping:
    """A mapping of the made-up process: an entry of /proc/self/smaps.

    Attributes:
        size: What it spans.
        anonymous: How much of it is in RAM and private.
        permissions: As in smaps; ``p`` is private, ``s`` shared.
        flags: VmFlags: ``ac`` is charged for, ``dc`` is MADV_DONTFORK, ``wf`` is MADV_WIPEONFORK.
        swap: How much of it is swapped out.
    """

    size: Size
    anonymous: Size = 0
    permissions: str = "rw-p"
    flags: str = "rd wr mr mw me ac"
    swap: Size = 0

    def _text(self, start: int) -> tuple[str, int]:
        sizes = [parse_size(size) for size in (self.size, self.anonymous, self.swap)]
        size_kb, anonymous_kb, swap_kb = (size_bytes // 1024 for size_bytes in sizes)
        end = start + sizes[0]
        text = (
            f"{start:x}-{end:x} {self.permissions} 00000000 00:00 0 \nSize:   {size_kb} kB\n"
            f"Rss:    {anonymous_kb} kB\nAnonymous:    {anonymous_kb} kB\nSwap:    {swap_kb} kB\n"
            f"VmFlags: {self.flags} \n"
        )
        return text, end


class FakeProcess(Part):
    """The process itself: what /proc/self tells of it.

    Attributes:
        rss, anonymous, swap, pss, total_vm, data_vm, page_tables: Its sizes.
        data_limit, address_space_limit: RLIMIT_DATA and RLIMIT_AS, the soft ones; None: unlimited.
        processes_limit: RLIMIT_NPROC; None: unlimited.
        threads: How many it has: with RLIMIT_NPROC, what its user may have more.
        uid, capabilities, oom_score, oom_score_adj: As in its status; ``1 << 21`` is CAP_SYS_ADMIN.
        user_namespace: The number of its user namespace; None: the first, where capabilities are worth what they say.
    """

    rss = Setting()
    anonymous = Setting()
    swap = Setting()
    pss = Setting()
    total_vm = Setting()
    data_vm = Setting()
    page_tables = Setting()
    data_limit = Setting()
    address_space_limit = Setting()
    processes_limit = Number()
    threads = Number()
    uid = Number()
    capabilities = Number()
    oom_score = Number()
    oom_score_adj = Signed()
    user_namespace = Number()

    _defaults: ClassVar[dict[str, int | None]] = {
        "rss": 8 << 20, "anonymous": 4 << 20, "swap": 0, "pss": 2 << 20, "total_vm": 64 << 20, "data_vm": 32 << 20,
        "page_tables": 1 << 20, "threads": 1, "uid": 1000, "capabilities": 0, "oom_score": 666, "oom_score_adj": 0,
    }  # fmt: skip

    def __init__(self, kernel: FakeKernel) -> None:
        super().__init__(kernel)
        self._mappings: tuple[FakeMapping, ...] = (FakeMapping(2 << 20, 1 << 20),)

    @property
    def mappings(self) -> tuple[FakeMapping, ...]:
        """Its mappings; set them to any sequence of FakeMapping."""
        return self._mappings

    @mappings.setter
    def mappings(self, mappings: tuple[FakeMapping, ...] | list[FakeMapping]) -> None:
        self._mappings = tuple(mappings)
        self._render()

    def _render(self) -> None:
        sizes = {
            "VmSize": self.total_vm, "VmRSS": self.rss, "RssAnon": self.anonymous, "VmData": self.data_vm,
            "VmPTE": self.page_tables, "VmSwap": self.swap,
        }  # fmt: skip
        show = self._tree.show
        uids = "" if self.uid is None else "Uid:" + f"\t{self.uid}" * 4 + "\n"
        text = (
            f"Name:\tpython\n{uids}{labelled(sizes)}Threads:\t{self.threads or 0}\n"
            f"CapEff:\t{self.capabilities or 0:016x}\n"
        )
        for name in ("self", PID):
            show(f"/proc/{name}/status", text)
        namespace = None if self.user_namespace is None else f"user:[{self.user_namespace}]"
        self._tree.show_link("/proc/self/ns/user", namespace)
        show("/proc/self/limits", self._limits())
        self._tree.show_number("/proc/self/oom_score", self.oom_score)
        self._tree.show_number("/proc/self/oom_score_adj", self.oom_score_adj)
        sums = {
            "Rss": self.rss, "Pss": self.pss, "Shared_Dirty": 0, "Private_Dirty": self.anonymous,
            "Anonymous": self.anonymous, "Swap": self.swap,
        }  # fmt: skip
        head = "00400000-7fff0000 ---p 00000000 00:00 0  [rollup]\n"
        show("/proc/self/smaps_rollup", head + labelled(sums))
        smaps, start = "", 0x7F0000000000
        for mapping in self._mappings:
            text, end = mapping._text(start)
            smaps += text
            start = end + 2**30  # neighbours would be one mapping
        show("/proc/self/smaps", smaps)

    def _limits(self) -> str:
        lines = [f"{'Limit':<25} {'Soft Limit':<20} {'Hard Limit':<20} {'Units':<10}"]
        for name, value, unit in (
            ("data size", self.data_limit, "bytes"),
            ("processes", self.processes_limit, "processes"),
            ("address space", self.address_space_limit, "bytes"),
        ):
            soft = "unlimited" if value is None else str(value)
            lines.append(f"{f'Max {name}':<25} {soft:<20} {'unlimited':<20} {unit:<10}")
        return "\n".join(lines) + "\n"
