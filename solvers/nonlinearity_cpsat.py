"""The selection of non-linearities as an integer program in OR-Tools CP-SAT.

A mode's damage is convex in the number of groups kept, so it lies above all its tangents: outer
approximation (Duran and Grossmann, 1986). Tangents have whole slopes and rounded-down constants,
so the program never overestimates a damage; all limits are in it exactly. So its bound is one for
the problem, and its solutions are within the limits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from ortools.sat.python import cp_model

from graphopt.solvers.interruptible import solve_interruptibly
from graphopt.solvers.nonlinearity_table import Choice, Mode, Pick, Table

Ways = list[list[tuple[Mode, int, int]]]  # by block: modes, fewest and most groups kept
Points = defaultdict[Mode, set[int]]  # numbers of groups kept where tangents are wanted

_SCALE = 2.0**40  # of the damage that is to be beaten
_LARGEST = 2.0**56  # products must stay below 2**63
_FEW = 48  # numbers of groups kept up to which all tangents are in the program
_TANGENTS = 8  # on either side of the best price, where there are more


class SelectionModel:
    """The integer program.

    Args:
        table: the problem.
        ways: what a choice may consist of.
        worst: damage that a choice must not exceed; inf to look for any choice.
        points: where tangents are wanted besides the usual ones.
        hint: a choice to start from.
    """

    def __init__(
        self, table: Table, ways: Ways, worst: float, points: Points, hint: Choice | None
    ) -> None:
        """Builds the program."""
        self.table, self.ways, self.model = table, ways, cp_model.CpModel()
        self.scale = _scale(ways, worst)
        self.chosen: list[list[cp_model.IntVar]] = []
        self.extra: list[list[cp_model.IntVar | None]] = []
        damages: list[cp_model.LinearExprT] = []
        for b, block in enumerate(ways):
            literals = [self.model.new_bool_var("") for _ in block]
            self.model.add_exactly_one(literals)
            self.chosen.append(literals)
            self.extra.append([])
            for (mode, low, high), literal in zip(block, literals, strict=True):
                extra = None
                if low == high:
                    damages.append(math.floor(mode.damage(low) * self.scale) * literal)
                else:
                    extra, damage = self._curve(mode, low, high, literal, points[mode])
                    damages.append(damage)
                self.extra[-1].append(extra)
            if hint:
                self._hint(b, hint[b])
        self._limits()
        self._paths()
        total = cp_model.LinearExpr.sum(damages)
        if math.isfinite(worst):
            self.model.add(total <= math.floor(worst * self.scale))
        self.model.minimize(total)

    def _curve(
        self, mode: Mode, low: int, high: int, literal: cp_model.IntVar, points: Iterable[int]
    ) -> tuple[cp_model.IntVar, cp_model.IntVar]:
        """Groups kept beyond `low`, and the damage, if the mode is chosen; else 0 and 0."""
        curve = mode.curve
        assert curve is not None
        extra = self.model.new_int_var(0, high - low, "")
        self.model.add(extra <= (high - low) * literal)
        most = math.floor(mode.damage(low) * self.scale)
        damage = self.model.new_int_var(0, most, "")
        wanted = {k for point in points for k in (point - 1, point) if low <= k < high}
        slopes = {round(curve.next(k) * self.scale) for k in {*_grid(low, high), *wanted}}
        for slope in sorted(slopes):
            kept = min(max(curve.above(slope / self.scale), low), high)
            around = range(max(low, kept - 1), min(high, kept + 1) + 1)  # rounding of the quotient
            constant = min(
                math.floor(mode.damage(k) * self.scale) + slope * (k - low) for k in around
            )
            self.model.add(damage + slope * extra >= constant * literal)
        return extra, damage

    def _hint(self, b: int, pick: Pick) -> None:
        for (mode, low, high), literal, extra in zip(
            self.ways[b], self.chosen[b], self.extra[b], strict=True
        ):
            same = mode is pick[0]
            self.model.add_hint(literal, same)
            if extra is not None:
                self.model.add_hint(extra, min(max(pick[1] - low, 0), high - low) if same else 0)

    def _limits(self) -> None:
        for j, limited in enumerate(self.table.limited):
            if not limited:
                continue
            terms: list[cp_model.LinearExprT] = []
            for block, literals, extras in zip(self.ways, self.chosen, self.extra, strict=True):
                for (mode, low, _), literal, extra in zip(block, literals, extras, strict=True):
                    terms.append(mode.use(low)[j] * literal)
                    if extra is not None:
                        terms.append(mode.unit[j] * extra)
            self.model.add(cp_model.LinearExpr.sum(terms) <= self.table.limits[j])

    def _paths(self) -> None:
        most = self.table.problem.max_depth
        if most is None:
            return
        paths, count = self.table.paths, len(self.table.problem.sites)
        if paths.direct > most:
            self.model.add_bool_or([])
        reached = [self.model.new_int_var(0, most, "") for _ in range(count)]
        levels: list[cp_model.LinearExprT] = [0] * count
        for block, ways, literals in zip(self.table.blocks, self.ways, self.chosen, strict=True):
            for i, site in enumerate(block.members):
                levels[site] = sum(
                    mode.levels[i] * y for (mode, _, _), y in zip(ways, literals, strict=True)
                )
        for site, before in paths.entries:
            self.model.add(reached[site] >= before + levels[site])
        for before, site, between in paths.between:
            self.model.add(reached[site] >= reached[before] + between + levels[site])
        for site, after in paths.exits:
            self.model.add(reached[site] + after <= most)

    def choice(self, solver: cp_model.CpSolver | cp_model.CpSolverSolutionCallback) -> Choice:
        """The choice of a solution."""
        picks: list[Pick] = []
        for block, literals, extras in zip(self.ways, self.chosen, self.extra, strict=True):
            for (mode, low, _), literal, extra in zip(block, literals, extras, strict=True):
                if solver.value(literal):
                    picks.append((mode, low + (solver.value(extra) if extra is not None else 0)))
        return tuple(picks)


class _Watcher(cp_model.CpSolverSolutionCallback):
    """Notes every choice as soon as it is found."""

    def __init__(self, model: SelectionModel, found: list[Choice]) -> None:
        super().__init__()
        self._model, self._found = model, found

    def on_solution_callback(self) -> None:
        """Called by CP-SAT."""
        self._found.append(self._model.choice(self))


def solve(
    model: SelectionModel,
    *,
    worst: float,
    time_limit: float,
    steps: float,
    gap: float,
    seed: int,
    found: list[Choice],
) -> tuple[str, float]:
    """Solves the program.

    Args:
        model: the program.
        worst: the damage it was built with.
        time_limit: seconds.
        steps: CP-SAT's deterministic time.
        gap: relative gap at which it may stop.
        seed: of CP-SAT.
        found: the choices found are added, the best last, also if an interrupt comes.

    Returns:
        "optimal", "infeasible" or "stopped", and a bound on the damage of every choice; if
        "infeasible", that is `worst`.
    """
    solver = cp_model.CpSolver()
    parameters = solver.parameters
    parameters.num_workers = 1
    parameters.random_seed = seed & (2**31 - 1)
    parameters.linearization_level = 2
    parameters.relative_gap_limit = gap
    parameters.max_time_in_seconds = max(0.05, time_limit)
    parameters.max_deterministic_time = steps
    status = solve_interruptibly(solver, model.model, _Watcher(model, found))
    if status == cp_model.INFEASIBLE:
        return "infeasible", worst
    proven = solver.best_objective_bound
    bound = proven / model.scale if abs(proven) < 2**60 else 0.0
    return ("optimal" if status == cp_model.OPTIMAL else "stopped"), bound


def _scale(ways: Ways, worst: float) -> float:
    """How many whole units one unit of damage becomes; a power of two."""
    spans = [(m, low, high) for block in ways for m, low, high in block]
    largest = max((mode.damage(low) for mode, low, _ in spans), default=0.0)
    scale = _SCALE / max(min(worst, largest * len(ways)), 1e-290)
    steep = max(
        (mode.curve.next(low) * (high - low) for mode, low, high in spans
         if mode.curve and low < high), default=0.0,
    )  # fmt: skip
    scale = min(scale, _LARGEST / max(steep, largest * len(ways), 1e-290))
    return 2.0 ** math.floor(math.log2(scale))


def _grid(low: int, high: int) -> list[int]:
    """Numbers kept, from `low` to below `high`: all, or some that are denser at the ends."""
    if high - low <= _FEW:
        return list(range(low, high))
    steps = np.geomspace(1, (high - low) / 2, _TANGENTS).astype(int)
    even = np.linspace(low, high - 1, _TANGENTS).astype(int)
    return sorted({*(low + steps - 1).tolist(), *(high - steps).tolist(), *even.tolist()})
