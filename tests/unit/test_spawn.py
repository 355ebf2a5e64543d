"""memsafe.Popen beside subprocess.Popen: what one does, the other does."""

import errno
import inspect
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import memsafe
from memsafe._kernel import child_cgroup
from memsafe.spawn import arguments, limits, popen
from tests.integration.scenario import open_files, opened_since

PIPE = subprocess.PIPE


def outcome(run, *args, **kwargs):
    """What a call did, in terms that must not differ: its result, or its error's type, number and file."""
    try:
        done = run(*args, **kwargs)
    except OSError as error:
        return type(error), error.errno, error.strerror, error.filename
    except (ValueError, TypeError, LookupError, OverflowError, subprocess.SubprocessError) as error:
        return type(error)
    return done.returncode, done.stdout, done.stderr


def run_in_a_child(code, **kwargs):
    """Run *code* in a Python of its own, which may break its descriptors, signals and limits."""
    code = "import os, sys, subprocess, signal, memsafe\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


SAME = {
    "a path": (["/bin/echo", "hello"], {}),
    "a name on PATH": (["echo", "hello"], {}),
    "a string": ("true", {}),
    "bytes": ([b"echo", b"\xff"], {}),
    "a Path": (Path("/bin/true"), {}),
    "a tuple": (("/bin/echo", Path("/tmp")), {}),
    "shell": ("echo $0 $((6 * 7)); exit 3", {"shell": True}),
    "shell with arguments": (["echo $1", "x", "y"], {"shell": True}),
    "shell with another shell": ("echo $0", {"shell": True, "executable": "/bin/bash"}),
    "a Path with shell": (Path("/bin/true"), {"shell": True}),
    "executable": (["other-name", "-c", "echo $0"], {"executable": "/bin/sh"}),
    "cwd": (["pwd"], {"cwd": "/usr/bin"}),
    "cwd as a Path": (["pwd"], {"cwd": Path("/usr")}),
    "cwd and a relative path": (["./env", "true"], {"cwd": "/usr/bin"}),
    "env": (["/usr/bin/env"], {"env": {"A": "1", "B": "ü", "C": "\udcff"}}),
    "no env": (["/usr/bin/env"], {"env": {}}),
    "PATH of env": (["sh", "-c", "echo hello"], {"env": {"PATH": "/nonexistent:/bin"}}),
    "PATH of env without it": (["echo"], {"env": {"PATH": "/nonexistent"}}),
    "an old environment": (["/usr/bin/env"], {}),
    "input": (["cat"], {"input": b"x" * 100_000}),
    "a session of its own": (["sh", "-c", "test $(cut -d' ' -f6 /proc/$$/stat) = $$"], {"start_new_session": True}),
    "a group of its own": (["sh", "-c", "test $(cut -d' ' -f5 /proc/$$/stat) = $$"], {"process_group": 0}),
    "umask": (["sh", "-c", "umask"], {"umask": 0o027}),
    "signals restored": (["grep", "^SigIgn", "/proc/self/status"], {}),
    "signals as they are": (["grep", "^SigIgn", "/proc/self/status"], {"restore_signals": False}),
    "signal mask": (["grep", "^SigBlk", "/proc/self/status"], {}),
    "descriptors": (["sh", "-c", "ls /proc/$$/fd; :"], {}),
    "death by a signal": (["sh", "-c", "kill -9 $$"], {}),
    "a group that is not there": (["true"], {"process_group": 2**22 - 1}),
    "a program that is not there": (["/nonexistent/program"], {}),
    "a name that is not there": (["no-such-program-anywhere"], {}),
    "no program": (["/etc/passwd"], {}),
    "a folder": (["/tmp"], {}),
    "cwd that is not there": (["true"], {"cwd": "/nonexistent"}),
    "cwd that is a file": (["true"], {"cwd": "/etc/passwd"}),
    "cwd that is not there, for a path": (["/bin/true"], {"cwd": "/nonexistent"}),
    "a descriptor that is not open": (["true"], {"stdin": 1_000_000}),
    "a descriptor to pass that is not open": (["true"], {"pass_fds": [987]}),
    "a negative descriptor to pass": (["true"], {"pass_fds": [-1]}),
    "an iterator of no descriptors to pass": (["true"], {"pass_fds": iter([])}),
    "NUL in an argument": (["true", "a\0b"], {}),
    "NUL in env": (["true"], {"env": {"A": "a\0b"}}),
    "NUL in cwd": (["true"], {"cwd": "/tmp\0"}),
    "= in a variable's name": (["true"], {"env": {"A=B": "1"}}),
    "an argument that is no string": (["true", 1], {}),
    "nothing": ([], {}),
    "a negative user": (["true"], {"user": -1}),
    "a user beyond all": (["true"], {"user": 2**64}),
    "a group beyond all": (["true"], {"group": 2**64}),
    "an extra group beyond all": (["true"], {"extra_groups": [2**64]}),
    "more extra groups than there may be": (["true"], {"extra_groups": range(65537)}),
    "env in bytes": (["/usr/bin/env"], {"env": {b"A": b"\xff", "B": b"1"}}),
    "PATH of env in bytes": (["sh", "-c", "echo hello"], {"env": {b"PATH": b"/nonexistent:/bin"}}),
    "a session and a group of its own": (["true"], {"start_new_session": True, "process_group": 0}),
    "a group that is none": (["true"], {"process_group": -5}),
    "newlines": (["printf", r"a\r\nb\rc"], {"universal_newlines": True}),
    "a pipe of another size": (["cat"], {"input": b"x" * 100_000, "pipesize": 4096}),
    "a user's and a group's name": (["id"], {"user": "root", "group": "root", "extra_groups": ["root"]}),
    "a user's name that nobody has": (["id"], {"user": "nobody has this name"}),
    "an executable in bytes": (["other-name", "-c", "echo $0"], {"executable": b"/bin/sh"}),
    "no name": ([""], {}),
    "an argument beyond all": (["true", "x" * 200_000], {}),
    "an unknown user's name": (["id"], {"user": 65533, "group": 65533, "extra_groups": []}),
}


@pytest.mark.parametrize("name", SAME)
def test_run_does_what_subprocess_run_does(name, monkeypatch):
    args, kwargs = SAME[name]
    monkeypatch.setenv("MEMSAFE_TEST", "\udc80")
    monkeypatch.delenv("LS_COLORS", raising=False)
    before = open_files()
    theirs = outcome(subprocess.run, args, stdout=PIPE, stderr=PIPE, **kwargs)
    left_by_theirs = len(opened_since(before))  # Python 3.11.2 leaves the pipes behind when the user is negative
    assert outcome(memsafe.run, args, stdout=PIPE, stderr=PIPE, **kwargs) == theirs
    assert len(opened_since(before)) == 2 * left_by_theirs
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_run_has_the_checks_of_subprocess_run():
    for kwargs in (
        {"input": b"", "stdin": PIPE},
        {"capture_output": True, "stdout": PIPE},
        {"stdout": subprocess.STDOUT},
        {"text": True, "universal_newlines": False},
        {"startupinfo": object()},
    ):
        assert outcome(memsafe.run, ["true"], **kwargs) == outcome(subprocess.run, ["true"], **kwargs)
    with pytest.raises(subprocess.CalledProcessError) as failed:
        memsafe.run(["sh", "-c", "echo out; exit 9"], check=True, capture_output=True, text=True)
    assert (failed.value.returncode, failed.value.stdout) == (9, "out\n")


def test_run_that_passes_its_timeout_kills_and_reaps_the_child():
    never_ending, keep_open = os.pipe()
    with pytest.raises(subprocess.TimeoutExpired):
        memsafe.run(["cat"], stdin=never_ending, stdout=PIPE, timeout=0.05)
    os.close(never_ending)
    os.close(keep_open)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_popen_is_a_subprocess_popen():
    with memsafe.Popen(["cat"], stdin=PIPE, stdout=PIPE, text=True) as process:
        assert isinstance(process, subprocess.Popen)
        assert process.poll() is None
        assert process.args == ["cat"]
        assert process.communicate("hello") == ("hello", None)
    assert process.returncode == 0


@pytest.mark.parametrize(("name", "own"), [("Popen", 0), ("run", 4), ("run_async", 4)])
def test_inspect_shows_the_parameters_of_subprocess_in_order_then_ours(name, own):
    theirs = inspect.signature(subprocess.Popen).parameters
    shown = inspect.signature(getattr(memsafe, name)).parameters
    assert [(key, shown[key].kind, shown[key].default) for key in list(shown)[: len(theirs)]] == [
        (key, parameter.kind, parameter.default) for key, parameter in theirs.items()
    ]
    ours = arguments.ChildArguments.__annotations__.keys() - arguments.PopenArguments.__annotations__.keys()
    of_run = [key for key in inspect.signature(subprocess.run).parameters if key not in ("popenargs", "kwargs")][:own]
    rest = list(shown)[len(theirs) :]
    assert (set(rest[: len(ours)]), rest[len(ours) :]) == (ours, of_run)


def test_type_checkers_know_the_parameters_of_subprocess_too():
    assert ["args", *arguments.PopenArguments.__annotations__] == list(inspect.signature(subprocess.Popen).parameters)


def test_the_environment_is_that_of_the_c_library_too():
    code = """
        os.putenv("ONLY_C_KNOWS", "1")
        print(memsafe.run(["sh", "-c", "echo $ONLY_C_KNOWS"], capture_output=True, text=True).stdout)
    """
    assert run_in_a_child(code).strip() == "1"


def test_the_audit_hook_of_subprocess_is_called():
    code = """
        seen = []
        sys.addaudithook(lambda name, arguments: seen.append(arguments) if name == "subprocess.Popen" else None)
        memsafe.run(["true", "x"], cwd="/")
        print(seen)
    """
    assert run_in_a_child(code).strip() == "[('true', ['true', 'x'], '/', None)]"


def test_preexec_fn_is_refused_with_what_to_use_instead():
    before = open_files()
    with pytest.raises(ValueError, match=r"preexec_fn needs fork.*oom_score_adj"):
        memsafe.Popen(["true"], preexec_fn=os.getpid, stdin=PIPE)
    assert opened_since(before) == []


def test_only_the_descriptors_to_pass_are_open_in_the_child():
    ends = [os.pipe() for _ in range(3)]
    for end in sum(ends, ()):
        os.set_inheritable(end, True)
    passed = (ends[2][1], ends[0][0])
    script = "ls /proc/$$/fd; :"
    listed = memsafe.run(["sh", "-c", script], pass_fds=passed, stdout=PIPE, text=True).stdout.split()
    # The colon keeps the shell from becoming ls, which has the folder open.
    assert {int(fd) for fd in listed} == {0, 1, 2, *passed}
    kept = memsafe.run(["sh", "-c", script], close_fds=False, stdout=PIPE, text=True).stdout.split()
    assert {int(fd) for fd in kept} >= {0, 1, 2, *sum(ends, ())}
    for end in sum(ends, ()):
        os.close(end)


def test_a_descriptor_that_is_passed_becomes_inheritable_in_the_child_alone():
    read_end, write_end = os.pipe()
    memsafe.run(["sh", "-c", f"echo hello >/proc/self/fd/{write_end}"], pass_fds=[write_end], check=True)
    assert os.get_inheritable(write_end) is False
    assert os.read(read_end, 100) == b"hello\n"
    os.close(read_end)
    os.close(write_end)


def test_stdio_may_be_any_permutation_of_stdio():
    code = """
        import itertools
        names = ["/tmp", "/usr", "/etc"]
        for fds in itertools.product(range(3), repeat=3):
            saved = [os.dup(fd) for fd in range(3)]
            for fd, name in enumerate(names):
                os.dup2(os.open(name, os.O_RDONLY | os.O_CLOEXEC), fd, inheritable=False)
            read_end, write_end = os.pipe()
            look = "said=$(readlink /proc/$$/fd/0 /proc/$$/fd/1 /proc/$$/fd/2)"
            script = f'{look}; echo "$said" >/proc/self/fd/{write_end}'
            status = memsafe.run(
                ["sh", "-c", script], stdin=fds[0], stdout=fds[1], stderr=fds[2], pass_fds=[write_end]
            ).returncode
            os.close(write_end)
            for fd in range(3):
                os.dup2(saved[fd], fd)
            with open(read_end) as result:
                said = result.read().split()
            assert (status, said) == (0, [names[fd] for fd in fds]), (fds, status, said)
            os.closerange(3, 100)
        print("done")
    """
    assert run_in_a_child(code).strip() == "done"


def test_the_child_starts_with_the_parents_mask_its_ignored_signals_and_none_of_its_handlers():
    code = """
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        command = ["grep", "^Sig[BIC]", "/proc/self/status"]
        for extra in ({}, {"restore_signals": False}, {"umask": 0}, {"umask": 0, "restore_signals": False}):
            theirs = subprocess.run(command, stdout=subprocess.PIPE, **extra)
            ours = memsafe.run(command, stdout=subprocess.PIPE, **extra)
            assert ours.stdout == theirs.stdout, (ours.stdout, theirs.stdout)
            assert ours.stdout.count(b"Sig") == 3
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {signal.SIGUSR2}
    """
    run_in_a_child(code)


@pytest.mark.parametrize("first", ["pass", "sealed.forbid(sealed.CLONE3, errno.ENOSYS)"], ids=["clone3", "clone"])
def test_a_signal_before_the_program_runs_ends_the_child_and_reaches_no_handler_of_ours(tmp_path, first):
    """The child hangs in a FIFO that stands for a cgroup's file, in our memory, while it is sent a signal."""
    os.mkfifo(tmp_path / "cgroup.procs")
    code = f"""
        import errno, psutil, threading
        from tests.integration import sealed
        {first}
        runs = []
        signal.signal(signal.SIGUSR1, lambda *_: runs.append(os.getpid()))
        def interfere():
            while not (children := psutil.Process().children()):
                pass
            children[0].send_signal(signal.SIGUSR1)
            with open({str(tmp_path / "cgroup.procs")!r}) as fifo:
                fifo.read()
        other = threading.Thread(target=interfere)
        other.start()
        status = memsafe.run(["true"], cgroup={str(tmp_path)!r}).returncode
        other.join()
        print(status == -signal.SIGUSR1, runs)
    """
    assert run_in_a_child(code, cwd=Path(__file__).parents[2]).strip() == "True []"


@pytest.mark.parametrize("reaper", ["we", "the kernel"])
def test_what_a_handler_raises_while_a_child_starts_ends_the_child(tmp_path, reaper):
    """It hangs in a FIFO meanwhile, as above; nobody would have its pid."""
    os.mkfifo(tmp_path / "cgroup.procs")
    code = f"""
        import psutil, threading
        def interrupt(*_):
            raise KeyboardInterrupt
        signal.signal(signal.SIGUSR1, interrupt)
        if {reaper!r} == "the kernel":
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        def interfere():
            while not psutil.Process().children():
                pass
            os.kill(os.getpid(), signal.SIGUSR1)
            with open({str(tmp_path / "cgroup.procs")!r}) as fifo:
                fifo.read()
        other = threading.Thread(target=interfere)
        other.start()
        never_ending, keep_open = os.pipe()
        try:
            memsafe.Popen(["cat"], cgroup={str(tmp_path)!r}, stdin=never_ending)
        except KeyboardInterrupt:
            print("interrupted", psutil.Process().children())
        other.join()
    """
    assert run_in_a_child(code).strip() == "interrupted []"


def test_what_is_raised_after_a_child_has_started_ends_it_too(monkeypatch):
    def interrupt(self, *fds):
        raise KeyboardInterrupt

    never_ending, keep_open = os.pipe()
    monkeypatch.setattr(popen.Popen, "_close_pipe_fds", interrupt)
    with pytest.raises(KeyboardInterrupt):
        memsafe.Popen(["cat"], stdin=never_ending)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    os.close(never_ending)
    os.close(keep_open)


def test_signals_that_interrupt_us_all_the_time_harm_no_child():
    code = """
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        for i in range(100):
            assert memsafe.run(["/bin/true"], umask=0 if i % 2 else -1).returncode == 0
        signal.setitimer(signal.ITIMER_REAL, 0)
    """
    run_in_a_child(code)


def test_many_threads_start_children_at_once():
    before = open_files()
    wrong = []

    def start(number):
        for i in range(15):
            said = memsafe.run(["echo", f"{number}-{i}"], stdout=PIPE, umask=0 if i % 2 else -1).stdout
            if said != b"%d-%d\n" % (number, i):
                wrong.append(said)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert opened_since(before) == []


def test_oom_score_adj_is_the_childs_and_not_ours():
    before = memsafe.oom.score_adj()
    said = memsafe.run(["cat", "/proc/self/oom_score_adj"], oom_score_adj=900, stdout=PIPE, check=True).stdout
    assert int(said) == 900
    assert memsafe.oom.score_adj() == before


@pytest.mark.parametrize("junk", [-1001, 1001])
def test_oom_score_adj_out_of_range_is_refused(junk):
    with pytest.raises(ValueError, match="from -1000 to 1000"):
        memsafe.Popen(["true"], oom_score_adj=junk)


def test_memory_limit_by_rlimit_makes_the_child_be_refused_memory_not_killed():
    code = "try:\n    bytearray(512 << 20)\nexcept MemoryError:\n    print('refused')"
    unlimited = memsafe.run([sys.executable, "-c", code], stdout=PIPE, check=True)
    limited = memsafe.run(
        [sys.executable, "-c", code], stdout=PIPE, check=True, memory_limit="256 MiB", memory_limit_by="rlimit"
    )
    assert (unlimited.stdout, limited.stdout) == (b"", b"refused\n")
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def test_memory_limit_cannot_be_taken_back_nor_pass_the_one_inherited():
    code = """
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (2**31, 2**31))
        shell = ["sh", "-c", "ulimit -Sd; ulimit -Hd"]
        for limit in (2**30, 2**40):
            limits = dict(memory_limit=limit, memory_limit_by="rlimit")
            print(memsafe.run(shell, stdout=subprocess.PIPE, **limits).stdout.split())
    """
    assert run_in_a_child(code).split("\n")[:2] == ["[b'1048576', b'1048576']", "[b'2097152', b'2097152']"]


@pytest.mark.parametrize("junk", [0, -1, "much", 1.5])
def test_memory_limit_that_is_none_is_refused(junk):
    with pytest.raises(ValueError, match="memory_limit must"):
        memsafe.Popen(["true"], memory_limit=junk)


def test_memory_limit_and_the_same_rlimit_exclude_each_other():
    with pytest.raises(ValueError, match="RLIMIT_DATA"):
        memsafe.Popen(["true"], memory_limit="1 GiB", rlimits={resource.RLIMIT_DATA: 2**30})


@pytest.mark.parametrize(
    "junk", [2**64, 2**64 + 64, (64, 2**64 + 64), -2, (1,), (1, 2, 3), "64", 6.4, None, (64, None), ()]
)
def test_an_rlimit_that_is_none_is_refused_and_never_taken_for_another(junk):
    with pytest.raises(ValueError, match=r"rlimits\[7\] must be a number or \(soft, hard\)"):
        memsafe.Popen(["true"], rlimits={resource.RLIMIT_NOFILE: junk})


def test_rlimits_may_be_infinite_in_either_spelling_and_any_kind_of_int():
    class Number:
        def __index__(self):
            return 64

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert hard == resource.RLIM_INFINITY
    for infinity in (-1, 2**64 - 1):
        limits = {resource.RLIMIT_FSIZE: infinity, resource.RLIMIT_CORE: [0, 0], resource.RLIMIT_NOFILE: Number()}
        said = memsafe.run(["sh", "-c", "ulimit -f; ulimit -n"], rlimits=limits, stdout=PIPE, check=True).stdout
        assert said.split() == [b"unlimited", b"64"]


@pytest.mark.parametrize("given", [{"oom_score_adj": 500.7}, {"oom_score_adj": "500"}, {"nice": 1.5}, {"nice": "1"}])
def test_a_number_that_is_no_int_is_refused_and_not_rounded(given):
    with pytest.raises(TypeError):
        memsafe.Popen(["true"], **given)


def test_rlimits_and_nice_are_the_childs():
    limits = {resource.RLIMIT_NOFILE: (64, 128), resource.RLIMIT_CORE: 0}
    shell = ["sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -c; nice"]
    said = memsafe.run(shell, rlimits=limits, nice=3, stdout=PIPE, check=True).stdout
    assert said.split() == [b"64", b"128", b"0", b"%d" % min(os.nice(0) + 3, 19)]


def test_a_limit_that_the_kernel_refuses_is_named_and_nothing_is_started(tmp_path):
    before = open_files()
    program = ["touch", str(tmp_path / "started")]
    with pytest.raises(memsafe.KernelError, match=r"setrlimit.*not started; the soft limit is above") as refused:
        memsafe.Popen(program, rlimits={resource.RLIMIT_NOFILE: (2, 1)}, stdout=PIPE)
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(memsafe.KernelError, match=re.escape(f"write 0 to {tmp_path}/cgroup.procs: No such file")):
        memsafe.Popen(program, cgroup=tmp_path, stdout=PIPE)
    (tmp_path / "cgroup.procs").touch()
    assert memsafe.run(["true"], cgroup=tmp_path).returncode == 0
    assert (tmp_path / "cgroup.procs").read_text() == "0"
    assert sorted(os.listdir(tmp_path)) == ["cgroup.procs"]
    assert opened_since(before) == []
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_the_folder_of_a_cgroup_is_taken_in_every_spelling_of_a_path_and_never_cut_short(tmp_path):
    (tmp_path / "cgroup.procs").touch()
    for folder in (tmp_path, str(tmp_path), os.fsencode(tmp_path), [tmp_path], (os.fsencode(tmp_path),)):
        (tmp_path / "cgroup.procs").write_text("")
        assert memsafe.run(["true"], cgroup=folder).returncode == 0
        assert (tmp_path / "cgroup.procs").read_text() == "0"
    (tmp_path / "cgroup.procs").write_text("")
    for folder in (f"{tmp_path}/cgroup.procs\0", f"{tmp_path}\0"):
        with pytest.raises(ValueError, match="null byte"):
            memsafe.Popen(["true"], cgroup=folder)
    assert (tmp_path / "cgroup.procs").read_text() == ""


def test_a_child_that_could_not_start_is_reaped_though_sigchld_is_ignored():
    code = """
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            memsafe.run(["/nonexistent"])
        except FileNotFoundError as error:
            print(error.filename)
    """
    assert run_in_a_child(code).strip() == "/nonexistent"


def test_an_unknown_subprocess_module_is_refused_rather_than_misread():
    def later(self, args, executable, sandbox):
        raise AssertionError

    with pytest.raises(ImportError, match="sandbox"):
        popen._parameters_of(later)
    assert popen._parameters_of(subprocess.Popen._execute_child)[0] == "args"


def test_signals_reach_the_child():
    with memsafe.Popen(["cat"], stdin=PIPE) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait() == -signal.SIGTERM


def test_memory_limit_by_has_three_ways():
    with pytest.raises(ValueError, match="memory_limit_by must be one of auto, cgroup, rlimit"):
        memsafe.Popen(["true"], memory_limit="1 GiB", memory_limit_by="hope")


def test_a_cgroup_of_its_own_and_another_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="not both"):
        memsafe.Popen(["true"], memory_limit="1 GiB", memory_limit_by="cgroup", cgroup=tmp_path)


def test_where_no_cgroup_can_be_made_auto_takes_the_rlimit_and_cgroup_says_why(monkeypatch):
    def refuse(limit_bytes):
        raise memsafe.UnsupportedError("no cgroups today")

    monkeypatch.setattr(child_cgroup, "make", refuse)
    said = memsafe.run(["sh", "-c", "ulimit -d"], memory_limit="1 GiB", stdout=PIPE)
    assert (said.stdout, said.oom_killed) == (b"1048576\n", None)
    with pytest.raises(memsafe.UnsupportedError, match="no cgroups today"):
        memsafe.Popen(["true"], memory_limit="1 GiB", memory_limit_by="cgroup")


class TellingLog:
    """A kernel's log that can, or cannot, tell: of the pid that is asked for, and of other victims."""

    def __init__(self, named, *others):
        self.named, self.victims = named, set(others)

    def names(self, pid):
        return self.named

    def close(self):
        pass


class CountingGroup:
    """A cgroup to be joined by nobody, whose oom_kill rises by *rise* between two looks."""

    version = 1
    directory = "/nowhere"

    def __init__(self, rise):
        self.counts = iter([None, None] if rise is None else [5, 5 + rise])

    def is_frozen(self):
        return False

    def oom_kills(self):
        return next(self.counts)


@pytest.mark.parametrize(
    ("rise", "log", "killed"),
    [
        ("no cgroup", TellingLog(True), True),
        ("no cgroup", TellingLog(False), False),
        ("no cgroup", TellingLog(False, 2), False),
        ("no cgroup", TellingLog(None), None),
        (None, TellingLog(True), True),
        (None, TellingLog(None), None),
        (0, TellingLog(None), False),
        (0, TellingLog(False), False),
        (1, TellingLog(None), True),
        (1, TellingLog(None, 2), True),
        (1, TellingLog(True), True),
        (1, TellingLog(False, 2), False),
        (1, TellingLog(False), True),  # somebody was counted whom the log does not name: it is not to be trusted
    ],
)
def test_the_log_corrects_the_count_of_a_cgroup_that_others_share(monkeypatch, rise, log, killed):
    opened = []
    monkeypatch.setattr(limits, "KillLog", lambda since_s: opened.append(since_s) or log)
    monkeypatch.setattr(child_cgroup, "at", lambda folder: CountingGroup(rise))
    child = limits.Limits(None, None, "auto", None if rise == "no cgroup" else "/nowhere", None, 0)
    child.prepare()
    assert opened == []
    assert child.was_oom_killed(41, -signal.SIGKILL) is killed
    assert len(opened) == 1


def test_the_log_is_not_read_for_a_child_that_ended_otherwise(monkeypatch):
    monkeypatch.delattr(limits, "KillLog")
    for code in ("exit 0", "exit 137", "kill -15 $$"):
        assert memsafe.run(["sh", "-c", code]).oom_killed is None


def test_what_run_returns_is_a_completed_process_of_subprocess():
    done = memsafe.run(["false"])
    assert isinstance(done, subprocess.CompletedProcess)
    assert repr(done) == repr(subprocess.run(["false"]))
    assert done.oom_killed is None
    with pytest.raises(subprocess.CalledProcessError):
        done.check_returncode()


class AskingLog(TellingLog):
    """A kernel's log that names the child, but while it is read for the first time something else happens."""

    def __init__(self, meanwhile):
        super().__init__(True)
        self.meanwhile = [meanwhile]

    def names(self, pid):
        if self.meanwhile:
            self.meanwhile.pop()()
            return False
        return True


def test_who_sees_in_another_thread_that_the_child_has_ended_is_told_what_ended_it(monkeypatch):
    reading, read_on = threading.Event(), threading.Event()
    log = AskingLog(lambda: reading.set() or read_on.wait(30))
    monkeypatch.setattr(limits, "KillLog", lambda since_s: log)
    with memsafe.Popen(["sleep", "60"]) as process:
        waiter = threading.Thread(target=process.wait)
        waiter.start()
        process.kill()
        assert reading.wait(30)
        told = process.returncode, process.oom_killed
        read_on.set()
        waiter.join()
    assert told == (-signal.SIGKILL, True)
    assert process.oom_killed is True  # who was slower does not take it back


def test_a_handler_that_interrupts_who_reaps_the_child_can_wait_for_it_and_is_told_what_ended_it(monkeypatch):
    told = []
    log = AskingLog(lambda: signal.raise_signal(signal.SIGUSR1))
    monkeypatch.setattr(limits, "KillLog", lambda since_s: log)
    before = signal.signal(signal.SIGUSR1, lambda *_: told.append((process.wait(), process.oom_killed)))
    try:
        with memsafe.Popen(["sleep", "60"]) as process:
            process.kill()
            process.wait()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert told == [(-signal.SIGKILL, True)]
