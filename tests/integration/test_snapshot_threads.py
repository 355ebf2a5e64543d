"""What a snapshot's `write` may do while the threads that it has not were in the middle of everything."""

import ctypes
import json
import logging
import logging.handlers
import os
import queue
import random
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

import memsafe
from memsafe._kernel import kept
from memsafe.snapshot import standstill
from tests.integration import scenario
from tests.integration.snapshots import MIB, PATIENCE_S, Gate, content, hello, out_of_time, outcome, unexpected

HALF_MADE = """
import half_made_state
name = __name__
half_made_state.begun.set()
half_made_state.end.wait()
"""


@contextmanager
def importing(*modules):
    """Another thread is half-way through the import of *modules*, files by name, of which the first holds it up."""
    state = sys.modules["half_made_state"] = type(sys)("half_made_state")
    state.begun, state.end = threading.Event(), threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        for name, source in modules:
            file = Path(folder, name)
            file.parent.mkdir(exist_ok=True)
            file.write_text(source)
        sys.path.insert(0, folder)
        thread = threading.Thread(target=__import__, args=("half_made",))
        thread.start()
        state.begun.wait()
        yield state
        state.end.set()
        thread.join()
        sys.path.remove(folder)


def half_imported(path):
    def write(out):
        state.end.set()  # in the child alone
        import half_made

        out.write(half_made.name.encode())

    with importing(("half_made.py", HALF_MADE)) as state:
        got = outcome(memsafe.fork_snapshot(path, write, timeout_s=PATIENCE_S))
        return {**got, "parent_still_at_it": sys.modules["half_made"].__spec__._initializing}


def test_what_another_thread_was_importing_is_imported_again(path):
    got = scenario.run(half_imported, path)
    assert unexpected(got["result"]["warnings"]) == []
    assert got["parent_still_at_it"]
    assert path.read_text() == "half_made"


def half_imported_package(path):
    def write(out):
        state.end.set()
        import half_made.part

        out.write(half_made.part.word.encode())

    package = ("half_made/__init__.py", "from half_made import part\n" + HALF_MADE)
    with importing(package, ("half_made/part.py", "word = 'whole'")) as state:
        return outcome(memsafe.fork_snapshot(path, write, timeout_s=PATIENCE_S))


def test_a_package_that_another_thread_was_importing_comes_with_its_parts(path):
    assert "result" in scenario.run(half_imported_package, path)
    assert path.read_text() == "whole"


def own_import(path):
    """fork_snapshot at the top level of a module: the import under way is the child's as well."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "snapshot_at_import.py").write_text(
            "import memsafe, sys\n"
            "word = 'mine'\n"
            "def write(out):\n"
            "    import snapshot_at_import\n"
            "    out.write(snapshot_at_import.word.encode())\n"
            f"job = memsafe.fork_snapshot({path!r}, write, timeout_s=30)\n"
        )
        sys.path.insert(0, folder)
        import snapshot_at_import

        return outcome(snapshot_at_import.job)


def test_what_the_calling_thread_imports_stays_as_it_is(path):
    assert "result" in scenario.run(own_import, path)
    assert path.read_text() == "mine"


def busy_log_file(path):
    """A thread is in the middle of a write to the log: on a terminal that takes no more, until this process reads."""
    master_fd, slave_fd = os.openpty()
    stream = os.fdopen(slave_fd, "w")
    handler = logging.StreamHandler(stream)
    log = logging.getLogger("busy")
    log.addHandler(handler)
    log.propagate = False
    writing = threading.Event()
    handler.addFilter(lambda record: writing.set() or True)
    thread = threading.Thread(target=log.error, args=("parent " * 20_000,))
    thread.start()
    writing.wait()
    os.read(master_fd, 1)  # the write has begun

    def write(out):
        log.error("from the child")
        out.write(b"new")

    job = memsafe.fork_snapshot(path, write, timeout_s=PATIENCE_S)
    heard = b""
    while b"from the child" not in heard:
        heard = heard[-32:] + os.read(master_fd, 4096)
        if job.done():
            break
    drain = threading.Thread(target=lambda: _drain(master_fd))
    drain.start()
    got = outcome(job)
    thread.join()
    handler.close()
    stream.close()
    drain.join()
    os.close(master_fd)
    return got


def _drain(fd):
    with suppress(OSError):  # EIO: the other end is closed
        while os.read(fd, 4096):
            pass


def test_a_log_file_that_another_thread_was_writing_to_can_be_written_to(path):
    assert "result" in scenario.run(busy_log_file, path)


def busy_log_queue(path):
    records = queue.Queue()
    log = logging.getLogger("queued")
    log.addHandler(logging.handlers.QueueHandler(records))
    held, release = threading.Event(), threading.Event()

    def hold():
        with records.mutex:
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def write(out):
        log.error("nobody will take it")
        out.write(b"new")

    got = outcome(memsafe.fork_snapshot(path, write, timeout_s=PATIENCE_S))
    release.set()
    thread.join()
    return {**got, "records": records.qsize()}


def test_a_log_s_queue_that_another_thread_holds_does_not_hold_the_child(path):
    got = scenario.run(busy_log_queue, path)
    assert "result" in got
    assert got["records"] == 0


@contextmanager
def asking_for_a_lock_that_is_held():
    lock = threading.Lock()
    held, release = threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            release.wait()

    thread = threading.Thread(target=hold, name="who holds it")
    thread.start()
    held.wait()

    def asks_for_the_lock(out):
        with lock:
            hello(out)

    yield asks_for_the_lock
    release.set()
    thread.join()


def waits_for_ever(path):
    with asking_for_a_lock_that_is_held() as write:
        return out_of_time(path, write, lambda got: "asks_for_the_lock" in (got["child_traceback"] or ""))


def test_a_write_that_waits_for_ever_is_reported_with_its_stack_and_who_else_there_was(path):
    got = scenario.run(waits_for_ever, path)
    assert got["error"] == "SnapshotFailedError"
    assert f"still running after {got['timeout_s']} s" in got["message"]
    assert "in asks_for_the_lock" in got["child_traceback"]
    assert got["child_traceback"] in got["message"]
    assert "Python's threads: who holds it" in got["message"]
    assert "MainThread" not in got["message"]
    assert path.read_text() == "old"


class Log(logging.Handler):
    """What is logged, and when there is something."""

    def __init__(self):
        super().__init__()
        self.lines, self.filled = [], threading.Event()
        logging.getLogger("memsafe.snapshot").addHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())
        self.filled.set()


def stands_still(path):
    """A standstill of a few milliseconds is told here, once the child has come as far as the lock."""
    standstill.LOOK_EVERY_S = 0.01
    log, begun = Log(), Gate()
    with asking_for_a_lock_that_is_held() as asks_for_the_lock:

        def write(out):
            begun.open()
            asks_for_the_lock(out)

        job = memsafe.fork_snapshot(path, write)
        begun.wait()
        standstill.STANDSTILL_S = 0.1
        log.filled.wait(PATIENCE_S)
        running = not job.done()
        job.cancel()
        begun.close()
        return {**outcome(job), "running": running, "lines": log.lines}


def test_a_write_that_waits_for_ever_without_a_timeout_is_logged_once_with_who_else_there_was(path):
    got = scenario.run(stands_still, path)
    (line,) = got["lines"]
    assert f"the snapshot of {path} stands still" in line
    assert "It waits; nothing ends it: pass timeout_s" in line
    assert "Python's threads: who holds it" in line
    assert (got["running"], got["error"]) == (True, "SnapshotCancelledError")


def deaf(path):
    import signal

    def write(out):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Event().wait()

    return out_of_time(path, write, lambda got: got["child_traceback"] is None)


def test_a_child_that_blocks_the_question_is_ended_without_an_answer(path):
    got = scenario.run(deaf, path)
    assert f"still running after {got['timeout_s']} s" in got["message"]
    assert got["child_traceback"] is None


PARALLEL = """
int parallel(void)
{
    int threads = 0;
    #pragma omp parallel num_threads(2) reduction(+ : threads)
    threads++;
    return threads;
}
"""


def openmp(path, library):
    parallel = ctypes.CDLL(library).parallel
    threads = parallel()
    got = out_of_time(path, lambda out: parallel(), lambda got: "in openmp" in (got["child_traceback"] or ""))
    return {**got, "threads": threads}


def test_a_library_that_waits_for_its_lost_threads_is_named(path, tmp_path):
    library = tmp_path / "libparallel.so"
    build = ["cc", "-shared", "-fPIC", "-fopenmp", "-x", "c", "-", "-o", str(library)]
    subprocess.run(build, input=PARALLEL, text=True, check=True)
    got = scenario.run(openmp, path, library)
    assert got["threads"] == 2
    assert "OpenMP of GCC (libgomp)" in got["message"]


class Busy:
    """Threads that hold every lock one can think of, again and again."""

    def __init__(self, folder):
        self.folder = folder
        self.stop = threading.Event()
        self.budget = memsafe.Budget("64 MiB", name="busy")
        self.leaf = self.budget.child("leaf", "1 MiB")
        self.log = logging.getLogger("hammer")
        self.log.propagate = False
        self.log.addHandler(logging.FileHandler(os.path.join(folder, "log")))
        self.log.addHandler(logging.StreamHandler(sys.stderr))
        self.items = queue.Queue(4)
        self.matrix = np.ones((64, 64))
        self.failures = []
        for number in range(20):
            Path(folder, f"fresh{number}.py").write_text("import json\nclass A: pass\n" * 20)
        sys.path.insert(0, folder)
        works = [getattr(self, name) for name in dir(self) if name.startswith("work_")]
        self.threads = [threading.Thread(target=self._repeat, args=(work,)) for work in works]

    def _repeat(self, work):
        try:
            while not self.stop.is_set():
                work()
        except BaseException as error:
            self.failures.append(repr(error))

    @contextmanager
    def running(self):
        with memsafe.PressureMonitor():
            for thread in self.threads:
                thread.start()
            try:
                yield
            finally:
                self.stop.set()
                for thread in self.threads:
                    thread.join()
        self.leaf.close()
        self.budget.close()
        for handler in list(self.log.handlers):
            self.log.removeHandler(handler)
            handler.close()

    def work_malloc(self):
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        for size in range(16, 200_000, 9973):
            libc.free(ctypes.c_void_p(libc.malloc(size)))

    def work_log(self):
        self.log.error("x" * 100)

    def work_print(self):
        print("x" * 100, flush=True)

    def work_import(self):
        name = f"fresh{random.randrange(20)}"
        __import__(name)
        sys.modules.pop(name, None)

    def work_put(self):
        with suppress(queue.Full):
            self.items.put(1, timeout=0.01)

    def work_get(self):
        with suppress(queue.Empty):
            self.items.get(timeout=0.01)

    def work_reserve(self):
        with self.leaf.reserve("600 KiB", timeout_s=PATIENCE_S):
            pass

    work_wait_for_budget = work_reserve

    def work_status(self):
        memsafe.memory_status()

    def work_region(self):
        with memsafe.Region(self.budget, "1 MiB") as region:
            region.decommit()

    def work_numpy(self):
        self.matrix @ self.matrix

    def work_sqlite(self):
        base = sqlite3.connect(":memory:")
        base.execute("create table t (x)")
        base.executemany("insert into t values (?)", [(number,) for number in range(200)])
        base.close()

    def work_resolve(self):
        socket.getaddrinfo("localhost", 80)

    def work_ssl(self):
        ssl.create_default_context()

    def work_time(self):
        time.tzset()
        time.localtime()

    def work_random(self):
        random.random()
        os.urandom(16)

    def work_spawn(self):
        subprocess.run(["true"], check=True)


@contextmanager
def silence():
    sys.stdout.flush()
    said = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    yield
    sys.stdout.flush()
    for fd, old_fd in zip((1, 2), said, strict=True):
        os.dup2(old_fd, fd)
        os.close(old_fd)


def beside_busy_threads(path, rounds):
    """Each child uses what docs/snapshots.md promises."""
    sys.setswitchinterval(0.0005)
    kinds = {}
    with tempfile.TemporaryDirectory() as folder, silence():
        busy = Busy(folder)

        def write(out):
            busy.log.error("from the child")
            assert __import__(f"fresh{random.randrange(20)}").A
            own = memsafe.Budget("2 MiB")
            with own.reserve(1000):
                assert busy.budget.used_bytes >= 0
            with memsafe.Region(own, "1 MiB"):
                pass
            memsafe.memory_status()
            assert (busy.matrix @ busy.matrix)[0, 0] == 64
            thread = threading.Thread(target=bytearray, args=(MIB,))
            thread.start()
            thread.join()
            time.localtime()
            json.dump({"random": random.random(), "blob": "x" * 300_000, "at": time.asctime()}, _Text(out))

        with busy.running():
            for _ in range(rounds):
                got = outcome(memsafe.fork_snapshot(path, write, timeout_s=PATIENCE_S))
                kind = "result" if "result" in got else got["message"]
                kinds[kind] = kinds.get(kind, 0) + 1
    kept._forget()  # what memory_status() keeps open
    return {"kinds": kinds, "failures": busy.failures, "complete": "blob" in content(path)}


class _Text:
    def __init__(self, out):
        self._out = out

    def write(self, text):
        self._out.write(text.encode())


def test_children_beside_threads_that_hold_every_lock_do_not_hang(path):
    got = scenario.run(beside_busy_threads, path, 10)
    assert got["kinds"] == {"result": 10}
    assert got["failures"] == []
    assert got["complete"]
