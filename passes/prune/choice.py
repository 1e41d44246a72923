"""Which units go: ranked by a criterion, as many of each dimension as a budget asks for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from graphopt.batches import Batch, read_batch
from graphopt.cost.flops import graph_flops
from graphopt.errors import BudgetInfeasible, InputMismatch, first_line
from graphopt.ir.program import Program
from graphopt.passes.prune.analysis import Analysis
from graphopt.passes.prune.costs import flops_cost, params_cost
from graphopt.passes.prune.dimensions import Dimensions
from graphopt.passes.prune.distortion import Distortion
from graphopt.passes.prune.distortion import gains as curve_gains
from graphopt.passes.prune.importance import Calibration, Criterion, score
from graphopt.passes.prune.rewrite import masked, pruned
from graphopt.pipeline import PassContext
from graphopt.report import FrozenAxis
from graphopt.solvers.widths import (
    Allocation,
    Cost,
    Dimension,
    WidthProblem,
    allocate,
    by_threshold,
    uniform,
)

Scheme = Literal["uniform", "global", "solver"]

# The solver stops when it has proven that no allocation is worth this much more.
_TOLERANCE = 1e-4
# How often widths are chosen again where the polynomial and the count differ.
_ATTEMPTS = 8
_BATCHES = 64
# Criteria that look at data, and estimate what the outputs or the loss lose.
_BY_GRADIENT = ("taylor", "taylor2")
_MEASURED = ("distortion", *_BY_GRADIENT)


@dataclass(frozen=True)
class Chosen:
    """What is removed, and the last round's problem and solution."""

    problem: WidthProblem
    allocation: Allocation
    removed: frozenset[int]


class Chooser:
    """Chooses what to remove from a program.

    Attributes:
        criterion: How units are ranked.
        scheme: How widths are allocated.
        dimensions: The prunable dimensions.
    """

    def __init__(
        self, options: Any, program: Program, context: PassContext, analysis: Analysis
    ) -> None:
        """Choose for a program.

        Args:
            options: The pass `Prune`.
            program: The program.
            context: Data, loss, limits.
            analysis: Of the program.
        """
        self.options, self.program, self.context = options, program, context
        self.analysis, self.dimensions = analysis, Dimensions(analysis)
        automatic: Criterion = "l2" if context.data is None else "taylor2"
        self.criterion: Criterion = automatic if options.criterion == "auto" else options.criterion
        best: Scheme = "solver" if self.criterion in _MEASURED else "uniform"
        self.scheme: Scheme = best if options.allocation == "auto" else options.allocation

    def chosen(self, compensated: list[str]) -> tuple[Chosen, Program]:
        """What to remove, and the program without it, which keeps the budget.

        In rounds, for each of which the units that are left are ranked anew.

        Args:
            compensated: The names of norms that had to be written out are added to it.

        Raises:
            BudgetInfeasible: What is frozen takes more; carries the smallest budget.
        """
        limits = self._limits()
        costs = [self._cost(name, limit) for name, limit in limits.items()]
        alive: Sequence[Sequence[int]] = [dim.units for dim in self.dimensions.all]
        rounds = self.options.rounds if self.criterion in _BY_GRADIENT else 1
        for number in range(1, rounds):
            left = [1 - (1 - self._share(c)) * number / rounds for c in costs]
            scaled = [
                Cost(c.name, c.terms, c.limit * share / self._share(c))
                for c, share in zip(costs, left, strict=True)
            ]
            problem, ranked = self._problem(scaled, alive)
            alive = _best(ranked, self._allocated(problem, limits, rounds))
        problem, ranked = self._problem(costs, alive)
        attempts = 0
        while True:
            allocation = self._allocated(problem, limits, rounds)
            removed = self.dimensions.removed(_best(ranked, allocation))
            compensated.clear()
            small = pruned(self.program, self.analysis, removed, compensated)
            over = _over(counted(small), limits)
            if not over:
                return Chosen(problem, allocation, removed), small
            attempts += 1
            if attempts == _ATTEMPTS:
                raise self._infeasible(allocation, limits)
            problem = _tightened(problem, over)

    @cached_property
    def full(self) -> dict[str, int]:
        """What the program has: FLOPs, parameters, bytes."""
        return counted(self.program)

    def _share(self, cost: Cost) -> float:
        """A limit as a share of what the program has, at most all of it."""
        return min(1.0, cost.limit / (self.full[cost.name] or 1))

    def _limits(self) -> dict[str, float]:
        asked = {name: getattr(self.options, name) for name in self.full}
        return {name: q.of(self.full[name]) for name, q in asked.items() if q is not None}

    def _scores(self, alive: Sequence[Sequence[int]]) -> dict[int, float]:
        """What each unit is worth where only some are left."""
        self.context.progress(f"ranking units by {self.criterion}")
        batches = self._batches if self.criterion in _MEASURED else ()
        removed = self.dimensions.removed(alive)
        program = masked(self.program, self.analysis, removed) if removed else self.program
        try:
            calibration = Calibration(program, batches, self.context.seed)
            return score(self.criterion, self.dimensions, calibration)
        except (RuntimeError, TypeError, ValueError) as error:
            if not batches:
                raise
            raise InputMismatch(
                f"the model fails on the calibration data: {first_line(error)}",
                hint="a batch is what the model takes, or a pair (inputs, targets)",
            ) from error

    @cached_property
    def _batches(self) -> list[Batch]:
        """The data; without any the example inputs."""
        context = self.context
        if context.data is None:
            return [Batch(context.args, dict(context.kwargs), context.loss)]
        some = itertools.islice(context.data, _BATCHES)
        return [read_batch(batch, context.data_loss, len(context.args)) for batch in some]

    def _problem(
        self, costs: Sequence[Cost], alive: Sequence[Sequence[int]]
    ) -> tuple[WidthProblem, list[list[int]]]:
        """The widths to choose, and the units that are left, the best first."""
        options, scores = self.options, self._scores(alive)
        ranked = [sorted(units, key=lambda unit: -scores[unit]) for units in alive]
        dimensions = []
        for dim, units, worth in zip(
            self.dimensions.all, ranked, self._gains(scores, ranked), strict=True
        ):
            least = min(len(units), max(1, int(np.ceil(options.min_keep * dim.width))))
            dimensions.append(Dimension(dim.name, worth, least, step=options.round_to))
        return WidthProblem(tuple(dimensions), tuple(costs)), ranked

    def _gains(
        self, scores: Mapping[int, float], ranked: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """What each unit more of each dimension is worth."""
        if self.criterion != "distortion":
            return [tuple(scores[unit] for unit in units) for units in ranked]
        measured = Distortion(self.program, self.dimensions, self._batches)
        curves = measured.curves(ranked, self.context.progress)
        return [
            curve_gains(dim, *curve) for dim, curve in zip(self.dimensions.all, curves, strict=True)
        ]

    def _cost(self, name: str, limit: float) -> Cost:
        if name == "flops":
            return flops_cost(self.program, self.dimensions, limit)
        return params_cost(self.program, self.dimensions, limit, in_bytes=name == "bytes")

    def _allocated(
        self, problem: WidthProblem, limits: Mapping[str, float], rounds: int
    ) -> Allocation:
        self.context.progress(f"choosing widths ({self.scheme})")
        if self.scheme == "uniform":
            found = uniform(problem)
        elif self.scheme == "global":
            found = by_threshold(problem)
        else:
            limit, seed = self.context.time_limit / rounds, self.context.seed
            found = allocate(problem, time_limit=limit, seed=seed, tolerance=_TOLERANCE)
        if found.status == "infeasible":
            raise self._infeasible(found, limits)
        return found

    def _infeasible(self, found: Allocation, limits: Mapping[str, float]) -> BudgetInfeasible:
        over = [
            (name, cost)
            for (name, limit), cost in zip(limits.items(), found.costs, strict=True)
            if cost > limit
        ]
        name, smallest = over[0] if over else (next(iter(limits)), None)
        frozen = [f"{axis.parameter} axis {axis.axis}, {axis.reason}" for axis in self.frozen()]
        return BudgetInfeasible(
            f"no pruning keeps {name} at {limits[name]:,.0f}",
            field=name,
            requested=limits[name],
            smallest=smallest,
            obstacle="; ".join(frozen[:5]) or "every dimension keeps a unit",
            proven=found.status == "infeasible",
        )

    def frozen(self) -> list[FrozenAxis]:
        """Axes of which nothing can be removed, and why."""
        return [FrozenAxis(path, axis, str(why)) for path, axis, why in self.analysis.frozen()]


def counted(program: Program) -> dict[str, int]:
    """FLOPs of one forward, parameters and their bytes."""
    parameters = {id(p): p for p in program.skeleton.root.parameters()}.values()
    return {
        "flops": graph_flops(program.module.graph),
        "params": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def _over(have: Mapping[str, int], limits: Mapping[str, float]) -> dict[str, float]:
    """For each limit that is passed, by how much."""
    return {name: have[name] / limit for name, limit in limits.items() if have[name] > limit}


def _best(ranked: Sequence[Sequence[int]], allocation: Allocation) -> list[Sequence[int]]:
    """The units that are kept; of equal ones the first."""
    return [units[:width] for units, width in zip(ranked, allocation.widths, strict=True)]


def _tightened(problem: WidthProblem, over: Mapping[str, float]) -> WidthProblem:
    costs = [Cost(c.name, c.terms, c.limit / over.get(c.name, 1.0)) for c in problem.costs]
    return WidthProblem(problem.dimensions, tuple(costs))
