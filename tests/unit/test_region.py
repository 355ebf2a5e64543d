import ctypes
import fcntl
import gc
import mmap
import os
import pickle
import subprocess
import sys
import threading

import pytest

import memsafe
from memsafe import Budget
from memsafe._native import lib

PAGE = mmap.PAGESIZE
HUGE = 2 << 20


def address_of(region):
    with memoryview(region) as view:
        return ctypes.addressof(ctypes.c_char.from_buffer(view))


def mappings(start, size):
    """What smaps says of the mappings that lie within a range: (size, permissions, VmFlags)."""
    found, inside = [], False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            words = line.split()
            if "-" in words[0]:
                low, high = (int(word, 16) for word in words[0].split("-"))
                inside = start <= low and high <= start + size
                if inside:
                    found.append([high - low, words[1], []])
            elif inside and words[0] == "VmFlags:":
                found[-1][2] = words[1:]
    return found


def test_a_region_is_zeroed_writable_memory_charged_in_whole_pages():
    budget = Budget("1 MiB")
    with budget.map(PAGE + 1) as region:
        assert len(region) == region.size_bytes == budget.used_bytes == 2 * PAGE
        with memoryview(region) as view:
            assert bytes(view) == bytes(2 * PAGE)
            view[:5] = b"hello"
            view[-1] = 7
        assert bytes(memoryview(region)[:5]) == b"hello"
    assert budget.used_bytes == 0
    assert region.closed
    region.close()


def test_a_refused_map_leaves_nothing_behind():
    budget = Budget(PAGE)
    with pytest.raises(memsafe.BudgetExceededError):
        budget.map(PAGE + 1)
    assert budget.used_bytes == 0
    for junk in (0, -1, "junk", 1.5):
        with pytest.raises(ValueError, match=r"must"):
            budget.map(junk)


def test_what_the_kernel_refuses_gives_the_reservation_back():
    budget = Budget()
    with pytest.raises(memsafe.KernelError, match="mmap: Cannot allocate memory") as caught:
        budget.map(2**62)
    assert caught.value.call == "mmap"
    assert budget.used_bytes == 0


def test_a_region_with_views_cannot_be_closed_and_stays_as_it_was():
    budget = Budget("1 MiB")
    region = budget.map(PAGE)
    view = memoryview(region)
    with pytest.raises(BufferError, match="1 views"):
        region.close()
    assert budget.used_bytes == PAGE
    view[0] = 1
    view.release()
    region.close()
    with pytest.raises(ValueError, match="closed"):
        memoryview(region)
    with pytest.raises(ValueError, match="closed"):
        region.decommit()
    with pytest.raises(ValueError, match="closed"), region:
        pass


def test_decommit_gives_pages_back_and_they_read_as_zeros():
    with Budget("1 MiB").map(4 * PAGE) as region, memoryview(region) as view:
        view[:] = b"x" * len(view)
        region.decommit(PAGE, 2 * PAGE)
        assert bytes(view) == b"x" * PAGE + bytes(2 * PAGE) + b"x" * PAGE
        region.decommit()
        assert bytes(view) == bytes(4 * PAGE)


@pytest.mark.parametrize(
    ("offset", "size"), [(1, PAGE), (0, 1), (-PAGE, PAGE), (0, 5 * PAGE), (4 * PAGE, PAGE), (5 * PAGE, None)]
)
def test_ranges_outside_or_of_part_pages_are_value_errors(offset, size):
    with Budget("1 MiB").map(4 * PAGE) as region, pytest.raises(ValueError, match="whole pages"):
        region.decommit(offset, size)


def test_a_size_whose_whole_pages_no_int_of_c_holds_is_a_value_error():
    for huge_pages in (False, True):
        with pytest.raises(ValueError, match="below 8 EiB"):
            Budget().map((1 << 63) - 1, huge_pages=huge_pages)


def test_huge_pages_are_aligned_and_charged_in_whole_huge_pages():
    budget = Budget("8 MiB")
    with budget.map("3 MiB", huge_pages=True) as region:
        assert region.size_bytes == budget.used_bytes == 4 << 20
        assert address_of(region) % HUGE == 0


def test_advice_by_name():
    with Budget("1 MiB").map(PAGE) as region:
        region.advise("dontfork")
        region.advise("sequential", 0, PAGE)
        with pytest.raises(ValueError, match=r"'junk' is no advice.*willneed"):
            region.advise("junk")


def test_a_lost_region_warns_and_is_unmapped():
    budget = Budget("1 MiB", name="db")
    with pytest.warns(ResourceWarning, match="region of 4 KiB from budget 'db' was never closed"):
        budget.map(1)
    assert budget.used_bytes == 0


@pytest.mark.usefixtures("no_collector")
def test_a_region_lost_in_a_cycle_with_its_views_is_unmapped():
    def resident_bytes():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * PAGE

    def lose():
        region = root.map("64 MiB")
        holder = [region, memoryview(region)]
        holder[1][:] = b"x" * len(region)
        holder.append(holder)

    root = Budget(name="root")
    lose()
    before = resident_bytes()
    with pytest.warns(ResourceWarning, match="region of 64 MiB") as told:
        gc.collect()
    assert len(told) == 1
    assert root.used_bytes == 0
    assert before - resident_bytes() > 60 << 20


def test_a_region_closed_by_many_threads_is_unmapped_once(monkeypatch):
    unmapped, meet = [], threading.Barrier(2)

    class Racing(memsafe.Region):
        def _detach(self):
            meet.wait(30)  # both have seen it open
            address = super()._detach()
            meet.wait(30)
            return address

    class Native:
        def __getattr__(self, name):
            return getattr(lib, name)

        def ms_region_close(self, region):
            unmapped.append(region)
            lib.ms_region_close(region)

    monkeypatch.setattr("memsafe.region.lib", Native())
    region = Racing(Budget(), PAGE)
    errors = []

    def close():
        try:
            region.close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=close) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(unmapped), errors) == (1, [])


def test_a_region_cannot_be_closed_while_the_kernel_is_given_advice(monkeypatch):
    class Native:
        def __getattr__(self, name):
            return getattr(lib, name)

        def ms_region_discard(self, *args):
            with pytest.raises(BufferError, match="a call under way"):
                region.close()  # as another thread might: cffi lets go of the GIL here
            return lib.ms_region_discard(*args)

        def ms_region_advise(self, *args):
            with pytest.raises(BufferError, match="a call under way"):
                region.close()
            return lib.ms_region_advise(*args)

    with Budget().map(PAGE) as region:
        monkeypatch.setattr("memsafe.region.lib", Native())
        region.decommit()
        region.advise("random")


def test_numpy_sees_a_region_without_a_copy():
    numpy = pytest.importorskip("numpy")
    with Budget("1 MiB").map(PAGE) as region:
        array = numpy.frombuffer(region, dtype=numpy.uint64)
        array[3] = 42
        assert memoryview(region)[24] == 42
        del array


def test_regions_cannot_be_pickled():
    with Budget("1 MiB").map(PAGE) as region, pytest.raises(TypeError, match="one process"):
        pickle.dumps(region)


def test_steps_are_charged_one_by_one_and_only_what_was_missing():
    budget = Budget("4 MiB")
    with budget.map("1 GiB", committed=False) as region:
        assert (budget.used_bytes, region.committed_bytes, len(region)) == (0, 0, 1 << 30)
        region.commit(0, 4 * PAGE)
        region.view(0, 4 * PAGE)[:] = b"x" * 4 * PAGE
        region.commit(2 * PAGE, 4 * PAGE)
        assert budget.used_bytes == region.committed_bytes == 6 * PAGE
        assert bytes(region.view(3 * PAGE, 2 * PAGE)) == b"x" * PAGE + bytes(PAGE)
        assert repr(region) == "<Region 24 KiB committed of 1 GiB from 'budget'>"
        region.decommit(PAGE, 2 * PAGE)
        region.decommit(PAGE, 2 * PAGE)
        assert budget.used_bytes == region.committed_bytes == 4 * PAGE
        region.commit(0, 3 * PAGE)
        assert bytes(region.view(0, 3 * PAGE)) == b"x" * PAGE + bytes(2 * PAGE)
        with pytest.raises(memsafe.BudgetExceededError):
            region.commit(0, "8 MiB")
        assert budget.used_bytes == region.committed_bytes == 6 * PAGE
    assert budget.used_bytes == region.committed_bytes == 0


def test_the_kernel_is_asked_to_back_just_what_is_committed():
    with Budget().map(8 * PAGE, committed=False, guard_pages=True) as region:
        region.commit(2 * PAGE, 4 * PAGE)
        region.commit(7 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(region.view(2 * PAGE, PAGE))) - 2 * PAGE
        region.decommit(3 * PAGE, PAGE)
        found = [(size, kind, "ac" in flags) for size, kind, flags in mappings(start - PAGE, 10 * PAGE)]
    assert [row for row in found if row[1] == "rw-p"] == [
        (PAGE, "rw-p", True), (2 * PAGE, "rw-p", True), (PAGE, "rw-p", True),
    ]  # fmt: skip
    assert not any(accounted for _, kind, accounted in found if kind != "rw-p")
    assert found[-1][1] == "---p", "the guard behind"


def test_committing_asks_reclaimers_and_tells_soft_limits():
    budget = Budget(8 * PAGE, soft_limit=6 * PAGE)
    held, passed = budget.reserve(4 * PAGE), []
    budget.reclaimer(lambda need: held.size_bytes if held.release() is None else 0)
    budget.on_soft_limit(passed.append)
    with budget.map(16 * PAGE, committed=False) as region:
        region.commit(0, 8 * PAGE)
        assert (budget.used_bytes, passed) == (8 * PAGE, [budget])


@pytest.mark.parametrize("committed", [True, False])
def test_what_is_not_committed_cannot_be_viewed_and_what_is_viewed_not_decommitted(committed):
    with Budget().map(4 * PAGE, committed=committed) as region:
        region.commit(PAGE, PAGE)
        if not committed:
            with pytest.raises(BufferError, match="not all of that is committed"):
                memoryview(region)
            with pytest.raises(BufferError, match="not all of that is committed"):
                region.view(2 * PAGE - 1, 2)
        view = region.view(PAGE + 1, PAGE - 1)
        view[:] = b"x" * len(view)
        part = view[7:9]
        view.release()
        if committed:
            region.decommit(PAGE, PAGE)
            assert bytes(part) == bytes(2)
        else:
            with pytest.raises(BufferError, match="views of it are in use"):
                region.decommit(2 * PAGE, PAGE)
        with pytest.raises(BufferError, match="1 views"):
            region.close()
        part.release()
        with pytest.raises(ValueError, match="not within"):
            region.view(3 * PAGE, PAGE + 1)
    with pytest.raises(ValueError, match="closed"):
        region.view()
    assert region.committed_bytes == 0


def test_no_view_is_made_while_another_thread_decommits(monkeypatch):
    class Native:
        def __getattr__(self, name):
            return getattr(lib, name)

        def ms_region_decommit(self, *args):
            with pytest.raises(BufferError, match="another thread is decommitting"):
                region.view(0, 1)
            return lib.ms_region_decommit(*args)

    with Budget().map(2 * PAGE, committed=False) as region:
        region.commit()
        monkeypatch.setattr("memsafe.region.lib", Native())
        region.decommit(PAGE)
        assert len(region.view(0, 1)) == 1


def test_threads_may_commit_and_decommit_the_same_pages():
    budget, errors = Budget(), []
    with budget.map(64 * PAGE, committed=False) as region:

        def work(step):
            try:
                for n in range(300):
                    at = n * step % 60 * PAGE
                    region.commit(at, 4 * PAGE)
                    region.decommit(at + PAGE, 2 * PAGE)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(step,)) for step in (1, 3, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert budget.used_bytes == region.committed_bytes
        region.decommit()
        assert budget.used_bytes == 0


def test_advice_about_the_whole_region_outlives_a_decommit():
    with Budget().map(4 * PAGE, committed=False, guard_pages=True) as region:
        region.advise("dontfork")
        region.advise("dontdump")
        region.commit(0, 2 * PAGE)
        region.decommit(0, 2 * PAGE)
        region.commit()
        start = address_of(region)
        assert {flag for _, _, flags in mappings(start, 4 * PAGE) for flag in flags} >= {"dc", "dd"}
        region.advise("dofork")
        region.decommit(0, PAGE)
        region.commit()
        assert all("dc" not in flags and "dd" in flags for _, _, flags in mappings(start, 4 * PAGE))


def in_a_child(script, returncode=0):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == returncode, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"guard_pages": True}, -1),
        ({"guard_pages": True}, PAGE),
        ({"guard_pages": True, "huge_pages": True}, HUGE),
        ({"committed": False}, 0),
    ],
)
def test_touching_a_guard_or_what_was_decommitted_ends_the_process(options, place):
    script = f"""
import ctypes, memsafe
region = memsafe.Budget().map(1, **{options})
region.commit()
address = ctypes.addressof(ctypes.c_char.from_buffer(region.view()))
assert ctypes.string_at(address, region.size_bytes) == bytes(region.size_bytes)
if not {options}.get("committed", True):
    region.decommit()
print("so far", flush=True)
ctypes.string_at(address + {place}, 1)
"""
    assert in_a_child(script, returncode=-11) == "so far\n"


def test_locked_memory_is_resident_and_a_lock_refused_leaves_nothing():
    script = """
import memsafe, os, resource
def locked_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmLck")).split()[1])
budget = memsafe.Budget()
with budget.map("64 KiB", locked=True) as region:
    assert locked_kib() == 64
    with memoryview(region) as view:
        view[0] = 1
        region.decommit()
        assert view[0] == 0 and locked_kib() == 64
assert (budget.used_bytes, locked_kib()) == (0, 0)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (32 << 10, 32 << 10))
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
region = budget.map("64 KiB", locked=True, committed=False)
region.commit(0, "16 KiB")
for attempt in range(2):
    try:
        region.commit()
    except memsafe.KernelError as error:
        assert error.call == "mlock" and "RLIMIT_MEMLOCK is 32 KiB" in str(error), error
    assert budget.used_bytes == region.committed_bytes == 16 << 10
    assert locked_kib() == 16
region.commit(16 << 10, "16 KiB")
region.close()
assert budget.used_bytes == 0
"""
    in_a_child(script)


def test_a_shared_region_is_the_same_memory_in_other_processes_and_cannot_be_resized():
    with Budget("1 MiB").map(2 * PAGE, shared=True) as region, memoryview(region) as view:
        view[:5] = b"hello"
        fd = region.fileno()
        with mmap.mmap(fd, 0) as other:
            assert other[:5] == b"hello"
            other[PAGE] = 7
        assert view[PAGE] == 7
        with pytest.raises(PermissionError):
            os.ftruncate(fd, PAGE)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 3 * PAGE)
        script = f"import mmap; print(mmap.mmap({fd}, 0, access=mmap.ACCESS_READ)[:5])"
        done = subprocess.run([sys.executable, "-c", script], pass_fds=[fd], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "b'hello'"
        region.decommit(PAGE)
        assert view[PAGE] == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        fcntl.fcntl(fd, fcntl.F_GETFD)


def test_a_sealed_region_is_read_only_to_others_and_writable_here():
    with Budget("1 MiB").map(PAGE, shared=True) as region, memoryview(region) as view:
        region.seal()
        view[0] = 5
        fd = region.fileno()
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 0)
        with pytest.raises(PermissionError):
            os.write(fd, b"x")
        with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as other:
            assert other[0] == 5
        with pytest.raises(memsafe.KernelError, match="add_seals"):
            region.seal()
        with pytest.raises(memsafe.KernelError, match="remove"):
            region.decommit()


def test_a_private_region_has_no_descriptor():
    with Budget().map(PAGE) as region:
        with pytest.raises(ValueError, match="shared=True"):
            region.fileno()
        with pytest.raises(ValueError, match="shared=True"):
            region.seal()


def test_shared_steps_are_given_back_to_the_machine():
    with Budget().map(4 * PAGE, shared=True, committed=False) as region:
        region.commit()
        region.view()[:] = b"x" * 4 * PAGE
        assert os.fstat(region.fileno()).st_blocks * 512 == 4 * PAGE
        region.decommit(PAGE, 2 * PAGE)
        assert os.fstat(region.fileno()).st_blocks * 512 == 2 * PAGE
        region.commit()
        assert bytes(region.view()) == b"x" * PAGE + bytes(2 * PAGE) + b"x" * PAGE


def test_zeroing_on_close_touches_no_page_that_was_not_written():
    # That it zeroes is seen where munmap can be looked at: tests/native/region_faults.c.
    script = """
import resource, memsafe
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with memsafe.Budget().map("256 MiB", zero_on_close=True) as region:
    region.view(5000, 6)[:] = b"secret"
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
"""
    in_a_child(script)
    with pytest.raises(ValueError, match="not zeroed"):
        Budget().map(PAGE, shared=True, zero_on_close=True)


def test_numpy_arrays_of_a_part():
    numpy = pytest.importorskip("numpy")
    with Budget().map(4 * PAGE, committed=False) as region:
        region.commit(PAGE, PAGE)
        table = region.as_array("f8", (16, 32), offset=PAGE)
        table[:] = numpy.arange(512).reshape(16, 32)
        assert table.sum() == 511 * 256
        assert region.as_array("f8", 4, offset=PAGE + 8).tolist() == [1, 2, 3, 4]
        assert region.as_array("f8", numpy.int64(2), offset=PAGE + 8).tolist() == [1, 2]
        with pytest.raises(ValueError, match="itemsize cannot be zero"):
            region.as_array("V0", offset=PAGE)
        with pytest.raises(BufferError):
            region.as_array("f8")
        with pytest.raises(BufferError):
            region.close()
        del table


def test_a_region_that_was_not_forked_is_not_unmapped_in_the_child():
    script = """
import ctypes, mmap, os, memsafe
region = memsafe.Budget().map(1 << 20, zero_on_close=True)
region.advise("dontfork")
if os.fork() == 0:
    region.close()  # zeroing it would be a SIGSEGV
    os._exit(7)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
with memoryview(region) as view:
    view[0] = 1
region.close()
"""
    in_a_child(script)


def test_a_region_that_was_not_forked_can_only_be_closed_in_the_child():
    script = """
import mmap, os, memsafe
budget = memsafe.Budget()
regions = [budget.map(1 << 20, committed=committed) for committed in (True, False)]
for region in regions:
    region.commit()
    region.advise("dontfork")
if os.fork() == 0:
    others = [mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE) for _ in range(8)]  # where the regions were, among others
    for other in others:
        other[:] = b"x" * len(other)
    for region in regions:
        for call in (
            region.decommit, region.commit, region.view, lambda: memoryview(region), lambda: region.advise("dodump")
        ):
            try:
                call()
            except ValueError as error:
                assert "not in this process" in str(error), error
            else:
                raise AssertionError
        assert region.committed_bytes == 0
        region.close()
    assert all(other[:] == b"x" * len(other) for other in others)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
for region in regions:
    region.decommit()
    region.commit()
    region.close()
assert budget.used_bytes == 0
"""
    in_a_child(script)


def test_a_region_that_a_child_withholds_from_its_own_is_the_childs():
    script = """
import os, memsafe
region = memsafe.Budget().map(1 << 20)
if os.fork() == 0:
    region.advise("dontfork")
    region.view()[0] = 1
    if os.fork() == 0:
        try:
            region.view()
        except ValueError:
            os._exit(8)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 8
    region.close()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
region.close()
"""
    in_a_child(script)


@pytest.mark.parametrize("advice", ["dontfork", "dofork"])
def test_a_part_of_a_region_is_not_kept_out_of_children(advice):
    with Budget().map(2 * PAGE) as region, pytest.raises(ValueError, match="whole or not at all"):
        region.advise(advice, 0, PAGE)


def test_a_fork_from_within_a_commit_leaves_a_region_that_can_be_closed_in_both():
    script = """
import os, memsafe
budget = memsafe.Budget(soft_limit=4096)
region = budget.map(1 << 20, committed=False)
pids = []
budget.on_soft_limit(lambda budget: pids.append(os.fork()))
region.commit()
region.close()
if pids == [0]:
    os._exit(7)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
"""
    in_a_child(script)


def test_forks_amid_commits_leave_a_region_that_works_in_the_child():
    script = """
import os, threading, memsafe
region = memsafe.Budget().map(64 << 12, committed=False)
stop = False
def churn():
    while not stop:
        region.commit(0, 32 << 12)
        region.decommit(0, 32 << 12)
threads = [threading.Thread(target=churn, daemon=True) for _ in range(2)]
for thread in threads: thread.start()
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        region.commit(32 << 12, 4 << 12)
        region.view(32 << 12, 1)[0] = 1
        region.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
stop = True
for thread in threads: thread.join()
region.close()
"""
    in_a_child(script)
