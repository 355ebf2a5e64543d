"""What budgets tell of themselves, and the budget that follows the machine."""

import io
import json
import threading
import time

import pytest
from rich.console import Console

import memsafe
from memsafe import Budget, BudgetExceededError, ProcessBudget
from memsafe.budget import process, report
from memsafe.testing import FakeKernel

MIB = 1 << 20


# ---------------------------------------------------------------------------------------------------- reports


def test_the_root_tells_what_is_charged_beside_the_memory_that_the_process_has():
    db = Budget(name="db")
    child = db.child("child")
    with child.reserve("3 MiB"):
        drift = db.report().drift
        assert drift.charged_bytes == 3 * MIB
        assert drift.anonymous_bytes > 0
        assert drift.unaccounted_bytes == drift.anonymous_bytes - 3 * MIB
        assert child.report().drift is None
    with db.reserve("1 PiB"):
        assert "untouched" in str(db.report())
    assert "not accounted for" in str(db.report())
    buffer = bytearray(64 * MIB)  # that nobody charged
    assert db.report().drift.unaccounted_bytes > drift.unaccounted_bytes + 32 * MIB
    del buffer


def test_a_kernel_that_tells_nothing_of_the_process_leaves_the_drift_out(tmp_path):
    kernel = FakeKernel(tmp_path)
    budget = Budget.for_process(root=kernel.root)
    assert budget.report().drift.anonymous_bytes == 4 * MIB
    (tmp_path / "proc/self/status").unlink()
    assert budget.report().drift is None


def test_a_report_is_text_plain_data_and_a_rich_tree():
    db = Budget("1 MiB", name="db")
    cache, index = db.child("cache"), db.child("[red]index", "600 KiB")
    with cache.reserve("300 KiB"), index.reserve("400 KiB"):
        told = db.report()
    plain = json.loads(json.dumps(told.as_dict()))
    assert [child["name"] for child in plain["children"]] == ["[red]index", "cache"]
    assert plain["used_bytes"] == 700 * 1024
    assert set(plain["drift"]) == {"charged_bytes", "anonymous_bytes", "unaccounted_bytes"}
    shown = io.StringIO()
    Console(file=shown, width=160).print(told)
    lines = shown.getvalue().splitlines()
    assert lines[0].startswith("db  700 KiB of 1 MiB")
    assert "├── [red]index  400 KiB of 600 KiB" in lines[1]
    assert "└── cache  300 KiB no limit" in lines[2]
    assert lines[3].startswith("charged 700 KiB beside")


def test_an_abort_is_in_the_report():
    db = Budget(name="db")
    db.child("query").abort("too slow")
    query = db.child("other")
    query.abort("cancelled")
    assert "db/other was aborted: cancelled" in str(query.report())
    assert query.report().as_dict()["notes"] == ["db/other was aborted: cancelled"]


def test_a_refusal_in_a_large_tree_does_not_walk_it_each_time(monkeypatch):
    walks = []

    def walk(budget, count, original=report.top_consumers):
        walks.append(budget)
        return original(budget, count)

    monkeypatch.setattr(report, "top_consumers", walk)
    small = Budget(100)
    with small.reserve(100):
        for _ in range(3):
            with pytest.raises(BudgetExceededError):
                small.reserve(1)
    assert len(walks) == 3
    walks.clear()
    monkeypatch.setattr(report, "_WALK_RATIO", 1e-9)
    large = Budget(1000)
    leaves = [large.child(f"leaf{i}") for i in range(report._SMALL_TREE)]
    first, second = leaves[0].reserve(700), leaves[1].reserve(300)
    for _ in range(3):
        with pytest.raises(BudgetExceededError) as caught:
            large.reserve(1)
        assert caught.value.top_consumers == (("budget/leaf0", 700), ("budget/leaf1", 300))
        first.shrink(first.size_bytes - 699)
        second.resize(301)
    assert len(walks) == 1
    assert large.top_consumers(1) == (("budget/leaf0", 699),)
    first.release()
    second.release()


# ---------------------------------------------------------------------------------------------------- the process


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "_LOOK_AGAIN_S", 0.0)
    kernel = FakeKernel(tmp_path)
    kernel.app = kernel.cgroup("/app", limit="1000 MiB", usage="300 MiB", inactive_file="100 MiB").join()
    kernel.process.set(anonymous="150 MiB", rss="160 MiB")
    return kernel


def test_it_is_a_share_of_what_the_tightest_constraint_leaves_the_process(kernel):
    budget = Budget.for_process(0.5, root=kernel.root)
    assert isinstance(budget, ProcessBudget)
    # Of 1000 MiB others use 50: 300 less 100 of cache that goes by itself and 150 of the process's own.
    assert budget.limit_bytes == 475 * MIB
    assert budget.path == "process"
    assert (
        "process may hold 475 MiB: 0.5 of the 950 MiB that memory.max of /app leaves this process" in budget.explain()
    )
    assert "(1000 MiB, 50 MiB used by others)" in budget.explain()
    told, _, looked = budget.explain().partition("; looked at ")
    assert looked
    assert told in str(budget.report())


def test_what_the_process_has_swapped_out_is_its_own(kernel):
    before_bytes = Budget.for_process(1.0, root=kernel.root).limit_bytes
    kernel.process.set(swap="30 MiB")
    budget = Budget.for_process(1.0, root=kernel.root)
    assert budget.limit_bytes - before_bytes == 30 * MIB
    assert budget.report().drift.anonymous_bytes == 180 * MIB


def test_an_rlimit_counts_what_it_counts(kernel):
    kernel.process.set(data_limit="200 MiB", data_vm="180 MiB")
    assert Budget.for_process(1.0, root=kernel.root).limit_bytes == 200 * MIB


def test_a_limit_that_is_raised_is_seen_when_the_budget_would_refuse(kernel):
    budget = Budget.for_process(1.0, root=kernel.root).child("all")
    kernel.app.limit = "2000 MiB"
    with budget.reserve("1900 MiB"):
        assert budget.parent.limit_bytes == 1950 * MIB
    assert budget.parent.stats().refusals == 0


def test_a_limit_that_is_raised_is_seen_by_who_waits(kernel, monkeypatch):
    monkeypatch.setattr(ProcessBudget, "_follow_every_s", 0.001)
    budget = Budget.for_process(1.0, root=kernel.root)
    held, served = budget.reserve("900 MiB"), []
    waiter = threading.Thread(target=lambda: served.append(budget.reserve("800 MiB", timeout_s=60.0)))
    waiter.start()
    while not budget.waiting:
        time.sleep(0.001)
    kernel.app.limit = "2000 MiB"  # and nobody asks for anything
    waiter.join(60)
    assert [each.size_bytes for each in served] == [800 * MIB]
    served[0].release()
    held.release()


def test_what_no_counter_could_hold_is_refused_like_anything_else(kernel):
    budget = Budget.for_process(1.0, root=kernel.root)
    with budget.reserve(1):
        for refuser in (budget, budget.child("below")):
            assert refuser.try_reserve(2**63 - 1) is None
            with pytest.raises(BudgetExceededError) as refused:
                refuser.reserve(2**63 - 1)
            assert refused.value.refused_by is budget


def test_a_limit_that_is_lowered_is_seen_as_the_charges_grow_and_reclaimers_are_asked(kernel):
    budget = Budget.for_process(1.0, name="all", root=kernel.root)
    cache = budget.child("cache").reserve("400 MiB")

    @cache.budget.reclaimer
    def shed(need_bytes):
        cache.shrink(need_bytes)
        return need_bytes

    kernel.app.limit = "450 MiB"  # which leaves 400
    with budget.reserve("31 MiB"):
        assert cache.size_bytes == 369 * MIB
    assert (budget.limit_bytes, budget.over_bytes) == (400 * MIB, 0)
    cache.release()


def test_soft_limits_of_its_own_still_work(kernel):
    budget, told = Budget.for_process(1.0, root=kernel.root), []
    budget.soft_limit_bytes = "100 MiB"
    budget.on_soft_limit(told.append)
    with budget.reserve("90 MiB") as reservation:
        assert told == []
        reservation.grow("20 MiB")
        assert told == [budget]


def test_it_looks_again_only_now_and_then(kernel, monkeypatch):
    monkeypatch.setattr(process, "_LOOK_AGAIN_S", 3600.0)
    budget = Budget.for_process(1.0, root=kernel.root)
    kernel.app.limit = "2000 MiB"
    assert budget.try_reserve("1900 MiB") is None
    assert budget.limit_bytes == 950 * MIB


def test_what_cannot_be_read_any_more_leaves_the_last_limit(kernel, tmp_path):
    budget = Budget.for_process(1.0, root=kernel.root)
    kernel.app.remove()
    (tmp_path / "proc/meminfo").unlink()
    assert budget.limit_bytes == 950 * MIB


def test_where_nothing_can_be_read_there_is_no_such_budget(tmp_path):
    (tmp_path / "proc").mkdir()
    with pytest.raises(memsafe.UnsupportedError, match="give Budget"):
        Budget.for_process(root=tmp_path)


@pytest.mark.parametrize("fraction", [0, -1, 1.1, True, "0.9", float("nan")])
def test_a_fraction_that_is_none_is_a_value_error(fraction):
    with pytest.raises(ValueError, match="fraction must be above 0"):
        Budget.for_process(fraction)


def test_its_limit_cannot_be_set(kernel):
    budget = Budget.for_process(root=kernel.root)
    with pytest.raises(AttributeError, match="child a limit of its own"):
        budget.limit_bytes = 5


def test_it_works_on_the_real_machine_and_closes():
    with Budget.for_process() as budget:
        assert memsafe.current_budget() is budget
        assert budget.limit_bytes > 0
        with budget.child("child").reserve(1):
            assert budget.used_bytes == 1
    assert budget.closed
