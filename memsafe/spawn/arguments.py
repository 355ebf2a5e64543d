"""The arguments of Popen and run that are subprocess's own or handed through, for type checkers, inspect and help()."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, TypedDict, TypeVar

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from typing import IO, Any, TypeAlias

    from memsafe.sizes import Size
    from memsafe.spawn.limits import MemoryLimitBy

    StrOrBytesPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
    Command: TypeAlias = StrOrBytesPath | Sequence[StrOrBytesPath]
    Stream: TypeAlias = int | IO[Any] | None

_Function = TypeVar("_Function", bound="Callable[..., object]")


class PopenArguments(TypedDict, total=False):
    """Those of subprocess.Popen, but for its first."""

    bufsize: int
    executable: StrOrBytesPath | None
    stdin: Stream
    stdout: Stream
    stderr: Stream
    preexec_fn: None  # refused
    close_fds: bool
    shell: bool
    cwd: StrOrBytesPath | None
    env: Mapping[str, StrOrBytesPath] | Mapping[bytes, StrOrBytesPath] | None
    universal_newlines: bool | None
    startupinfo: None
    creationflags: int
    restore_signals: bool
    start_new_session: bool
    pass_fds: Collection[int]
    user: str | int | None
    group: str | int | None
    extra_groups: Iterable[str | int] | None
    encoding: str | None
    errors: str | None
    text: bool | None
    umask: int
    pipesize: int
    process_group: int | None


class ChildArguments(PopenArguments, total=False):
    """Those of memsafe.Popen, but for its first."""

    oom_score_adj: int | None
    memory_limit: Size | None
    memory_limit_by: MemoryLimitBy
    cgroup: StrOrBytesPath | Iterable[StrOrBytesPath] | None
    rlimits: Mapping[int, int | tuple[int, int]] | None
    nice: int


def passed_on_to(target: Callable[..., object]) -> Callable[[_Function], _Function]:
    """Show a function that passes its ``*args`` and ``**kwargs`` on with the parameters of *target*, then its own."""

    def show(function: _Function) -> _Function:
        shown = inspect.signature(function)
        own = [parameter for parameter in shown.parameters.values() if parameter.kind is parameter.KEYWORD_ONLY]
        theirs = inspect.signature(target).parameters.values()
        function.__signature__ = shown.replace(parameters=[*theirs, *own])  # type: ignore[attr-defined]
        return function

    return show


__all__ = ["ChildArguments", "Command", "PopenArguments", "StrOrBytesPath", "passed_on_to"]
