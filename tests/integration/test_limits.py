"""limit_process() with this machine's kernel: every test in a process of its own."""

import mmap
import os
import resource
import threading
from contextlib import ExitStack, suppress
from types import SimpleNamespace

import pytest

from memsafe import UnsupportedError, limit_process, limits
from memsafe._kernel import process
from tests.integration.scenario import run

DATA = resource.RLIMIT_DATA
MIB = 1 << 20


def used_bytes():
    return process.status().anonymous_bytes


def soft_limit():
    return resource.getrlimit(DATA)[0]


def refused(size_bytes):
    try:
        mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return True
    return False


def the_kernel_refuses():
    before = resource.getrlimit(DATA)
    block = bytes(50 * MIB)
    with limit_process(used_bytes() + 64 * MIB):
        kept = bytearray(48 * MIB)
        with pytest.raises(MemoryError):
            bytearray(32 * MIB)
        del kept
        bytearray(48 * MIB)  # what was freed can be had again
    assert resource.getrlimit(DATA) == before
    assert len(bytearray(200 * MIB)) + len(block) == 250 * MIB


def what_is_reserved_but_untouched_does_not_count():
    reserved = mmap.mmap(-1, 512 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with reserved, limit_process(used_bytes() + 64 * MIB):
        assert not refused(48 * MIB)
        assert refused(65 * MIB)


def untouched_stacks_of_new_threads_count():
    threading.stack_size(64 * MIB)
    with limit_process(used_bytes() + 48 * MIB), pytest.raises(RuntimeError, match="can't start new thread"):
        threading.Thread(target=print).start()
    thread = threading.Thread(target=soft_limit)
    thread.start()
    thread.join()


def limits_end_in_any_order():
    resource.setrlimit(DATA, (1 << 40, resource.RLIM_INFINITY))
    outer, inner, wider = (limit_process(used_bytes() + size * MIB) for size in (200, 100, 800))
    with outer:
        assert soft_limit() == outer.data_bytes
        inner.__enter__()
        assert soft_limit() == inner.data_bytes
        tightest = inner.data_bytes
        with wider:  # it cannot loosen
            assert soft_limit() == tightest
            assert wider.data_bytes > tightest
    assert soft_limit() == tightest, "the outer one ended first, the inner one still holds"
    inner.__exit__(None, None, None)
    assert (outer.data_bytes, inner.data_bytes, wider.data_bytes) == (None, None, None)
    assert resource.getrlimit(DATA) == (1 << 40, resource.RLIM_INFINITY)


def the_limit_that_was_there_holds_if_it_is_tighter():
    tight = process.status().data_vm_bytes + 64 * MIB
    resource.setrlimit(DATA, (tight, tight))
    with limit_process("1 TiB") as limit:
        assert resource.getrlimit(DATA) == (tight, tight)
        assert limit.data_bytes > tight
    assert resource.getrlimit(DATA) == (tight, tight)


def a_hard_limit_lowered_inside_stays():
    with limit_process("1 TiB"):
        lowered = process.status().data_vm_bytes + 64 * MIB
        resource.setrlimit(DATA, (lowered, lowered))
    assert resource.getrlimit(DATA) == (lowered, lowered)


def it_refuses_what_could_not_work():
    before = resource.getrlimit(DATA)
    block = bytearray(b"x" * (32 * MIB))
    with pytest.raises(ValueError, match=r"to 16 MiB: it uses .* already"):
        limit_process("16 MiB").__enter__()
    with limit_process("1 TiB") as limit, pytest.raises(RuntimeError, match="in force already"):
        limit.__enter__()
    limit.__exit__(None, None, None)  # once too often changes nothing
    limits.mmap = NotEnforcing()
    with pytest.raises(UnsupportedError, match="does not enforce RLIMIT_DATA"):
        limit_process("1 TiB").__enter__()
    limits.process = SwappedOut()
    with pytest.raises(ValueError, match=r"to 16 MiB: it uses 20 MiB already"):
        limit_process("16 MiB").__enter__()
    limits.process = Silent()
    with pytest.raises(UnsupportedError, match="VmData"):
        limit_process("1 TiB").__enter__()
    assert resource.getrlimit(DATA) == before
    assert len(block) == 32 * MIB


class SwappedOut:
    """A process most of which is on the disk."""

    def status(self):
        return SimpleNamespace(data_vm_bytes=40 * MIB, anonymous_bytes=4 * MIB, swap_bytes=16 * MIB)


class NotEnforcing:
    """A kernel started with ignore_rlimit_data."""

    PAGESIZE, MAP_PRIVATE, MAP_ANONYMOUS = mmap.PAGESIZE, mmap.MAP_PRIVATE, mmap.MAP_ANONYMOUS

    def mmap(self, fd, size_bytes, flags):
        return mmap.mmap(fd, mmap.PAGESIZE, flags=flags)


class Silent:
    def status(self):
        return self

    data_vm_bytes = anonymous_bytes = None


def the_block_ends_well_when_not_a_byte_is_left():
    before = resource.getrlimit(DATA)
    kept = []
    with suppress(MemoryError), limit_process(used_bytes() + 16 * MIB):
        for size in (MIB, 4096, 64, 16):
            with suppress(MemoryError):
                while True:
                    kept.append(bytes(size))
        bytes(MIB)
    assert resource.getrlimit(DATA) == before
    assert len(kept) > 16


def a_child_inherits_it_and_ends_it_for_itself():
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with limits._lock:
            entered.set()
            leave.wait()

    with limit_process(used_bytes() + 512 * MIB) as limit:
        inside = soft_limit()
        holder = threading.Thread(target=hold)
        holder.start()
        entered.wait()
        child = os.fork()  # while another thread holds the lock
        if child == 0:
            limit.__exit__(None, None, None)
            os._exit(0 if inside == limit_of_parent(inside) and soft_limit() == resource.RLIM_INFINITY else 1)
        leave.set()
        holder.join()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert soft_limit() == inside


def limit_of_parent(inside):
    return resource.prlimit(os.getppid(), DATA)[0]


def threads_enter_and_leave_at_once():
    before = resource.getrlimit(DATA)
    errors = []

    def enter_and_leave(number):
        try:
            for turn in range(50):
                with ExitStack() as stack:
                    mine = [stack.enter_context(limit_process((1 + (number + turn) % 7) << 40)) for _ in range(3)]
                    assert soft_limit() <= min(limit.data_bytes for limit in mine)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=enter_and_leave, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert resource.getrlimit(DATA) == before


SCENARIOS = [
    the_kernel_refuses,
    what_is_reserved_but_untouched_does_not_count,
    untouched_stacks_of_new_threads_count,
    limits_end_in_any_order,
    the_limit_that_was_there_holds_if_it_is_tighter,
    a_hard_limit_lowered_inside_stays,
    it_refuses_what_could_not_work,
    the_block_ends_well_when_not_a_byte_is_left,
    a_child_inherits_it_and_ends_it_for_itself,
    threads_enter_and_leave_at_once,
]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_limit_process(scenario):
    run(scenario)


@pytest.mark.parametrize("junk", [-1, 1.5, "junk", None])
def test_junk_is_a_value_error_before_anything_happens(junk):
    with pytest.raises(ValueError, match="the limit of a process"):
        limit_process(junk)
