"""Optimisation problems on plain data: rematerialization under a peak-memory budget.

Widths of prunable dimensions under cost budgets are in `graphopt.solvers.widths`, non-linearities
to keep in `graphopt.solvers.nonlinearity`.
Nothing here imports torch or any other part of graphopt.
"""

from graphopt.solvers.check import Check, check
from graphopt.solvers.cover import least_peak
from graphopt.solvers.frontier import frontier, minimise
from graphopt.solvers.graph import Task, TaskGraph, TaskGraphError, Value
from graphopt.solvers.order import reorder
from graphopt.solvers.saving import least_saved, save_least
from graphopt.solvers.search import prepare
from graphopt.solvers.solution import Progress, Solution
from graphopt.solvers.solve import solve

__all__ = [
    "Check",
    "Progress",
    "Solution",
    "Task",
    "TaskGraph",
    "TaskGraphError",
    "Value",
    "check",
    "frontier",
    "least_peak",
    "least_saved",
    "minimise",
    "prepare",
    "reorder",
    "save_least",
    "solve",
]
