"""fork_snapshot() where cgroup v2 has the memory controller, and where fork is refused."""

import errno
import mmap
import os
import select

import pytest

import memsafe
from tests.integration.copies import keep_sentries_out
from tests.kernel.guest import child

MIB = 1024 * 1024
PATIENCE_S = 60

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def state_of(size_bytes):
    """Memory of this process's own, every page of it written."""
    state = mmap.mmap(-1, size_bytes, PRIVATE)
    for offset in range(0, size_bytes, MIB):
        state[offset : offset + MIB] = os.urandom(16) * (MIB // 16)
    return state


def snapshot(path, size_bytes, max_copy=None):
    state = state_of(size_bytes)

    def write(out):
        for offset in range(0, size_bytes, MIB):
            out.write(state[offset : offset + MIB])

    try:
        result = memsafe.fork_snapshot(path, write, max_copy=max_copy).wait(PATIENCE_S)
    except memsafe.SnapshotRefusedError as error:
        return {"refused": str(error), **error.assessment.as_dict()}
    with open(path, "rb") as file:
        same = all(file.read(MIB) == state[offset : offset + MIB] for offset in range(0, size_bytes, MIB))
        return {"same": same and not file.read(1), **result.as_dict()}


@pytest.fixture
def path(scratch):
    target = scratch / "dump"
    target.write_bytes(b"old")
    return target


def test_a_snapshot_that_fits_is_taken(group, path):
    group["memory.max"] = 256 * MIB
    own = group.child("own", memory_max=192 * MIB)
    told = child.run(snapshot, str(path), 32 * MIB, cgroup=own)
    assert told["same"]
    assert told["peak_copy_bytes"] < 32 * MIB, "reading a mapping copies none of it"
    assert own.flat("memory.events")["oom_kill"] == 0


def test_a_snapshot_that_an_ancestor_has_no_room_for_is_refused(group, path):
    group["memory.max"] = 160 * MIB
    own = group.child("own", memory_max=1024 * MIB)
    told = child.run(snapshot, str(path), 96 * MIB, cgroup=own)
    assert told["decision"] == "refuse"
    assert told["binding"]["path"] == f"/{group.path.name}"
    assert told["copy_forecast_bytes"] > 96 * MIB
    assert "160 MiB" in told["refused"]
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


def test_one_for_which_a_neighbour_left_no_room_is_deferred(group, path):
    group["memory.max"] = 256 * MIB
    own, neighbour = group.child("own"), group.child("neighbour")
    with child.start(hold_until_told, 144 * MIB, cgroup=neighbour, stdin=child.subprocess.PIPE) as holder:
        assert holder.stdout.readline() == "held\n"
        told = child.run(snapshot, str(path), 64 * MIB, cgroup=own)
        holder.communicate("\n")
    assert told["decision"] == "defer"
    assert child.run(snapshot, str(path), 64 * MIB, cgroup=own)["same"]


def hold_until_told(size_bytes):
    held = state_of(size_bytes)
    print("held", flush=True)
    input()
    return len(held)


def test_a_bound_on_copies_lets_it_in_where_a_full_copy_would_not_fit(group, path):
    own = group.child("own", memory_max=160 * MIB)
    assert child.run(snapshot, str(path), 96 * MIB, "16 MiB", cgroup=own)["same"]


def shot(path, size_bytes):
    """Take a snapshot whose child takes more memory than there is; what comes of it."""
    keep_sentries_out()
    begin, ended = os.pipe(), []

    def write(out):
        out.progress(os.getpid(), os.getpid())
        os.read(begin[0], 1)
        state_of(size_bytes)

    def on_progress(pid, _):
        # While this lasts nothing is measured, so that the OOM killer comes before memsafe's own bound.
        pidfd = os.pidfd_open(pid)
        os.write(begin[1], b"!")
        ended.append(bool(select.select([pidfd], [], [], PATIENCE_S)[0]))
        os.close(pidfd)

    job = memsafe.fork_snapshot(path, write, on_progress=on_progress, keep_fds=[begin[0]])
    try:
        job.wait(PATIENCE_S)
    except memsafe.MemsafeError as error:
        return {"error": type(error).__name__, "message": str(error), "ended": ended}
    return {}


def test_a_child_shot_in_its_cgroup_is_told_and_the_parent_lives(group, path):
    own = group.child("own", memory_max=96 * MIB)
    told = child.run(shot, str(path), 192 * MIB, cgroup=own)
    assert told["ended"] == [True]
    assert told["error"] == "OOMKilledError", told["message"]
    assert path.read_bytes() == b"old"
    assert own.flat("memory.events.local")["oom_kill"] == 1


def test_a_child_shot_for_an_ancestors_limit_is_told(group, path):
    group["memory.max"] = 96 * MIB
    own = group.child("own", memory_max=512 * MIB)
    told = child.run(shot, str(path), 192 * MIB, cgroup=own)
    assert told["error"] == "OOMKilledError", told["message"]


def test_a_child_shot_because_the_whole_machine_is_short_is_told_and_everybody_else_lives(group, path):
    own = group.child("own")
    total_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    told = child.run(shot, str(path), total_bytes, cgroup=own)
    assert told["error"] == "OOMKilledError", told["message"]
    assert path.read_bytes() == b"old"


# Mode 2: a fork that the kernel refuses.


def beside_a_large_mapping(path, share_percent):
    """Map a share of what may still be promised, then fork in three ways."""
    headroom_bytes = memsafe.memory_status().commit.headroom_bytes
    held = mmap.mmap(-1, headroom_bytes // 100 * share_percent, PRIVATE)
    told = {"assessment": memsafe.assess_fork().as_dict()}
    try:
        forked = os.fork()
        if not forked:
            os._exit(0)
        os.waitpid(forked, 0)
        told["fork"] = 0
    except OSError as error:
        told["fork"] = error.errno
    told["run"] = memsafe.run(["true"]).returncode
    try:
        memsafe.fork_snapshot(path, lambda out: out.write(b"new")).wait(PATIENCE_S)
    except memsafe.SnapshotRefusedError as error:
        told["refused"] = str(error)
    held.close()
    return told


@pytest.mark.parametrize("user", [child.ROOT, child.ORDINARY])
def test_where_the_kernel_refuses_fork_it_is_foretold_and_children_still_start(sysctl, path, user):
    path.chmod(0o666)
    sysctl("vm/overcommit_memory", 2)
    sysctl("vm/overcommit_ratio", 100)
    told = child.run(beside_a_large_mapping, str(path), 70, user=user)
    assert told["assessment"]["kernel_would_allow"] is False
    assert told["assessment"]["decision"] == "refuse"
    assert told["fork"] == errno.ENOMEM
    assert told["run"] == 0
    assert "vm.overcommit_memory=2" in told["refused"]
    assert path.read_bytes() == b"old"


def test_in_mode_2_a_fork_that_fits_is_foretold_and_granted(sysctl, path):
    sysctl("vm/overcommit_memory", 2)
    sysctl("vm/overcommit_ratio", 100)
    told = child.run(beside_a_large_mapping, str(path), 30)
    assert told["assessment"]["kernel_would_allow"] is True
    assert (told["fork"], told["run"]) == (0, 0)
    assert path.read_bytes() == b"new"


def image_from(size_bytes, path, spared):
    block = bytes(range(256)) * 4096

    def write(out):
        for _ in range(size_bytes // MIB):
            out.write(block)

    if spared:
        return memsafe.fork_snapshot(path, write, max_copy="24 MiB", checksum="crc32").wait(PATIENCE_S).as_dict()
    with open(path, "wb") as out:
        write(out)
        os.fsync(out.fileno())
    return {"size_bytes": os.stat(path).st_size}


@pytest.mark.parametrize("spared", [True, False])
def test_an_image_larger_than_its_cgroup_never_meets_the_limit_where_a_plain_file_does(group, path, spared):
    own = group.child("own", memory_max=64 * MIB)
    told = child.run(image_from, 128 * MIB, str(path), spared, cgroup=own)
    assert told["size_bytes"] == 128 * MIB
    events = own.flat("memory.events")
    assert bool(events["max"]) is not spared
    assert events["oom_kill"] == 0
