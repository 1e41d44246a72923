"""A plan without a memory budget: as little saved for backward as memory-bound ops can undo."""

from __future__ import annotations

from graphopt import solvers
from graphopt.ir.ops import is_memory_bound
from graphopt.planning.problem import Problem
from graphopt.planning.search import Plan, describe
from graphopt.planning.situation import Situation


def saving_plan(situation: Situation, problem: Problem) -> Plan:
    """The step in the order of the joint graph that saves least.

    What runs again is elementwise, a copy or a normalisation: no FLOPs are added.
    """
    solution = solvers.save_least(problem.graph, problem.turn, cheap_tasks(problem))
    return describe(situation, solution.peak, problem, solution, solution.sequence)


def cheap_tasks(problem: Problem) -> frozenset[int]:
    """Tasks all of whose ops are bound by memory."""
    return frozenset(
        task
        for task, step in enumerate(problem.steps)
        if step.kind == "run" and all(is_memory_bound(node) for node in step.nodes)
    )
