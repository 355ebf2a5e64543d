"""What is asked of the native call: subprocess's arguments and the limits of a child, as C takes them."""

from __future__ import annotations

import errno
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from memsafe._native import environment, ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from memsafe.spawn.limits import Limits

_U64 = 2**64 - 1
_INT_MAX = 2**31 - 1
_ID_MAX = 2**32 - 2  # the kernel keeps -1 for "no change"
_GROUPS_MAX = 65536  # NGROUPS_MAX


class Program:
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
            packed = environment()
            return ffi.from_buffer(packed), len(packed)
        items = [(os.fsencode(name), os.fsencode(value)) for name, value in self.env.items()]
        if any(b"=" in name for name, _ in items):
            raise ValueError("illegal environment variable name")
        return _pack([name + b"=" + value for name, value in items])


def _pack(items: Sequence[bytes]) -> tuple[Any, int]:
    """Return *items* one after another, each ended by NUL, and how many bytes that is."""
    packed = b"\0".join([*items, b""])
    if packed.count(b"\0") != len(items):
        raise ValueError("embedded null byte")
    return ffi.from_buffer(packed), len(packed)


class _Plan:
    """What the native call is given.

    Attributes:
        native: It, valid as long as this lives: cffi keeps alive what a cdata owns, not what it points to.
    """

    def __init__(self, program: Program, given: Mapping[str, Any], limits: Limits) -> None:
        paths, args, env = program.packed_paths(), program.packed_args(), program.packed_env()
        self._alive: list[Any] = [paths, args, env]
        self.native = ffi.new(
            "struct ms_spawn *",
            {
                "paths": paths,
                "args": args,
                "env": env,
                "stdio": (given["p2cread"], given["c2pwrite"], given["errwrite"]),
                "close_fds": bool(given["close_fds"]),
                "restore_signals": bool(given["restore_signals"]),
                "new_session": bool(given["start_new_session"]),
                "process_group": given["process_group"],
                "umask": given["umask"],
                "uid": _id(given["uid"]),
                "gid": _id(given["gid"]),
                "groups_count": -1,
                "nice": limits.nice,
            },
        )
        self._take_given(given)
        self._take_limits(limits)

    def _take_given(self, given: Mapping[str, Any]) -> None:
        if given["cwd"] is not None:
            self._point("cwd", _pack([os.fsencode(given["cwd"])])[0])
        keep_fds = _kept_fds(given["pass_fds"])
        if keep_fds:
            self._point("keep_fds", ffi.new("int[]", keep_fds))
            self.native.keep_fds_count = len(keep_fds)
        if given["gids"] is not None:
            groups = _group_ids(given["gids"])
            self._point("groups", ffi.new("uint32_t[]", groups))
            self.native.groups_count = len(groups)

    def _take_limits(self, limits: Limits) -> None:
        if limits.writes:
            texts = [(_pack([path])[0], _pack([text])[0]) for path, text in limits.writes]
            self._alive.append(texts)
            self._point("writes", ffi.new("struct ms_spawn_write[]", texts))
            self.native.writes_count = len(texts)
        if limits.birthplace is not None:
            self._point("birthplace", _pack([limits.birthplace])[0])
        if limits.rlimits:
            rlimits = [(which, soft & _U64, hard & _U64) for which, soft, hard in limits.rlimits]
            self._point("rlimits", ffi.new("struct ms_spawn_rlimit[]", rlimits))
            self.native.rlimits_count = len(rlimits)

    def _point(self, field: str, cdata: Any) -> None:
        self._alive.append(cdata)
        setattr(self.native, field, cdata)


def start(program: Program, given: Mapping[str, Any], limits: Limits) -> int:
    """Start *program* as *given* and *limits* say; return its pid."""
    plan = _Plan(program, given, limits)
    result = ffi.new("struct ms_spawn_result *")
    try:
        failed = lib.ms_spawn(plan.native, result)
        if failed:
            raise _error(-failed, result.failed_step, result.failed_index, program, given, limits)
        return int(result.pid)
    except BaseException:  # with a child, it comes from a signal's handler
        if result.pid:
            with suppress(ProcessLookupError, ChildProcessError):  # it has ended, and somebody else has reaped it
                os.kill(result.pid, signal.SIGKILL)
                os.waitpid(result.pid, 0)
        raise


def _error(code: int, step: int, at: int, program: Program, given: Mapping[str, Any], limits: Limits) -> OSError:
    """Return what subprocess raises for a failure at *step*, or a KernelError for the steps it does not know."""
    if step in (lib.MS_SPAWN_WRITE, lib.MS_SPAWN_RLIMIT, lib.MS_SPAWN_NICE):
        return limits.error(code, step, at)
    if step == lib.MS_SPAWN_CHDIR:
        return OSError(code, os.strerror(code), given["cwd"])
    if step == lib.MS_SPAWN_EXEC:
        error = OSError(code, os.strerror(code), program.executable)
        if code == errno.ENOMEM and (note := limits.scarcity()) is not None:
            error.add_note(note)
        return error
    return OSError(code, os.strerror(code))


def _kept_fds(fds: Iterable[Any]) -> list[int]:
    kept = sorted({int(fd) for fd in fds})
    if kept and not 0 <= kept[0] <= kept[-1] <= _INT_MAX:
        raise ValueError("bad value(s) in fds_to_keep")
    return kept


def _group_ids(groups: Sequence[int]) -> list[int]:
    if any(group > _ID_MAX for group in groups):
        raise ValueError("invalid group id")
    if len(groups) > _GROUPS_MAX:
        raise ValueError("too many groups")
    return list(groups)


def _id(number: int | None) -> int:
    if number is None:
        return -1
    if number > _ID_MAX:
        raise OverflowError(f"a user or group id must be at most {_ID_MAX}: {number}")
    return number


__all__ = ["Program", "start"]
