"""Run a function of a test module in a process of its own: pytest's own process never forks, and gets no limits."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path

TIMEOUT_S = 250  # less than pytest gives a test


class Result(dict):
    """What the scenario returned, a dict, and what it left behind."""

    left: dict


def command(function, *args):
    """The command line that runs *function*, of a module's top level, with *args*, which JSON can hold."""
    module = sys.modules[function.__module__]
    return [sys.executable, "-X", "faulthandler", __file__, module.__file__, function.__name__, json.dumps(args)]


def run(function, *args, returncode=0, leaves=None, prefix=()):
    """Call *function* in a new interpreter; return the dict that it returned. It must leave nothing behind.

    *prefix* begins the command line, as with unshare(1).
    """
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*prefix, *command(function, *map(_plain, args))], capture_output=True, text=True, timeout=TIMEOUT_S, env=env
    )
    assert done.returncode == returncode, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    result = Result()
    if returncode == 0:
        report = json.loads(done.stdout.splitlines()[-1])
        assert report["left"] == (leaves or {}), done.stderr
        result.update(report["returned"] or {})
    result["stderr"] = done.stderr
    result["stdout"] = done.stdout
    return result


def _plain(value):
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def open_files():
    """What each descriptor of this process stands for, as /proc names it."""
    found = {}
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def opened_since(before):
    """What this process has open now that it had not *before*, when open_files() was asked.

    What it had then and has no more is nobody's leak: garbage of an earlier test may be collected at any time.
    """
    return [target for fd, target in open_files().items() if before.get(fd) != target]


def _children():
    try:
        return [os.waitpid(-1, os.WNOHANG)[0]]
    except ChildProcessError:
        return []


def _left_behind(before):
    for thread in threading.enumerate():
        if thread.name == "memsafe-snapshot":
            thread.join(TIMEOUT_S)
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    found = {"threads": threads, "descriptors": opened_since(before), "children": _children()}
    return {name: what for name, what in found.items() if what}


def _main(file, name, args):
    spec = importlib.util.spec_from_file_location("scenario_module", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["scenario_module"] = module
    spec.loader.exec_module(module)
    before = open_files()
    try:
        returned = getattr(module, name)(*json.loads(args))
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)
    report = {"returned": returned, "left": _left_behind(before)}
    sys.stdout.flush()
    with open(1, "w", closefd=False) as out:  # PYTHONUNBUFFERED has print() lose what an interrupted write left over
        print("\n" + json.dumps(report), file=out)


if __name__ == "__main__":
    _main(*sys.argv[1:])
