"""Children without fork's bill: subprocess's Popen and run, which never copy this process.

fork() copies the page tables and is charged for all writable memory of the parent; a child that shares the parent's
memory until it runs its program costs the same beside 1 MiB and beside 100 GiB. subprocess does that too until one
of ``user``, ``group``, ``extra_groups`` or ``preexec_fn`` is asked for, and then falls back to fork().
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from operator import index
from typing import TYPE_CHECKING, Any

from memsafe._kernel.oom import JOIN_TEXT, check_score_adj, join_path, score_adj_path
from memsafe._native import ffi, lib
from memsafe.errors import KernelError
from memsafe.sizes import Size, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import FunctionType

    StrPath = str | os.PathLike[str]

_U64 = 2**64 - 1
_CGROUP_NEEDS = (
    "needs a cgroup's folder whose cgroup.procs, and that of the common ancestor, this process may write; in v2, one "
    "without controllers in its cgroup.subtree_control"
)
_INT_MAX = 2**31 - 1
_ID_MAX = 2**32 - 2  # the kernel keeps -1 for "no change"

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

    The environment of a child without ``env`` is that of this process when the call is made, as with subprocess.

    Args:
        *args: Those of subprocess.Popen.
        **kwargs: Those of subprocess.Popen; ``preexec_fn`` is refused, see Raises.
        oom_score_adj: What the child's oom_score_adj becomes, -1000 to 1000; None leaves it as inherited. An ordinary
            user may raise it; the child cannot lower it below where it was.
        memory_limit: Private writable memory the child may map, in bytes or as a string (RLIMIT_DATA, soft and hard).
            The child's allocation is refused, nothing is killed. Not RLIMIT_AS: that counts address space, of which
            runtimes reserve far more than they use (64 MiB a thread for glibc's arenas). Shared memory is not counted,
            and each process of a tree of children has the limit for itself; a cgroup does better where one is to hand.
        cgroup: A cgroup's folder, or several of different v1 hierarchies, that the child joins before it runs.
        rlimits: ``{resource.RLIMIT_...: (soft, hard)}``, or one number for both.
        nice: Added to this process's niceness.

    Raises:
        ValueError: ``preexec_fn`` was given, or an argument is out of its range.
        KernelError: The kernel refused one of the limits; nothing was started.
    """

    def __init__(
        self,
        *args: Any,
        oom_score_adj: int | None = None,
        memory_limit: Size | None = None,
        cgroup: StrPath | Iterable[StrPath] | None = None,
        rlimits: Mapping[int, int | tuple[int, int]] | None = None,
        nice: int = 0,
        **kwargs: Any,
    ) -> None:
        self._limits = _Limits(oom_score_adj, memory_limit, cgroup, rlimits, nice)
        super().__init__(*args, **kwargs)

    def _execute_child(self, *values: Any) -> None:
        """Start the child; subprocess.Popen.__init__ calls it with everything checked and the pipes made."""
        given = dict(zip(_PARAMETERS, values, strict=True))
        if given["preexec_fn"] is not None:
            raise ValueError(
                "preexec_fn needs fork(), which copies this process, and memsafe never forks for a child: use cwd, "
                "umask, user, group, extra_groups, start_new_session, process_group, nice, rlimits, memory_limit, "
                "oom_score_adj or cgroup instead, or have the program start through a small one that prepares it"
            )
        program = _Program(given)
        sys.audit("subprocess.Popen", program.executable, program.args, given["cwd"], given["env"])
        try:
            self.pid = _spawn(program, given, self._limits)
            self._child_created = True
        finally:
            self._close_pipe_fds(  # type: ignore[attr-defined]
                *(given[end] for end in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
            )


def run(
    *args: Any,
    input: str | bytes | None = None,  # noqa: A002
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **kwargs: Any,
) -> subprocess.CompletedProcess[Any]:
    """subprocess.run on memsafe.Popen: run a command, wait, return a CompletedProcess.

    Args:
        *args: Those of memsafe.Popen.
        **kwargs: Those of memsafe.Popen.
        input: What the child reads from its stdin.
        capture_output: Return what it writes to stdout and stderr.
        timeout: Seconds; when they have passed the child is killed.
        check: Raise if it exits with anything but 0.

    Raises:
        subprocess.TimeoutExpired: *timeout* passed.
        subprocess.CalledProcessError: *check* is set and the exit status is not 0.
        ValueError, KernelError: As of memsafe.Popen.
    """
    if input is not None:
        if kwargs.get("stdin") is not None:
            raise ValueError("stdin and input arguments may not both be used.")
        kwargs["stdin"] = subprocess.PIPE
    if capture_output:
        if kwargs.get("stdout") is not None or kwargs.get("stderr") is not None:
            raise ValueError("stdout and stderr arguments may not be used with capture_output.")
        kwargs["stdout"] = kwargs["stderr"] = subprocess.PIPE
    with Popen(*args, **kwargs) as process:
        try:
            stdout, stderr = process.communicate(input, timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        except BaseException:
            process.kill()  # an interrupted wait has been given its grace already
            raise
        status = process.poll()
    if check and status:
        raise subprocess.CalledProcessError(status, process.args, output=stdout, stderr=stderr)
    assert status is not None
    return subprocess.CompletedProcess(process.args, status, stdout, stderr)


class _Limits:
    """What memsafe adds to a child, checked: the files it writes, its rlimits, its niceness."""

    def __init__(
        self,
        oom_score_adj: int | None,
        memory_limit: Size | None,
        cgroup: StrPath | Iterable[StrPath] | None,
        rlimits: Mapping[int, int | tuple[int, int]] | None,
        nice: int,
    ) -> None:
        self.writes: list[tuple[bytes, bytes]] = []
        if cgroup is not None:
            folders = [cgroup] if isinstance(cgroup, (str, os.PathLike)) else cgroup
            self.writes += [(os.fsencode(join_path(folder)), JOIN_TEXT) for folder in folders]
        self.cgroups = len(self.writes)
        if oom_score_adj is not None:
            check_score_adj(oom_score_adj)
            self.writes.append((os.fsencode(score_adj_path()), b"%d" % oom_score_adj))
        self.rlimits = [
            (which, *((value, value) if isinstance(value, int) else value)) for which, value in (rlimits or {}).items()
        ]
        if memory_limit is not None:
            if any(which == resource.RLIMIT_DATA for which, *_ in self.rlimits):
                raise ValueError("memory_limit sets RLIMIT_DATA: give it or rlimits[RLIMIT_DATA], not both")
            self.rlimits.append((resource.RLIMIT_DATA, *_data_limit(memory_limit)))
        self.nice = index(nice)

    def error(self, code: int, step: int, at: int) -> KernelError:
        """Return what to raise when the kernel refused the *at*-th limit of *step*."""
        if step == lib.MS_SPAWN_WRITE:
            path, text = self.writes[at]
            call = f"write {text.decode()} to {os.fsdecode(path)}"
            needs = _CGROUP_NEEDS if at < self.cgroups else "below what it inherits needs CAP_SYS_RESOURCE"
        elif step == lib.MS_SPAWN_RLIMIT:
            call, needs = f"setrlimit{self.rlimits[at]}", "raising a hard limit needs CAP_SYS_RESOURCE"
        else:
            call, needs = f"nice({self.nice})", "below 0 needs CAP_SYS_NICE"
        return KernelError(code, call, f"by the child, which was not started; {needs}")


def _data_limit(memory_limit: Size) -> tuple[int, int]:
    limit_bytes = parse_size(memory_limit, what="memory_limit")
    if limit_bytes == 0:
        raise ValueError("memory_limit must be above 0: no program starts without memory")
    _, hard_bytes = resource.getrlimit(resource.RLIMIT_DATA)
    if hard_bytes != resource.RLIM_INFINITY:
        limit_bytes = min(limit_bytes, hard_bytes)
    return limit_bytes, limit_bytes


class _Program:
    """What to run: the argument vector, where to look for it, its environment, all as subprocess understands them."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        args, shell = given["args"], given["shell"]
        if isinstance(args, os.PathLike) and shell:
            raise TypeError("path-like args is not allowed when shell is true")
        self.args = [args] if isinstance(args, (str, bytes, os.PathLike)) else list(args)
        self.executable = given["executable"]
        if shell:
            self.args = [self.executable or "/bin/sh", "-c", *self.args]
        if self.executable is None:
            self.executable = self.args[0]
        self.env: Mapping[Any, Any] | None = given["env"]

    def packed_args(self) -> Any:
        return _pack([os.fsencode(argument) for argument in self.args])

    def packed_paths(self) -> Any:
        executable = os.fsencode(self.executable)
        if b"/" in executable:
            return _pack([executable])
        folders = map(os.fsencode, os.get_exec_path(self.env))
        return _pack([os.path.join(folder, executable) for folder in folders])  # noqa: PTH118 - bytes

    def packed_env(self) -> Any:
        if self.env is None:
            return _pack(_inherited_env())
        items = [(os.fsencode(name), os.fsencode(value)) for name, value in self.env.items()]
        if any(b"=" in name for name, _ in items):
            raise ValueError("illegal environment variable name")
        return _pack([name + b"=" + value for name, value in items])


def _inherited_env() -> list[bytes]:
    """Return the environment of this process as C holds it, os.putenv's changes included.

    A copy, because the native call releases the GIL, under which another thread may change it.
    """
    env: list[bytes] = []
    environ = lib.environ
    while environ and (entry := environ[len(env)]):
        env.append(ffi.string(entry))
    return env


def _pack(items: Sequence[bytes]) -> tuple[Any, int]:
    """Return *items* one after another, each ended by NUL, and their number."""
    packed = b"\0".join([*items, b""])
    if packed.count(b"\0") != len(items):
        raise ValueError("embedded null byte")
    return ffi.from_buffer(packed), len(items)


def _spawn(program: _Program, given: Mapping[str, Any], limits: _Limits) -> int:
    """Start *program* as *given* and *limits* say; return its pid."""
    keep_fds, groups_wanted = _kept_fds(given["pass_fds"]), _group_ids(given["gids"])
    paths, args, env = program.packed_paths(), program.packed_args(), program.packed_env()
    cwd = None if given["cwd"] is None else _pack([os.fsencode(given["cwd"])])[0]
    # cffi keeps alive what a cdata owns, not what it points to: these names do, until the call returns.
    texts = [(ffi.new("char[]", path), ffi.new("char[]", text)) for path, text in limits.writes]
    keep = ffi.new("int[]", keep_fds)
    groups = ffi.new("uint32_t[]", groups_wanted or [])
    writes = ffi.new("struct ms_spawn_write[]", texts)
    rlimits = ffi.new(
        "struct ms_spawn_rlimit[]", [(which, soft & _U64, hard & _U64) for which, soft, hard in limits.rlimits]
    )
    plan = ffi.new(
        "struct ms_spawn *",
        {
            "paths": paths,
            "args": args,
            "env": env,
            "cwd": ffi.NULL if cwd is None else cwd,
            "stdio": [given["p2cread"], given["c2pwrite"], given["errwrite"]],
            "close_fds": bool(given["close_fds"]),
            "keep_fds": keep,
            "keep_fds_count": len(keep_fds),
            "restore_signals": bool(given["restore_signals"]),
            "new_session": bool(given["start_new_session"]),
            "process_group": given["process_group"],
            "umask": given["umask"],
            "uid": _id(given["uid"]),
            "gid": _id(given["gid"]),
            "groups": groups,
            "groups_count": -1 if groups_wanted is None else len(groups_wanted),
            "writes": writes,
            "writes_count": len(limits.writes),
            "rlimits": rlimits,
            "rlimits_count": len(limits.rlimits),
            "nice": limits.nice,
        },
    )
    pid, step, at = ffi.new("int *"), ffi.new("int *"), ffi.new("int *")
    failed = lib.ms_spawn(plan, pid, step, at)
    if failed:
        raise _error(-failed, step[0], at[0], program, given, limits)
    return int(pid[0])


def _error(code: int, step: int, at: int, program: _Program, given: Mapping[str, Any], limits: _Limits) -> OSError:
    """Return what subprocess raises for a failure at *step*, or a KernelError for the steps it does not know."""
    if step in (lib.MS_SPAWN_WRITE, lib.MS_SPAWN_RLIMIT, lib.MS_SPAWN_NICE):
        return limits.error(code, step, at)
    if step == lib.MS_SPAWN_CHDIR:
        return OSError(code, os.strerror(code), given["cwd"])
    if step == lib.MS_SPAWN_EXEC:
        return OSError(code, os.strerror(code), program.executable)
    return OSError(code, os.strerror(code))


def _kept_fds(fds: Iterable[Any]) -> list[int]:
    kept = sorted({int(fd) for fd in fds})
    if kept and not 0 <= kept[0] <= kept[-1] <= _INT_MAX:
        raise ValueError("bad value(s) in fds_to_keep")
    return kept


def _group_ids(groups: Sequence[int] | None) -> list[int] | None:
    if groups is None:
        return None
    if any(group > _ID_MAX for group in groups):
        raise ValueError("invalid group id")
    return list(groups)


def _id(number: int | None) -> int:
    if number is None:
        return -1
    if number > _ID_MAX:
        raise OverflowError(f"a user or group id must be at most {_ID_MAX}: {number}")
    return number


__all__ = ["Popen", "run"]
