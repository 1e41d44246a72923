"""Which units go: ranked by a criterion, as many of each dimension as a budget asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from graphopt.batches import Batch, calibration_batches
from graphopt.errors import UsageError
from graphopt.ir.program import Program
from graphopt.passes.prune.alignment import vector_step
from graphopt.passes.prune.allocation import Allocator, Scheme, with_widths
from graphopt.passes.prune.analysis import Analysis
from graphopt.passes.prune.bounds import bounds, read_caps
from graphopt.passes.prune.costs import Polynomial, cost_of, flops_cost, params_cost
from graphopt.passes.prune.criteria import Calibration, criterion_of, score
from graphopt.passes.prune.dimensions import Dimensions
from graphopt.passes.prune.distortion import Distortion
from graphopt.passes.prune.distortion import gains as curve_gains
from graphopt.passes.prune.latency import Latency, latency_polynomial
from graphopt.passes.prune.limits import CAUTION, counted, limited, moved, passed
from graphopt.passes.prune.refinement import Refinement, refined
from graphopt.passes.prune.rewrite import masked, pruned
from graphopt.pipeline import PassContext
from graphopt.report import FrozenAxis
from graphopt.solvers.widths import Allocation, Cost, WidthProblem

# How often widths are chosen again where the polynomial and the count differ.
_ATTEMPTS = 8
# Networks that take less than this share of the seconds allowed leave room for wider ones, which
# are tried so often.
_USED, _WIDER = 0.95, 2

Ranked = Sequence[Sequence[int]]
"""The units of each dimension, the best first."""


@dataclass(frozen=True)
class Chosen:
    """What is removed, the last round's problem and solution, and what comes of it.

    Attributes:
        problem: Widths to choose.
        allocation: The widths chosen, the refined ones where they were.
        removed: The units that are removed.
        program: The program without them.
        compensated: The names of norms that had to be written out.
        have: What the program takes of everything that is limited, and of what is always counted.
        refinement: What measuring improved, or None.
    """

    problem: WidthProblem
    allocation: Allocation
    removed: frozenset[int]
    program: Program
    compensated: list[str]
    have: Mapping[str, Any]
    refinement: Refinement | None = None

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
        automatic = "l2" if context.data is None else "taylor2"
        asked = options.criterion
        self.criterion = criterion_of(automatic if asked == "auto" else asked)
        best: Scheme = "solver" if self.criterion.adds_up else "uniform"
        self.scheme: Scheme = best if options.allocation == "auto" else options.allocation
        self.rounds = 1 if self.criterion.needs == "nothing" else options.rounds
        self.bounds = bounds(self.dimensions, options.min_keep, read_caps(options.caps), self._step)
        self.allocator = Allocator(self.scheme, self.rounds + 1, options, self.dimensions, context)
        if options.refine and context.data is None:
            raise UsageError("refine= measures on data", hint="give data=, or refine=0")

    def chosen(self) -> Chosen:
        """What to remove, and the program without it, which keeps the budget.

        In rounds, for each of which the units that are left are ranked anew.

        Raises:
            BudgetInfeasible: What is frozen takes more; carries the smallest budget.
        """
        limits = self._limits()
        costs = [self._cost(name, limit) for name, limit in limits.items()]
        alive: Ranked = [dim.units for dim in self.dimensions.all]
        gone: list[list[int]] = [[] for _ in alive]
        for number in range(1, self.rounds):
            done = number / self.rounds
            problem, ranked = self._problem(self._towards(costs, done), alive, done)
            widths = self.allocator.allocation(problem, limits).widths
            alive = best(ranked, widths)
            gone = [[*u[w:], *g] for u, w, g in zip(ranked, widths, gone, strict=True)]
        problem, ranked = self._problem(costs, alive)
        if self.options.round_to is None and self.latency is None:
            problem = self.allocator.aligned(problem, limits)
        found = self._within(problem, ranked, limits)
        if not self.options.refine:
            return found
        everything = [[*units, *g] for units, g in zip(ranked, gone, strict=True)]
        return self._refined(found, everything, limits)

    def _within(self, problem: WidthProblem, ranked: Ranked, limits: Mapping[str, float]) -> Chosen:
        """The best network found of those that were counted and timed to keep all limits.

        Limits are moved by what a network really takes: down where it takes too much; seconds also
        up where they leave room.
        """
        best: Chosen | None = None
        found: Chosen | None = None
        for number in range(_ATTEMPTS):
            if best is None and number == _ATTEMPTS - 1:
                problem = limited(problem, {"latency": 0.0})  # the narrowest network
            allocation = self.allocator.allocation(problem, limits)
            if best is not None and allocation.widths == best.allocation.widths:
                break
            found = self._tried(problem, ranked, allocation)
            over = passed(found.have, limits)
            if over and (best is not None or ("latency" in over and found.is_least)):
                break
            if not over:
                best = found
                seconds = found.have.get("latency", math.inf)
                if seconds > _USED * limits.get("latency", 0.0) or number >= _WIDER:
                    break
            problem = moved(problem, allocation, found.have, limits)
        if best is None:
            assert found is not None
            raise self.allocator.infeasible(found.have, limits, proven=False)
        return best

    def _tried(self, problem: WidthProblem, ranked: Ranked, allocation: Allocation) -> Chosen:
        removed = self.dimensions.removed(best(ranked, allocation.widths))
        return self.pruned(Chosen(problem, allocation, removed, self.program, [], {}))

    def pruned(self, chosen: Chosen) -> Chosen:
        """The choice with its program made of the present weights, counted, timed if limited."""
        compensated: list[str] = []
        small = pruned(self.program, self.analysis, chosen.removed, compensated)
        have: dict[str, float] = dict(counted(small))
        if self.latency is not None:
            have["latency"] = self.latency.of(small)
        return replace(chosen, program=small, compensated=compensated, have=have)

    def _refined(self, start: Chosen, ranked: Ranked, limits: Mapping[str, float]) -> Chosen:
        """The best of the measured widths whose program, counted, keeps the limits."""
        problem = start.problem
        dimensions = tuple(
            bound.dimension(dim.name, (0.0,) * dim.width)
            for dim, bound in zip(self.dimensions.all, self.bounds, strict=True)
        )
        found = refined(
            WidthProblem(dimensions, problem.costs),
            start.allocation.widths,
            lambda widths: self.dimensions.removed(best(ranked, widths)),
            Distortion(self.program, self.dimensions, self._batches, self.context.seed),
            self.options.refine,
            self.context,
        )
        # The counts are exact, the polynomials nearly: the start at least keeps the limits.
        for widths, gained in reversed(found):
            taken = with_widths(start.allocation, problem, widths)
            each = self._tried(problem, ranked, taken)
            if not passed(each.have, limits):
                return replace(each, refinement=gained)
        return start

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

    def _towards(self, costs: Sequence[Cost], done: float) -> list[Cost]:
        """The costs with limits that have come down so far: 0 is the whole program, 1 the limit."""
        shares = [self._share(cost) for cost in costs]
        return [
            replace(cost, limit=cost.limit * (1 - (1 - share) * done) / share)
            for cost, share in zip(costs, shares, strict=True)
        ]

    def _share(self, cost: Cost) -> float:
        """A limit as a share of what the program has, at most all of it."""
        full = self.full[cost.name]
        return min(1.0, cost.limit / full) if full else 1.0

    def _limits(self) -> dict[str, float]:
        asked = {name: getattr(self.options, name) for name in self.full}
        return {name: q.of(self.full[name]) for name, q in asked.items() if q is not None}

    def _scores(self, alive: Ranked) -> dict[int, float]:
        """What each unit is worth where only some are left."""
        self.context.progress(f"ranking units by {self.criterion.name}")
        batches = self._batches if self.criterion.reads_data else ()
        removed = self.dimensions.removed(alive)
        program = masked(self.program, self.analysis, removed) if removed else self.program
        calibration = Calibration(program, self.program, batches, self.context.seed)
        return score(self.criterion, self.dimensions, calibration)

    @cached_property
    def _batches(self) -> list[Batch]:
        """The data; without any the example inputs."""
        return calibration_batches(self.context)

    def _problem(
        self, costs: Sequence[Cost], alive: Ranked, done: float = 1.0
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

    def _gains(self, scores: Mapping[int, float], ranked: Ranked) -> list[tuple[float, ...]]:
        """What each unit more of each dimension is worth."""
        if not self.criterion.measured:
            return [tuple(scores[unit] for unit in units) for units in ranked]
        measured = Distortion(self.program, self.dimensions, self._batches, self.context.seed)
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
            return cost_of(name, self._seconds, CAUTION * limit)
        if name == "flops":
            return flops_cost(self.program, self.dimensions, limit, self.full["flops"])
        return params_cost(self.program, self.dimensions, limit, in_bytes=name == "bytes")

    @cached_property
    def _seconds(self) -> Polynomial:
        """Seconds of one forward."""
        allowed = [
            bound.dimension(dim.name, (0.0,) * dim.width).widths
            for dim, bound in zip(self.dimensions.all, self.bounds, strict=True)
        ]
        return latency_polynomial(
            self.program, self.dimensions, allowed, self.full["latency"], self.context
        )

    def frozen(self) -> list[FrozenAxis]:
        """Axes of which nothing can be removed, and why."""
        return [FrozenAxis(path, axis, str(why)) for path, axis, why in self.analysis.frozen()]


def best(ranked: Ranked, widths: Sequence[int]) -> list[Sequence[int]]:
    """The units that are kept; of equal ones the first."""
    return [units[:width] for units, width in zip(ranked, widths, strict=True)]
