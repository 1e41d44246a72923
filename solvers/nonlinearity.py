"""Which non-linearities of a network to keep: the least damage within limits on what they cost.

Damages of groups (elements, channels, whole sites) are given, by replacement. With one limit on
elements of one size, keeping the most damaging is the best that can be done (`by_greedy`). Several
replacements, fixed costs of a site's rounds, limits on sites and levels along paths couple the
choices: `select` starts from greedy, bounds the damage by Lagrangian prices
(`nonlinearity_bound`), and closes the gap with CP-SAT (`nonlinearity_cpsat`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from graphopt.solvers.nonlinearity_bound import Dual
from graphopt.solvers.nonlinearity_check import NonlinearityCheck, check
from graphopt.solvers.nonlinearity_cpsat import Points, SelectionModel, Ways, solve
from graphopt.solvers.nonlinearity_figures import figures
from graphopt.solvers.nonlinearity_fill import Menu, fill, shares
from graphopt.solvers.nonlinearity_problem import (
    Edge,
    NonlinearityError,
    NonlinearityProblem,
    OnProgress,
    Option,
    Price,
    Selection,
    Site,
)
from graphopt.solvers.nonlinearity_rules import in_order, randomly
from graphopt.solvers.nonlinearity_search import by_price, greedy, polish, settled, shallow_menu
from graphopt.solvers.nonlinearity_table import Choice, Ints, Table

_EXACT = 1e-9  # a gap below this is rounding
_STEPS = 4.0  # deterministic time of CP-SAT, at first
_ROUNDS = 60
_PATIENCE = 4096.0  # deterministic time after which CP-SAT is given up


def select(
    problem: NonlinearityProblem,
    *,
    time_limit: float = 30.0,
    seed: int = 0,
    progress: OnProgress | None = None,
    tolerance: float = 1e-4,
) -> Selection:
    """What to keep for the least damage within every limit, and a proof of how good that is.

    What the limits leave is spent as long as that reduces the damage, so that with groups of one
    element the count equals the budget.

    Args:
        problem: sites and limits.
        time_limit: seconds.
        seed: of all random choices; the same seed gives the same selection unless the time limit
            strikes.
        progress: called with the selection as it stands whenever something improves. An
            interrupt (Ctrl-C, or KeyboardInterrupt from this call) ends the work, and what was
            found until then is returned.
        tolerance: stop when the gap is proven to be no larger than this. Damages are estimates;
            0 asks for the last digit.

    Raises:
        NonlinearityError: a time limit or tolerance that makes no sense.
    """
    if not (time_limit > 0 and tolerance >= 0):
        raise NonlinearityError(
            f"time_limit must be positive and tolerance not negative, not {time_limit!r} and "
            f"{tolerance!r}"
        )
    run = _Run(problem, time_limit, seed, progress, tolerance)
    with contextlib.suppress(KeyboardInterrupt):
        run.all()
    return run.selection()


def by_greedy(problem: NonlinearityProblem) -> Selection:
    """Keeps what has the most damage per share of the limits. Its bound is 0.

    Args:
        problem: sites and limits.
    """
    run = _Run(problem, math.inf, 0, None, 0.0)
    run.start()
    return run.selection()


def by_random(problem: NonlinearityProblem, seed: int) -> Selection:
    """Keeps groups at random within the limits; replaces the others as `by_greedy` does.

    Args:
        problem: sites and limits.
        seed: of the choice.
    """
    run = _Run(problem, math.inf, seed, None, 0.0)
    run.start()
    found = randomly(run.table, run.best, seed) if run.best else None
    if found is None:
        run.best = None
        return run.selection()
    choice, kept = found
    return run.stated(run.table.options(choice), kept)


def by_order(problem: NonlinearityProblem, order: Sequence[int]) -> Selection:
    """Replaces whole sites, one after another, until all limits are kept (culling).

    Coupled sites go with the first of them; every site gets the least damaging option that
    `by_greedy` has it choose from.

    Args:
        problem: sites and limits.
        order: of the sites, the first to be replaced first; those left out stay.

    Raises:
        NonlinearityError: the order names a site twice, or one that doesn't exist.
    """
    if len(set(order)) < len(order) or not set(order) <= set(range(len(problem.sites))):
        raise NonlinearityError(f"not an order of {len(problem.sites)} sites: {list(order)}")
    run = _Run(problem, math.inf, 0, None, 0.0)
    run.start()
    if not run.infeasible:
        run.best = in_order(run.table, order)
    return run.selection()


class _Run:
    """One call: the incumbent and the bound, and what improves them."""

    def __init__(
        self,
        problem: NonlinearityProblem,
        time_limit: float,
        seed: int,
        progress: OnProgress | None,
        tolerance: float,
    ) -> None:
        self.began = time.perf_counter()
        self.problem, self.time_limit, self.seed = problem, time_limit, seed
        self.progress, self.tolerance = progress, max(tolerance, _EXACT)
        self.table = Table(problem)
        self.menu: Menu = [block.modes for block in self.table.blocks]
        self.best: Choice | None = None
        self.damage = self.greedy = math.inf
        self.bound, self.infeasible = 0.0, not all(self.menu)

    def all(self) -> None:
        """Works until the clock runs out or nothing better can exist."""
        self.start()
        if self.best is None and not self.infeasible:
            self._search()
        if self.best is None or self.over():
            return
        dual = self._dual()
        self._improve(dual)
        self._close(dual)

    def start(self) -> None:
        """Offers what greedy finds."""
        found = None if self.infeasible else greedy(self.table)
        if found is not None:
            self.offer(found)
            self.greedy = self.damage

    def offer(self, choice: Choice) -> None:
        """Takes a choice within the limits if it is better."""
        damage = self.table.damage(choice)
        if damage < self.damage and self.table.fits(choice):
            self.best, self.damage = choice, damage
            self._report()

    def left(self) -> float:
        """Seconds."""
        return self.time_limit - (time.perf_counter() - self.began)

    def over(self) -> bool:
        """Whether the time is up or the incumbent is good enough."""
        return self.left() <= 0 or self.damage - self.bound <= self.tolerance * self.damage

    def _search(self) -> None:
        """Looks for any choice within the limits, or a proof that there is none."""
        ways: Ways = [[(mode, mode.low, mode.high) for mode in modes] for modes in self.menu]
        model = SelectionModel(self.table, ways, math.inf, defaultdict(set), None)
        steps = _STEPS
        while self.best is None and self.left() > 0 and steps <= _PATIENCE:
            self._solve(model, math.inf, steps, 0.5)
            if self.infeasible:
                return
            steps *= 4

    def _dual(self) -> Dual:
        assert self.best is not None
        dual = Dual(self.table, self.menu, self.best)
        single = [j for j, limited in enumerate(self.table.limited) if limited]
        if len(single) == 1 and self.problem.max_depth is None:
            self._marginal(dual, single[0])
        self._raise(dual.bound)
        if not self.over():
            dual.run(lambda: self.left() <= 0)
            self._raise(dual.bound)
        return dual

    def _marginal(self, dual: Dual, j: int) -> None:
        """Under one limit, the right price is what the best group not kept would gain."""
        assert self.best is not None
        gains = [
            mode.curve.next(kept) / mode.unit[j]
            for mode, kept in self.best
            if mode.curve and kept < mode.high and mode.unit[j] > 0
        ] + [
            other.curve.next(0) / other.unit[j]
            for (mode, kept), modes in zip(self.best, self.menu, strict=True)
            for other in modes
            if kept == 0 and other.curve and other.option == mode.option and other.unit[j] > 0
        ]
        uses = [0.0, 0.0, 0.0]
        uses[j] = max(gains, default=0.0)
        if math.isfinite(uses[j]):
            dual.price(dual.fixed((uses[0], uses[1], uses[2])))

    def _raise(self, bound: float) -> None:
        if bound > self.bound:
            self.bound = bound
            self._report()

    def _improve(self, dual: Dual) -> None:
        """Rounds the dual's prices to a choice, and polishes."""
        assert self.best is not None
        prices = dual.prices.uses if dual.prices else shares(self.table)
        menu = shallow_menu(self.table)
        found = by_price(self.table, menu, prices) if menu and any(prices) else None
        for choice in (self.best, found):
            if choice and not self.over():
                self._polish(choice)

    def _polish(self, choice: Choice) -> None:
        filled = fill(self.table, choice, self.menu)
        self.offer(polish(self.table, filled, self.menu, lambda: self.left() <= 0))

    def _settle(self, choice: Choice, prices: Sequence[float]) -> None:
        """Offers the best numbers of groups for the modes of a choice."""
        self._polish(choice)
        if any(prices) and not self.over():
            self._polish(settled(self.table, choice, prices))

    def _close(self, dual: Dual) -> None:
        """Outer approximation: tangents are added where the program's solutions need them."""
        points: Points = defaultdict(set)
        steps, gap = _STEPS, 0.25 * self.tolerance
        prices = dual.prices.uses if dual.prices else (0.0, 0.0, 0.0)
        for modes in self.menu:
            for mode in modes:
                if mode.curve and mode.low < mode.high:
                    points[mode].add(mode.best(prices)[1])
        for _ in range(_ROUNDS):
            if self.over() or steps > _PATIENCE:
                return
            model = SelectionModel(
                self.table, dual.narrowed(self.damage), self.damage, points, self.best
            )
            status, found = self._solve(model, self.damage, steps, gap, prices)
            known = sum(map(len, points.values()))
            for choice in (*found[-3:], self.best or ()):
                for mode, kept in choice:
                    points[mode] |= {kept}
            if status == "stopped":
                steps *= 2
            elif known == sum(map(len, points.values())):
                return

    def _solve(
        self, model: SelectionModel, worst: float, steps: float, gap: float,
        prices: Sequence[float] = (),
    ) -> tuple[str, list[Choice]]:  # fmt: skip
        found: list[Choice] = []
        try:
            status, bound = solve(
                model, worst=worst, time_limit=self.left(), steps=steps, gap=gap, seed=self.seed,
                found=found,
            )  # fmt: skip
        finally:
            for choice in found:
                self.offer(choice)
        self.infeasible = status == "infeasible" and self.best is None
        if self.best is not None:
            self._raise(min(bound, self.damage))
        for choice in found[:-4:-1]:
            if not self.over():
                self._settle(choice, prices)
        return status, found

    def _report(self) -> None:
        if self.progress and self.best is not None:
            self.progress(self.selection())

    def selection(self) -> Selection:
        """The answer as it stands."""
        if self.best is None:
            return self._nothing()
        chosen, kept = self.table.options(self.best), self.table.kept(self.best)
        return self.stated(chosen, kept)

    def stated(self, options: tuple[int | None, ...], kept: tuple[Ints, ...]) -> Selection:
        """A selection within the limits, with its figures."""
        found = figures(self.problem, self.table.paths, options, kept)
        bound = min(self.bound, found.damage)
        gap = (found.damage - bound) / found.damage if found.damage > 0 else 0.0
        return Selection(
            options, kept, found.damage, bound, gap,
            "optimal" if gap <= _EXACT else "feasible",
            time.perf_counter() - self.began, self.greedy,
            found.relus, found.relu_sites, found.cost, found.depth,
        )  # fmt: skip

    def _nothing(self) -> Selection:
        """What is returned where nothing within the limits is known: all is kept."""
        options = (None,) * len(self.problem.sites)
        kept = tuple(np.arange(site.groups, dtype=np.int64) for site in self.problem.sites)
        found = figures(self.problem, self.table.paths, options, kept)
        return Selection(
            options, kept, math.inf, math.inf if self.infeasible else self.bound, math.inf,
            "infeasible" if self.infeasible else "unknown",
            time.perf_counter() - self.began, math.inf,
            found.relus, found.relu_sites, found.cost, found.depth,
        )  # fmt: skip


__all__ = [
    "Edge",
    "NonlinearityCheck",
    "NonlinearityError",
    "NonlinearityProblem",
    "Option",
    "Price",
    "Selection",
    "Site",
    "by_greedy",
    "by_order",
    "by_random",
    "check",
    "select",
]
