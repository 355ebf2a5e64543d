"""trim(): in processes of their own, because what malloc keeps is a matter of everything that ran before."""

import ctypes.util
import linecache
import os
import re
import subprocess
import sys
import sysconfig

import pytest

import memsafe

FREED_BLOBS = """
import memsafe
kept = [bytes(3000) for _ in range(30000)]
del kept[::2], kept[:-1]
freed = memsafe.trim()
assert memsafe.trim() >= 0
"""


def in_a_process(script, **env):
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **env}, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_freed_blobs_are_given_back():
    check = "assert freed > 60 << 20, freed"
    in_a_process(
        FREED_BLOBS + check, MALLOC_TRIM_THRESHOLD_=str(1 << 40)
    )  # else free() itself gives back what is on top


@pytest.mark.parametrize(
    ("name", "package", "at_least_bytes"),
    [("jemalloc", "libjemalloc2", 60 << 20), ("mimalloc", "libmimalloc2.0", 20 << 20)],  # mimalloc keeps a part
)
def test_what_another_malloc_keeps_is_given_back(name, package, at_least_bytes):
    library = ctypes.util.find_library(name)
    if library is None:
        pytest.skip(f"no {name} here: it is Debian's package {package}")
    check = f"""
assert freed > {at_least_bytes}, freed
from memsafe._native import lib
assert lib.ms_trim() & lib.MS_TRIM_{name.upper()}
"""
    # jemalloc would give back by itself within seconds.
    in_a_process(FREED_BLOBS + check, LD_PRELOAD=library, MALLOC_CONF="dirty_decay_ms:-1,muzzy_decay_ms:-1")


def test_a_process_that_grew_meanwhile_gave_back_nothing():
    in_a_process("""
import memsafe
from memsafe import trimming
kept = []
trimming.give_back = lambda: kept.append(bytearray(b"x") * (16 << 20))
assert memsafe.trim() == 0
""")


def test_garbage_in_cycles_is_collected_first():
    # Without the GIL it is freed a while after it was found: 31 MiB at once.
    at_least_bytes = (20 if sysconfig.get_config_var("Py_GIL_DISABLED") else 40) << 20
    in_a_process(f"""
import gc, memsafe
gc.disable()
for _ in range(20000):
    cycle = [bytes(3000)]
    cycle.append(cycle)
del cycle
assert memsafe.trim() > {at_least_bytes}
""")


def test_what_the_interpreter_can_have_again_is_dropped():
    pattern = re.compile("a pattern of this test")
    assert re.compile("a pattern of this test") is pattern
    assert linecache.getline(__file__, 1)
    linecache.cache["<typed in>"] = (5, None, ["line\n"], "<typed in>")
    try:
        memsafe.trim()
        assert re.compile("a pattern of this test") is not pattern
        assert __file__ not in linecache.cache
        assert linecache.getline("<typed in>", 1) == "line\n", "it is nowhere else"
    finally:
        linecache.cache.pop("<typed in>", None)
