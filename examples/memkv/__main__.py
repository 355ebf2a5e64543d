"""Run the server: ``python -m examples.memkv --port P --dir D --limit SIZE``."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from examples.memkv import rdb
from examples.memkv.config import POLICIES, Config, SettingError, read_save_points
from examples.memkv.persistence import LoadError
from examples.memkv.server import Server
from memsafe import parse_size


def main() -> int:
    """Serve until told to end; return the exit status."""
    config = _arguments()
    logging.basicConfig(
        format="%(process)d %(asctime)s.%(msecs)03d %(levelname)s %(message)s",
        datefmt="%d %b %Y %H:%M:%S",
        level=logging.INFO,
        stream=sys.stderr,
    )
    server = Server(config)
    # The data holds no cycles, and nothing that a request leaves does: a collector would only walk over it.
    gc.collect()
    gc.freeze()
    # How long a busy loop may keep the monitor's thread from telling that memory runs low; 5 ms by default.
    sys.setswitchinterval(0.001)
    try:
        _runner()(server.run())
    except rdb.RDBError as error:
        return _fail(f"the dump cannot be loaded, and is left as it is: {error}")
    except LoadError as error:
        return _fail(f"{error}. The dump is left as it is. Give a larger --limit, or more memory, or move the dump")
    except OSError as error:
        return _fail(_os_error(error, config))
    except KeyboardInterrupt:  # before the server listens for signals itself
        return 130
    return 0


def _runner() -> Callable[[Coroutine[Any, Any, None]], None]:
    """Return what runs a coroutine to its end: uvloop's, which is faster, or asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    return uvloop.run


def _arguments() -> Config:
    parser = argparse.ArgumentParser(
        prog="python -m examples.memkv",
        description="A key-value server that Redis clients talk to, and that keeps to a budget of memory.",
    )
    parser.add_argument("--port", type=int, default=6379, help="TCP port; 0: any that is free (default: 6379)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--dir", type=_directory, default=Path.cwd(), help="where the dump is (default: here)")
    parser.add_argument("--dbfilename", default="dump.rdb", help="the dump's name (default: dump.rdb)")
    parser.add_argument("--limit", type=_limit, required=True, help="budget for data and buffers, such as '512 MiB'")
    parser.add_argument("--policy", choices=POLICIES, default="noeviction", help="what happens at the limit")
    parser.add_argument(
        "--save", type=_save_points, metavar="'SECONDS CHANGES …'", help="when to save unasked (default: never)"
    )
    parser.add_argument(
        "--snapshot-max-copy", type=_size, metavar="SIZE", help="end a save that copies more (default: what fits)"
    )
    options = parser.parse_args()
    if not 0 <= options.port <= 65535:
        parser.error(f"argument --port: must be 0 to 65535, not {options.port}")
    return Config(
        port=options.port,
        host=options.host,
        directory=options.dir,
        dbfilename=options.dbfilename,
        limit_bytes=options.limit,
        policy=options.policy,
        save_points=options.save,
        snapshot_max_copy_bytes=options.snapshot_max_copy,
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _limit(text: str) -> int:
    try:
        size_bytes = parse_size(text, what="the limit")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not size_bytes:
        raise argparse.ArgumentTypeError("the limit must be above 0")
    return size_bytes


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a directory")
    return path.absolute()


def _save_points(text: str) -> tuple[tuple[int, int], ...]:
    try:
        return read_save_points(text)
    except SettingError as error:
        raise argparse.ArgumentTypeError(f"{error}: pairs of seconds and changes are wanted, not {text!r}") from None


def _os_error(error: OSError, config: Config) -> str:
    import errno

    if error.errno == errno.EADDRINUSE:
        return f"port {config.port} of {config.host} is in use by another process; choose another --port"
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"cannot listen on {config.host} port {config.port}: {error.strerror or error}"


def _fail(message: str) -> int:
    print(f"memkv: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
