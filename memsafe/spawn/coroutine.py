"""run() for asyncio: pipes and the end of the child are watched by the event loop, without threads and SIGCHLD.

The end is told by a pidfd, so that it works under any loop with add_reader (uvloop's too), in any thread, and beside
whatever else waits for children.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
import subprocess
from functools import partial
from typing import TYPE_CHECKING, Any

from memsafe.errors import KernelError, UnsupportedError
from memsafe.spawn.arguments import passed_on_to
from memsafe.spawn.popen import CompletedProcess, Popen, completed, connect

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO, Unpack

    from memsafe.spawn.arguments import ChildArguments, Command

_READ_BYTES = 256 * 1024


@passed_on_to(Popen)
async def run_async(
    args: Command,
    *more: Any,
    input: str | bytes | None = None,  # noqa: A002
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **kwargs: Unpack[ChildArguments],
) -> CompletedProcess:
    """memsafe.run() that an event loop can go on beside: with its arguments, what it returns and what it raises.

    Cancelled, it kills the child and waits until it is gone. Starting the child blocks the loop as long as the kernel
    takes to begin the program.

    Raises:
        UnsupportedError: Also where pidfds are forbidden.
    """
    connect(kwargs, input, capture_output)
    process = Popen(args, *more, **kwargs)
    try:
        conversation = _Conversation(process)
    except BaseException:
        _kill_and_reap(process)
        for stream in _pipes(process):
            stream.close()
        raise
    try:
        async with asyncio.timeout(timeout) as limit:
            await conversation.hold(input)
    except GeneratorExit:  # nobody awaits any more, the loop may be gone
        conversation.disregard_the_end()
        _kill_and_reap(process)
        raise
    except BaseException as error:
        process.kill()
        await conversation.ended.wait()
        if timeout is not None and isinstance(error, TimeoutError) and limit.expired():
            out, err = conversation.heard()
            raise subprocess.TimeoutExpired(process.args, timeout, output=out or None, stderr=err or None) from None
        raise
    finally:
        conversation.close()
    return completed(process, *conversation.said(), check=check)


def _kill_and_reap(process: Popen) -> None:
    process.kill()
    process.wait()


def _pidfd_of(process: Popen) -> int | None:
    """Return a new pidfd; None: somebody else has reaped the child, as where SIGCHLD is ignored."""
    try:
        return os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    except OSError as error:
        code = error.errno or errno.EIO
        if code not in (errno.ENOSYS, errno.EPERM):
            raise KernelError(code, "pidfd_open") from None
        raise UnsupportedError(
            "run_async needs pidfd_open(), which a seccomp filter forbids here: use memsafe.run in a thread"
        ) from None


def _pipes(process: Popen) -> list[IO[Any]]:
    return [stream for stream in (process.stdin, process.stdout, process.stderr) if stream is not None]


class _Conversation:
    """What is said to a child and what it says, until its pipes are at their end and it has ended itself.

    The end is watched for as long as it takes, whoever still waits for it: a killed child is always reaped.
    """

    def __init__(self, process: Popen) -> None:
        self.ended = asyncio.Event()
        self._process = process
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._chunks: dict[str, list[bytes]] = {}
        self._unwatch: dict[Any, Callable[[], object]] = {}  # what is still open: a pipe, or the child
        self._watch_the_child()

    async def hold(self, text: str | bytes | None) -> None:
        """Say *text*, hear everything, wait for the end."""
        for name in ("stdout", "stderr"):
            if (stream := getattr(self._process, name)) is not None:
                chunks = self._chunks[name] = []
                self._watch(stream, self._loop.add_reader, self._loop.remove_reader, partial(_hear, chunks))
        stdin: Any = self._process.stdin
        if stdin is not None and text:
            data: Any = text
            if isinstance(stdin, io.TextIOWrapper):
                data = data.encode(stdin.encoding, stdin.errors)
            self._unsaid = memoryview(data).cast("B")
            self._watch(stdin, self._loop.add_writer, self._loop.remove_writer, self._say)
        elif stdin is not None:
            stdin.close()
        self._settle()
        await self._over

    def heard(self) -> tuple[bytes | None, bytes | None]:
        """Return the bytes that came from stdout and stderr so far; None: it is no pipe."""
        out, err = (b"".join(self._chunks[name]) if name in self._chunks else None for name in ("stdout", "stderr"))
        return out, err

    def said(self) -> tuple[Any, Any]:
        """Return what came from stdout and stderr, as text where that was asked for."""
        out, err = self.heard()
        return _as_asked(self._process.stdout, out), _as_asked(self._process.stderr, err)

    def close(self) -> None:
        """Close the pipes; the child is watched until it has ended. Nobody may be in hold()."""
        for stream in _pipes(self._process):
            self._disregard(stream)
            stream.close()

    def disregard_the_end(self) -> None:
        """Watch the child no more."""
        self._disregard(self._process)

    def _watch_the_child(self) -> None:
        process = self._process
        number = _pidfd_of(process)
        if number is None:
            process.poll()
            self.ended.set()
            return

        def reap() -> None:
            if process.poll() is not None:
                self.ended.set()
                self._disregard(process)
                self._settle()

        def let_go() -> None:
            try:
                self._remove(self._loop.remove_reader, pidfd.fileno())
            finally:
                pidfd.close()

        pidfd = open(number, "rb", buffering=0)  # noqa: SIM115 - owned: a loop may end before the child
        self._unwatch[process] = let_go
        try:
            self._loop.add_reader(pidfd.fileno(), reap)
        except BaseException:
            let_go()
            raise

    def _watch(
        self,
        stream: IO[Any],
        add: Callable[..., object],
        remove: Callable[[int], object],
        step: Callable[[int], bool],
    ) -> None:
        """Call *step* with the descriptor of *stream* whenever that is ready, until it says that all is done."""
        fd = stream.fileno()
        os.set_blocking(fd, False)

        def ready() -> None:
            try:
                if step(fd):
                    finish()
            except BlockingIOError:
                pass
            except BaseException as error:  # MemoryError, say: it belongs to who waits, not to the loop's log
                if not self._over.done():
                    self._over.set_exception(error)
                finish()

        def finish() -> None:
            self._disregard(stream)
            stream.close()
            self._settle()

        self._unwatch[stream] = partial(self._remove, remove, fd)
        add(fd, ready)

    def _disregard(self, what: Any) -> None:
        self._unwatch.pop(what, lambda: None)()

    def _remove(self, remove: Callable[[int], object], fd: int) -> None:
        """Have the loop watch *fd* no more; not in a forked copy, which has the loop's epoll with its parent."""
        if os.getpid() == self._pid and not self._loop.is_closed():
            remove(fd)

    def _settle(self) -> None:
        if not self._unwatch and not self._over.done():
            self._over.set_result(None)

    def _say(self, fd: int) -> bool:
        try:
            self._unsaid = self._unsaid[os.write(fd, self._unsaid) :]
        except BrokenPipeError:  # it does not want to hear more: its own affair
            return True
        return not self._unsaid


def _hear(chunks: list[bytes], fd: int) -> bool:
    data = os.read(fd, _READ_BYTES)
    chunks.append(data)
    return not data


def _as_asked(stream: Any, data: bytes | None) -> Any:
    if data is None or not isinstance(stream, io.TextIOWrapper):
        return data
    return data.decode(stream.encoding, stream.errors or "strict").replace("\r\n", "\n").replace("\r", "\n")


__all__ = ["run_async"]
