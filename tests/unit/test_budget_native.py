"""The counters in C, called without the GIL from several threads at once: what allocator hooks will do."""

import gc
import threading

import pytest

from memsafe._native import ffi, lib


@pytest.fixture
def stats():
    return ffi.new("ms_budget_stats *")


def read(node, stats):
    lib.ms_budget_read(node, stats)
    return stats.used_bytes


def test_charges_from_threads_without_the_gil_end_at_zero_and_never_pass_a_limit(stats):
    root = lib.ms_budget_new(ffi.NULL, 1000)
    middle = lib.ms_budget_new(root, 900)
    leaves = [lib.ms_budget_new(middle, 500) for _ in range(3)]
    over = []

    def work(leaf, seed):
        mine = ffi.new("ms_budget_stats *")
        for i in range(4000):
            size = (i * seed) % 700
            if lib.ms_budget_charge(leaf, size, ffi.NULL, ffi.NULL) >= 0:
                if read(root, mine) > 1000 or read(middle, mine) > 900:
                    over.append(i)
                lib.ms_budget_uncharge(leaf, size, ffi.NULL)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(leaves, (311, 97, 13), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert over == []
    for node in (root, middle, *leaves):
        assert read(node, stats) == 0
    lib.ms_budget_read(root, stats)
    assert 0 < stats.peak_bytes <= 1000
    for node in (*leaves, middle, root):
        lib.ms_budget_unref(node)


def test_closing_while_others_charge_gives_every_byte_back_exactly_once(stats):
    for _ in range(50):
        root = lib.ms_budget_new(ffi.NULL, 2**40)
        leaf = lib.ms_budget_new(root, 2**40)
        start = threading.Barrier(3)

        def work(leaf=leaf, start=start):
            start.wait()
            taken = 0
            while taken < 20000 and lib.ms_budget_charge(leaf, 7, ffi.NULL, ffi.NULL) >= 0:
                taken += 1
            for _ in range(taken):
                lib.ms_budget_uncharge(leaf, 7, ffi.NULL)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        start.wait()
        lib.ms_budget_close(leaf)
        for thread in threads:
            thread.join()
        assert read(root, stats) == 0
        assert read(leaf, stats) == 0
        lib.ms_budget_unref(leaf)
        lib.ms_budget_unref(root)
    gc.collect()


def test_a_refusal_names_the_level(stats):
    root = lib.ms_budget_new(ffi.NULL, 10)
    leaf = lib.ms_budget_new(root, 100)
    level = ffi.new("int *", 77)
    assert lib.ms_budget_charge(leaf, 10, ffi.NULL, level) == 0
    assert level[0] == 77  # outputs are untouched on success
    assert lib.ms_budget_charge(leaf, 1, ffi.NULL, level) < 0
    assert level[0] == 1
    lib.ms_budget_uncharge(leaf, 10, ffi.NULL)
    lib.ms_budget_unref(root)  # the child holds it
    assert read(root, stats) == 0
    lib.ms_budget_unref(leaf)
