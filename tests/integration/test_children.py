"""Children and the OOM killer with this machine's kernel: users, cgroups, kills, and what fork cannot do."""

import asyncio
import errno
import mmap
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import memsafe
from memsafe._kernel import cgroup, child_cgroup, machine, process
from memsafe._kernel.oom import KillLog
from tests.integration import cgroups, scenario, sealed

PIPE = subprocess.PIPE
PROJECT = Path(__file__).parents[2]
ROOT = os.geteuid() == 0
SOMEBODY = 65533  # else than us: nobody is 65534


def run_in_a_child(code, **kwargs):
    code = "import os, sys, subprocess, memsafe\n" + textwrap.dedent(code)
    done = memsafe.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def memory_cgroup(memory_group):
    folder, limit = memory_group
    return folder, folder / limit


@pytest.fixture
def unified_cgroup():
    directory = cgroup.unified_directory()
    if directory is None:
        pytest.skip("no cgroup2 is mounted")
    with cgroups.below(directory) as child:
        yield child


@pytest.mark.cgroup
def test_a_child_joins_a_memory_cgroup_before_it_runs(memory_cgroup):
    folder, _ = memory_cgroup
    for spelled in (folder, str(folder), [folder]):
        said = memsafe.run(["cat", "/proc/self/cgroup"], cgroup=spelled, stdout=PIPE, text=True, check=True).stdout
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


@pytest.fixture(params=[("freezer.state", "FROZEN", "THAWED"), ("cgroup.freeze", "1", "0")], ids=["v1", "v2"])
def freezing(request):
    """A cgroup below that of the tests, the file that freezes it, and what to write to it."""
    name, frozen, thawed = request.param
    directory = cgroup.unified_directory() if name == "cgroup.freeze" else None
    if name == "freezer.state" and (located := cgroup.locate("freezer")).version == 1 and located.cgroups:
        directory = located.cgroups[0].directory
    if directory is None:
        pytest.skip(f"no hierarchy with {name} holds this process")
    with cgroups.below(directory) as group:
        yield group, group / name, frozen, thawed


@pytest.mark.cgroup
def test_no_child_is_started_in_a_frozen_cgroup_where_both_would_stand_still(freezing, tmp_path):
    group, state, frozen, thawed = freezing
    inner = group / "inner"
    inner.mkdir()
    try:
        state.write_text(frozen)
        for folder in (group, inner):
            with pytest.raises(memsafe.KernelError, match="frozen") as refused:
                memsafe.Popen(["touch", tmp_path / "started"], cgroup=folder)
            assert refused.value.errno == errno.EBUSY
        state.write_text(thawed)
        memsafe.run(["true"], cgroup=inner, check=True)
    finally:
        state.write_text(thawed)
        cgroups.remove(inner)
    assert list(tmp_path.iterdir()) == []


def test_no_cgroup_at_all_is_not_the_current_directory():
    for empty in ("", b"", [""]):
        with pytest.raises(ValueError, match="current directory"):
            memsafe.run(["true"], cgroup=empty)


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


# A cgroup of the child's own

EAT = [sys.executable, "-c", "held = b'x' * (512 << 20)"]


@pytest.fixture
def making():
    """The folder in which cgroups for children are made; nothing may be left in it, nor an open lock of one."""
    try:
        probe = child_cgroup.make(2**30)
    except memsafe.UnsupportedError as error:
        pytest.skip(str(error))
    probe.remove()
    folder = Path(probe.cgroup.directory).parent
    before = scenario.open_files()
    yield folder
    assert scenario.opened_since(before) == []
    assert list(folder.glob(f"memsafe-child-{os.getpid()}-*")) == []


@pytest.mark.cgroup
def test_memory_limit_is_that_of_a_cgroup_which_goes_with_the_child(making):
    with memsafe.Popen(["cat"], stdin=PIPE, memory_limit="1 GiB") as process:
        made = Path(process.memory_cgroup)
        assert made.parent == making
        assert process.oom_killed is None
        member = next(one for one in cgroup.placement(pid=process.pid).memberships if one.path.endswith(made.name))
        assert "memory" in member.controllers or member.hierarchy == 0
        group = child_cgroup.at(str(made))
        assert group.limit_bytes() == 1 << 30
        assert group.swap_limit_bytes() in {None, 0}
        assert group.memsw_limit_bytes() in {None, 1 << 30}
    assert not made.exists()
    assert (process.returncode, process.oom_killed, process.memory_cgroup) == (0, False, None)


@pytest.mark.cgroup
def test_a_child_that_passes_it_is_killed_and_told_from_one_that_crashed(making):
    done = memsafe.run(EAT, memory_limit="128 MiB")
    assert (done.returncode, done.oom_killed) == (-signal.SIGKILL, True)
    killed = memsafe.run(["sh", "-c", "kill -9 $$"], memory_limit="128 MiB")
    assert (killed.returncode, killed.oom_killed) == (-signal.SIGKILL, False)


@pytest.mark.cgroup
def test_a_limit_too_small_to_begin_with_is_named_where_there_is_no_memory_for_the_program(making):
    with pytest.raises(OSError, match="Cannot allocate memory: 'true'") as refused:
        memsafe.run(["true"], memory_limit="4 KiB", memory_limit_by="cgroup")
    assert refused.value.__notes__ == ["the child's memory_limit, 4 KiB, holds before its program begins"]


@pytest.mark.cgroup
def test_with_check_the_kill_is_an_error_of_both_kinds(making):
    with pytest.raises(memsafe.OOMKilledError, match=r"SIGKILL.*OOM killer") as shot:
        memsafe.run(EAT, memory_limit="128 MiB", check=True, capture_output=True)
    assert isinstance(shot.value, subprocess.CalledProcessError)
    assert isinstance(shot.value, memsafe.ChildOOMKilledError)
    assert (shot.value.returncode, shot.value.cmd, shot.value.stderr) == (-9, EAT, b"")
    again = pickle.loads(pickle.dumps(shot.value))
    assert (str(again), again.returncode) == (str(shot.value), -9)
    with pytest.raises(subprocess.CalledProcessError) as crashed:
        memsafe.run(["sh", "-c", "kill -9 $$"], memory_limit="128 MiB", check=True)
    assert not isinstance(crashed.value, memsafe.OOMKilledError)
    with pytest.raises(memsafe.OOMKilledError):
        asyncio.run(memsafe.run_async(EAT, memory_limit="128 MiB", check=True))


@pytest.mark.cgroup
def test_a_tree_of_processes_has_the_limit_together(making):
    """Neither half is too much, both are."""
    code = """
import subprocess, sys
hold = "held = b'x' * (96 << 20); print(flush=True); input()"
with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as half:
    half.stdout.readline()
    held = b"x" * (96 << 20)
    half.communicate(b"enough")
"""
    done = memsafe.run([sys.executable, "-c", code], memory_limit="160 MiB")
    assert done.oom_killed


@pytest.mark.cgroup
def test_a_kill_in_a_cgroup_that_was_given_is_told_too(memory_cgroup):
    folder, limit = memory_cgroup
    limit.write_text(str(96 << 20))
    assert memsafe.run(EAT, cgroup=folder).oom_killed is True
    assert memsafe.run(["true"], cgroup=folder).oom_killed is False
    assert memsafe.run(["sh", "-c", "kill -9 $$"], cgroup=folder).oom_killed is False
    with memsafe.Popen(["cat"], stdin=PIPE, cgroup=folder) as survivor:
        assert memsafe.run(EAT, cgroup=folder, oom_score_adj=1000).oom_killed is True
    assert survivor.oom_killed is False


@pytest.fixture
def kernel_log():
    with closing(KillLog()) as log:
        told = log.names(0)
    if told is None:
        pytest.skip("the kernel's log may not be read here, or has the pids of another namespace")


def killed_without_a_cgroup(folder):
    """A victim whose cgroup is this process's own, one killed by hand, and how each is raised."""
    Path(folder, "cgroup.procs").write_text("0")
    told = [memsafe.run(EAT, oom_score_adj=1000), memsafe.run(["sh", "-c", "kill -9 $$"])]
    raised = []
    for command in (EAT, ["sh", "-c", "kill -9 $$"]):
        try:
            memsafe.run(command, oom_score_adj=1000, check=True)
        except subprocess.CalledProcessError as error:
            raised.append(type(error).__name__)
    return {"told": [[one.returncode, one.oom_killed] for one in told], "raised": raised}


@pytest.mark.cgroup
@pytest.mark.usefixtures("kernel_log")
def test_the_kernels_log_tells_of_a_child_without_a_cgroup_of_its_own(memory_cgroup):
    folder, limit = memory_cgroup
    limit.write_text(str(96 << 20))
    got = scenario.run(killed_without_a_cgroup, folder)
    assert got["told"] == [[-signal.SIGKILL, True], [-signal.SIGKILL, False]]
    assert got["raised"] == ["ChildOOMKilledError", "CalledProcessError"]


@pytest.mark.cgroup
@pytest.mark.usefixtures("kernel_log")
def test_the_log_tells_the_victim_from_one_killed_by_hand_in_the_same_cgroup(memory_cgroup):
    folder, limit = memory_cgroup
    limit.write_text(str(96 << 20))
    with memsafe.Popen(["cat"], stdin=PIPE, cgroup=folder) as beside:
        assert memsafe.run(EAT, cgroup=folder, oom_score_adj=1000).oom_killed is True
        beside.kill()
    assert (beside.returncode, beside.oom_killed) == (-signal.SIGKILL, False)


@pytest.mark.cgroup
@pytest.mark.parametrize("limit_bytes", [1, 4096, 64 << 10, 256 << 10, 1 << 20])
def test_a_limit_that_no_program_fits_into_fails_or_kills_the_child_and_not_the_parent(making, limit_bytes):
    """The child runs in the parent's memory when the killer comes: it must not take both."""
    told = scenario.run(start_in_too_little, limit_bytes)
    assert told["ended"] in [
        ["returned", -signal.SIGKILL],
        ["returned", -signal.SIGSEGV],
        ["raised", errno.ENOMEM],
    ] or (limit_bytes > 4096 and told["ended"] == ["returned", 0])


def start_in_too_little(limit_bytes):
    try:
        return {"ended": ["returned", memsafe.run(["/bin/true"], memory_limit=limit_bytes).returncode]}
    except OSError as error:
        return {"ended": ["raised", error.errno]}


@pytest.mark.cgroup
def test_a_child_that_does_not_start_leaves_no_cgroup(making):
    with pytest.raises(FileNotFoundError):
        memsafe.Popen(["/nonexistent"], memory_limit="1 GiB")
    with pytest.raises(ValueError, match="null byte"):
        memsafe.Popen(["true", "\0"], memory_limit="1 GiB")


@pytest.mark.cgroup
def test_what_a_grandchild_keeps_is_removed_by_the_next_who_makes_one(making):
    """So is what a parent that crashed has left."""
    never_ending, keep_open = os.pipe()
    with memsafe.Popen(
        ["sh", "-c", "exec 3<&0; cat <&3 & exit 0"], stdin=never_ending, memory_limit="1 GiB"
    ) as process:
        kept = Path(process.memory_cgroup)
    assert process.returncode == 0
    assert kept.exists()
    other = memsafe.run(["true"], memory_limit="1 GiB")
    assert (other.returncode, kept.exists()) == (0, True)
    pidfd = os.pidfd_open(int((kept / "cgroup.procs").read_text()))
    os.close(keep_open)
    os.close(never_ending)
    select.select([pidfd], [], [])
    os.close(pidfd)
    while kept.exists():  # it is not our child: whoever it was given to reaps it
        memsafe.run(["true"], memory_limit="1 GiB")


def crash_with_a_child():
    process = memsafe.Popen(["true"], memory_limit="1 GiB")
    print(process.memory_cgroup, flush=True)
    os._exit(7)


@pytest.mark.cgroup
def test_what_a_crashed_parent_left_is_removed(making):
    command = scenario.command(crash_with_a_child)
    done = subprocess.run(command, stdout=PIPE, text=True, env={**os.environ, "PYTHONPATH": str(PROJECT)})
    assert done.returncode == 7
    left = Path(done.stdout.strip())
    assert left.parent == making
    assert left.exists()
    while left.exists():
        memsafe.run(["true"], memory_limit="1 GiB")


@pytest.mark.cgroup
def test_one_that_is_in_use_is_not_taken_for_a_left_over(making):
    """Empty as it is: its child has not joined it yet."""
    made = child_cgroup.make(2**30)
    assert memsafe.run(["true"], memory_limit="1 GiB").returncode == 0
    assert Path(made.cgroup.directory).exists()
    made.remove()


@pytest.mark.cgroup
def test_threads_that_make_and_sweep_at_once_do_not_disturb_each_other(making):
    codes = []

    def work():
        codes.extend(
            memsafe.run(["true"], memory_limit="1 GiB", memory_limit_by="cgroup").returncode for _ in range(10)
        )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0] * 40


@pytest.mark.cgroup
def test_a_child_that_is_dropped_while_it_runs_is_reaped_later_and_its_cgroup_removed(making):
    process = memsafe.Popen(["cat"], stdin=PIPE, memory_limit="1 GiB")
    made, stdin = Path(process.memory_cgroup), process.stdin
    with pytest.warns(ResourceWarning, match="still running"):
        del process
    stdin.close()
    while made.exists():
        memsafe.run(["true"])


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


@pytest.mark.skipif(not ROOT, reason="only root may start a child as another user")
def test_threads_that_start_children_as_another_user_leave_this_process_dumpable():
    """The change of ids clears the flag of the memory that the child shares: each puts back what was before all."""
    code = f"""
        import ctypes, threading
        def start():
            for _ in range(40):
                memsafe.run(["true"], user={SOMEBODY}, check=True)
        threads = [threading.Thread(target=start) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
    """
    assert run_in_a_child(code) == "1\n"


PATIENCE_S = 30


def in_a_forked_copy(act):
    """Call *act* in a copy of this process, which does nothing else; how it ended, or None: it did not in time."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    pidfd = os.pidfd_open(pid)
    ended, _, _ = select.select([pidfd], [], [], PATIENCE_S)
    os.close(pidfd)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) if ended else None


def fork_beside_a_thread_that_starts_as_another_user(count):
    """How many forks of *count* ended well, each copy having started a child as another user; and how one did not."""
    as_another = partial(memsafe.run, ["true"], user=SOMEBODY, check=True)
    stop = threading.Event()

    def start():
        while not stop.is_set():
            as_another()

    busy = threading.Thread(target=start)
    busy.start()
    well, ended = 0, 0
    while well < count and (ended := in_a_forked_copy(as_another)) == 0:
        well += 1
    stop.set()
    busy.join()
    return {"well": well, "ended": ended}


@pytest.mark.skipif(not ROOT, reason="only root may start a child as another user")
def test_a_fork_beside_a_thread_that_starts_as_another_user_can_start_as_another_user():
    """The copy has the lock as it was, and not the thread that would have let it go."""
    told = scenario.run(fork_beside_a_thread_that_starts_as_another_user, 50)
    assert told == {**told, "well": 50, "ended": 0}


def forget_in_a_forked_copy(forget):
    """Have a forked copy wait for, or drop, a limited child that was shot and not yet reaped; what is known of it."""
    process = memsafe.Popen(EAT, memory_limit="128 MiB")
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    folder = process.memory_cgroup

    def act():
        nonlocal process
        if forget == "wait":
            process.wait()
        else:
            del process

    copy_ended, kept = in_a_forked_copy(act), os.path.exists(folder)
    process.wait()
    told = [process.returncode, process.oom_killed]
    return {"copy": copy_ended, "kept": kept, "told": told, "left": os.path.exists(folder)}


@pytest.mark.cgroup
@pytest.mark.parametrize("forget", ["wait", "drop"])
def test_a_forked_copy_of_a_popen_leaves_the_cgroup_to_its_maker(making, forget):
    told = scenario.run(forget_in_a_forked_copy, forget)
    assert told == {**told, "copy": 0, "kept": True, "told": [-signal.SIGKILL, True], "left": False}


def close_in_a_forked_copy():
    """Have a forked copy close a coroutine that waits for a child; what the child said to us then."""

    async def main():
        running = asyncio.create_task(memsafe.run_async(["cat"], stdin=read_end, stdout=PIPE))
        await asyncio.sleep(0)
        copy_ended = in_a_forked_copy(running.get_coro().close)
        os.close(read_end)
        os.write(write_end, b"hello")
        os.close(write_end)
        async with asyncio.timeout(PATIENCE_S):
            return {"copy": copy_ended, "said": (await running).stdout.decode()}

    read_end, write_end = os.pipe()
    return asyncio.run(main())


def test_a_forked_copy_of_a_loop_does_not_make_its_parent_deaf():
    """They share one epoll."""
    told = scenario.run(close_in_a_forked_copy)
    assert told == {**told, "copy": 0, "said": "hello"}


def list_what_is_open(error, descriptors=None):
    sealed.forbid(sealed.CLOSE_RANGE, error)
    ends = [os.pipe() for _ in range(200)]
    for fd in sum(ends, ()):
        os.set_inheritable(fd, True)
    kept = ends[100][1]
    rlimits = None if descriptors is None else {resource.RLIMIT_NOFILE: descriptors}
    said = memsafe.run(["sh", "-c", "ls /proc/$$/fd; :"], pass_fds=[kept], stdout=PIPE, rlimits=rlimits).stdout
    for fd in sum(ends, ()):
        os.close(fd)
    return {"open": sorted(map(int, said.split())), "expected": [0, 1, 2, kept]}


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_descriptors_are_closed_without_close_range_too(error):
    """Linux 5.4 has no close_range(); a seccomp filter makes this kernel such a one."""
    told = scenario.run(list_what_is_open, error)
    assert told["open"] == told["expected"]


def test_a_limit_on_descriptors_does_not_keep_them_from_being_closed():
    """Listing them takes one, above the limit."""
    told = scenario.run(list_what_is_open, errno.ENOSYS, 16)
    assert told["open"] == told["expected"]


# Never fork


def hinder_forks(how):
    """Make copying this process impossible: death by a filter, or refused by the kernel for want of memory.

    One mapping larger than all memory is refused to fork by the heuristic of overcommit mode 0.
    """
    if how == "a filter":
        sealed.seal_forks()
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    maps = [mmap.mmap(-1, total // 5 * 3, flags=flags) for _ in range(2)]  # neighbours: one to the kernel
    with pytest.raises(OSError, match="Cannot allocate memory"):
        os.fork()
    return maps


HOW = ["a filter", "want of memory"]


@pytest.fixture(params=HOW)
def how(request):
    if request.param == "want of memory" and machine.overcommit_mode() != 0:
        pytest.skip("vm.overcommit_memory is not 0: fork would not be refused by the size of one mapping")
    return request.param


def fork_by(name):
    held = hinder_forks("a filter")
    calls = {
        "os.fork": os.fork,
        "preexec_fn": lambda: subprocess.run(["true"], preexec_fn=int),
        "user": lambda: subprocess.run(["true"], user=os.getuid()),
    }
    calls[name]()
    return {"held": bool(held)}


@pytest.mark.parametrize("name", ["os.fork", "preexec_fn", "user"])
def test_the_filter_kills_who_forks(name):
    scenario.run(fork_by, name, returncode=-signal.SIGSYS)


def arguments():
    """Every argument of Popen that a child may be started with, in any combination."""
    own = {"user": os.getuid(), "group": os.getgid(), **({"extra_groups": [os.getgid()]} if ROOT else {})}
    return st.fixed_dictionaries(
        {},
        optional={
            "cwd": st.sampled_from(["/", Path("/usr")]),
            "env": st.sampled_from([{}, {"A": "1"}, {"PATH": os.environ["PATH"]}]),
            "umask": st.sampled_from([0, 0o77]),
            "start_new_session": st.booleans(),
            "close_fds": st.booleans(),
            "pass_fds": st.sampled_from([(), (0,), (1, 2)]),
            "restore_signals": st.booleans(),
            "stdin": st.sampled_from([subprocess.DEVNULL, PIPE]),
            "stderr": st.sampled_from([subprocess.DEVNULL, PIPE, subprocess.STDOUT]),
            "executable": st.just("/bin/echo"),
            "text": st.booleans(),
            "bufsize": st.sampled_from([0, -1]),
            "oom_score_adj": st.sampled_from([900, 1000]),
            "memory_limit": st.sampled_from(["1 GiB", 2**31]),
            "memory_limit_by": st.sampled_from(["auto", "rlimit"]),
            "rlimits": st.sampled_from([{}, {resource.RLIMIT_NOFILE: 64}, {resource.RLIMIT_CORE: (0, 0)}]),
            "nice": st.integers(0, 2),
            **{name: st.just(value) for name, value in own.items()},
        },
    ).map(lambda given: given if given.get("start_new_session") else {**given, "process_group": 0})


def start_in_every_way(how, count):
    held = hinder_forks(how)
    started = 0

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(arguments(), st.booleans())
    def start(kwargs, awaited):
        nonlocal started
        command = ["/bin/echo", "started"]
        if awaited:
            done = asyncio.run(memsafe.run_async(command, stdout=PIPE, **kwargs))
        else:
            done = memsafe.run(command, stdout=PIPE, **kwargs)
        assert (done.returncode, done.stdout) in [(0, b"started\n"), (0, "started\n")]
        started += 1

    start()
    return {"started": started, "held": bool(held)}


def test_no_combination_of_arguments_forks(how):
    assert scenario.run(start_in_every_way, how, 100)["started"] >= 100


def start_where_fork_is_refused():
    held = hinder_forks("want of memory")
    return {"said": memsafe.run("echo started; exit 3", shell=True, stdout=PIPE).stdout.decode(), "held": bool(held)}


def test_a_shell_starts_where_fork_is_refused():
    """It forks itself, being small."""
    if machine.overcommit_mode() != 0:
        pytest.skip("vm.overcommit_memory is not 0: fork would not be refused by the size of one mapping")
    assert scenario.run(start_where_fork_is_refused)["said"] == "started\n"
