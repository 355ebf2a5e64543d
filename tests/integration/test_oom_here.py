"""What an ordinary user may do with oom_score_adj, and what not, on this machine's kernel."""

import ctypes
import errno
import os

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
