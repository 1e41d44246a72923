"""How many units of each dimension are kept: by a rule or by the solver."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from graphopt.errors import BudgetInfeasible
from graphopt.passes.prune.alignment import aligned, is_cheap, is_near
from graphopt.passes.prune.dimensions import Dimensions
from graphopt.passes.prune.limits import limited
from graphopt.passes.prune.sparsity import pq_gains
from graphopt.pipeline import PassContext
from graphopt.solvers.widths import Allocation, Rule, WidthProblem, allocate, by_rule

Scheme = Literal["uniform", "global", "pq", "solver"]
_RULES: Mapping[str, Rule] = {"uniform": "uniform", "global": "threshold"}

# The solver stops when it has proven that no allocation is worth this much more.
_TOLERANCE = 1e-4


class Allocator:
    """Solves the width problems of one run of the pass.

    Attributes:
        scheme: How widths are allocated.
        solves: How many problems share the time limit.
    """

    def __init__(
        self,
        scheme: Scheme,
        solves: int,
        options: Any,
        dimensions: Dimensions,
        context: PassContext,
    ) -> None:
        """Allocate.

        Args:
            scheme: How.
            solves: How many problems share the time limit.
            options: The pass `Prune`.
            dimensions: The prunable dimensions.
            context: Time limit, seed, progress.
        """
        self.scheme, self.solves = scheme, solves
        self.options, self.dimensions, self.context = options, dimensions, context
        self._known: dict[WidthProblem, Allocation] = {}

    def allocation(self, problem: WidthProblem, limits: Mapping[str, float]) -> Allocation:
        """Widths within the limits of a problem.

        Raises:
            BudgetInfeasible: There are none.
        """
        self.context.progress(f"choosing widths ({self.scheme})")
        found = self._solved(problem)
        if found.status != "infeasible":
            return found
        names = [cost.name for cost in problem.costs]
        least = dict(zip(names, found.costs, strict=True))
        over = [cost.name for cost in problem.costs if least[cost.name] > cost.limit]
        if over != ["latency"]:
            raise self.infeasible(least, limits, proven=True)
        # Seconds are estimates here: the narrowest network is timed before anything is refused.
        return self._solved(limited(problem, {"latency": least["latency"]}))

    def aligned(self, problem: WidthProblem, limits: Mapping[str, float]) -> WidthProblem:
        """The problem with widths that fill vector registers, if that costs next to nothing."""
        rounded = aligned(problem, tuple(dim.width for dim in self.dimensions.all))
        if rounded == problem:
            return problem
        plain, found = self.allocation(problem, limits), self._solved(rounded)
        near = self.scheme == "solver" or is_near(problem, found, plain)
        return rounded if near and is_cheap(problem, found, plain) else problem

    def infeasible(
        self, least: Mapping[str, float], limits: Mapping[str, float], *, proven: bool
    ) -> BudgetInfeasible:
        """The error that says which limit can't be kept, and what is in the way.

        Args:
            least: What the narrowest network takes.
            limits: What was asked.
            proven: Whether no network takes less.
        """
        over = [name for name, limit in limits.items() if least[name] > limit]
        name = next((name for name in over if name != "latency"), (over or list(limits))[0])
        axes = self.dimensions.analysis.frozen()
        frozen = [f"{path} axis {axis}, {why}" for path, axis, why in axes]
        asked = [f"{n}={v}" for n in ("caps", "min_keep") if (v := getattr(self.options, n))]
        rounded = self.options.round_to is None and name == "latency"
        limit = f"{limits[name]:.4g} s" if name == "latency" else f"{limits[name]:,.0f}"
        return BudgetInfeasible(
            f"no pruning keeps {name} at {limit}",
            field=name,
            requested=limits[name],
            smallest=least[name] if over else None,
            obstacle="; ".join([*asked, *frozen[:5]]) or "every dimension keeps a unit",
            proven=proven,
            hint="round_to=1 allows widths of less than a vector register" if rounded else None,
        )

    def _solved(self, problem: WidthProblem) -> Allocation:
        if problem not in self._known:
            self._known[problem] = self._solve(problem)
        return self._known[problem]

    def _solve(self, problem: WidthProblem) -> Allocation:
        if self.scheme == "pq":
            return self._by_sparsity(problem)
        if self.scheme != "solver":
            return by_rule(problem, _RULES[self.scheme])
        limit, seed = self.context.time_limit / self.solves, self.context.seed
        return allocate(problem, time_limit=limit, seed=seed, tolerance=_TOLERANCE)

    def _by_sparsity(self, problem: WidthProblem) -> Allocation:
        gains = pq_gains(self.dimensions, [len(d.gains) for d in problem.dimensions])
        instead = tuple(
            dataclasses.replace(d, gains=g) for d, g in zip(problem.dimensions, gains, strict=True)
        )
        found = by_rule(WidthProblem(instead, problem.costs), "threshold")
        return with_widths(found, problem, found.widths)


def with_widths(found: Allocation, problem: WidthProblem, widths: Sequence[int]) -> Allocation:
    """An allocation with other widths, and what they are worth."""
    kept = zip(problem.dimensions, widths, strict=True)
    value = sum(sum(d.gains[:width]) for d, width in kept)
    return dataclasses.replace(found, widths=tuple(widths), value=value)
