"""What a program takes of everything that can be limited, and limits moved by it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from graphopt.cost.flops import graph_flops
from graphopt.cost.sizes import Substitution, symbols_of
from graphopt.ir.program import Program
from graphopt.solvers.widths import Allocation, Cost, WidthProblem

# Predicted seconds are to stay below their limit by as much as timings scatter.
CAUTION = 0.98


def counted(program: Program) -> dict[str, int]:
    """FLOPs of one forward on the example inputs, parameters and their bytes."""
    parameters = {id(p): p for p in program.skeleton.root.parameters()}.values()
    return {
        "flops": graph_flops(program.module.graph, example_sizes(program)),
        "params": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def example_sizes(program: Program) -> Substitution:
    """The sizes of the example inputs; a batch of one was traced as two."""
    shapes = [leaf.shape for leaf in program.signature.inputs]
    return symbols_of(program.fake_inputs(), shapes)


def passed(have: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, float]:
    """For each limit that is passed, by how much."""
    return {
        name: have[name] / limit if limit > 0 else math.inf
        for name, limit in limits.items()
        if have[name] > limit
    }


def limited(problem: WidthProblem, limits: Mapping[str, float]) -> WidthProblem:
    """The problem with other limits on some costs."""
    costs = [Cost(c.name, c.terms, limits.get(c.name, c.limit)) for c in problem.costs]
    return WidthProblem(problem.dimensions, tuple(costs))


def moved(
    problem: WidthProblem,
    allocation: Allocation,
    have: Mapping[str, float],
    limits: Mapping[str, float],
) -> WidthProblem:
    """The problem with the limits at which a network would have been within its own.

    Args:
        problem: Whose limits were too loose, or, for seconds, too tight.
        allocation: Its solution.
        have: What the network of these widths really takes.
        limits: What it may take.
    """
    over = passed(have, limits)
    found = {}
    for cost, predicted in zip(problem.costs, allocation.costs, strict=True):
        if cost.name == "latency":
            found[cost.name] = CAUTION * limits[cost.name] / have[cost.name] * predicted
        elif cost.name in over:
            found[cost.name] = cost.limit / over[cost.name]
    return limited(problem, found)
