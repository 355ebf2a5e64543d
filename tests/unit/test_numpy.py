"""Arrays charged to budgets."""

import asyncio
import gc
import io
import mmap
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy._core.multiarray import get_handler_name

import memsafe
from memsafe import Budget
from memsafe._native import numpy_handler, numpy_swap_handler

MIB = 1 << 20


def charged_to(array):
    """The path of the budget that an array is charged to, None for none."""
    name = get_handler_name(array)
    return name.removeprefix("memsafe:") if name.startswith("memsafe:") else None


@pytest.fixture
def budget():
    budget = Budget(name="db")
    yield budget
    gc.collect()
    assert budget.used_bytes == 0


# ---------------------------------------------------------------------------------------------------- charging


@pytest.mark.parametrize("count", [1, 10, 1000, MIB])
@pytest.mark.parametrize("make", [np.empty, np.zeros, np.ones, np.arange], ids=lambda make: make.__name__)
def test_an_array_is_charged_its_bytes_until_it_is_freed(budget, make, count):
    with budget.numpy():
        array = make(count)
        assert budget.used_bytes == array.nbytes == 8 * count
        view = array[::2]
        assert charged_to(array) == "db"
    del array
    assert budget.used_bytes == 8 * count
    del view
    assert budget.used_bytes == 0
    assert budget.peak_bytes >= 8 * count


def test_every_level_is_charged_and_the_smallest_refuses():
    root = Budget(3 * MIB, name="root")
    leaf = root.child("engine").child("query")
    with leaf.numpy(), root.numpy():
        kept = np.empty(2 * MIB, "u1")
    with leaf.numpy():
        array = np.empty(MIB, "u1")  # exactly at the limit
        assert (leaf.used_bytes, root.used_bytes) == (MIB, 3 * MIB)
        with pytest.raises(MemoryError):
            np.empty(1, "u1")
        assert (leaf.used_bytes, root.used_bytes) == (MIB, 3 * MIB)
    del array, kept
    assert root.used_bytes == 0


def test_outside_of_a_block_nothing_is_charged(budget):
    before = np.ones(10)
    with budget.numpy():
        pass
    after = before + 1
    assert charged_to(before) is charged_to(after) is None


def test_zeros_are_as_lazy_as_without():
    def resident_bytes():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * mmap.PAGESIZE

    budget = Budget("1 GiB")
    with budget.numpy():
        before = resident_bytes()
        array = np.zeros(512 * MIB, "u1")
        assert budget.used_bytes == 512 * MIB
        assert resident_bytes() - before < 64 * MIB
        assert not array[:: 64 * MIB].any()
    del array
    assert budget.used_bytes == 0


def test_resizing_in_place_charges_the_difference(budget):
    with budget.numpy():
        array = np.arange(1000.0)
        for count in (10, 100_000, 3, 2 * MIB, 1):
            array.resize(count, refcheck=False)
            assert budget.used_bytes == array.nbytes
        assert array.tolist() == [0.0]
        array.resize(0, refcheck=False)
        assert budget.used_bytes in (1, 8)  # NumPy keeps a byte, or an item
    del array


def test_text_is_parsed_into_a_growing_array(budget):
    text = " ".join(map(str, range(50_000)))
    with budget.numpy():
        array = np.fromstring(text, sep=" ")  # it grows without the GIL
        assert budget.used_bytes == array.nbytes
        budget.limit_bytes = array.nbytes + 8 * 10_000
        with pytest.raises(MemoryError):
            np.fromstring(text, sep=" ")
        assert budget.used_bytes == array.nbytes
    assert array.tolist() == list(range(50_000))
    del array


def test_objects_copies_pickles_and_buffers_of_sorting(budget):
    with budget.numpy():
        objects = np.array([[], {}, 1], dtype=object)
        assert budget.used_bytes == objects.nbytes
        swapped = np.arange(100, dtype=">i8")[::-1].copy()
        swapped.sort()
        again = pickle.loads(pickle.dumps(np.arange(50)))
        assert charged_to(again) == "db"
        assert budget.peak_bytes >= 2 * swapped.nbytes
    assert swapped.tolist() == list(range(100))
    del objects, swapped, again


def test_a_size_beyond_all_memory_is_a_memory_error_and_charges_nothing(budget):
    with budget.numpy():
        for count in (2**60, 2**63 - 1):
            with pytest.raises((MemoryError, ValueError)):
                np.empty(count, "u1")
        with pytest.raises(MemoryError):
            np.zeros(2**46 // 8)  # more than there are addresses
        assert budget.used_bytes == 0


# ---------------------------------------------------------------------------------------------------- freeing


def test_an_array_freed_on_another_thread_credits_its_budget(budget):
    with budget.numpy():
        arrays = [np.ones(1000) for _ in range(100)]
    thread = threading.Thread(target=arrays.clear)
    thread.start()
    thread.join()
    assert budget.used_bytes == 0


def test_an_array_outlives_the_closing_of_its_budget():
    root = Budget(name="root")
    with pytest.warns(ResourceWarning, match="7.8 KiB still charged"), root.child("query") as query, query.numpy():
        array = np.ones(1000)
    assert (root.used_bytes, query.used_bytes) == (0, 0)
    del array
    assert (root.used_bytes, query.used_bytes) == (0, 0)
    assert query.closed


def test_what_was_freed_just_now_is_there_for_anybody():
    root = Budget(80, name="root")
    leaf, other = root.child("leaf"), root.child("other")
    with leaf.numpy():
        for take in (leaf.reserve, other.reserve, other.try_reserve, lambda n: root.reserve("80 B")):
            array = np.empty(10)
            del array
            take(80).release()
        array = np.empty(9)
        with other.reserve(8) as held:
            del array
            held.grow(72)
            held.resize(79)
        with other.numpy():
            array = np.empty(10)
        assert charged_to(array) == "root/other"
        del array
    assert (root.used_bytes, root.peak_bytes) == (0, 80)


def test_a_freed_array_serves_who_waits_for_its_bytes():
    budget = Budget(8000)
    with budget.numpy(), ThreadPoolExecutor(1) as pool:
        array = np.empty(999)
        np.empty(1)
        waiting = pool.submit(lambda: budget.reserve(8000, timeout_s=60).release())
        while not budget.waiting:
            assert not waiting.done()
        del array
        waiting.result()
        assert budget.used_bytes == 0


def test_a_freed_array_serves_who_waits_elsewhere_in_the_tree_and_needs_its_bytes_next():
    root = Budget(200, name="root")
    leaf, other = root.child("leaf"), root.child("other", limit=120)
    with leaf.numpy(), other.reserve(100) as held, ThreadPoolExecutor(1) as pool:
        kept = np.empty(40, "u1")
        waiting = pool.submit(lambda: other.reserve(60, timeout_s=60).release())
        while not other.waiting:  # other's limit holds it up, not yet root's
            assert not waiting.done()
        array = np.empty(50, "u1")
        del array
        held.shrink(40)
        waiting.result()
        del kept
    assert root.used_bytes == 0


def test_an_array_grows_into_what_was_freed_just_now():
    budget = Budget(101, name="db")
    with budget.numpy():
        array, other = np.empty(40, "u1"), np.empty(60, "u1")
        del other
        array.resize(90, refcheck=False)
        assert (budget.used_bytes, budget.peak_bytes) == (90, 100)
    del array
    assert budget.used_bytes == 0


def test_a_growth_is_no_peak_of_what_was_freed_before():
    budget = Budget(name="db")
    with budget.numpy():
        array, other = np.empty(40, "u1"), np.empty(20, "u1")
        del other
        array.resize(60, refcheck=False)
        assert budget.peak_bytes == 60
    del array


def test_arrays_of_two_budgets_that_never_lived_at_once_are_no_peak():
    root = Budget(name="root")
    inner = root.child("inner").numpy()
    with root.child("outer").numpy():
        with inner:
            np.empty(80, "u1")
        np.empty(80, "u1")
    assert root.peak_bytes == 80


def test_a_freed_array_leaves_no_room_beyond_what_was_decided_since():
    budget = Budget(name="db")
    handler = budget.numpy()
    with handler:
        kept, array = np.empty(100), np.empty(10)
        del array
        budget.limit_bytes = 800
        with pytest.raises(MemoryError):
            np.empty(1)
        array = kept
        del kept, array
        np.empty(10)
        budget.abort("cancelled")
        with pytest.raises(MemoryError):
            np.empty(10)
    assert budget.used_bytes == 0


def test_an_array_keeps_its_budget_as_a_reservation_does():
    root = Budget(name="root")
    with root.child("query").numpy():
        array = np.ones(1000)
    gc.collect()
    assert [child.used_bytes for child in root.children] == [8000]
    del array
    gc.collect()
    assert (root.used_bytes, root.children) == (0, ())


def test_arrays_of_one_block_and_a_later_one_of_the_same_budget_add_up(budget):
    with budget.numpy():
        first = np.ones(10)
    with budget.numpy():
        second = first + 1
    assert budget.used_bytes == 160
    del first, second


# ---------------------------------------------------------------------------------------------------- refusing


def test_the_error_that_leaves_the_block_is_caused_by_the_refusal(budget):
    budget.limit_bytes = MIB
    with pytest.raises(MemoryError, match="Unable to allocate") as caught, budget.numpy():
        np.empty(2 * MIB, "u1")
    cause = caught.value.__cause__
    assert isinstance(cause, memsafe.BudgetExceededError)
    assert (cause.requested_bytes, cause.refused_by, cause.available_bytes) == (2 * MIB, budget, MIB)
    assert memsafe.numpy.last_refusal() is None


def test_inside_the_block_the_last_refusal_says_why(budget):
    budget.limit_bytes = MIB
    with budget.numpy():
        assert memsafe.numpy.last_refusal() is None
        with pytest.raises(MemoryError):
            np.empty(2 * MIB, "u1")
        assert memsafe.numpy.last_refusal().requested_bytes == 2 * MIB


def test_an_error_that_no_refusal_caused_is_left_alone(budget):
    budget.limit_bytes = MIB

    def fail_differently():
        with pytest.raises(MemoryError):
            np.empty(2 * MIB, "u1")
        raise MemoryError("something else")

    with pytest.raises(MemoryError, match="something else") as caught, budget.numpy():
        fail_differently()
    assert caught.value.__cause__ is None
    with pytest.raises(ZeroDivisionError), budget.numpy():
        _ = 1 / 0


def test_a_refused_growth_leaves_the_array_as_it_was_and_says_why(budget):
    budget.limit_bytes = 1000
    with budget.numpy():
        array = np.arange(100)
        with pytest.raises(MemoryError, match="cannot allocate") as caught, budget.numpy():
            array.resize(200, refcheck=False)
        assert array.tolist() == list(range(100))
    assert "cannot grow in place by 800 B" in str(caught.value.__cause__)
    assert caught.value.__cause__.available_bytes == 200
    assert budget.used_bytes == 800
    del array


def test_reclaimers_make_room_for_an_array(budget):
    budget.limit_bytes = 10 * MIB
    cache = {}

    @budget.reclaimer
    def evict(need_bytes):
        assert np.ones(10).sum() == 10  # arrays can be made here
        freed = sum(array.nbytes for array in cache.values())
        cache.clear()
        return freed

    with budget.numpy():
        cache["a"] = np.ones(8 * MIB, "u1")
        array = np.ones(9 * MIB, "u1")
        assert (cache, budget.used_bytes) == ({}, 9 * MIB)
        with pytest.raises(MemoryError):
            np.ones(2 * MIB, "u1")
    del array
    assert budget.used_bytes == 0
    budget.remove_reclaimer(evict)


def test_no_reclaimer_runs_while_an_array_is_resized(budget):
    budget.limit_bytes, asked = 1000, []
    budget.reclaimer(asked.append)
    with budget.numpy():
        array = np.arange(100)
        with pytest.raises(MemoryError):
            array.resize(200, refcheck=False)
    assert asked == []
    budget.remove_reclaimer(asked.append)
    del array


def test_an_interrupted_reclaimer_interrupts_the_program_after_the_array_was_refused():
    script = """
import memsafe, numpy as np
budget = memsafe.Budget(1000)
@budget.reclaimer
def evict(need):
    raise KeyboardInterrupt
def make():
    try:
        np.ones(1000, "u1")[:1]
        np.ones(1000)
    except MemoryError:
        pass
    for _ in range(1000):
        pass
with budget.numpy():
    kept = np.ones(500, "u1")
    try:
        make()
    except KeyboardInterrupt:
        print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


def test_soft_limits_are_told_by_arrays_and_after_a_growth():
    passed = []
    budget = Budget(soft_limit=1000)
    budget.on_soft_limit(lambda budget: passed.append(budget.used_bytes))
    with budget.numpy():
        array = np.ones(2000, "u1")
        assert passed == [2000]
        del array
        array = np.ones(2000, "u1")
        assert passed == [2000, 2000]
        del array
        passed.clear()
        array = np.ones(10, "u1")
        array.resize(3000, refcheck=False)
        for _ in range(10):  # the main thread tells when it next looks for what is pending
            pass
        assert passed == [3000]
    del array


def test_a_comparison_that_was_refused_its_buffer_fails_rather_than_calls_all_equal(budget):
    kind = np.dtype([("a", ">i8"), ("b", "S3")])  # compared by way of copies, by the byte order
    rows = np.array([(n * 7919 % 101, b"x") for n in range(101)], dtype=kind)
    wanted = np.sort(rows)
    with budget.numpy():
        copy = rows.copy()
        budget.limit_bytes = copy.nbytes
        with pytest.raises(MemoryError):
            copy.sort()
        budget.limit_bytes = None
        copy[:] = rows
        copy.sort()
    assert (copy == wanted).all()
    del copy


def test_an_aborted_budget_refuses_arrays_and_blocks():
    budget = Budget()
    handler = budget.numpy()

    def use():
        budget.abort("cancelled")
        np.ones(10)

    with pytest.raises(MemoryError, match="Unable to allocate") as caught:
        handler.run(use)
    assert isinstance(caught.value.__cause__, memsafe.BudgetAbortedError)
    with pytest.raises(memsafe.BudgetAbortedError, match="cancelled"):
        handler.run(use)
    assert charged_to(np.ones(1)) is None


def test_an_array_of_a_closed_budget_can_shrink_and_not_grow():
    budget = Budget()
    handler = budget.numpy()
    array = handler.run(np.ones, 10)
    with pytest.warns(ResourceWarning):
        budget.close()
    array.resize(5, refcheck=False)
    with pytest.raises(MemoryError, match="cannot allocate"):
        array.resize(6, refcheck=False)
    assert array.tolist() == [1] * 5
    assert isinstance(memsafe.numpy.last_refusal(), memsafe.BudgetClosedError)
    with pytest.raises(memsafe.BudgetClosedError, match="closed"):
        handler.run(np.ones, 10)


# ---------------------------------------------------------------------------------------------------- where it holds


def test_blocks_nest_and_the_innermost_is_charged():
    outer, inner = Budget(name="outer"), Budget(name="inner")
    handler = memsafe.numpy.handler(outer)
    with handler:
        with inner.numpy():
            a = np.ones(1)
            with handler:
                b = np.ones(1)
            c = np.ones(1)
        d = np.ones(1)
    assert [charged_to(array) for array in (a, b, c, d)] == ["inner", "outer", "inner", "outer"]
    assert charged_to(np.ones(1)) is None


def test_generators_may_end_in_any_order():
    def charge(name):
        with Budget(name=name).numpy():
            yield

    first, second = charge("first"), charge("second")
    next(first)
    next(second)
    first.close()
    assert charged_to(np.ones(1)) == "second"
    second.close()
    assert charged_to(np.ones(1)) is None


def test_a_handler_that_was_set_before_comes_back():
    ours = numpy_handler(Budget(), b"somebody else's", lambda *_: None, False)
    before = numpy_swap_handler(ours)
    try:
        with Budget(name="db").numpy():
            assert charged_to(np.ones(1)) == "db"
        assert get_handler_name(np.ones(1)) == "somebody else's"
    finally:
        numpy_swap_handler(before)


def test_new_threads_and_executors_are_charged_by_run_and_install(budget):
    def path_here():
        return charged_to(np.ones(1))

    handler = memsafe.numpy.handler(budget)
    found = []
    with handler:
        threads = [
            threading.Thread(target=lambda: found.append(path_here())),
            threading.Thread(target=handler.run, args=(lambda: found.append(path_here()),)),
        ]
        for thread in threads:
            thread.start()
            thread.join()
        assert found == [None, "db"]
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(path_here).result() is None
            assert pool.submit(handler.run, path_here).result() == "db"
            assert pool.submit(path_here).result() is None
        with ThreadPoolExecutor(1, initializer=handler.install) as pool:
            assert pool.submit(path_here).result() == "db"
    assert path_here() is None


def test_tasks_inherit_the_block_and_keep_their_own():
    budgets = [Budget(name=f"task{n}") for n in range(3)]

    async def work(budget, meet):
        with budget.numpy():
            await meet.wait()
            return charged_to(np.ones(1)), await asyncio.to_thread(lambda: charged_to(np.ones(1)))

    async def main():
        meet = asyncio.Event()
        tasks = [asyncio.create_task(work(budget, meet)) for budget in budgets]
        await asyncio.sleep(0)
        meet.set()
        with Budget(name="outer").numpy():
            inherited = await asyncio.create_task(asyncio.to_thread(lambda: charged_to(np.ones(1))))
        return await asyncio.gather(*tasks), inherited

    assert asyncio.run(main()) == ([("task0",) * 2, ("task1",) * 2, ("task2",) * 2], "outer")


def test_many_threads_end_at_zero(budget):
    budget.limit_bytes = 4 * MIB
    handler = budget.numpy()
    shared = [None] * 8

    def work(seed):
        for n in range(2000):
            try:
                array = np.ones((seed * 7919 + n * 104729) % 200_000, "u1")
                shared[n % 8] = array  # another thread frees what was there
            except MemoryError:
                shared[n % 8] = None

    threads = [threading.Thread(target=handler.run, args=(work, seed)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.used_bytes == sum(array.nbytes or 1 for array in shared if array is not None)


def test_a_name_that_is_too_long_for_numpy_is_cut_between_letters():
    with Budget(name="é" * 200).numpy():
        name = get_handler_name(np.ones(1))
    assert name == "memsafe:" + "é" * 59


def test_a_numpy_that_crashes_when_it_is_refused_is_not_used(monkeypatch):
    monkeypatch.setattr("memsafe.numpy.numpy_connect", lambda _: False)
    memsafe.numpy._multiarray.cache_clear()
    with pytest.raises(memsafe.UnsupportedError, match=r"2\.4 or later"):
        Budget().numpy()


def test_without_numpy_it_says_so():
    script = """
import sys
sys.modules["numpy"] = None
import memsafe, memsafe.numpy
try:
    memsafe.Budget().numpy()
except ImportError as error:
    print("numpy" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


# ---------------------------------------------------------------------------------------------------- faults

STRUCTURED = np.dtype([("a", ">i4"), ("b", "<f8"), ("c", "S5")])
OPERATIONS = {
    "ufunc": lambda: np.sqrt(np.arange(100.0)) + 1,
    "reduction": lambda: np.arange(600).reshape(2, 3, 100).sum(axis=1),
    "broadcast": lambda: np.arange(10)[:, None] * np.arange(10),
    "casting": lambda: np.arange(20000, dtype=">i2").astype("f8") @ np.ones(20000),
    "indexing": lambda: np.arange(1000)[np.arange(0, 1000, 7)][::-1].copy(),
    "boolean": lambda: np.arange(1000)[np.arange(1000) % 3 == 0],
    "assignment": lambda: np.put_along_axis(a := np.zeros((3, 4)), np.array([[1], [2], [3]]), 5, 1) or a,
    "sort": lambda: np.sort(np.arange(1000, dtype=">i8")[::-1]),
    "argsort": lambda: np.argsort(np.arange(300)[::-1].reshape(3, 100), axis=0, kind="stable"),
    "structured sort": lambda: np.sort(np.array([(n * 7 % 11, n, b"x") for n in range(11)], dtype=STRUCTURED)),
    "structured search": lambda: np.array([(n, n, b"x") for n in range(9)], dtype=STRUCTURED).searchsorted(
        np.array([(4, 4, b"x")], dtype=STRUCTURED)
    ),
    "partition": lambda: np.partition(np.arange(1000)[::-1], 10)[:10].sum(),
    "unique": lambda: np.unique(np.array([3, 1, 2, 3, 1]), return_inverse=True),
    "concatenate": lambda: np.concatenate([np.ones(10), np.zeros(5)]),
    "einsum": lambda: np.einsum("ij,jk->ik", np.ones((5, 6)), np.ones((6, 7))),
    "linalg": lambda: np.linalg.solve(np.eye(20) * 2, np.ones(20)),
    "fft": lambda: np.fft.fft(np.ones(64)).real,
    "random": lambda: np.random.default_rng(1).normal(size=100),
    "fromiter": lambda: np.fromiter(range(1000), dtype="i8"),
    "fromstring": lambda: np.fromstring(" ".join(map(str, range(9000))), sep=" "),
    "loadtxt": lambda: np.loadtxt(io.StringIO("1 2\n3 4\n" * 100)),
    "save": lambda: (np.save(f := io.BytesIO(), np.arange(100)), f.seek(0), np.load(f))[2],
    "pickle": lambda: pickle.loads(pickle.dumps(np.arange(50))),
    "resize": lambda: np.arange(10).repeat(3).copy().resize(100, refcheck=False),
    "nditer": lambda: sum(
        x[()] for x in np.nditer(np.arange(10, dtype=">i4"), flags=["buffered"], op_dtypes=["f8"], casting="safe")
    ),
    "vectorize": lambda: np.vectorize(lambda x: x + 1)(np.arange(20)),
    "strings": lambda: np.char.upper(np.array(["a", "bc", "def"])),
    "objects": lambda: np.array([1, "a", None], dtype=object)[::-1].copy(),
    "masked": lambda: np.ma.masked_greater(np.arange(10), 5).sum(),
    "datetimes": lambda: np.arange("2020-01", "2021-01", dtype="datetime64[D]").astype("M8[M]"),
    "print": lambda: str(np.arange(2000.0) / 7),
}


def same(a, b):
    if isinstance(a, tuple):
        return all(map(same, a, b))
    return np.array_equal(a, b) and getattr(a, "dtype", None) == getattr(b, "dtype", None)


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_refusal_is_a_memory_error_and_nothing_else_comes_of_it(budget, name, for_good):
    budget.limit_bytes = 0  # so that each allocation and each growth is asked about
    operation, asked = OPERATIONS[name], 0

    def decide(budget, size_bytes, level):
        nonlocal asked
        asked += 1
        if asked == refused_at or (for_good and asked > refused_at):
            return MemoryError(f"refused: {size_bytes}")
        budget._charge_existing(size_bytes)
        return None

    wanted = operation()
    capsule = numpy_handler(budget, b"memsafe:faults", decide, False)
    refused_at, refusals = 0, 0
    while refused_at == 0 or asked >= refused_at:
        refused_at, asked = refused_at + 1, 0
        before = numpy_swap_handler(capsule)
        try:
            operation()
        except MemoryError:
            refusals += 1
        finally:
            numpy_swap_handler(before)
        gc.collect()
        assert budget.used_bytes == 0
    assert refusals == refused_at - 1
    assert refusals > 0 or name == "print"
    assert same(operation(), wanted)
