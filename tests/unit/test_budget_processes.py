"""Budgets where their process forks or ends."""

import os
import pickle
import subprocess
import sys

import pytest

from memsafe import Budget


def test_budgets_cannot_be_pickled_or_subverted():
    budget = Budget(100)
    with pytest.raises(TypeError, match="one process"):
        pickle.dumps(budget)
    with budget.reserve(1) as reservation, pytest.raises(TypeError):
        pickle.dumps(reservation)
    with pytest.raises(TypeError):
        type(reservation)()
    with pytest.raises(RuntimeError, match="__init__"):
        Budget.__new__(Budget).reserve(1)
    with pytest.raises(RuntimeError, match="twice"):
        budget.__init__(5)
    assert budget.limit_bytes == 100


def test_the_interpreter_ends_quietly_with_budgets_in_use():
    script = """
import memsafe, threading
db = memsafe.Budget("1 MiB", name="db")
kept = db.child("cache").reserve(10)
db.reclaimer(lambda need: 0)
threading.Thread(target=lambda: db.reserve(5).release()).start()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_forked_child_has_a_copy_that_the_parent_never_sees():
    script = """
import memsafe, os, threading
from memsafe import budget
db = memsafe.Budget(100, name="db")
kept = db.reserve(40)
budget.policy.lock.acquire()  # as another thread might hold it at the fork
pid = os.fork()
if pid == 0:
    def use():
        with db.child("in-child").reserve(60):
            assert db.used_bytes == 100
    other = threading.Thread(target=use)
    other.start(); other.join()
    kept.release()
    os._exit(7 if db.used_bytes == 0 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert (db.used_bytes, db.peak_bytes) == (40, 40)
kept.release()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_forked_child_starts_with_an_empty_line():
    script = """
import memsafe, os, threading
db = memsafe.Budget(100, name="db")
kept = db.reserve(40)
def wait():
    with db.reserve(70, timeout_s=60):
        pass
waiting = threading.Thread(target=wait)
waiting.start()
while not db.waiting:
    pass
pid = os.fork()
if pid == 0:
    assert db.waiting == 0
    with db.reserve(60):
        assert db.try_reserve(1) is None
    with db.reserve(1, timeout_s=1):
        os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert db.try_reserve(10) is None
kept.release()
waiting.join()
assert db.used_bytes == 0
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_interpreter_ends_quietly_while_threads_wait_and_reclaim():
    script = """
import memsafe, threading, time
db = memsafe.Budget(100, name="db")
kept = db.reserve(100)
inside = threading.Event()
@db.reclaimer
def slow(need_bytes):
    inside.set()
    time.sleep(60)
for _ in range(3):
    threading.Thread(target=db.reserve, args=(10,), kwargs={"timeout_s": 60}, daemon=True).start()
assert inside.wait(60)
while db.waiting < 3:
    pass
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_this_process_did_not_leave_children():
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
