"""memsafe.run_async beside memsafe.run: the same outcome, under asyncio's own loop and uvloop, in any thread."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

import memsafe
from tests.integration.scenario import open_files, opened_since

PIPE = subprocess.PIPE
MIB = 1 << 20


@pytest.fixture(params=["asyncio", "uvloop"])
def runner(request):
    """Run a coroutine in a loop of the kind; nothing may be left behind."""
    if request.param == "asyncio":
        run = asyncio.run
    else:
        run = pytest.importorskip("uvloop", reason="uvloop is not installed").run
    run(asyncio.sleep(0))  # uvloop keeps what it opens at first
    before, threads = open_files(), set(threading.enumerate())
    yield run
    assert opened_since(before) == []
    assert set(threading.enumerate()) <= threads
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def outcome(call):
    try:
        done = call()
    except OSError as error:
        return type(error), error.errno, error.filename
    except subprocess.CalledProcessError as error:
        return type(error), error.returncode, error.stdout, error.stderr
    except (ValueError, TypeError, AttributeError, subprocess.SubprocessError) as error:
        return type(error)
    return done.args, done.returncode, done.stdout, done.stderr


SHOUT = "echo out; echo err >&2; exit 3"
SAME = {
    "nothing asked": (["true"], {}),
    "a status": (["sh", "-c", "exit 3"], {}),
    "a signal": (["sh", "-c", "kill -9 $$"], {}),
    "output": ([*["sh", "-c"], SHOUT], {"capture_output": True}),
    "stdout alone": ([*["sh", "-c"], SHOUT], {"stdout": PIPE, "stderr": subprocess.DEVNULL}),
    "both in one": ([*["sh", "-c"], SHOUT], {"stdout": PIPE, "stderr": subprocess.STDOUT}),
    "check": ([*["sh", "-c"], SHOUT], {"capture_output": True, "check": True}),
    "input": (["cat"], {"input": b"hello", "stdout": PIPE}),
    "no input": (["cat"], {"input": b"", "stdout": PIPE}),
    "stdin, and nothing to say": (["cat"], {"stdin": PIPE, "stdout": PIPE}),
    "input that nobody reads": (["true"], {"input": b"x" * MIB}),
    "text": (["cat"], {"input": "h\u00e9llo\r\nthere\r", "stdout": PIPE, "text": True}),
    "an encoding": (["cat"], {"input": "h\u00e9", "stdout": PIPE, "encoding": "latin-1"}),
    "what is not in the encoding": (["cat"], {"input": "\u20ac", "stdout": PIPE, "encoding": "ascii"}),
    "text without text=": (["cat"], {"input": "text", "stdout": PIPE}),
    "bytes with text=": (["cat"], {"input": b"bytes", "stdout": PIPE, "text": True}),
    "output that is no text": (["printf", r"\377"], {"stdout": PIPE, "encoding": "utf-8", "errors": "replace"}),
    "a buffer": (["cat"], {"input": bytearray(b"hello"), "stdout": PIPE}),
    "memsafe's own": (["sh", "-c", "nice"], {"stdout": PIPE, "nice": 2, "oom_score_adj": 900}),
    "no program": (["/nonexistent/program"], {"capture_output": True}),
    "input and stdin": (["cat"], {"input": b"", "stdin": PIPE}),
    "capture_output and stdout": (["cat"], {"capture_output": True, "stdout": PIPE}),
    "preexec_fn": (["true"], {"preexec_fn": int}),
}


@pytest.mark.parametrize("name", SAME)
def test_run_async_does_what_run_does(name, runner):
    args, kwargs = SAME[name]
    if name in {"text without text=", "bytes with text=", "what is not in the encoding"}:
        kwargs = {**kwargs, "timeout": 60}  # run() leaves the child when it cannot encode
    theirs = outcome(lambda: memsafe.run(args, **kwargs))
    assert outcome(lambda: runner(memsafe.run_async(args, **kwargs))) == theirs


def test_much_goes_both_ways_at_once_without_deadlock(runner):
    code = """
import sys
for line in sys.stdin.buffer:
    sys.stdout.buffer.write(line)
    sys.stderr.buffer.write(line)
"""
    text = b"".join(b"%d\n" % number for number in range(100_000))
    done = runner(memsafe.run_async([sys.executable, "-c", code], input=text, capture_output=True, check=True))
    assert (done.stdout, done.stderr) == (text, text)


def test_the_loop_goes_on_beside_a_child(runner):
    async def main():
        read_end, write_end = os.pipe()
        task = asyncio.create_task(memsafe.run_async(["cat"], stdin=read_end, stdout=PIPE))
        await asyncio.sleep(0)
        os.close(read_end)
        os.write(write_end, b"from the loop")
        os.close(write_end)
        return (await task).stdout

    assert runner(main()) == b"from the loop"


def test_many_children_at_once(runner):
    async def main():
        runs = (memsafe.run_async(["echo", str(number)], stdout=PIPE) for number in range(50))
        return [done.stdout for done in await asyncio.gather(*runs)]

    assert runner(main()) == [b"%d\n" % number for number in range(50)]


def test_a_timeout_kills_and_reaps_the_child_and_tells_what_it_said(runner):
    never_ending, keep_open = os.pipe()
    said = "echo said; exec cat"
    for timeout in (1.0, 5.0, 20.0):  # the first is plenty, but on a busy machine
        with pytest.raises(subprocess.TimeoutExpired) as passed:
            runner(memsafe.run_async(["sh", "-c", said], stdin=never_ending, capture_output=True, timeout=timeout))
        if passed.value.output:
            break
    os.close(never_ending)
    os.close(keep_open)
    assert (passed.value.timeout, passed.value.output, passed.value.stderr) == (timeout, b"said\n", None)


def test_a_child_that_ends_in_time_is_not_touched_by_the_timeout(runner):
    assert runner(memsafe.run_async(["true"], timeout=60)).returncode == 0


async def cancelled_when_it_speaks(times=1):
    """Cancel run_async as soon as its child speaks; return the child's pid and whether it is gone by then."""
    read_end, write_end = os.pipe()
    never_ending, keep_open = os.pipe()
    task = asyncio.create_task(
        memsafe.run_async(
            ["sh", "-c", f"echo $$ >/proc/self/fd/{write_end}; exec cat"], stdin=never_ending, pass_fds=[write_end]
        )
    )
    heard = asyncio.Event()
    asyncio.get_running_loop().add_reader(read_end, heard.set)
    await heard.wait()
    asyncio.get_running_loop().remove_reader(read_end)
    pid = int(os.read(read_end, 100))
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    for fd in (read_end, write_end, never_ending, keep_open):
        os.close(fd)
    return pid


def test_cancelled_it_kills_and_reaps_the_child(runner):
    async def main():
        pid = await cancelled_when_it_speaks()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    runner(main())


def test_cancelled_twice_it_returns_at_once_and_the_loop_reaps_the_child(runner):
    async def main():
        pid = await cancelled_when_it_speaks(times=2)
        while True:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return
            await asyncio.sleep(0)

    runner(main())


def test_an_outer_timeout_is_the_callers_own(runner):
    async def main():
        never_ending, keep_open = os.pipe()
        try:
            async with asyncio.timeout(0.1):
                await memsafe.run_async(["cat"], stdin=never_ending)
        finally:
            os.close(never_ending)
            os.close(keep_open)

    with pytest.raises(TimeoutError) as passed:
        runner(main())
    assert not isinstance(passed.value, subprocess.TimeoutExpired)


def test_it_works_in_threads_and_with_sigchld_ignored(runner):
    """Ignored, SIGCHLD makes the kernel reap the child: subprocess's word for its status is 0 then."""
    statuses = []

    def work():
        for _ in range(10):
            statuses.append(runner(memsafe.run_async(["sh", "-c", "exit 3"])).returncode)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [3] * 30
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert runner(memsafe.run_async(["sh", "-c", "exit 3"])).returncode == 0
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_pipe_that_a_grandchild_keeps_open_is_heard_to_its_end_as_with_run(runner):
    script = "(read line; echo later) <&3 & echo now"
    read_end, write_end = os.pipe()

    async def main():
        command = ["sh", "-c", f"exec 3</proc/self/fd/{read_end}; {script}"]
        task = asyncio.create_task(memsafe.run_async(command, stdout=PIPE, pass_fds=[read_end]))
        await asyncio.sleep(0)
        os.close(read_end)
        os.write(write_end, b"go\n")
        os.close(write_end)
        return (await task).stdout

    assert sorted(runner(main()).split()) == [b"later", b"now"]


def test_a_coroutine_that_is_never_finished_kills_its_child(runner):
    async def main():
        running = memsafe.run_async(["cat"], stdin=never_ending)
        running.send(None)
        running.close()

    never_ending, keep_open = os.pipe()
    runner(main())
    os.close(never_ending)
    os.close(keep_open)


@pytest.mark.parametrize("timeout", [None, 60])
def test_a_coroutine_that_outlives_its_loop_leaves_nothing_when_it_is_closed(runner, timeout):
    async def main():
        running = memsafe.run_async(["cat"], stdin=never_ending, capture_output=True, timeout=timeout)
        running.send(None)
        return running

    never_ending, keep_open = os.pipe()
    running = runner(main())
    running.close()
    os.close(never_ending)
    os.close(keep_open)


class Loop:
    """The running loop, which refuses the *number*-th descriptor to read from."""

    def __init__(self, number):
        self._loop, self._left = asyncio.get_running_loop(), number

    def __getattr__(self, name):
        return getattr(self._loop, name)

    def add_reader(self, fd, callback):
        self._left -= 1
        if self._left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._loop.add_reader(fd, callback)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_loop_that_refuses_to_watch_leaves_no_child_and_no_descriptor(runner, monkeypatch, number):
    """It does so past fs.epoll.max_user_watches."""

    async def main():
        loop = Loop(number)
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "get_running_loop", lambda: loop)
            await memsafe.run_async(["cat"], stdin=never_ending, capture_output=True)

    never_ending, keep_open = os.pipe()
    with pytest.raises(OSError, match="No space left"):
        runner(main())
    os.close(never_ending)
    os.close(keep_open)


@pytest.mark.parametrize("stdout", [None, PIPE])
def test_a_child_that_somebody_else_has_reaped_is_no_reason_to_wait(runner, monkeypatch, stdout):
    """Its status is lost: subprocess says 0 then."""

    def too_late(pid):
        os.waitpid(pid, 0)
        raise ProcessLookupError

    monkeypatch.setattr(os, "pidfd_open", too_late)
    done = runner(memsafe.run_async(["sh", "-c", "exit 3"], stdout=stdout, timeout=60))
    assert (done.returncode, done.stdout) == (0, None if stdout is None else b"")


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.EPERM, memsafe.UnsupportedError), (errno.EMFILE, memsafe.KernelError)]
)
def test_without_a_pidfd_the_child_is_killed_and_the_error_says_why(runner, monkeypatch, code, kind):
    def refuse(pid):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with pytest.raises(kind, match="pidfd_open"):
        runner(memsafe.run_async(["cat"], stdin=PIPE, stdout=PIPE))
