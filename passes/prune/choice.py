"""Which units go: ranked by a criterion, as many of each dimension as a budget asks for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from graphopt.batches import Batch, read_batch
from graphopt.cost.flops import graph_flops
from graphopt.errors import BudgetInfeasible, InputMismatch, UsageError, first_line
from graphopt.ir.program import Program
from graphopt.passes.prune.analysis import Analysis
from graphopt.passes.prune.bounds import bounds, read_caps
from graphopt.passes.prune.costs import flops_cost, params_cost
from graphopt.passes.prune.criteria import Calibration, criterion_of, score
from graphopt.passes.prune.dimensions import Dimensions
from graphopt.passes.prune.distortion import Distortion
from graphopt.passes.prune.distortion import gains as curve_gains
from graphopt.passes.prune.refinement import Refinement, refined
from graphopt.passes.prune.rewrite import masked, pruned
from graphopt.passes.prune.sparsity import pq_gains
from graphopt.pipeline import PassContext
from graphopt.report import FrozenAxis
from graphopt.solvers.widths import (
    Allocation,
    Cost,
    WidthProblem,
    allocate,
    by_threshold,
    uniform,
)

Scheme = Literal["uniform", "global", "pq", "solver"]

# The solver stops when it has proven that no allocation is worth this much more.
_TOLERANCE = 1e-4
# How often widths are chosen again where the polynomial and the count differ.
_ATTEMPTS = 8
_BATCHES = 64


@dataclass(frozen=True)
class Chosen:
    """What is removed, and the last round's problem and solution.

    Attributes:
        problem: Of the last round.
        allocation: Its widths, the refined ones where they were.
        removed: The units.
        refinement: What measuring improved, or None.
    """

    problem: WidthProblem
    allocation: Allocation
    removed: frozenset[int]
    refinement: Refinement | None = None


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
        automatic = "l2" if context.data is None else "taylor2"
        asked = options.criterion
        self.criterion = criterion_of(automatic if asked == "auto" else asked)
        best: Scheme = "solver" if self.criterion.adds_up else "uniform"
        self.scheme: Scheme = best if options.allocation == "auto" else options.allocation
        self.bounds = bounds(
            self.dimensions, options.min_keep, read_caps(options.caps), options.round_to
        )
        if options.refine and context.data is None:
            raise UsageError("refine= measures on data", hint="give data=, or refine=0")

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
        gone: list[list[int]] = [[] for _ in alive]
        rounds = 1 if self.criterion.needs == "nothing" else self.options.rounds
        for number in range(1, rounds):
            left = [1 - (1 - self._share(c)) * number / rounds for c in costs]
            scaled = [
                Cost(c.name, c.terms, c.limit * share / self._share(c))
                for c, share in zip(costs, left, strict=True)
            ]
            problem, ranked = self._problem(scaled, alive, number / rounds)
            widths = self._allocated(problem, limits, rounds).widths
            alive = _best(ranked, widths)
            gone = [[*u[w:], *g] for u, w, g in zip(ranked, widths, gone, strict=True)]
        problem, ranked = self._problem(costs, alive)
        allocation, small = self._within(problem, ranked, limits, rounds, compensated)
        everything = [[*units, *g] for units, g in zip(ranked, gone, strict=True)]
        if self.options.refine:
            return self._refined(problem, allocation, everything, limits, compensated)
        removed = self.dimensions.removed(_best(ranked, allocation.widths))
        return Chosen(problem, allocation, removed), small

    def _within(
        self,
        problem: WidthProblem,
        ranked: Sequence[Sequence[int]],
        limits: Mapping[str, float],
        rounds: int,
        compensated: list[str],
    ) -> tuple[Allocation, Program]:
        """An allocation whose program, counted, keeps the limits."""
        attempts = 0
        while True:
            allocation = self._allocated(problem, limits, rounds)
            small = self._pruned(_best(ranked, allocation.widths), compensated)
            over = _over(counted(small), limits)
            if not over:
                return allocation, small
            attempts += 1
            if attempts == _ATTEMPTS:
                raise self._infeasible(allocation, limits)
            problem = _tightened(problem, over)

    def _pruned(self, kept: Sequence[Sequence[int]], compensated: list[str]) -> Program:
        compensated.clear()
        return pruned(self.program, self.analysis, self.dimensions.removed(kept), compensated)

    def _refined(
        self,
        problem: WidthProblem,
        allocation: Allocation,
        ranked: Sequence[Sequence[int]],
        limits: Mapping[str, float],
        compensated: list[str],
    ) -> tuple[Chosen, Program]:
        """The best of the measured widths whose program, counted, keeps the limits."""
        dimensions = tuple(
            bound.dimension(dim.name, (0.0,) * dim.width)
            for dim, bound in zip(self.dimensions.all, self.bounds, strict=True)
        )
        found = refined(
            WidthProblem(dimensions, problem.costs),
            allocation.widths,
            lambda widths: self.dimensions.removed(_best(ranked, widths)),
            Distortion(self.program, self.dimensions, self._batches),
            self.options.refine,
            self.context,
        )
        # The counts are exact, the polynomials nearly: the start at least keeps the limits.
        for widths, gained in reversed(found):
            small = self._pruned(_best(ranked, widths), compensated)
            if not _over(counted(small), limits):
                removed = self.dimensions.removed(_best(ranked, widths))
                taken = _with_widths(allocation, problem, widths)
                return Chosen(problem, taken, removed, gained), small
        raise self._infeasible(allocation, limits)

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
        self.context.progress(f"ranking units by {self.criterion.name}")
        batches = self._batches if self.criterion.reads_data else ()
        removed = self.dimensions.removed(alive)
        program = masked(self.program, self.analysis, removed) if removed else self.program
        try:
            calibration = Calibration(program, self.program, batches, self.context.seed)
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
        self, costs: Sequence[Cost], alive: Sequence[Sequence[int]], done: float = 1.0
    ) -> tuple[WidthProblem, list[list[int]]]:
        """The widths to choose, and the units that are left, the best first.

        Args:
            costs: The limits of this round.
            alive: The units that are left.
            done: How much of all rounds is done with this one.
        """
        scores = self._scores(alive)
        ranked = [sorted(units, key=lambda unit: -scores[unit]) for units in alive]
        gains = self._gains(scores, ranked)
        dimensions = tuple(
            bound.dimension(dim.name, worth, done)
            for dim, bound, worth in zip(self.dimensions.all, self.bounds, gains, strict=True)
        )
        return WidthProblem(dimensions, tuple(costs)), ranked

    def _gains(
        self, scores: Mapping[int, float], ranked: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """What each unit more of each dimension is worth."""
        if not self.criterion.measured:
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
        elif self.scheme == "pq":
            found = self._by_sparsity(problem)
        else:
            limit, seed = self.context.time_limit / rounds, self.context.seed
            found = allocate(problem, time_limit=limit, seed=seed, tolerance=_TOLERANCE)
        if found.status == "infeasible":
            raise self._infeasible(found, limits)
        return found

    def _by_sparsity(self, problem: WidthProblem) -> Allocation:
        widths = [len(d.gains) for d in problem.dimensions]
        gains = pq_gains(self.dimensions, widths)
        instead = tuple(
            dataclasses.replace(d, gains=g) for d, g in zip(problem.dimensions, gains, strict=True)
        )
        found = by_threshold(WidthProblem(instead, problem.costs))
        return _with_widths(found, problem, found.widths)

    def _infeasible(self, found: Allocation, limits: Mapping[str, float]) -> BudgetInfeasible:
        over = [
            (name, cost)
            for (name, limit), cost in zip(limits.items(), found.costs, strict=True)
            if cost > limit
        ]
        name, smallest = over[0] if over else (next(iter(limits)), None)
        asked = [f"{n}={v}" for n in ("caps", "min_keep") if (v := getattr(self.options, n))]
        frozen = [f"{axis.parameter} axis {axis.axis}, {axis.reason}" for axis in self.frozen()]
        return BudgetInfeasible(
            f"no pruning keeps {name} at {limits[name]:,.0f}",
            field=name,
            requested=limits[name],
            smallest=smallest,
            obstacle="; ".join([*asked, *frozen[:5]]) or "every dimension keeps a unit",
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


def _best(ranked: Sequence[Sequence[int]], widths: Sequence[int]) -> list[Sequence[int]]:
    """The units that are kept; of equal ones the first."""
    return [units[:width] for units, width in zip(ranked, widths, strict=True)]


def _with_widths(found: Allocation, problem: WidthProblem, widths: Sequence[int]) -> Allocation:
    """An allocation with other widths, and what they are worth."""
    kept = zip(problem.dimensions, widths, strict=True)
    value = sum(sum(d.gains[:width]) for d, width in kept)
    return dataclasses.replace(found, widths=tuple(widths), value=value)


def _tightened(problem: WidthProblem, over: Mapping[str, float]) -> WidthProblem:
    costs = [Cost(c.name, c.terms, c.limit / over.get(c.name, 1.0)) for c in problem.costs]
    return WidthProblem(problem.dimensions, tuple(costs))
