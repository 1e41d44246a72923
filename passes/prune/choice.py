"""Which units go: ranked by a criterion, as many of each dimension as a budget asks for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from graphopt.batches import Batch, read_batch
from graphopt.cost.flops import graph_flops
from graphopt.errors import BudgetInfeasible, InputMismatch, first_line
from graphopt.ir.program import Program
from graphopt.passes.prune.alignment import aligned, is_cheap, is_near, vector_step
from graphopt.passes.prune.analysis import Analysis
from graphopt.passes.prune.costs import Polynomial, cost_of, flops_cost, params_cost
from graphopt.passes.prune.dimensions import Dimensions
from graphopt.passes.prune.distortion import Distortion
from graphopt.passes.prune.distortion import gains as curve_gains
from graphopt.passes.prune.importance import Calibration, Criterion, score
from graphopt.passes.prune.latency import Latency, latency_polynomial
from graphopt.passes.prune.rewrite import masked, pruned
from graphopt.pipeline import PassContext
from graphopt.report import FrozenAxis
from graphopt.solvers.widths import (
    Allocation,
    Cost,
    Dimension,
    Rule,
    WidthProblem,
    allocate,
    by_rule,
)

Scheme = Literal["uniform", "global", "solver"]
_RULES: Mapping[str, Rule] = {"uniform": "uniform", "global": "threshold"}

# The solver stops when it has proven that no allocation is worth this much more.
_TOLERANCE = 1e-4
# How often widths are chosen again where the polynomial and the count differ.
_ATTEMPTS = 8
# Networks that take less than this share of the seconds allowed leave room for wider ones, which
# are tried so often.
_USED, _WIDER = 0.95, 2
# Predicted seconds are to stay below their limit by as much as timings scatter.
_CAUTION = 0.98
_BATCHES = 64
# Criteria that look at data, and estimate what the outputs or the loss lose.
_BY_GRADIENT = ("taylor", "taylor2")
_MEASURED = ("distortion", *_BY_GRADIENT)


@dataclass(frozen=True)
class Chosen:
    """What is removed, the last round's problem and solution, and what comes of it.

    Attributes:
        problem: Widths to choose.
        allocation: The widths chosen.
        removed: The units that are removed.
        program: The program without them.
        compensated: The names of norms that had to be written out.
        have: What the program takes of everything that is limited, and of what is always counted.
    """

    problem: WidthProblem
    allocation: Allocation
    removed: frozenset[int]
    program: Program
    compensated: list[str]
    have: Mapping[str, Any]

    @property
    def is_least(self) -> bool:
        """Whether nothing more can be removed."""
        pairs = zip(self.allocation.widths, self.problem.dimensions, strict=True)
        return all(width == dimension.widths[0] for width, dimension in pairs)


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
        self._known: dict[WidthProblem, Allocation] = {}
        automatic: Criterion = "l2" if context.data is None else "taylor2"
        self.criterion: Criterion = automatic if options.criterion == "auto" else options.criterion
        best: Scheme = "solver" if self.criterion in _MEASURED else "uniform"
        self.scheme: Scheme = best if options.allocation == "auto" else options.allocation

    def chosen(self) -> Chosen:
        """What to remove, and the program without it, which keeps the budget.

        In rounds, for each of which the units that are left are ranked anew.

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
        if self.options.round_to is None and self.latency is None:
            problem = self._aligned(problem, limits, rounds)
        return self._within(problem, ranked, limits, rounds)

    def _aligned(
        self, problem: WidthProblem, limits: Mapping[str, float], rounds: int
    ) -> WidthProblem:
        """The problem with widths that fill vector registers, if that costs next to nothing."""
        rounded = aligned(problem, tuple(dim.width for dim in self.dimensions.all))
        if rounded == problem:
            return problem
        plain = self._allocated(problem, limits, rounds)
        found = self._solved(rounded, rounds)
        near = self.scheme == "solver" or is_near(problem, found, plain)
        return rounded if near and is_cheap(problem, found, plain) else problem

    def _within(
        self,
        problem: WidthProblem,
        ranked: Sequence[Sequence[int]],
        limits: Mapping[str, float],
        rounds: int,
    ) -> Chosen:
        """The best network found of those that were counted and timed to keep all limits.

        Limits are moved by what a network really takes: down where it takes too much; seconds also
        up where they leave room.
        """
        best: Chosen | None = None
        found: Chosen | None = None
        for number in range(_ATTEMPTS):
            if best is None and number == _ATTEMPTS - 1:
                problem = _limited(problem, {"latency": 0.0})  # the narrowest network
            allocation = self._allocated(problem, limits, rounds)
            if best is not None and allocation.widths == best.allocation.widths:
                break
            found = self._pruned(problem, ranked, allocation)
            over = _over(found.have, limits)
            if over and (best is not None or ("latency" in over and found.is_least)):
                break
            if not over:
                best = found
                seconds = found.have.get("latency", math.inf)
                if seconds > _USED * limits.get("latency", 0.0) or number >= _WIDER:
                    break
            problem = _moved(found, limits, over)
        if best is None:
            assert found is not None
            raise self._infeasible(found.have, limits, proven=False)
        return best

    def _pruned(
        self, problem: WidthProblem, ranked: Sequence[Sequence[int]], allocation: Allocation
    ) -> Chosen:
        """A network with some widths, counted, and timed where seconds are limited."""
        removed = self.dimensions.removed(_best(ranked, allocation))
        compensated: list[str] = []
        small = pruned(self.program, self.analysis, removed, compensated)
        have: dict[str, float] = dict(counted(small))
        if self.latency is not None:
            have["latency"] = self.latency.of(small)
        return Chosen(problem, allocation, removed, small, compensated, have)

    @cached_property
    def full(self) -> dict[str, Any]:
        """What the program has: FLOPs, parameters, bytes; the source's seconds if limited."""
        full = counted(self.program)
        return full if self.latency is None else {**full, "latency": self.latency.before}

    @cached_property
    def latency(self) -> Latency | None:
        """What a limit on seconds says of programs; None without one."""
        quantity = self.options.latency
        return None if quantity is None else Latency(self.program, self.context, quantity)

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
            dimensions.append(Dimension(dim.name, worth, least, step=self._step(dim.width)))
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

    def _step(self, width: int) -> int:
        """The widths of a dimension are multiples of it."""
        step = self.options.round_to
        return step or (1 if self.options.latency is None else vector_step(width))

    def _cost(self, name: str, limit: float) -> Cost:
        if name == "latency":
            return cost_of(name, self._seconds, _CAUTION * limit)
        if name == "flops":
            return flops_cost(self.program, self.dimensions, limit)
        return params_cost(self.program, self.dimensions, limit, in_bytes=name == "bytes")

    @cached_property
    def _seconds(self) -> Polynomial:
        """Seconds of one forward."""
        allowed = [
            Dimension(dim.name, (0.0,) * dim.width, step=self._step(dim.width)).widths
            for dim in self.dimensions.all
        ]
        return latency_polynomial(
            self.program, self.dimensions, allowed, self.full["latency"], self.context
        )

    def _allocated(
        self, problem: WidthProblem, limits: Mapping[str, float], rounds: int
    ) -> Allocation:
        self.context.progress(f"choosing widths ({self.scheme})")
        found = self._solved(problem, rounds)
        if found.status != "infeasible":
            return found
        names = [cost.name for cost in problem.costs]
        least = dict(zip(names, found.costs, strict=True))
        over = [cost.name for cost in problem.costs if least[cost.name] > cost.limit]
        if over != ["latency"]:
            raise self._infeasible(least, limits, proven=True)
        # Seconds are estimates here: the narrowest network is timed before anything is refused.
        return self._solved(_limited(problem, {"latency": least["latency"]}), rounds)

    def _solved(self, problem: WidthProblem, rounds: int) -> Allocation:
        if problem not in self._known:
            self._known[problem] = self._solve(problem, rounds)
        return self._known[problem]

    def _solve(self, problem: WidthProblem, rounds: int) -> Allocation:
        if self.scheme != "solver":
            return by_rule(problem, _RULES[self.scheme])
        limit, seed = self.context.time_limit / (rounds + 1), self.context.seed
        return allocate(problem, time_limit=limit, seed=seed, tolerance=_TOLERANCE)

    def _infeasible(
        self, least: Mapping[str, float], limits: Mapping[str, float], *, proven: bool
    ) -> BudgetInfeasible:
        over = [name for name, limit in limits.items() if least[name] > limit]
        name = next((name for name in over if name != "latency"), (over or list(limits))[0])
        frozen = [f"{axis.parameter} axis {axis.axis}, {axis.reason}" for axis in self.frozen()]
        rounded = self.options.round_to is None and name == "latency"
        asked = f"{limits[name]:.4g} s" if name == "latency" else f"{limits[name]:,.0f}"
        return BudgetInfeasible(
            f"no pruning keeps {name} at {asked}",
            field=name,
            requested=limits[name],
            smallest=least[name] if over else None,
            obstacle="; ".join(frozen[:5]) or "every dimension keeps a unit",
            proven=proven,
            hint="round_to=1 allows widths of less than a vector register" if rounded else None,
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


def _over(have: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, float]:
    """For each limit that is passed, by how much."""
    return {
        name: have[name] / limit if limit > 0 else math.inf
        for name, limit in limits.items()
        if have[name] > limit
    }


def _best(ranked: Sequence[Sequence[int]], allocation: Allocation) -> list[Sequence[int]]:
    """The units that are kept; of equal ones the first."""
    return [units[:width] for units, width in zip(ranked, allocation.widths, strict=True)]


def _limited(problem: WidthProblem, limits: Mapping[str, float]) -> WidthProblem:
    """The problem with other limits on some costs."""
    costs = [Cost(c.name, c.terms, limits.get(c.name, c.limit)) for c in problem.costs]
    return WidthProblem(problem.dimensions, tuple(costs))


def _moved(found: Chosen, limits: Mapping[str, float], over: Mapping[str, float]) -> WidthProblem:
    """The problem with the limits at which a network would have been within its own."""
    moved = {}
    for cost, predicted in zip(found.problem.costs, found.allocation.costs, strict=True):
        if cost.name == "latency":
            ratio = limits[cost.name] / found.have[cost.name]
            moved[cost.name] = _CAUTION * ratio * predicted
        elif cost.name in over:
            moved[cost.name] = cost.limit / over[cost.name]
    return _limited(found.problem, moved)
