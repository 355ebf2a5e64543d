"""Children where fork cannot be: almost all commit used in mode 2; and cgroup v2, made for a child and born into."""

import errno
import mmap
import os
import signal
import subprocess
import sys

import pytest

import memsafe
from memsafe._kernel import overcommit
from tests.integration import sealed
from tests.kernel.guest import child

MIB = 1024 * 1024
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
PIPE = subprocess.PIPE
SPARE_BYTES = 24 * MIB  # for the small program, and for what this interpreter still allocates

EAT = "held = []\nwhile True: held.append(bytearray(1 << 20))"


def error_of(call):
    """The number of the OSError that *call* raises; None: it does not."""
    try:
        call()
    except OSError as error:
        return error.errno
    return None


def fork():
    if not os.fork():
        os._exit(0)
    os.wait()


def start_where_all_is_promised(cgroup):
    """Have almost all commit, then start children in all ways."""
    every_limit = {
        "user": 65533, "group": 65533, "extra_groups": [5], "cwd": "/", "umask": 0o77, "oom_score_adj": 900, "nice": 1,
        "memory_limit": "1 GiB", "memory_limit_by": "rlimit", "cgroup": cgroup,
    }  # fmt: skip
    command = ["echo", "started"]
    headroom_bytes = memsafe.memory_status().commit.headroom_bytes
    held = mmap.mmap(-1, headroom_bytes - SPARE_BYTES, PRIVATE)
    refused = {
        "fork": error_of(fork),
        "user": error_of(lambda: subprocess.run(command, user=65533)),
        "preexec_fn": error_of(lambda: subprocess.run(command, preexec_fn=int)),
    }
    started = {
        name: memsafe.run(command, stdout=PIPE, text=True, check=True, **limits).stdout
        for name, limits in {"plain": {}, "every limit": every_limit}.items()
    }
    return {"refused": refused, "started": started, "held": len(held) > 4 * SPARE_BYTES}


def test_children_start_where_almost_all_commit_is_used_and_fork_fails(group, sysctl):
    sysctl("vm/overcommit_memory", overcommit.NEVER)
    told = child.run(start_where_all_is_promised, str(group.path))
    assert told == {
        "refused": dict.fromkeys(["fork", "user", "preexec_fn"], errno.ENOMEM),
        "started": dict.fromkeys(["plain", "every limit"], "started\n"),
        "held": True,
    }


# Born in a cgroup


def start_in(cgroup, without_clone3):
    if without_clone3:
        sealed.forbid(sealed.CLONE3, errno.ENOSYS)
    read = "read name </proc/self/cgroup; echo $name"
    try:
        return {"said": memsafe.run(["sh", "-c", read], cgroup=cgroup, stdout=PIPE, text=True).stdout}
    except OSError as error:
        return {"errno": error.errno}


@pytest.mark.parametrize("without_clone3", [False, True])
def test_a_child_is_in_its_cgroup_from_its_first_instruction(group, without_clone3):
    joined = group.child("joined")
    assert child.run(start_in, str(joined.path), without_clone3) == {"said": f"0::/{group.path.name}/joined\n"}


def test_by_clone3_a_child_is_born_there_and_counted_before_it_is(group):
    """pids.max refuses births and not moves: that tells the two ways apart."""
    full = group.child("full", pids_max=0)
    assert child.run(start_in, str(full.path), False) == {"errno": errno.EAGAIN}


def test_a_cgroup_that_passes_controllers_on_takes_no_child_and_the_error_names_it(group):
    outer = group.child("outer")
    outer.child("inner")
    told = child.run(start_in, str(outer.path), False)
    assert told == {"errno": errno.EBUSY}


# A cgroup of the child's own


def start_limited(limit_by):
    """Have a shell and the child that it starts pass the limit; where they were, how they ended, what is left."""
    script = f'{sys.executable} -c "{EAT}" & read name </proc/self/cgroup; echo $name; wait; echo alive'
    try:
        with memsafe.Popen(
            ["sh", "-c", script], stdout=PIPE, text=True, memory_limit="48 MiB", memory_limit_by=limit_by
        ) as process:
            folder = process.memory_cgroup
            said, _ = process.communicate()
    except memsafe.UnsupportedError as error:
        return {"refused": str(error)}
    while folder is not None and os.path.exists(folder):  # the one that the shell started ends in its own time
        memsafe.run(["true"], memory_limit="48 MiB")
    return {"said": said, "status": process.returncode, "oom_killed": process.oom_killed, "folder": folder}


def start_many_limited(count):
    """How many cgroups are left when so many children have ended one after the other."""
    left = 0
    for _ in range(count):
        with memsafe.Popen(["true"], memory_limit="48 MiB") as process:
            folder = process.memory_cgroup
        left += os.path.exists(folder)
    return {"left": left}


@pytest.fixture
def delegated(group):
    """A cgroup that is left to those who live in it, as systemd marks one."""
    os.setxattr(group.path, "user.delegate", b"1")
    return group


def test_the_cgroup_is_removed_when_the_child_is_reaped(delegated):
    assert child.run(start_many_limited, 20, cgroup=delegated.child("own")) == {"left": 0}


@pytest.mark.parametrize("attribute", ["user.delegate", "trusted.delegate"])
def test_memory_limit_makes_a_cgroup_beside_the_own_whose_processes_end_together(group, attribute):
    own = group.child("own")
    os.setxattr(group.path, attribute, b"1")
    told = child.run(start_limited, "auto", cgroup=own)
    name = told["folder"].removeprefix(str(group.path))
    assert name.startswith("/memsafe-child-")
    assert told == {
        "said": f"0::/{group.path.name}{name}\n",
        "status": -signal.SIGKILL,
        "oom_killed": True,
        "folder": told["folder"],
    }


def assert_limited_by_rlimit(own, **kwargs):
    """By RLIMIT_DATA: the one that ate was refused, and where it was."""
    told = child.run(start_limited, "auto", cgroup=own, **kwargs)
    assert (told["folder"], told["status"], told["oom_killed"]) == (None, 0, None)
    assert told["said"] == f"0::/{own.path.parent.name}/own\nalive\n"


def test_roots_child_stays_in_its_service_where_nothing_was_delegated(group):
    """So stands a service in its slice: beside it the child would be out of pids.max, and not stopped with it."""
    own = group.child("own")
    told = child.run(start_limited, "cgroup", cgroup=own)
    assert f"{group.path} is not delegated" in told["refused"]
    assert_limited_by_rlimit(own)


@pytest.mark.parametrize("limit", ["memory_max", "pids_max"])
def test_a_limited_process_makes_none_that_would_be_free_of_its_limits(delegated, limit):
    own = delegated.child("own", **{limit: 256 * MIB if limit == "memory_max" else 1000})
    told = child.run(start_limited, "cgroup", cgroup=own)
    assert f"would be free of the limits of {own.path}: {limit.replace('_', '.')}" in told["refused"]
    assert_limited_by_rlimit(own)


def test_the_child_of_a_limited_child_is_not_free_of_its_limit(delegated):
    """A cgroup of memsafe's own making is no other than any."""
    own = delegated.child("memsafe-child-1-00000000", memory_max=256 * MIB)
    told = child.run(start_limited, "cgroup", cgroup=own)
    assert f"would be free of the limits of {own.path}: memory.max" in told["refused"]


def test_an_ordinary_user_makes_none_where_it_may_not_write(delegated):
    own = delegated.child("own")
    told = child.run(start_limited, "cgroup", cgroup=own, user=child.ORDINARY)
    assert f"{delegated.path} may not be written" in told["refused"]


def give(group, own):
    """Let nobody write what a delegated cgroup's user may."""
    for path in (
        group.path,
        group.path / "cgroup.procs",
        group.path / "cgroup.subtree_control",
        own.path / "cgroup.procs",
    ):
        os.chown(path, child.NOBODY, child.NOBODY)


def test_an_ordinary_user_makes_one_in_what_was_delegated(delegated):
    own = delegated.child("own")
    give(delegated, own)
    told = child.run(start_limited, "cgroup", cgroup=own, user=child.ORDINARY)
    assert (told["status"], told["oom_killed"]) == (-signal.SIGKILL, True)


@pytest.mark.parametrize("attribute", [None, "trusted.delegate"])
def test_an_ordinary_user_makes_none_in_what_it_owns_but_was_not_told_is_delegated(group, attribute):
    """A user's slices are its own as well, and its services in them are limited and stopped. trusted.* is root's."""
    own = group.child("own")
    give(group, own)
    if attribute is not None:
        os.setxattr(group.path, attribute, b"1")
    told = child.run(start_limited, "cgroup", cgroup=own, user=child.ORDINARY)
    assert f"{group.path} is not delegated" in told["refused"]
    assert_limited_by_rlimit(own, user=child.ORDINARY)
