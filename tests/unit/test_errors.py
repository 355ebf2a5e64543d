import copy
import pickle

import pytest

import memsafe
from memsafe import Budget

ERRORS = [
    memsafe.BudgetClosedError("closed"),
    memsafe.KernelError(12, "mmap", "1 GiB asked"),
    memsafe.SnapshotFailedError("failed", child_type="ValueError", child_message="no", child_traceback="..."),
    memsafe.SnapshotOverrunError("overrun", copy_bytes=2, max_copy_bytes=1),
    memsafe.SnapshotRefusedError("refused", None),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_cross_processes_whole(error):
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is type(error)
    assert (str(there), there.args, vars(there)) == (str(error), error.args, vars(error))


def test_a_refusal_crosses_processes_without_its_budgets():
    budget = Budget(100, name="db")
    with budget.reserve(60), pytest.raises(memsafe.BudgetExceededError) as refusal:
        budget.reserve(50)
    for there in (pickle.loads(pickle.dumps(refusal.value)), copy.copy(refusal.value)):
        assert isinstance(there, MemoryError)
        assert str(there) == str(refusal.value)
        assert (there.requested_bytes, there.available_bytes) == (50, 40)
        assert there.top_consumers == refusal.value.top_consumers
        assert there.budget is there.refused_by is None
