"""What this machine's kernel says and does, against what memsafe says of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

import memsafe
from memsafe._kernel import machine
from tests.integration import cgroups

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1024 * 1024


def run_child(script: str, *args: object, procs: str | None = None) -> Any:
    """Run *script* in a process of its own, in the cgroup of *procs*, and return the JSON that it prints."""
    join = f"open({procs!r}, 'w').write(str(__import__('os').getpid()))\n" if procs else ""
    done = subprocess.run(
        [sys.executable, "-c", join + script, *map(str, args)], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def own_group() -> Iterator[Path]:
    """A new v1 memory cgroup below that of the tests."""
    with cgroups.v1_memory_group() as group:
        yield group


def test_nothing_here_is_unreadable() -> None:
    status = memsafe.memory_status()
    assert status.warnings == ()
    assert status.binding in status.constraints
    assert status.available_bytes is not None
    assert status.limit_bytes is not None
    assert 0 < status.available_bytes <= status.limit_bytes


def test_physical_memory_agrees_with_psutil() -> None:
    (physical,) = (c for c in memsafe.memory_status().constraints if c.kind == "physical")
    assert physical.limit_bytes == psutil.virtual_memory().total + psutil.swap_memory().total


def test_the_process_agrees_with_psutil() -> None:
    own, theirs = memsafe.memory_status().process, psutil.Process().memory_full_info()
    assert own.rss_bytes == pytest.approx(theirs.rss, abs=16 * MIB)
    assert own.pss_bytes == pytest.approx(theirs.pss, abs=16 * MIB)
    assert own.anonymous_bytes is not None
    assert own.oom_score_adj == int(Path("/proc/self/oom_score_adj").read_text())


def test_the_commit_limit_is_the_kernels_by_our_arithmetic_too(tmp_path: Path) -> None:
    text = Path("/proc/meminfo").read_text()
    (tmp_path / "proc/sys").mkdir(parents=True)
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("CommitLimit")]
    (tmp_path / "proc/meminfo").write_text("".join(lines))
    (tmp_path / "proc/sys/vm").symlink_to("/proc/sys/vm")
    assert memsafe.memory_status(root=tmp_path).commit.limit_bytes == machine.meminfo().commit_limit_bytes


STATUS = """
import json, memsafe
held = bytearray(32 << 20)
print(json.dumps(memsafe.memory_status().as_dict()))
"""


@pytest.mark.cgroup
def test_a_cgroups_limit_and_use_are_seen_from_inside(own_group: Path) -> None:
    (own_group / "memory.limit_in_bytes").write_text(str(256 * MIB))
    status = run_child(STATUS, procs=str(own_group / "cgroup.procs"))
    first = status["constraints"][0]
    assert first["path"].endswith(own_group.name)
    assert (first["kind"], first["limit_bytes"]) == ("memory.limit_in_bytes", 256 * MIB)
    assert 32 * MIB <= first["used_bytes"] < 256 * MIB
    assert status["limit_bytes"] == 256 * MIB
    assert status["available_bytes"] == first["headroom_bytes"] <= 224 * MIB


CACHE = """
import json, memsafe, os, sys
with open(sys.argv[1], "wb") as file:
    for _ in range(96):
        file.write(os.urandom(1 << 20))
    file.flush()
    os.fsync(file.fileno())
print(json.dumps(memsafe.memory_status().as_dict()["constraints"][0]))
"""


@pytest.mark.cgroup
def test_a_file_just_written_does_not_count_as_used(own_group: Path, tmp_path: Path) -> None:
    (own_group / "memory.limit_in_bytes").write_text(str(256 * MIB))
    limit = run_child(CACHE, tmp_path / "written", procs=str(own_group / "cgroup.procs"))
    free_bytes = limit["headroom_bytes"] + limit["active_file_bytes"]
    if limit["reclaimable_bytes"] + limit["active_file_bytes"] < 64 * MIB:
        pytest.skip("this file system keeps no page cache of what is written")
    assert free_bytes > 256 * MIB - limit["used_bytes"] + 64 * MIB


FORK = """
import json, memsafe, mmap, os, sys

flags, both = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE
size = 512 << 20
WIPEONFORK, NORESERVE = 18, 0x4000
maps = [mmap.mmap(-1, size, flags, both) for _ in range(4)]
maps[1].madvise(mmap.MADV_DONTFORK)
maps[2].madvise(WIPEONFORK)
maps.append(mmap.mmap(-1, size, flags | NORESERVE, both))
maps.append(mmap.mmap(-1, size, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, both))
maps.append(mmap.mmap(-1, size, flags, mmap.PROT_READ))
maps[0][: 8 << 20] = bytes(8 << 20)
foretold = memsafe.assess_fork()

def committed():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Committed_AS"))

deltas = []
for _ in range(7):
    before, (wait, go) = committed(), os.pipe()
    child = os.fork()
    if not child:
        os.close(go)
        os.read(wait, 1)
        os._exit(0)
    deltas.append(committed() - before)
    os.close(go)
    os.close(wait)
    os.waitpid(child, 0)
print(json.dumps({"charge": foretold.commit_charge_bytes, "copy": foretold.copy_forecast_bytes, "deltas": deltas}))
"""


def test_fork_is_charged_what_was_foretold() -> None:
    if machine.overcommit_mode() == 2:
        pytest.skip("vm.overcommit_memory is 2: mappings of 512 MiB may be refused before the fork")
    told = run_child(FORK)
    # Others on this machine map and unmap meanwhile: the median of a few, and slack far below one mapping of 512 MiB.
    median = sorted(told["deltas"])[len(told["deltas"]) // 2]
    assert median == pytest.approx(told["charge"], abs=64 * MIB), told
    assert told["charge"] >= 3 * 512 * MIB
    assert 8 * MIB <= told["copy"] < 128 * MIB, "untouched memory is not copied"


FORK_REFUSED = """
import ctypes, json, memsafe, mmap, os, sys

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
flags, both = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE
FIXED, NORESERVE = 0x10, 0x4000
half = int(sys.argv[1]) // 10 * 6 & -(1 << 21)
gap = 1 << 21 if sys.argv[2] == "apart" else 0
# With room on both sides: Linux 6.1 would rather make one mapping of the second and its upper neighbour.
base = libc.mmap(None, 2 * half + gap + (2 << 21), 0, flags | NORESERVE, -1, 0) + (1 << 21)
for at in (base, base + half + gap):
    assert libc.mmap(at, half, both, flags | FIXED, -1, 0) == at, os.strerror(ctypes.get_errno())
foretold = memsafe.assess_fork()
try:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    answer = True
except OSError as error:
    answer = False
print(json.dumps({"foretold": foretold.kernel_would_allow, "answer": answer, "reasons": foretold.reasons}))
"""


@pytest.mark.parametrize("where", ["adjacent", "apart"])
def test_forks_own_answer_is_foretold(where: str) -> None:
    mode = machine.overcommit_mode()
    if mode == 2:
        pytest.skip("vm.overcommit_memory is 2: a mapping of half of the memory may be refused before the fork")
    total_bytes = psutil.virtual_memory().total + psutil.swap_memory().total
    told = run_child(FORK_REFUSED, total_bytes, where)
    assert told["foretold"] == told["answer"] == (mode == 1 or where == "apart"), told


def test_a_status_read_in_a_forked_child_is_the_childs() -> None:
    script = "import json, memsafe, os, sys\n" + (
        "memsafe.memory_status()\nchild = os.fork()\n"
        "if child:\n    os.waitpid(child, 0)\n"
        "else:\n    held = b'x' * (64 << 20)\n"
        "    print(json.dumps(memsafe.memory_status().process.anonymous_bytes), flush=True)\n    os._exit(0)\n"
    )
    assert run_child(script) > 64 * MIB


WARM = """
import json, memsafe, os, resource
for _ in range(3):
    memsafe.memory_status()
before = memsafe.memory_status()
resource.setrlimit(resource.RLIMIT_NOFILE, (1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
warm = memsafe.memory_status()
kinds = [[(c.kind, c.path, c.limit_bytes) for c in status.constraints] for status in (before, warm)]
print(json.dumps({"warnings": warm.warnings, "kinds": kinds, "pressure": [bool(before.pressure), bool(warm.pressure)]}))
"""


def test_a_warm_call_needs_no_descriptor_that_it_has_not_yet() -> None:
    told = run_child(WARM)
    assert told["warnings"] == []
    assert told["kinds"][0] == told["kinds"][1]
    assert told["pressure"][0] == told["pressure"][1]


IN_CHILD = """
import json, memsafe, os
def kernel_files():
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            pass
    return sorted(link for link in links if link.startswith(("/proc", "/sys")) and not link.endswith("/fd"))
for _ in range(3):
    memsafe.memory_status()
kept = kernel_files()
child = os.fork()
if child:
    os.waitpid(child, 0)
else:
    at_first = kernel_files()
    for _ in range(3):
        memsafe.memory_status()
    print(json.dumps({"parent": kept, "at_first": at_first, "child": kernel_files(), "pid": os.getpid()}), flush=True)
    os._exit(0)
"""


def test_a_forked_child_keeps_its_own_descriptors_and_none_of_its_parents() -> None:
    told = run_child(IN_CHILD)
    assert told["parent"]
    assert told["at_first"] == []
    assert len(told["child"]) == len(told["parent"])
    assert f"/proc/{told['pid']}/status" in told["child"]


MOVED = """
import json, memsafe, os, sys
from pathlib import Path
group = Path(sys.argv[1])
def own():
    first = memsafe.memory_status().constraints[0]
    return first.path.rpartition("/")[2], first.limit_bytes >> 20
def numbers():
    return len(os.listdir("/proc/self/fd"))
def join(where):
    (where / "cgroup.procs").write_text(str(os.getpid()))
def make(name, mib):
    (group / name).mkdir()
    (group / name / "memory.limit_in_bytes").write_text(str(mib << 20))
told, opened = [], []
make("a", 64)
make("b", 65)
join(group / "a")
for _ in range(3):
    own()
opened.append(numbers())
told.append(own())
(group / "a" / "memory.limit_in_bytes").write_text(str(66 << 20))
told.append(own())
join(group / "b")
for _ in range(3):
    own()
told.append(own())
opened.append(numbers())
(group / "a").rmdir()
make("a", 67)
join(group / "a")
told.append(own())
(join(group / "b"), (group / "a").rmdir(), make("a", 68), join(group / "a"))
told.append(own())
told.append(own())
join(group)
os.system(f"rmdir {group}/a {group}/b")
warnings = memsafe.memory_status().warnings
print(json.dumps({"told": told, "opened": opened, "warnings": warnings}))
"""


@pytest.mark.cgroup
def test_a_process_that_is_moved_and_a_cgroup_made_anew_are_seen_at_once(own_group: Path) -> None:
    (own_group / "memory.limit_in_bytes").write_text(str(256 * MIB))
    told = run_child(MOVED, own_group, procs=str(own_group / "cgroup.procs"))
    assert told["told"] == [["a", 64], ["a", 66], ["b", 65], ["a", 67], ["a", 68], ["a", 68]]
    assert told["opened"][0] == told["opened"][1]
    assert told["warnings"] == []


MOUNTS = """
import ctypes, json, memsafe, os, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
NEWNS, BIND, PRIVATE, REC, DETACH = 0x20000, 0x1000, 1 << 18, 0x4000, 2
def must(result):
    if result:
        print(json.dumps({"skip": os.strerror(ctypes.get_errno())}))
        sys.exit()
def total():
    (physical,) = (c for c in memsafe.memory_status().constraints if c.kind == "physical")
    return physical.limit_bytes
def fake(kilobytes, name):
    path = os.path.join(sys.argv[1], name)
    with open(path, "w") as file:
        file.write(f"MemTotal: {kilobytes} kB\\nMemFree: 1 kB\\nMemAvailable: 1 kB\\n")
    return path.encode()
for _ in range(3):
    real = total()
must(libc.unshare(NEWNS))
must(libc.mount(b"none", b"/", None, REC | PRIVATE, None))
must(libc.mount(fake(1024, "first"), b"/proc/meminfo", None, BIND, None))
told = [total(), total()]
must(libc.mount(fake(2048, "second"), b"/proc/meminfo", None, BIND, None))
told += [total(), total()]
must(libc.umount2(b"/proc/meminfo", DETACH))
told.append(total())
must(libc.umount2(b"/proc/meminfo", DETACH))
told.append(total())
print(json.dumps({"told": told, "real": real}))
"""


def test_mounts_that_change_and_another_mount_namespace_are_seen_at_once(tmp_path: Path) -> None:
    told = run_child(MOUNTS, tmp_path)
    if "skip" in told:
        pytest.skip(f"may not mount: {told['skip']}")
    assert told["told"] == [1 * MIB, 1 * MIB, 2 * MIB, 2 * MIB, 1 * MIB, told["real"]]


NAMESPACE = """
import ctypes, json, memsafe, os
from memsafe.status import status_once
libc = ctypes.CDLL(None, use_errno=True)
NEWCGROUP, NEWUSER = 0x02000000, 0x10000000
def told(status):
    return [(each.path, each.limit_bytes) for each in status.constraints if each.path], status.warnings
for _ in range(3):
    memsafe.memory_status()
if libc.unshare(NEWCGROUP if os.geteuid() == 0 else NEWCGROUP | NEWUSER):
    print(json.dumps({"skip": os.strerror(ctypes.get_errno())}))
else:
    print(json.dumps({"kept": told(memsafe.memory_status()), "fresh": told(status_once("/"))}))
"""


@pytest.mark.cgroup
def test_another_cgroup_namespace_is_seen_at_once_though_no_mount_changed(own_group: Path) -> None:
    (own_group / "memory.limit_in_bytes").write_text(str(256 * MIB))
    told = run_child(NAMESPACE, procs=str(own_group / "cgroup.procs"))
    if "skip" in told:
        pytest.skip(f"may make no cgroup namespace: {told['skip']}")
    assert told["kept"] == told["fresh"]


NPROC = """
import json, memsafe, os, resource, subprocess, time
from memsafe._kernel import tasks
from memsafe._kernel.cgroup import placement
if os.getuid() == 0:
    user = 60000 + os.getpid() % 5000  # another one than that of the same test beside this one
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
waiting = [subprocess.Popen(["sleep", "1000"]) for _ in range(2)]
found = []
for limit in (3, 4):
    resource.setrlimit(resource.RLIMIT_NPROC, (limit, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
    foretold = tasks.exhausted(placement())
    try:
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        answer = True
    except BlockingIOError:
        answer = False
    found.append([foretold is None, answer])
for process in waiting:
    process.kill()
    process.wait()
print(json.dumps(found))
"""


def test_what_rlimit_nproc_answers_is_foretold() -> None:
    if os.getuid() != 0:
        pytest.skip("how many tasks this user has is not ours to say; as root the test becomes a user of its own")
    assert run_child(NPROC) == [[False, False], [True, True]]
