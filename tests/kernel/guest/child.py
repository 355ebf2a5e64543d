"""Run a function of a test module in a process of its own: in a cgroup, as a user, from its first instruction on."""

import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534
CAP_SYS_ADMIN = 21
TIMEOUT_S = 90

ROOT = "root"
ROOT_WITHOUT_SYS_ADMIN = "root without CAP_SYS_ADMIN"
ORDINARY = "an ordinary user"
ROOT_OF_A_NAMESPACE = "root of a user namespace"

_PR_CAPBSET_DROP = 24
_PR_SET_DUMPABLE = 4
_CLONE_NEWUSER = 0x10000000
_PROJECT = Path(__file__).parents[3]


def start(function, *args, cgroup=None, user=ROOT, **kwargs):
    """Start a new interpreter that calls *function*, of a module's top level, with *args*, which JSON can hold."""
    libc = ctypes.CDLL(None, use_errno=True)

    def become():
        if cgroup is not None:
            Path(cgroup, "cgroup.procs").write_text("0")
        if user == ROOT_WITHOUT_SYS_ADMIN:
            # exec gives root the bounding set.
            assert libc.prctl(_PR_CAPBSET_DROP, CAP_SYS_ADMIN, 0, 0, 0) == 0
        if user in {ORDINARY, ROOT_OF_A_NAMESPACE}:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        if user == ROOT_OF_A_NAMESPACE:
            libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # or uid_map would be root's
            assert libc.unshare(_CLONE_NEWUSER) == 0
            Path("/proc/self/uid_map").write_text(f"0 {NOBODY} 1")

    file = sys.modules[function.__module__].__file__
    return subprocess.Popen(
        [sys.executable, "-X", "faulthandler", __file__, file, function.__name__, json.dumps(args)],
        preexec_fn=become,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_PROJECT)},
        **kwargs,
    )


def run(function, *args, killed=False, **kwargs):
    """Call *function* in a new interpreter and return what it returned; or see it killed by SIGKILL."""
    with start(function, *args, **kwargs) as process:
        try:
            out, errors = process.communicate(timeout=TIMEOUT_S)
        except BaseException:
            process.kill()
            raise
    if killed:
        assert process.returncode == -signal.SIGKILL, f"exit status {process.returncode}\n{out}\n{errors}"
        return None
    assert process.returncode == 0, f"exit status {process.returncode}\n{out}\n{errors}"
    if errors:
        sys.stderr.write(errors)
    return json.loads(out.splitlines()[-1])


@contextmanager
def asking(function, **kwargs):
    """Run a process that calls *function* each time it is asked to; yield what asks and returns what it returned."""
    arguments = [sys.modules[function.__module__].__file__, function.__name__]
    with start(_answer, *arguments, stdin=subprocess.PIPE, **kwargs) as process:

        def ask(*args):
            print(json.dumps(args), file=process.stdin, flush=True)
            line = process.stdout.readline()
            assert line, f"it ended\n{process.communicate()}"
            return json.loads(line)

        ask.pid = process.pid
        yield ask
        out, errors = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, f"exit status {process.returncode}\n{out}\n{errors}"


def _answer(file, name):
    function = getattr(_load(file), name)
    for line in sys.stdin:
        print(json.dumps(function(*json.loads(line))), flush=True)


class _Decorations:
    """Stands in for pytest, whose import takes longest, and which only decorates what is not called here."""

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **kwargs):
        return args[0] if args and callable(args[0]) else self


def _load(file):
    spec = importlib.util.spec_from_file_location("child_module", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["child_module"] = module
    spec.loader.exec_module(module)
    return module


def _main(file, name, args):
    sys.modules["pytest"] = _Decorations()
    try:
        returned = getattr(_load(file), name)(*json.loads(args))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)
    print("\n" + json.dumps(returned), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
