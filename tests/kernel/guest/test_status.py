"""memory_status() where cgroup v2 has the memory controller."""

import mmap
import os
from pathlib import Path

import memsafe
from tests.kernel.guest import child

MIB = 1024 * 1024


def status():
    return memsafe.memory_status().as_dict()


def of_cgroups(plain):
    kinds = ("memory.max", "memory.high")
    return [(c["kind"], c["path"], c["limit_bytes"]) for c in plain["constraints"] if c["kind"] in kinds]


def test_the_root_cgroup_has_no_limit_and_nothing_is_missing():
    plain = child.run(status)
    assert Path("/proc/self/cgroup").read_text() == "0::/\n"
    assert of_cgroups(plain) == []
    assert plain["warnings"] == []
    assert plain["binding"]["kind"] == "physical"


def test_own_limits_and_every_ancestors_are_listed_own_first(group):
    group["memory.max"] = 512 * MIB
    middle = group.child("middle", memory_high=384 * MIB)
    own = middle.child("own", memory_max=256 * MIB, memory_high=128 * MIB)
    name = f"/{group.path.name}"
    plain = child.run(status, cgroup=own)
    assert of_cgroups(plain) == [
        ("memory.max", f"{name}/middle/own", 256 * MIB),
        ("memory.high", f"{name}/middle/own", 128 * MIB),
        ("memory.high", f"{name}/middle", 384 * MIB),
        ("memory.max", name, 512 * MIB),
    ]
    assert plain["warnings"] == []
    assert plain["limit_bytes"] == 128 * MIB
    assert plain["binding"]["kind"] == "memory.high"
    assert plain["binding"]["consequence"] == "throttle"


def used_beside(plain, kind):
    return [c["used_bytes"] for c in plain["constraints"] if c["kind"] == kind]


def test_usage_is_the_kernels(group):
    own = group.child("own", memory_max=256 * MIB)
    plain = child.run(holding, 64 * MIB, cgroup=own)
    (used_bytes,) = used_beside(plain, "memory.max")
    assert 64 * MIB <= used_bytes <= int(own["memory.peak"])
    assert plain["available_bytes"] < 192 * MIB


def holding(size_bytes):
    held = b"x" * size_bytes
    plain = status()
    assert held
    return plain


def hold_until_told(size_bytes):
    held = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, size_bytes, mmap.PAGESIZE):
        held[offset] = 1
    print("held", flush=True)
    input()


def test_an_ancestor_used_up_by_a_sibling_binds(group):
    """Headroom is the least over self and every ancestor of limit - usage, not the least limit less own usage."""
    group["memory.max"] = 256 * MIB
    own, sibling = group.child("own", memory_max=200 * MIB), group.child("sibling")
    with child.start(hold_until_told, 160 * MIB, cgroup=sibling, stdin=child.subprocess.PIPE) as holder:
        assert holder.stdout.readline() == "held\n"
        plain = child.run(status, cgroup=own)
        holder.communicate("\n")
    assert plain["limit_bytes"] == 200 * MIB
    assert plain["binding"]["path"] == f"/{group.path.name}"
    assert plain["available_bytes"] < 96 * MIB


def fill_cache(path, size_bytes):
    with open(path, "wb") as file:
        for _ in range(size_bytes // MIB):
            file.write(bytes(MIB))
        file.flush()
        os.fsync(file.fileno())
    return status()


def test_page_cache_does_not_use_headroom_up(group, scratch):
    own = group.child("own", memory_max=256 * MIB)
    plain = child.run(fill_cache, str(scratch / "file"), 160 * MIB, cgroup=own)
    (limit,) = [c for c in plain["constraints"] if c["kind"] == "memory.max"]
    assert limit["used_bytes"] > 160 * MIB
    assert limit["reclaimable_bytes"] > 150 * MIB
    assert limit["headroom_bytes"] > 200 * MIB


def take_headroom(path):
    """Fill 160 MiB with cache, then hold what is said to be left, but for what the interpreter may take meanwhile."""
    held_bytes = fill_cache(path, 160 * MIB)["available_bytes"] - 8 * MIB
    held = mmap.mmap(-1, held_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, held_bytes, mmap.PAGESIZE):
        held[offset] = 1
    return held_bytes


def test_the_kernel_gives_the_headroom_that_was_promised(group, scratch):
    own = group.child("own", memory_max=256 * MIB)
    assert child.run(take_headroom, str(scratch / "file"), cgroup=own) > 180 * MIB
    assert own.flat("memory.events")["oom_kill"] == 0


def test_a_limit_that_is_changed_is_seen(group):
    own = group.child("own", memory_max=256 * MIB)
    changed = child.run(before_and_after, str(own.path / "memory.max"), 128 * MIB, cgroup=own)
    assert changed == [256 * MIB, 128 * MIB]


def before_and_after(path, limit_bytes):
    before = memsafe.memory_status().limit_bytes
    Path(path).write_text(str(limit_bytes))
    return [before, memsafe.memory_status().limit_bytes]


def test_the_cgroups_own_pressure_is_told(group):
    own = group.child("own")
    told = child.run(status, cgroup=own)["pressure"]
    assert told["source"] == f"{own.path}/memory.pressure"
    assert told["some"]["avg10"] >= 0


def test_a_cgroup_without_the_controller_is_bound_by_its_nearest_ancestor_that_has_it(group):
    group["memory.max"] = 256 * MIB
    inner = type(group)(group.path / "inner")
    inner.path.mkdir()
    assert not (inner.path / "memory.max").exists()
    plain = child.run(status, cgroup=inner)
    assert of_cgroups(plain) == [("memory.max", f"/{group.path.name}", 256 * MIB)]
    assert plain["warnings"] == []


def in_namespace():
    import ctypes

    clone_newcgroup, clone_newns = 0x02000000, 0x00020000
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(clone_newcgroup | clone_newns) == 0
    private = 1 << 18 | 1 << 14
    assert libc.mount(None, b"/", None, private, None) == 0
    assert libc.umount2(b"/sys/fs/cgroup", 2) == 0
    assert libc.mount(b"cgroup2", b"/sys/fs/cgroup", b"cgroup2", 0, None) == 0
    return {"membership": Path("/proc/self/cgroup").read_text(), **status()}


def test_the_root_of_a_cgroup_namespace_has_limits(group):
    """As in a container: 0::/ and memory.max is there."""
    own = group.child("own", memory_max=256 * MIB)
    plain = child.run(in_namespace, cgroup=own)
    assert plain["membership"] == "0::/\n"
    assert of_cgroups(plain) == [("memory.max", "/", 256 * MIB)]
    assert plain["warnings"] == []


def test_an_ordinary_user_sees_the_same(group):
    own = group.child("own", memory_max=256 * MIB)
    plain = child.run(status, cgroup=own, user=child.ORDINARY)
    assert of_cgroups(plain) == [("memory.max", f"/{group.path.name}/own", 256 * MIB)]
    assert plain["warnings"] == []
