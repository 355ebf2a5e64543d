import gc
import mmap
import pickle
import threading

import pytest

import memsafe
from memsafe import Budget
from memsafe._native import lib

PAGE = mmap.PAGESIZE
HUGE = 2 << 20


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


@pytest.mark.parametrize(("offset", "size"), [(1, PAGE), (0, 1), (-PAGE, PAGE), (0, 5 * PAGE), (4 * PAGE, PAGE)])
def test_ranges_outside_or_of_part_pages_are_value_errors(offset, size):
    with Budget("1 MiB").map(4 * PAGE) as region, pytest.raises(ValueError, match="whole pages"):
        region.decommit(offset, size)


def test_huge_pages_are_aligned_and_charged_in_whole_huge_pages():
    budget = Budget("8 MiB")
    with budget.map("3 MiB", huge_pages=True) as region:
        assert region.size_bytes == budget.used_bytes == 4 << 20
        assert int(memsafe._native.ffi.cast("uintptr_t", region._address)) % HUGE == 0


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
            meet.wait(10)  # both have seen it open
            address = super()._detach()
            meet.wait(10)
            return address

    class Native:
        def __getattr__(self, name):
            return getattr(lib, name)

        def ms_region_unmap(self, address, size):
            unmapped.append(address)
            return lib.ms_region_unmap(address, size)

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

        def ms_region_decommit(self, address, size):
            with pytest.raises(BufferError):
                region.close()  # as another thread might: cffi lets go of the GIL here
            return lib.ms_region_decommit(address, size)

        def ms_region_advise(self, address, size, advice):
            with pytest.raises(BufferError):
                region.close()
            return lib.ms_region_advise(address, size, advice)

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
