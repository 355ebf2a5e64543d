"""What an ordinary user may do with oom_score_adj, and what not, on this machine's kernel."""

import ctypes
import errno
import os
import signal
import sys
import threading

import pytest

import memsafe
import memsafe.oom  # now, and not when the scenario is another user, who may not read the interpreter's files
from tests.integration import scenario

NOBODY = 65534
PR_SET_DUMPABLE = 4


def attempt(change):
    """Make the change for a block; what it was in there, or the error's number and text."""
    try:
        with change():
            return memsafe.oom.score_adj()
    except memsafe.KernelError as error:
        return [error.errno, str(error)]


def as_an_ordinary_user():
    libc = ctypes.CDLL(None)
    base = memsafe.oom.score_adj()
    told = {"base": base, "changed_user": os.geteuid() == 0}
    if told["changed_user"]:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        told["before exec"] = attempt(lambda: memsafe.oom.set_score_adj(base + 1))
        libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # as running a program does
    told["raised"] = attempt(lambda: memsafe.oom.set_score_adj(base + 100))
    told["lowered"] = attempt(lambda: memsafe.oom.set_score_adj(base - 1))
    told["protected"] = attempt(memsafe.oom.protect)
    told["after"] = memsafe.oom.score_adj()
    told["read"] = [memsafe.oom.score() >= 0, memsafe.oom.kills() >= 0]
    return told


def test_an_ordinary_user_may_raise_take_back_and_read_but_not_go_below_what_was_inherited():
    told = scenario.run(as_an_ordinary_user)
    assert told["raised"] == told["base"] + 100
    for what in ("lowered", "protected"):
        number, words = told[what]
        assert number == errno.EACCES
        assert "CAP_SYS_RESOURCE" in words
        assert f"it is {told['base']}" in words
    assert told["after"] == told["base"]
    assert told["read"] == [True, True]


def test_a_process_that_changed_its_user_is_told_why_it_may_not_even_raise():
    told = scenario.run(as_an_ordinary_user)
    if not told["changed_user"]:
        pytest.skip("only root can change its user")
    number, words = told["before exec"]
    assert number == errno.EACCES
    assert "changed its user" in words


def overlap(way):
    sys.setswitchinterval(1e-5)
    base = memsafe.oom.score_adj()
    change = {"set": lambda: memsafe.oom.set_score_adj(base + 1), "offset": lambda: memsafe.oom.adjust_by(1)}[way]
    failures = []

    def work():
        try:
            for _ in range(150):
                with change():
                    pass
        except memsafe.KernelError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"sum": memsafe.oom.score_adj() - base, "failures": failures}


@pytest.mark.parametrize("way", ["set", "offset"])
def test_blocks_of_several_threads_add_up_to_nothing(way):
    told = scenario.run(overlap, way)
    assert (told["sum"], told["failures"]) == (0, [])


def fork_in_the_midst_of_a_change():
    write_score_adj = memsafe.oom.kernel.write_score_adj
    changing, change = threading.Event(), threading.Event()

    def wait_and_write(*args):
        changing.set()
        change.wait()
        write_score_adj(*args)

    base = memsafe.oom.score_adj()
    memsafe.oom.kernel.write_score_adj = wait_and_write
    thread = threading.Thread(target=memsafe.oom.adjust_by, args=(1,))
    thread.start()
    changing.wait()
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # instead of waiting for ever
        memsafe.oom.kernel.write_score_adj = write_score_adj
        with memsafe.oom.adjust_by(2):
            os._exit(memsafe.oom.score_adj() - base)
    _, status = os.waitpid(pid, 0)
    change.set()
    thread.join()
    return {"status": status, "after": memsafe.oom.score_adj() - base}


def test_a_process_forked_in_the_midst_of_a_change_can_change_its_own():
    told = scenario.run(fork_in_the_midst_of_a_change)
    assert (os.waitstatus_to_exitcode(told["status"]), told["after"]) == (2, 1)
