"""Children and the OOM killer with this machine's kernel: users, cgroups, kills, and what fork cannot do."""

import ctypes
import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import memsafe
from memsafe._kernel import cgroup, machine, process

PIPE = subprocess.PIPE
ROOT = os.geteuid() == 0
SOMEBODY = 65533  # else than us: nobody is 65534


def run_in_a_child(code, **kwargs):
    code = "import os, sys, subprocess, memsafe\n" + textwrap.dedent(code)
    done = memsafe.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_below(directory):
    """Make a cgroup below one that holds this process, or skip."""
    child = Path(directory, f"memsafe-test-{os.getpid()}")
    try:
        child.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made in {directory}: {error.strerror}")
    return child


@pytest.fixture
def memory_cgroup():
    own = cgroup.memory_cgroups()[:1]
    if not own:
        pytest.skip("this process is in no memory cgroup")
    child = make_below(own[0].directory)
    limit = child / ("memory.max" if own[0].version == 2 else "memory.limit_in_bytes")
    if not limit.exists():
        child.rmdir()
        pytest.skip(f"{own[0].directory} does not pass the memory controller on")
    yield child, limit
    child.rmdir()


@pytest.fixture
def unified_cgroup():
    directory = cgroup.unified_directory()
    if directory is None:
        pytest.skip("no cgroup2 is mounted")
    child = make_below(directory)
    yield child
    child.rmdir()


@pytest.mark.cgroup
def test_a_child_joins_a_memory_cgroup_before_it_runs(memory_cgroup):
    folder, _ = memory_cgroup
    for given in (folder, str(folder), [folder]):
        said = memsafe.run(["cat", "/proc/self/cgroup"], cgroup=given, stdout=PIPE, text=True, check=True).stdout
        assert f"/{folder.name}\n" in said
    assert folder.name not in Path("/proc/self/cgroup").read_text()


@pytest.mark.cgroup
def test_a_child_joins_a_cgroup2(unified_cgroup):
    said = memsafe.run(["cat", "/proc/self/cgroup"], cgroup=unified_cgroup, stdout=PIPE, text=True, check=True).stdout
    assert any(line.startswith("0::") and line.endswith(unified_cgroup.name) for line in said.splitlines())


@pytest.mark.cgroup
def test_a_cgroup_that_is_gone_is_an_error_and_nothing_starts(memory_cgroup, tmp_path):
    folder, _ = memory_cgroup
    with pytest.raises(memsafe.KernelError, match=r"cgroup\.procs: No such file"):
        memsafe.Popen(["touch", tmp_path / "started"], cgroup=folder / "gone")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cgroup
def test_kills_counts_what_the_oom_killer_ends_in_our_cgroup(memory_cgroup):
    folder, limit = memory_cgroup
    limit.write_text(str(96 << 20))
    code = """
        before = memsafe.oom.kills()
        eat = [sys.executable, "-c", "held = b'x' * (512 << 20)"]
        status = memsafe.run(eat, oom_score_adj=1000).returncode
        print(status, memsafe.oom.kills() - before)
    """
    assert run_in_a_child(code, cgroup=folder).split() == ["-9", "1"]


def test_adjusting_up_and_back_needs_nobodys_leave():
    code = """
        base = memsafe.oom.score_adj()
        print(memsafe.oom.set_score_adj(700) - base, memsafe.oom.score_adj(), memsafe.oom.set_score_adj(base))
        print(memsafe.oom.score_adj() - base)
    """
    assert run_in_a_child(code).split() == ["0", "700", "700", "0"]


def test_protect_works_with_cap_sys_resource_and_says_what_is_missing_without():
    code = """
        from memsafe import oom
        base = oom.score_adj()
        try:
            oom.protect()
            print("protected", oom.score_adj() < base)
        except memsafe.KernelError as error:
            print(error.errno, error, oom.score_adj() == base)
    """
    said = run_in_a_child(code)
    if process.status().effective_capabilities >> process.CAP_SYS_RESOURCE & 1:
        assert said.split() == ["protected", "True"]
    else:
        assert said.startswith(f"{errno.EACCES} write ")
        assert "CAP_SYS_RESOURCE" in said
        assert "OOMScoreAdjust=" in said
        assert said.rstrip().endswith("True")


def test_a_child_below_our_adjustment_is_refused_without_the_capability():
    if process.status().effective_capabilities >> process.CAP_SYS_RESOURCE & 1:
        said = memsafe.run(["cat", "/proc/self/oom_score_adj"], oom_score_adj=-1000, stdout=PIPE).stdout
        assert int(said) == -1000
    else:
        with pytest.raises(memsafe.KernelError, match="CAP_SYS_RESOURCE") as refused:
            memsafe.Popen(["true"], oom_score_adj=-1000)
        assert refused.value.errno == errno.EACCES


def test_user_and_groups_are_as_subprocess_sets_them_or_refuses():
    command = ["grep", "-E", "^(Uid|Gid|Groups|CapEff)", "/proc/self/status"]
    for kwargs in (
        {"user": SOMEBODY, "group": SOMEBODY - 1, "extra_groups": [7, 8]},
        {"user": SOMEBODY},
        {"group": SOMEBODY},
        {"extra_groups": []},
        {"extra_groups": [1, 2, 3]},
    ):
        results = []
        for run in (subprocess.run, memsafe.run):
            try:
                results.append(run(command, stdout=PIPE, check=True, **kwargs).stdout)
            except PermissionError as error:
                results.append((error.errno, error.filename))
        assert results[0] == results[1]
        assert isinstance(results[0], bytes) is ROOT


def test_another_user_for_the_child_leaves_this_process_as_it_was():
    code = f"""
        import ctypes
        dumpable = lambda: ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
        before = os.getresuid(), os.getresgid(), os.getgroups(), dumpable(), os.stat("/proc/self/maps").st_uid
        try:
            memsafe.run(["true"], user={SOMEBODY}, group={SOMEBODY}, extra_groups=[5], check=True)
        except PermissionError:
            assert os.geteuid()
        after = os.getresuid(), os.getresgid(), os.getgroups(), dumpable(), os.stat("/proc/self/maps").st_uid
        print(dumpable(), before == after)
    """
    assert run_in_a_child(code).split() == ["1", "True"]


@pytest.mark.parametrize("extra", ["umask=-1", "umask=0o22", "oom_score_adj=900", "cwd='/'", "pass_fds=[1]"])
def test_children_start_where_fork_is_refused(extra):
    """One mapping larger than all memory is refused to fork by the heuristic of overcommit mode 0."""
    if machine.overcommit_mode() != 0:
        pytest.skip("vm.overcommit_memory is not 0: fork would not be refused by the size of one mapping")
    code = f"""
        import mmap
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        maps = [mmap.mmap(-1, total // 5 * 3, flags=flags) for _ in range(2)]  # neighbours: one to the kernel
        try:
            if not os.fork():
                os._exit(0)
            print("forked")
        except OSError as error:
            print(error.errno)
        print(memsafe.run(["echo", "started"], {extra}, stdout=subprocess.PIPE).stdout.decode())
    """
    assert run_in_a_child(code).split() == [str(errno.ENOMEM), "started"]


class _Filter(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]


def test_descriptors_are_closed_without_close_range_too():
    """Linux 5.4 has no close_range(); a seccomp filter makes this kernel such a one."""
    code = """
        import ctypes
        sys.path.insert(0, %r)
        from tests.integration.test_children import forbid
        forbid(436, %d)
        ends = [os.pipe() for _ in range(200)]
        for pair in ends:
            for end in pair:
                os.set_inheritable(end, True)
        kept = ends[100][1]
        script = "ls /proc/$$/fd; :"
        said = memsafe.run(["sh", "-c", script], pass_fds=[kept], stdout=subprocess.PIPE, umask=0).stdout
        print(sorted(map(int, said.split())) == [0, 1, 2, kept])
    """
    project = Path(__file__).parents[2]
    for error in (errno.ENOSYS, errno.EPERM):
        assert run_in_a_child(code % (str(project), error)).strip() == "True"


def forbid(call, error):
    """Let the system call number *call* fail with *error* in this process from now on."""
    load, jump_if_equal, answer = 0x20, 0x15, 0x06
    program = (_Filter * 4)(
        _Filter(load, 0, 0, 0),
        _Filter(jump_if_equal, 0, 1, call),
        _Filter(answer, 0, 0, 0x00050000 | error),
        _Filter(answer, 0, 0, 0x7FFF0000),
    )

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Filter))]

    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, by_filter = 38, 22, 2
    assert libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
    assert libc.prctl(set_seccomp, by_filter, ctypes.byref(Program(4, program)), 0, 0) == 0
