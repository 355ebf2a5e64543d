"""assess_fork() against fork() itself: random mappings, ratios, reserves and users, in every mode of overcommit.

The answer must be the kernel's each time, but where it hangs on less than the kernel's own counter is exact by: mode 2
reads a sum of per-CPU counters of which each may be off by a batch (mm/mm_init.c, mm_compute_batch()).
"""

import ctypes
import functools
import json
import mmap
import os
import random
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import memsafe
from memsafe._kernel import overcommit
from tests.kernel.guest import child

MIB = 1024 * 1024
PAGE = mmap.PAGESIZE
CASES = {overcommit.GUESS: 25, overcommit.ALWAYS: 20, overcommit.NEVER: 60}

USERS = (child.ROOT, child.ROOT_WITHOUT_SYS_ADMIN, child.ORDINARY, child.ROOT_OF_A_NAMESPACE)
MODES = (overcommit.GUESS, overcommit.ALWAYS, overcommit.NEVER)

NONE, READ, WRITE = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
FIXED, NORESERVE, HUGETLB = 0x10, 0x4000, 0x40000
DONTFORK, WIPEONFORK = 10, 18

# What a mapping may be: its protection, its flags, what is done with it.
KINDS = {
    "private": (WRITE, PRIVATE, ()),
    "written": (WRITE, PRIVATE, ("write",)),
    "read-only": (READ, PRIVATE, ()),
    "inaccessible": (NONE, PRIVATE, ()),
    "made writable": (NONE, PRIVATE, ("protect",)),
    "made read-only once written": (WRITE, PRIVATE, ("write", "unprotect")),
    "noreserve": (WRITE, PRIVATE | NORESERVE, ()),
    "shared": (WRITE, SHARED, ()),
    "of a file": (WRITE, mmap.MAP_PRIVATE, ()),
    "dontfork": (WRITE, PRIVATE, (DONTFORK,)),
    "wipeonfork": (WRITE, PRIVATE, (WIPEONFORK,)),
    "hugetlb": (WRITE, PRIVATE | HUGETLB, ()),
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
        self._file = os.memfd_create("mapped")
        os.ftruncate(self._file, size_bytes)

    def add(self, kind, size_bytes, gap_bytes):
        """Put a mapping after the last one; False where the kernel refuses it."""
        protection, flags, acts = KINDS[kind]
        at = self._next + gap_bytes
        if flags & HUGETLB:
            at, size_bytes = -(-at // (2 * MIB)) * 2 * MIB, 2 * MIB
        if at + size_bytes > self._start + self._size_bytes:
            return False
        fd = self._file if kind == "of a file" else -1
        if self._libc.mmap(at, size_bytes, protection, flags | FIXED, fd, 0) != at:
            return False  # what was there is gone, and nothing is in its place
        self._next = at + size_bytes
        for act in acts:
            if act == "write":
                ctypes.memset(at, 1, PAGE)
            elif act in {"protect", "unprotect"}:
                if self._libc.mprotect(at, size_bytes, WRITE if act == "protect" else READ):
                    return False
            else:
                assert self._libc.madvise(at, size_bytes, act) == 0
        return True

    def close(self):
        self._libc.munmap(self._start, self._size_bytes)
        os.close(self._file)


def fork_answers():
    """Whether fork() is granted, by asking it."""
    try:
        forked = os.fork()
    except OSError as error:
        return error.strerror
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


def draw_case(seed, mode):
    """Map at random; what was foretold, what fork answered, and how near a thing it was."""
    draw = random.Random(seed)
    wanted = list(draw_mappings(draw, mode))
    address = Address(sum(size_bytes + gap_bytes for _, size_bytes, gap_bytes in wanted) + 64 * MIB)
    mapped = [each for each in wanted if address.add(*each)]
    foretold = memsafe.assess_fork()
    answer = fork_answers()
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


def answer_cases():
    """Answer one line of [seed, mode] with one line, until there are no more."""
    while True:
        try:
            line = input()
        except EOFError:
            return
        print(json.dumps(draw_case(*json.loads(line))), flush=True)


def slack_bytes():
    """How far the kernel's own counter may be off, in mode 2 (mm_compute_batch()), both ways."""
    cpus = os.cpu_count()
    batch_pages = max(os.sysconf("SC_PHYS_PAGES") // cpus // 256, 2 * cpus, 32)
    return cpus * batch_pages * PAGE


def surroundings(draw, sysctl, group, swap_file, mode):
    """Set what else the kernel's answer hangs on."""
    sysctl("vm/nr_hugepages", draw.choice([0, 0, 3]))
    if mode == overcommit.NEVER:
        if draw.random() < 0.5:
            sysctl("vm/overcommit_ratio", draw.randint(60, 400))
        else:
            sysctl("vm/overcommit_kbytes", draw.randint(600, 4000) * 1024 + draw.randint(0, 1023))
        sysctl("vm/admin_reserve_kbytes", draw.randint(0, 128 * 1024))
        sysctl("vm/user_reserve_kbytes", draw.choice([0, draw.randint(0, 128 * 1024)]))
    group["pids.max"] = group["pids.current"] if draw.random() < (0.3 if mode == overcommit.ALWAYS else 0.1) else "max"
    if draw.random() < 0.2:
        swaps = "off" if swap_file in Path("/proc/swaps").read_text() else "on"
        subprocess.run([f"swap{swaps}", swap_file], check=True)


@pytest.fixture
def swap_file(scratch):
    path = scratch / "swap"
    path.write_bytes(bytes(48 * MIB))
    path.chmod(0o600)
    subprocess.run(["mkswap", path], check=True, stdout=subprocess.DEVNULL)
    yield str(path)
    if str(path) in Path("/proc/swaps").read_text():
        subprocess.run(["swapoff", path], check=True)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("mode", MODES)
def test_forks_answer_is_foretold(group, sysctl, swap_file, record_property, kernel, mode, user):
    own = group.child("own")
    draw = random.Random(f"{mode} {user}")
    before = [(name, Path("/proc/sys/vm", name).read_text()) for name in ("overcommit_memory", "overcommit_ratio")]
    for name, value in before:
        sysctl(f"vm/{name}", value.strip())  # to have it put back
    table, wrong = Counter(), []
    with child.start(answer_cases, cgroup=own, user=user, stdin=subprocess.PIPE) as asked:
        sysctl("vm/overcommit_memory", mode)
        for number in range(CASES[mode]):
            surroundings(draw, sysctl, own, swap_file, mode)
            print(json.dumps([f"{mode} {user} {number}", mode]), file=asked.stdin, flush=True)
            line = asked.stdout.readline()
            if not line:
                pytest.fail(f"case {number}: {asked.stderr.read()}")
            case = json.loads(line)
            granted = case["answer"] == "granted"
            near = mode == overcommit.NEVER and case["margin_bytes"] is not None
            near = near and abs(case["margin_bytes"]) <= slack_bytes()
            table[case["foretold"], granted, near] += 1
            if case["foretold"] is not granted and not near:
                wrong.append({"number": number, **case})
        asked.stdin.close()
    row = {
        "kernel": ".".join(map(str, kernel)),
        "mode": mode,
        "user": user,
        "granted, foretold": table[True, True, False],
        "refused, foretold": table[False, False, False],
        "wrong": len(wrong),
        "within slack": sum(count for key, count in table.items() if key[2]),
        "of them wrong": table[True, False, True] + table[False, True, True],
    }
    record_property("fork, foretold and real", row)
    assert wrong == []
    assert row["granted, foretold"] >= CASES[mode] // 10
    assert row["refused, foretold"] >= (CASES[mode] // 10 if mode != overcommit.ALWAYS else 1)
