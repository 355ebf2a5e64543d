"""Signals and interrupts of the caller: none reaches a child, none loses one."""

import ctypes
import dis
import functools
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

import memsafe
from tests.integration import scenario
from tests.integration.snapshots import (
    PATIENCE_S,
    Gate,
    content,
    gated,
    hello,
    let_the_thread_end,
    outcome,
    temporaries,
)


def interrupted(path):
    """Ctrl-C while fork is under way: the handler runs when the call returns, before its job is stored."""
    gate = Gate()
    # Not os.kill, which would run the handler itself.
    os.register_at_fork(after_in_parent=functools.partial(ctypes.CDLL(None).kill, os.getpid(), signal.SIGINT))
    try:
        memsafe.fork_snapshot(path, gated(gate))
        return {"raised": False}
    except KeyboardInterrupt:
        pass
    let_the_thread_end()
    gate.close()
    return {"raised": True}


def test_an_interrupt_during_the_fork_leaves_no_child_behind(path):
    got = scenario.run(interrupted, path)
    assert got["raised"]
    assert path.read_bytes() == b"old"


def interrupted_everywhere(path, step, names):
    """Raise KeyboardInterrupt at the n-th bytecode of memsafe.snapshot in the calling thread, for every step-th n.

    Counted are functions of these *names*, or all where there are none.
    """
    package = os.path.dirname(memsafe.snapshot.__file__)
    outcomes = []
    memsafe.fork_snapshot(path, hello).wait(PATIENCE_S)  # what is imported and cached is so before
    n = 0
    while outcomes[-1:] != ["done"]:
        n += step
        before = scenario.open_files()
        outcomes.append(_interrupted_at(n, path, package, names))
        let_the_thread_end()
        left = scenario.opened_since(before)
        if left or temporaries(path) or content(path) not in ("old", "new"):
            return {"n": n, "left": left, "temporaries": temporaries(path), "content": content(path)}
        again = outcome(memsafe.fork_snapshot(path, hello))
        if "result" not in again:
            return {"n": n, "again": again}
        Path(path).write_text("old")
    return {"points": n, "outcomes": sorted(set(outcomes))}


def _interrupted_at(n, path, package, names):
    left, own = n, os.getpid()

    def count(frame, event, _):
        nonlocal left
        code = frame.f_code
        if os.getpid() != own or not code.co_filename.startswith(package) or (names and code.co_name not in names):
            return None
        frame.f_trace_opcodes = True
        # Signals are looked for after calls and at jumps back, never between a value and its return.
        if event == "opcode" and not dis.opname[code.co_code[frame.f_lasti]].startswith("RETURN"):
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return count

    gate = Gate()  # a child that nobody ends waits for ever
    try:
        sys.settrace(count)
        try:
            job = memsafe.fork_snapshot(path, gated(gate))
        finally:
            sys.settrace(None)
        gate.open()
        job.wait(PATIENCE_S)
    except KeyboardInterrupt:
        return "interrupted"
    finally:
        gate.close()
    return "done"


@pytest.mark.parametrize(("step", "names", "points"), [(7, [], 300), (1, ["fork"], 70)], ids=["anywhere", "the fork"])
def test_an_interrupt_at_any_bytecode_leaves_no_child_file_or_descriptor_and_the_next_one_works(
    path, step, names, points
):
    got = scenario.run(interrupted_everywhere, path, step, names)
    assert got.get("outcomes") == ["done", "interrupted"], got
    assert got["points"] > points


def storm(path, rounds):
    heard = []
    signal.signal(signal.SIGALRM, lambda *_: heard.append(os.getpid()))
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(os.getpid()))
    stop = threading.Event()
    main, own = threading.main_thread().ident, os.getpid()

    def keep_signalling():
        while not stop.wait(0.001):
            signal.pthread_kill(main, signal.SIGUSR1)

    def write(out):
        out.write(b"new")
        out.flush()
        out.write(b"" if set(heard) <= {own} else b"the parent's handler ran here")

    thread = threading.Thread(target=keep_signalling)
    thread.start()
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    outcomes = []
    while len(outcomes) < rounds or len(heard) <= rounds:  # a busy machine may send many of them as one
        outcomes.append(outcome(memsafe.fork_snapshot(path, write)))
    signal.setitimer(signal.ITIMER_REAL, 0)
    stop.set()
    thread.join()
    return {"sizes": [got.get("result", got).get("size_bytes", got) for got in outcomes]}


def test_snapshots_go_on_in_a_storm_of_signals_and_none_of_them_reaches_a_child(path):
    got = scenario.run(storm, path, 40)
    assert set(got["sizes"]) == {3}
