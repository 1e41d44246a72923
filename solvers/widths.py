"""Which width every prunable dimension gets: the most value within limits on polynomial costs.

Gains of units are given, so value is separable and concave in the widths; costs are products of
widths (a convolution's: inputs times outputs), which couple them. Greedy rules give the first
allocation; branch and bound with Lagrangian bounds (`width_branch`) improves it and proves how
good it is; CP-SAT (`width_cpsat`) ends the proof where the dimensions are few.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace
from typing import Literal

import numpy as np

from graphopt.solvers.width_branch import Branching
from graphopt.solvers.width_cpsat import prove
from graphopt.solvers.width_problem import (
    Allocation,
    Cost,
    Dimension,
    OnProgress,
    Term,
    WidthError,
    WidthProblem,
)
from graphopt.solvers.width_search import (
    above_threshold,
    fill,
    greedy,
    polish,
    same_share,
    shrink,
    spend,
)
from graphopt.solvers.width_table import Choice, WidthTable

_EXACT = 1e-9  # a gap below this is rounding
_FEW_BOXES = 400  # before CP-SAT is tried on a small problem
_SMALL = 600  # allowed widths of all dimensions together up to which it is
_MOST_BOXES = 20_000
_STEPS = 2.0  # deterministic time of CP-SAT
_PROOF = 0.25  # share of the time left that CP-SAT may take


def allocate(
    problem: WidthProblem,
    *,
    time_limit: float = 30.0,
    seed: int = 0,
    progress: OnProgress | None = None,
    tolerance: float = 0.0,
) -> Allocation:
    """The widths that keep the most value within every limit, and a proof of how good they are.

    Args:
        problem: dimensions and costs.
        time_limit: seconds.
        seed: of all random choices; the same seed gives the same widths unless the time limit
            strikes.
        progress: called with the allocation as it stands whenever something improves. An
            interrupt (Ctrl-C, or KeyboardInterrupt from this call) ends the work, and what was
            found until then is returned.
        tolerance: stop when the gap is proven to be no larger than this.

    Raises:
        WidthError: a time limit or tolerance that makes no sense.
    """
    if not (time_limit > 0 and tolerance >= 0):
        raise WidthError(
            f"time_limit must be positive and tolerance not negative, not {time_limit!r} and "
            f"{tolerance!r}"
        )
    run = _Run(problem, time_limit, seed, progress, tolerance)
    with contextlib.suppress(KeyboardInterrupt):
        run.all()
        run.widen()
    return run.allocation()


Rule = Literal["uniform", "threshold", "greedy"]
_RULES = {"greedy": greedy, "uniform": same_share, "threshold": above_threshold}


def by_rule(problem: WidthProblem, rule: Rule) -> Allocation:
    """The widths that a simple rule gives; what it leaves of the limits is spent afterwards.

    Args:
        problem: dimensions and costs.
        rule: `uniform`: the same share of every dimension, the largest within the limits, units
            being exchanged where coarse ones leave much of them;
            `threshold`: units whose gain is above the lowest threshold within the limits;
            `greedy`: units removed where the least value is lost per cost saved.

    Returns:
        An allocation whose bound is the value of everything that may be kept.

    Raises:
        WidthError: an unknown rule.
    """
    if rule not in _RULES:
        raise WidthError(f"no rule is called {rule!r}; there are {', '.join(_RULES)}")
    run = _Run(problem, math.inf, 0, None, 0.0)
    if run.feasible:
        run.start(rule, spending=rule == "uniform")
    return run.allocation()


class _Run:
    """One call: the incumbent and the bound, and what improves them."""

    def __init__(
        self,
        problem: WidthProblem,
        time_limit: float,
        seed: int,
        progress: OnProgress | None,
        tolerance: float,
    ) -> None:
        self.began = time.perf_counter()
        self.time_limit, self.seed, self.progress = time_limit, seed, progress
        self.tolerance = max(tolerance, _EXACT)
        self.table = WidthTable(problem)
        self.best: Choice = np.zeros_like(self.table.last)
        self.feasible = self.table.fits(self.best)
        self.worth = self.table.worth(self.best)
        self.bound = self.table.worth(self.table.last)
        self.branching: Branching | None = None

    def all(self) -> None:
        """Works until the clock runs out or nothing better can exist."""
        if not self.feasible:
            return
        if self.table.fits(self.table.last):
            self.offer(self.table.last)
            return
        for rule in _RULES:
            self.start(rule)
        self.branching = Branching(self.table, self.offer, self.over, self.tolerance / 2)
        self.branching.start(self.best)
        self._take_bound()
        self._polish()
        self._branch(_FEW_BOXES)
        if int(self.table.last.sum()) <= _SMALL and not self.over():
            self._prove()
        self._branch(_MOST_BOXES)

    def start(self, rule: str, spending: bool = False) -> None:
        """Offers what a rule finds."""
        found = _RULES[rule](self.table)
        if found is not None:
            self.offer(spend(self.table, found) if spending else found)

    def widen(self) -> None:
        """Spends what is left on units that are worth nothing too."""
        if self.feasible:
            self.offer(fill(self.table, self.best))

    def offer(self, choice: Choice) -> float:
        """Takes a choice within the limits if it is better; returns the best worth.

        Of equal worth, the one with more units is better: units without a gain do no harm.
        """
        worth = self.table.worth(choice)
        known = (self.worth, int(self.best.sum()))
        if (worth, int(choice.sum())) > known and self.table.fits(choice):
            self.best, self.worth = choice.copy(), worth
            self._report()
        return self.worth

    def over(self) -> bool:
        """Whether the time is up or the incumbent is good enough."""
        late = time.perf_counter() - self.began > self.time_limit
        return late or self.bound * (1 - self.tolerance) <= self.worth

    def _polish(self) -> None:
        assert self.branching is not None
        self.offer(polish(self.table, self.best, self.over))
        self.branching.worth = self.worth

    def _branch(self, boxes: int) -> None:
        assert self.branching is not None
        for _ in range(boxes):
            before = self.worth
            left = not self.over() and self.branching.step()
            self._take_bound()
            if not left:
                return
            if self.worth > before:
                self._polish()

    def _take_bound(self) -> None:
        assert self.branching is not None
        if self.branching.bound < self.bound:
            self.bound = self.branching.bound
            self._report()

    def _prove(self) -> None:
        assert self.branching is not None
        left = _PROOF * (self.time_limit - (time.perf_counter() - self.began))
        found: list[Choice] = []
        try:
            bound = prove(
                self.table, self.best, self.bound, time_limit=left, steps=_STEPS, seed=self.seed,
                found=found.append,
            )  # fmt: skip
            self.bound = min(self.bound, bound)
        finally:
            for choice in found:
                fitting = shrink(self.table, choice)
                if fitting is not None:
                    self.offer(fill(self.table, fitting))
            self.branching.worth = self.worth
        self._report()

    def _report(self) -> None:
        if self.progress:
            self.progress(self.allocation())

    def allocation(self) -> Allocation:
        """The answer as it stands."""
        table = self.table
        value = table.gained(self.best)
        bound = max(value, self.bound * table.total) if self.feasible else value
        gap = (bound - value) / bound if bound > 0 else 0.0
        found = Allocation(
            widths=table.widths(self.best),
            value=value,
            bound=bound,
            gap=gap,
            status="optimal" if gap <= _EXACT else "feasible",
            seconds=time.perf_counter() - self.began,
            costs=table.costs(self.best),
        )
        return found if self.feasible else replace(found, gap=math.inf, status="infeasible")


__all__ = [
    "Allocation",
    "Cost",
    "Dimension",
    "Rule",
    "Term",
    "WidthError",
    "WidthProblem",
    "allocate",
    "by_rule",
]
