"""Who may hold what a snapshot's child waits for."""

import threading

import pytest

from memsafe.snapshot.threads import witnesses
from tests.unit.proc_tree import ProcTree


@pytest.fixture
def tree(tmp_path):
    return ProcTree(tmp_path)


def test_nobody_is_told_where_there_is_nobody(tree):
    assert witnesses(threading.get_ident(), tree.root) == ""


def test_the_thread_that_forked_is_no_witness(tree):
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="other")
    thread.start()
    assert witnesses(threading.get_ident(), tree.root) == "Python's threads: other"
    assert witnesses(thread.ident, tree.root) == f"Python's threads: {threading.current_thread().name}"
    end.set()
    thread.join()


def test_threads_that_python_does_not_know_are_told_by_their_names(tree):
    tree.write(f"/proc/self/task/{threading.get_native_id()}/comm", "python3\n")
    tree.write("/proc/self/task/1000000001/comm", "grpc_poller\n")
    tree.write("/proc/self/task/1000000002/comm", "grpc_poller\n")
    tree.write("/proc/self/task/1000000003/comm", "memsafe-watch\n")
    assert witnesses(threading.get_ident(), tree.root) == "other threads: grpc_poller"


def test_libraries_with_threads_of_their_own_are_told(tree):
    tree.write("/proc/self/maps", "00400000-00401000 r-xp 00000000 08:01 11 /usr/lib/libgomp-a34b.so.1.0.0\n")
    told = witnesses(threading.get_ident(), tree.root)
    assert told == "libraries that may wait for ever in a child: OpenMP of GCC (libgomp)"
