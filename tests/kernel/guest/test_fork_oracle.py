"""assess_fork() against fork() itself: random mappings, ratios, reserves and users, in every mode of overcommit.

The answer must be the kernel's each time, but where it hangs on less than the kernel's own counter is exact by: mode 2
reads a sum of per-CPU counters of which each may be off by a batch (mm/mm_init.c, mm_compute_batch()).

A case is drawn from --seed, its mode, its user and its number: the same every time, until a seed is given.
"""

import ctypes
import errno
import functools
import mmap
import os
import random
import resource
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

import memsafe
from memsafe._kernel import overcommit
from tests.kernel.guest import child

MIB = 1024 * 1024
PAGE = mmap.PAGESIZE
CASES = {overcommit.GUESS: 30, overcommit.ALWAYS: 25, overcommit.NEVER: 60}

USERS = (child.ROOT, child.ROOT_WITHOUT_SYS_ADMIN, child.ORDINARY, child.ROOT_OF_A_NAMESPACE)
MODES = (overcommit.GUESS, overcommit.ALWAYS, overcommit.NEVER)

NONE, READ, WRITE = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
FIXED, GROWSDOWN, NORESERVE, HUGETLB = 0x10, 0x100, 0x4000, 0x40000
DONTFORK, DOFORK, HUGEPAGE, DONTDUMP, WIPEONFORK, KEEPONFORK = 10, 11, 14, 16, 18, 19


class Kind(NamedTuple):
    """What a mapping may be: its protection and flags, what is done with it, a file that it is of."""

    protection: int
    flags: int
    acts: tuple = ()
    file: str = None


KINDS = {
    "private": Kind(WRITE, PRIVATE),
    "written": Kind(WRITE, PRIVATE, ("write",)),
    "read-only": Kind(READ, PRIVATE),
    "inaccessible": Kind(NONE, PRIVATE),
    "made writable": Kind(NONE, PRIVATE, ("protect",)),
    "made read-only": Kind(WRITE, PRIVATE, ("unprotect",)),
    "made read-only once written": Kind(WRITE, PRIVATE, ("write", "unprotect")),
    "noreserve": Kind(WRITE, PRIVATE | NORESERVE),
    "noreserve, made writable": Kind(NONE, PRIVATE | NORESERVE, ("protect",)),
    "shared": Kind(WRITE, SHARED),
    "shared, noreserve": Kind(WRITE, SHARED | NORESERVE),
    "of a file": Kind(WRITE, mmap.MAP_PRIVATE, file="memory"),
    "of a file, written": Kind(WRITE, mmap.MAP_PRIVATE, ("write",), file="memory"),
    "of a file, read-only": Kind(READ, mmap.MAP_PRIVATE, file="memory"),
    "of a file, shared": Kind(WRITE, mmap.MAP_SHARED, file="memory"),
    "of /dev/zero": Kind(WRITE, mmap.MAP_PRIVATE, file="zero"),
    "with a hole": Kind(WRITE, PRIVATE, ("pierce",)),
    "grows down": Kind(WRITE, PRIVATE | GROWSDOWN),
    "dontfork": Kind(WRITE, PRIVATE, (DONTFORK,)),
    "dofork": Kind(WRITE, PRIVATE, (DONTFORK, DOFORK)),
    "wipeonfork": Kind(WRITE, PRIVATE, (WIPEONFORK,)),
    "keeponfork": Kind(WRITE, PRIVATE, (WIPEONFORK, KEEPONFORK)),
    "dontdump": Kind(WRITE, PRIVATE, (DONTDUMP,)),
    "in huge pages": Kind(WRITE, PRIVATE, (HUGEPAGE,)),
    "hugetlb": Kind(WRITE, PRIVATE | HUGETLB),
}
# Those that fork is charged for, twice in three: or few forks would be refused.
CHARGED = ("private", "written", "made writable", "made read-only once written", "of a file", "wipeonfork")


class Address:
    """A stretch of address space, filled with mappings side by side; those that are alike become one."""

    def __init__(self, size_bytes):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        for name in ("mprotect", "madvise", "munmap"):
            getattr(self._libc, name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int][
                : 3 - (name[1] == "u")
            ]
        self._size_bytes = size_bytes
        self._start = self._libc.mmap(None, size_bytes, NONE, PRIVATE | NORESERVE, -1, 0)
        self._next = -(-self._start // (2 * MIB)) * 2 * MIB
        self._files = {"memory": os.memfd_create("mapped"), "zero": os.open("/dev/zero", os.O_RDWR), None: -1}
        os.ftruncate(self._files["memory"], size_bytes)

    def add(self, kind, size_bytes, gap_bytes):
        """Put a mapping after the last one; False where the kernel refuses it."""
        protection, flags, acts, file = KINDS[kind]
        at = self._next + gap_bytes
        if flags & HUGETLB:
            at, size_bytes = -(-at // (2 * MIB)) * 2 * MIB, 2 * MIB
        if at + size_bytes > self._start + self._size_bytes:
            return False
        if self._libc.mmap(at, size_bytes, protection, flags | FIXED, self._files[file], 0) != at:
            return False  # what was there is gone, and nothing is in its place
        self._next = at + size_bytes
        return all(self._act(act, at, size_bytes) for act in acts)

    def _act(self, act, at, size_bytes):
        if act == "write":
            ctypes.memset(at, 1, PAGE)
            return True
        if act == "pierce":
            middle = at + size_bytes // PAGE // 2 * PAGE
            return self._libc.mmap(middle, PAGE, NONE, PRIVATE | NORESERVE | FIXED, -1, 0) == middle
        if act in {"protect", "unprotect"}:
            return self._libc.mprotect(at, size_bytes, WRITE if act == "protect" else READ) == 0
        assert self._libc.madvise(at, size_bytes, act) == 0
        return True

    def close(self):
        self._libc.munmap(self._start, self._size_bytes)
        os.close(self._files["memory"])
        os.close(self._files["zero"])


def fork_answers():
    """What fork() answers: "granted", or an errno's name."""
    try:
        forked = os.fork()
    except OSError as error:
        return errno.errorcode[error.errno]
    if not forked:
        os._exit(0)
    os.waitpid(forked, 0)
    return "granted"


def draw_mappings(draw, mode):
    """Return (kind, size_bytes, gap_bytes) of what is to be mapped, such that about half of all forks are refused."""
    return draw_by_sum(draw) if mode == overcommit.NEVER else draw_by_largest(draw)


def draw_by_sum(draw):
    """Mode 2: the fork asks for once more what was mapped."""
    most_bytes = max(PAGE, (memsafe.memory_status().commit.headroom_bytes - bare_charge_bytes()) // 2)
    near = draw.random() < 0.5
    total_bytes = most_bytes + draw.randint(-32 * MIB, 32 * MIB) if near else most_bytes * draw.uniform(0.2, 1.8)
    weights = [draw.random() for _ in range(draw.randint(1, 12))]
    gaps = [0] if draw.random() < 0.5 else [0, 0, PAGE]
    for weight in weights:
        size_bytes = int(max(PAGE, total_bytes * weight / sum(weights))) // PAGE * PAGE
        yield draw_kind(draw), size_bytes, draw.choice(gaps)


@functools.cache
def bare_charge_bytes():
    return memsafe.assess_fork().commit_charge_bytes


def draw_by_largest(draw):
    """Modes 0 and 1: one mapping alone counts. The largest is made of two, as one request may not be so large."""
    for _ in range(draw.randint(0, 6)):
        yield draw_kind(draw), draw.randint(1, 4096) * PAGE, draw.choice([0, PAGE])
    limit_bytes = _request_limit_bytes()
    off_bytes = draw.choice([0, PAGE, PAGE, -PAGE, draw.randint(-64 * MIB, 64 * MIB) // PAGE * PAGE])
    half_bytes = draw.randint(limit_bytes // 3, limit_bytes * 2 // 3) // PAGE * PAGE
    kind = draw.choice(CHARGED)
    yield kind, half_bytes, PAGE
    yield kind, limit_bytes - half_bytes + off_bytes, 0 if draw.random() < 0.8 else PAGE


def draw_kind(draw):
    return draw.choice(CHARGED if draw.random() < 0.67 else list(KINDS))


def _request_limit_bytes():
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))


def draw_case(seed, mode, kind, tasks_max):
    """Map at random, *kind* as well; what was foretold, what fork answered, and how near a thing it was."""
    draw = random.Random(seed)
    wanted = [(kind, draw.randint(3, 64) * PAGE, PAGE), *draw_mappings(draw, mode)]
    address = Address(sum(size_bytes + gap_bytes for _, size_bytes, gap_bytes in wanted) + 64 * MIB)
    mapped = [each for each in wanted if address.add(*each)]
    _, most = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (tasks_max or most, most))
    foretold = memsafe.assess_fork()
    answer = fork_answers()
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    address.close()
    margin_bytes = None
    if foretold.commit_headroom_bytes is not None:
        margin_bytes = foretold.commit_headroom_bytes - foretold.commit_charge_bytes
    return {
        "foretold": foretold.kernel_would_allow,
        "answer": answer,
        "margin_bytes": margin_bytes,
        "mapped": mapped,
        "reasons": foretold.reasons,
    }


def slack_bytes():
    """How far the kernel's own counter may be off, in mode 2 (mm_compute_batch()), both ways."""
    cpus = os.cpu_count()
    batch_pages = max(os.sysconf("SC_PHYS_PAGES") // cpus // 256, 2 * cpus, 32)
    return cpus * batch_pages * PAGE


def surroundings(draw, sysctl, groups, swap_file, mode, kind, crowded):
    """Set what else the kernel's answer hangs on; return the RLIMIT_NPROC that the process is to have."""
    sysctl("vm/nr_hugepages", 3 if kind == "hugetlb" else draw.choice([0, 0, 3]))
    if mode == overcommit.NEVER:
        if draw.random() < 0.5:
            sysctl("vm/overcommit_ratio", draw.randint(60, 400))
        else:
            sysctl("vm/overcommit_kbytes", draw.randint(600, 4000) * 1024 + draw.randint(0, 1023))
        sysctl("vm/admin_reserve_kbytes", draw.randint(0, 128 * 1024))
        sysctl("vm/user_reserve_kbytes", draw.choice([0, draw.randint(0, 128 * 1024)]))
    full = draw.choice(groups) if crowded else None
    for each in groups:
        each["pids.max"] = each["pids.current"] if each is full else "max"
    if draw.random() < 0.2:
        if swap_file.is_on:
            swap_file.off()
        else:
            swap_file.on()
    return draw.choice([1, 2]) if draw.random() < 0.15 else None


def is_right(case):
    """What was foretold came; where fork was refused, for a reason that was given."""
    if case["answer"] == "granted":
        return case["foretold"] is True
    return case["foretold"] is False and any(case["answer"] in reason for reason in case["reasons"])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("mode", MODES)
def test_forks_answer_is_foretold(group, sysctl, swap_file, record_property, request, kernel, mode, user):
    own = group.child("own")
    seed = f"{request.config.option.seed} {mode} {user}"
    draw = random.Random(seed)
    for name in ("overcommit_memory", "overcommit_ratio"):
        sysctl(f"vm/{name}", Path("/proc/sys/vm", name).read_text().strip())  # to have it put back
    answers, kinds, near, wrong = Counter(), Counter(), Counter(), []
    with child.asking(draw_case, cgroup=own, user=user) as ask:
        sysctl("vm/overcommit_memory", mode)
        for number in range(CASES[mode]):
            kind = list(KINDS)[number % len(KINDS)]
            crowded = number % (2 if mode == overcommit.ALWAYS else 5) == 1
            tasks_max = surroundings(draw, sysctl, [own, group], swap_file, mode, kind, crowded)
            case = ask(f"{seed} {number}", mode, kind, tasks_max)
            kinds.update(kind for kind, _, _ in case["mapped"])
            right, margin_bytes = is_right(case), case["margin_bytes"]
            if mode == overcommit.NEVER and margin_bytes is not None and abs(margin_bytes) <= slack_bytes():
                near[right] += 1
                continue
            answers[case["answer"]] += right
            if not right:
                wrong.append({"number": number, "tasks_max": tasks_max, **case})
    row = {
        "kernel": ".".join(map(str, kernel)),
        "mode": mode,
        "user": user,
        "granted, foretold": answers["granted"],
        "ENOMEM, foretold": answers["ENOMEM"],
        "EAGAIN, foretold": answers["EAGAIN"],
        "wrong": len(wrong),
        "within slack": near.total(),
        "of them wrong": near[False],
        "mappings": kinds.total(),
    }
    record_property("fork, foretold and real", row)
    assert wrong == [], f"--seed {request.config.option.seed}"
    assert kinds.keys() == KINDS.keys()
    assert answers["granted"] >= CASES[mode] // 10
    assert answers["ENOMEM"] >= (CASES[mode] // 10 if mode != overcommit.ALWAYS else 0)
    assert answers["EAGAIN"] >= (CASES[mode] // 10 if mode == overcommit.ALWAYS else 1)
