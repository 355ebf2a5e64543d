"""Budgets: accounting that refuses.

tree.py has Budget itself, on counters in C; wait.py what happens to a request that is not met at once, with reclaim.py
(who is asked to make room) and refusal.py (what the error says); report.py what budgets tell of themselves; process.py
the budget that follows the limits of the process.
"""

from memsafe._native import Reservation
from memsafe.budget.process import ProcessBudget
from memsafe.budget.report import BudgetReport, BudgetStats, Consumer, Drift, Waiter
from memsafe.budget.tree import Budget, current_budget

__all__ = [
    "Budget",
    "BudgetReport",
    "BudgetStats",
    "Consumer",
    "Drift",
    "ProcessBudget",
    "Reservation",
    "Waiter",
    "current_budget",
]
