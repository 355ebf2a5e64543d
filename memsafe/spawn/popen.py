"""subprocess.Popen and subprocess.run, which start their child by the native call."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

from memsafe.errors import OOMKilledError
from memsafe.spawn.arguments import passed_on_to
from memsafe.spawn.limits import Limits
from memsafe.spawn.request import Program, start

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import FunctionType
    from typing import Unpack

    from memsafe.sizes import Size
    from memsafe.spawn.arguments import ChildArguments, Command, PopenArguments, StrOrBytesPath
    from memsafe.spawn.limits import MemoryLimitBy

# What is passed to _execute_child, which is no public name: known for 3.11 to 3.13, asked of any other.
_KNOWN_PARAMETERS = """
    args executable preexec_fn close_fds pass_fds cwd env startupinfo creationflags shell p2cread p2cwrite c2pread
    c2pwrite errread errwrite restore_signals gid gids uid umask start_new_session process_group
"""


def _parameters_of(execute_child: FunctionType) -> tuple[str, ...]:
    """Return the names of what subprocess.Popen passes to its _execute_child, in order.

    Raises:
        ImportError: There are others than those we know: to drop one in silence could start the wrong child.
    """
    code = execute_child.__code__
    names = code.co_varnames[1 : code.co_argcount]
    differing = set(names) ^ set(_KNOWN_PARAMETERS.split())
    if differing or code.co_kwonlyargcount:
        raise ImportError(
            f"memsafe.Popen does not know the subprocess module of Python {sys.version.split()[0]}: _execute_child "
            f"differs in {', '.join(sorted(differing)) or 'keyword-only parameters'}; a newer memsafe may"
        )
    return names


_PARAMETERS = _parameters_of(subprocess.Popen._execute_child)  # type: ignore[attr-defined]


class Popen(subprocess.Popen[Any]):
    """subprocess.Popen, with its arguments, attributes and exceptions, that never forks, and with limits for the child.

    The environment of a child without ``env`` is that of this process when the call is made, as with subprocess. What
    a signal's handler raises while the child starts (KeyboardInterrupt) ends the child: there is nobody to give it to.

    Args:
        args: As of subprocess.Popen.
        *more: As of subprocess.Popen.
        **kwargs: As of subprocess.Popen; ``preexec_fn`` is refused, see Raises.
        oom_score_adj: What the child's oom_score_adj becomes, -1000 to 1000; None leaves it as inherited. It is the
            value itself, as the kernel's file has it, whatever this process has: below that the child is less likely
            to be chosen than its parent, and an ordinary user is refused. ``min(memsafe.oom.score_adj() + 200, 1000)``
            goes from there. An ordinary user may raise it; the child cannot lower it below where it was.
        memory_limit: How much memory the child may use, in bytes or as a string.
        memory_limit_by: By what. "cgroup": one that is made for the child and removed after it, with all that it
            starts: together they may use so much, page cache and swap included; past that the OOM killer ends one of
            them, in cgroup v2 all. "rlimit": RLIMIT_DATA, soft and hard, of each process for itself: the allocation
            is refused and nothing is killed; what is mapped counts, used or not, shared memory does not. "auto": a
            cgroup where this process may make one and ``cgroup`` is not given, else the rlimit.
        cgroup: A cgroup's folder, or several of different v1 hierarchies, that the child joins before it runs.
        rlimits: ``{resource.RLIMIT_...: (soft, hard)}``, or one number for both.
        nice: Added to this process's niceness.

    Attributes:
        oom_killed: Whether the OOM killer ended the child; None while it runs, and where nothing tells. In a cgroup
            that was made for it, its counter does: the child or a process that it started was killed. Of any other
            child that died by SIGKILL the kernel's log tells, where it may be read and reaches back to the start of
            the child. Where not, the counter of what was given as ``cgroup``: True if it grew while the child ran.
        memory_cgroup: The folder of the cgroup that was made for it; None: there is none, or the child has ended.

    Raises:
        ValueError: ``preexec_fn`` was given, or an argument is out of its range.
        KernelError: The kernel refused one of the limits; nothing was started.
        UnsupportedError: ``memory_limit_by`` is "cgroup", and no cgroup can be made here; the error says why.
    """

    @passed_on_to(subprocess.Popen.__init__)
    def __init__(
        self,
        args: Command,
        *more: Any,
        oom_score_adj: int | None = None,
        memory_limit: Size | None = None,
        memory_limit_by: MemoryLimitBy = "auto",
        cgroup: StrOrBytesPath | Iterable[StrOrBytesPath] | None = None,
        rlimits: Mapping[int, int | tuple[int, int]] | None = None,
        nice: int = 0,
        **kwargs: Unpack[PopenArguments],
    ) -> None:
        self._limits = Limits(oom_score_adj, memory_limit, memory_limit_by, cgroup, rlimits, nice)
        try:
            super().__init__(args, *more, **kwargs)
        except BaseException:  # a signal's handler has raised
            if self._child_created:
                self.kill()
                self.wait()
            raise

    @property
    def memory_cgroup(self) -> str | None:
        made = self._limits.made
        return None if made is None else made.cgroup.directory

    @property  # subprocess sets it in several places when it has reaped the child, and nowhere else
    def returncode(self) -> Any:
        return self._returncode

    @returncode.setter
    def returncode(self, value: Any) -> None:
        self._returncode = value  # first of all: send_signal() takes the pid for the child's until then
        if value is not None:
            try:
                _ = self.oom_killed
            finally:
                self._limits.release()

    @property
    def oom_killed(self) -> bool | None:
        # Found out by whoever asks first after the end, in milliseconds; of several at once, the first answer stays.
        # Without a lock: a signal's handler would wait for the thread that it interrupts, a forked copy for one that
        # it does not have.
        known = vars(self)
        if self._returncode is not None and "_oom_killed" not in known:
            known.setdefault("_oom_killed", self._limits.was_oom_killed(self.pid, self._returncode))
        return known.get("_oom_killed")

    def _execute_child(self, *values: Any) -> None:
        """Start the child; subprocess.Popen.__init__ calls it with everything checked and the pipes made."""
        given = dict(zip(_PARAMETERS, values, strict=True))
        if given["preexec_fn"] is not None:
            raise ValueError(
                "preexec_fn needs fork(), which copies this process, and memsafe never forks for a child: use cwd, "
                "umask, user, group, extra_groups, start_new_session, process_group, nice, rlimits, memory_limit, "
                "oom_score_adj or cgroup instead, or have the program start through a small one that prepares it"
            )
        program = Program(given)
        sys.audit("subprocess.Popen", program.executable, program.args, given["cwd"], given["env"])
        try:
            self._limits.prepare()
            self.pid = start(program, given, self._limits)
            self._child_created = True
        except BaseException:
            self._limits.release()
            raise
        finally:
            self._close_pipe_fds(  # type: ignore[attr-defined]
                *(given[end] for end in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
            )


class ChildOOMKilledError(OOMKilledError, subprocess.CalledProcessError):
    """A child of run(check=True) failed, and the OOM killer ended it: see Popen.oom_killed.

    Attributes:
        returncode, cmd, output, stdout, stderr: As of subprocess.CalledProcessError.
    """

    def __init__(self, returncode: int, cmd: Any, output: Any = None, stderr: Any = None) -> None:
        subprocess.CalledProcessError.__init__(self, returncode, cmd, output, stderr)
        self.child_type = self.child_message = self.child_traceback = None

    def __str__(self) -> str:
        return f"{subprocess.CalledProcessError.__str__(self)} The OOM killer ended it or a process that it started."


class CompletedProcess(subprocess.CompletedProcess[Any]):
    """subprocess.CompletedProcess, with what is known of the OOM killer.

    Attributes:
        oom_killed: As of Popen.
    """

    def __init__(
        self, args: Any, returncode: int, stdout: Any = None, stderr: Any = None, oom_killed: bool | None = None
    ) -> None:
        super().__init__(args, returncode, stdout, stderr)
        self.oom_killed = oom_killed

    def check_returncode(self) -> None:
        """Raise ChildOOMKilledError or subprocess.CalledProcessError if the exit status is not 0."""
        if self.returncode:
            kind = ChildOOMKilledError if self.oom_killed else subprocess.CalledProcessError
            raise kind(self.returncode, self.args, self.stdout, self.stderr)


def connect(kwargs: ChildArguments, input: str | bytes | None, capture_output: bool) -> None:  # noqa: A002
    """Ask Popen, by its *kwargs*, for the pipes that run()'s arguments need."""
    if input is not None:
        if kwargs.get("stdin") is not None:
            raise ValueError("stdin and input arguments may not both be used.")
        kwargs["stdin"] = subprocess.PIPE
    if capture_output:
        if kwargs.get("stdout") is not None or kwargs.get("stderr") is not None:
            raise ValueError("stdout and stderr arguments may not be used with capture_output.")
        kwargs["stdout"] = kwargs["stderr"] = subprocess.PIPE


def completed(process: Popen, stdout: Any, stderr: Any, *, check: bool) -> CompletedProcess:
    """Return what run() returns of *process*, which has ended, or raise what it raises."""
    done = CompletedProcess(process.args, process.returncode, stdout, stderr, process.oom_killed)
    if check:
        done.check_returncode()
    return done


@passed_on_to(Popen)
def run(
    args: Command,
    *more: Any,
    input: str | bytes | None = None,  # noqa: A002
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **kwargs: Unpack[ChildArguments],
) -> CompletedProcess:
    """subprocess.run on memsafe.Popen: run a command, wait, return a CompletedProcess.

    Args:
        args: As of memsafe.Popen.
        *more: As of memsafe.Popen.
        **kwargs: As of memsafe.Popen.
        input: What the child reads from its stdin.
        capture_output: Return what it writes to stdout and stderr.
        timeout: Seconds; when they have passed the child is killed.
        check: Raise if it exits with anything but 0.

    Raises:
        subprocess.TimeoutExpired: *timeout* passed.
        subprocess.CalledProcessError: *check* is set and the exit status is not 0.
        ChildOOMKilledError: The same, and the OOM killer was what ended it.
        ValueError, KernelError, UnsupportedError: As of memsafe.Popen.
    """
    connect(kwargs, input, capture_output)
    with Popen(args, *more, **kwargs) as process:
        try:
            stdout, stderr = process.communicate(input, timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        except BaseException:
            process.kill()  # an interrupted wait has been given its grace already
            raise
        process.poll()
    return completed(process, stdout, stderr, check=check)


__all__ = ["ChildOOMKilledError", "CompletedProcess", "Popen", "completed", "connect", "run"]
