"""Upper bounds on an allocation of widths from its relaxation in logarithms of widths.

In these a posynomial cost is convex, as in geometric programming (Boyd and others, "A tutorial on
geometric programming", 2007), and lies above its tangent planes; the value of a dimension is
replaced by its concave envelope. That takes any number of dimensions in one term, and couplings of
everything with everything, for which `width_bound` is loose. It is tight where gains fall faster
than in inverse proportion to the width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ortools.linear_solver import pywraplp

from graphopt.solvers.width_table import Choice, Floats, WidthTable

_CHORDS = 24  # a dimension: tangents of its envelope to begin with
_ROUNDING = 1e-13  # added to bounds, relative to what was added up for them
_CLOSE = 1e-6  # a bound that improves by less has converged


class LogRelaxation:
    """The relaxation within one box, solved by cutting planes.

    Args:
        table: the problem.
        low: least positions.
        high: largest positions.

    Attributes:
        bound: no choice of the box is worth more.
        choice: the positions nearest to the solution.
        split: the dimension whose envelope is farthest above its value there, and the position
            after which to divide it.
    """

    def __init__(self, table: WidthTable, low: Choice, high: Choice) -> None:
        """Builds the linear program, without planes of costs."""
        self.table, self.low, self.high = table, low, high
        self.exponents = table.exponents.astype(float)
        self.logs = [table.log[d, low[d] : high[d] + 1] for d in table.rows]
        self.values = [table.value[d, low[d] : high[d] + 1] for d in table.rows]
        self.bound = sum(float(value[-1]) for value in self.values)
        self.choice, self.split = low, (int((high - low).argmax()), 0)
        self.lp = pywraplp.Solver.CreateSolver("GLOP")
        self.y = [self.lp.NumVar(float(log[0]), float(log[-1]), "") for log in self.logs]
        self.t = [self.lp.NumVar(0.0, float(value[-1]), "") for value in self.values]
        self.lp.Maximize(sum(self.t[1:], start=self.t[0]))
        self._slopes: list[list[float]] = [[] for _ in self.logs]
        self._tangents: list[list[pywraplp.Constraint]] = [[] for _ in self.logs]
        self._planes: list[tuple[pywraplp.Constraint, Floats, float]] = []
        for d, (log, value) in enumerate(zip(self.logs, self.values, strict=True)):
            at = np.unique(np.linspace(0, len(log) - 1, _CHORDS).round().astype(int))
            for slope in (np.diff(value[at]) / np.diff(log[at])).tolist():
                self._tangent(d, slope)

    def solve(self, near: Choice, rounds: int, over: Callable[[float], bool]) -> None:
        """Adds planes and tangents where the solution is cut off by them.

        Args:
            near: where the first planes touch.
            rounds: most linear programs.
            over: asked with the bound after each whether to stop.
        """
        at = self.table.log[self.table.rows, near]
        for _ in range(rounds):
            self._add_planes(at)
            if self.lp.Solve() != pywraplp.Solver.OPTIMAL:
                return  # numerically stuck: the bound so far holds
            at = np.array([y.solution_value() for y in self.y])
            slopes, total = self._priced()
            improved, self.bound = self.bound - total, min(self.bound, total)
            self._round(at)
            if over(self.bound) or (abs(improved) < _CLOSE and self._within(at)):
                return
            for d, slope in enumerate(slopes.tolist()):
                self._tangent(d, slope)

    def _tangent(self, d: int, slope: float) -> None:
        """The envelope lies below its tangent of any slope."""
        most = float((self.values[d] - slope * self.logs[d]).max())
        row = self.lp.Constraint(-self.lp.infinity(), most)
        row.SetCoefficient(self.t[d], 1.0)
        row.SetCoefficient(self.y[d], -slope)
        self._slopes[d].append(slope)
        self._tangents[d].append(row)

    def _add_planes(self, at: Floats) -> None:
        """A cost lies above its tangent plane, which must not exceed the limit either."""
        parts = self.table.shares * np.exp(self.exponents @ at)
        for part in parts:
            slope = part @ self.exponents
            most = float(1 - part.sum() + slope @ at)
            row = self.lp.Constraint(-self.lp.infinity(), most)
            for y, coefficient in zip(self.y, slope.tolist(), strict=True):
                row.SetCoefficient(y, coefficient)
            self._planes.append((row, slope, most))

    def _priced(self) -> tuple[Floats, float]:
        """Prices of the logarithms, and the bound that they prove, whatever the rounding."""
        slopes, total, size = np.zeros(len(self.y)), 0.0, 1.0
        for row, slope, most in self._planes:
            price = max(0.0, row.dual_value())
            slopes += price * slope
            total += price * most
            size += price * abs(most)
        for value, log, slope in zip(self.values, self.logs, slopes.tolist(), strict=True):
            total += float((value - slope * log).max())
            size += abs(slope) * float(log[-1])
        return slopes, total + _ROUNDING * size

    def _within(self, at: Floats) -> bool:
        return bool((self.table.shares @ np.exp(self.exponents @ at) <= 1 + _CLOSE).all())

    def _round(self, at: Floats) -> None:
        """The choice and the split that belong to a solution."""
        above = np.zeros(len(at))
        choice = self.low.copy()
        for d, (log, value) in enumerate(zip(self.logs, self.values, strict=True)):
            choice[d] += int(np.abs(log - at[d]).argmin())
            if len(log) > 1:
                above[d] = self.t[d].solution_value() - np.interp(at[d], log, value)
        above[self.low == self.high] = -np.inf
        self.choice = choice
        d = int(above.argmax())
        self.split = (d, int(np.clip(choice[d], self.low[d], max(self.low[d], self.high[d] - 1))))
