"""The allocation of widths as a constraint program in OR-Tools CP-SAT, for proofs.

Gains are rounded up to integers and costs down, each by less than a part in 2**40: the program
admits a little more than the problem, so its bound is one for the problem.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
from ortools.sat.python import cp_model

from graphopt.solvers.interruptible import solve_interruptibly
from graphopt.solvers.width_table import Choice, ExactCost, WidthTable

_SCALE = 2**40  # of the value of everything
_LARGEST = 2**56  # of a cost within its limit: sums and products must stay below 2**63
_TANGENTS = 12  # a dimension


class WidthModel:
    """The constraint program.

    Args:
        table: the problem.
        best: an allocation within the limits, as a hint.
        bound: no allocation is worth more.
    """

    def __init__(self, table: WidthTable, best: Choice, bound: float) -> None:
        """Builds the program."""
        self.table, self.model = table, cp_model.CpModel()
        self._products: dict[tuple[int, ...], tuple[cp_model.IntVar, int]] = {}
        self.positions: list[cp_model.IntVar] = []
        values = []
        for d, last in enumerate(table.last.tolist()):
            position = self.model.new_int_var(0, last, "")
            width = self._element(position, table.width[d, : last + 1].astype(np.int64).tolist())
            kept = [math.ceil(v * _SCALE) for v in table.value[d, : last + 1].tolist()]
            values.append(self._element(position, kept))
            self._tangents(width, values[-1], d, kept)
            self.positions.append(position)
            self._products[(d,)] = (width, int(table.width[d, last]))
            self.model.add_hint(position, int(best[d]))
        for cost in table.exact:
            self._limit(cost)
        total = sum(values)
        reached = sum(math.ceil(v * _SCALE) for v in table.value[table.rows, best].tolist())
        self.model.add_linear_constraint(
            total, reached - len(values), math.ceil(bound * _SCALE) + len(values)
        )
        self.model.maximize(total)

    def _element(self, position: cp_model.IntVar, items: list[int]) -> cp_model.IntVar:
        result = self.model.new_int_var(min(items), max(items), "")
        self.model.add_element(position, items, result)
        return result

    def _tangents(
        self, width: cp_model.IntVar, value: cp_model.IntVar, d: int, kept: list[int]
    ) -> None:
        """Concavity, for the linear relaxation: chords prolonged, rounded up."""
        widths = self.table.width[d, : len(kept)].astype(np.int64).tolist()
        for i in np.unique(np.linspace(0, len(kept) - 2, _TANGENTS).astype(int)).tolist():
            if 0 <= i < len(kept) - 1:
                rise, run = kept[i + 1] - kept[i] + 1, widths[i + 1] - widths[i]
                slack = 2 * (max(widths) + run)  # rounded values are not quite concave
                if rise * max(widths) < 2**60:
                    self.model.add(
                        run * value <= rise * width + run * kept[i] - rise * widths[i] + slack
                    )

    def _limit(self, cost: ExactCost) -> None:
        """Coefficients rounded down where the limit is too large a number."""
        by = Fraction(1) if cost.limit <= _LARGEST else Fraction(_LARGEST, cost.limit)
        limit = math.floor(cost.limit * by)
        terms = []
        for coefficient, powers in zip(cost.coefficients, cost.powers, strict=True):
            small = math.floor(coefficient * by)
            factors = tuple(sorted(d for d, exponent in powers for _ in range(exponent)))
            if small and factors:
                terms.append(min(small, limit + 1) * self._product(factors, limit // small))
            else:
                terms.append(min(small, limit + 1))
        self.model.add(sum(terms) <= limit)

    def _product(self, factors: tuple[int, ...], most: int) -> cp_model.IntVar:
        """A product of widths; `most` is the largest that any limit allows here."""
        known = self._products.get(factors)
        if known is None:
            left, left_most = self._products_of(factors[:-1])
            right, right_most = self._products[factors[-1:]]
            top = min(left_most * right_most, 2**62)
            known = (self.model.new_int_var(1, top, ""), top)
            self.model.add_multiplication_equality(known[0], [left, right])
            self._products[factors] = known
        self.model.add(known[0] <= most)
        return known[0]

    def _products_of(self, factors: tuple[int, ...]) -> tuple[cp_model.IntVar, int]:
        self._product(factors, 2**62)
        return self._products[factors]


class _Watcher(cp_model.CpSolverSolutionCallback):
    """Hands every allocation over as soon as it is found."""

    def __init__(self, model: WidthModel, found: Callable[[Choice], object]) -> None:
        super().__init__()
        self._model, self._found = model, found

    def on_solution_callback(self) -> None:
        """Called by CP-SAT."""
        positions = [self.value(position) for position in self._model.positions]
        self._found(np.array(positions, np.int64))


def prove(
    table: WidthTable,
    best: Choice,
    bound: float,
    *,
    time_limit: float,
    steps: float,
    seed: int,
    found: Callable[[Choice], object],
) -> float:
    """A bound on the worth of all allocations.

    Args:
        table: the problem.
        best: an allocation within the limits.
        bound: a bound that is known.
        time_limit: seconds.
        steps: CP-SAT's deterministic time.
        seed: of CP-SAT.
        found: called with allocations, from another thread; they may exceed a limit slightly.
    """
    model, solver = WidthModel(table, best, bound), cp_model.CpSolver()
    parameters = solver.parameters
    parameters.num_workers = 1
    parameters.random_seed = seed & (2**31 - 1)
    parameters.linearization_level = 2
    parameters.max_time_in_seconds = max(0.05, time_limit)
    parameters.max_deterministic_time = steps
    status = solve_interruptibly(solver, model.model, _Watcher(model, found))
    if status == cp_model.INFEASIBLE:
        return table.worth(best)
    proven = solver.best_objective_bound
    return min(bound, proven / _SCALE) if abs(proven) < 2**60 else bound
