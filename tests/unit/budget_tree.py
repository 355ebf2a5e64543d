"""A tree of budgets, and what each of them holds."""

from memsafe import Budget


def tree(*limits):
    """A chain of budgets, root first, each with its limit."""
    budgets = [Budget(limits[0], name="root")]
    for depth, limit in enumerate(limits[1:], 1):
        budgets.append(budgets[-1].child(f"level{depth}", limit))
    return budgets


def used(budgets):
    return [budget.used_bytes for budget in budgets]
