"""A width problem as arrays, and its costs in exact arithmetic.

A *choice* is an array with, for every dimension, the position of its width among those allowed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from graphopt.solvers.width_problem import Cost, WidthProblem

Choice = NDArray[np.int64]
Floats = NDArray[np.float64]

# Floating-point costs this close to a limit, relatively, are computed again exactly.
_DOUBT = 1e-9


class ExactCost:
    """A cost in integers: floating-point coefficients are whole multiples of a power of two."""

    def __init__(self, cost: Cost) -> None:
        """Brings coefficients and limit to one denominator."""
        self.powers = [term.powers for term in cost.terms]
        parts = [Fraction(term.coefficient) for term in cost.terms]
        self.scale = math.lcm(1, *(part.denominator for part in parts))
        self.coefficients = [int(part * self.scale) for part in parts]
        self.limit = math.floor(Fraction(cost.limit) * self.scale)

    def of(self, widths: Sequence[int]) -> int:
        """The cost, times `scale`."""
        total = 0
        for coefficient, powers in zip(self.coefficients, self.powers, strict=True):
            product = coefficient
            for index, exponent in powers:
                product *= widths[index] ** exponent
            total += product
        return total


class WidthTable:
    """Arrays for one problem; rows of dimensions are padded to one length.

    Attributes:
        last: position of the largest allowed width, by dimension.
        width: allowed widths.
        log: logarithms of the allowed widths.
        value: value kept, by dimension and position, divided by `total`.
        total: value of everything that may be kept (1 if that is 0).
        exponents: by distinct monomial and dimension.
        shares: coefficients divided by the limit, by limiting cost and monomial; the costs that
            even the largest widths don't exceed are left out.
    """

    def __init__(self, problem: WidthProblem) -> None:
        """Tabulates."""
        self.problem = problem
        allowed = [dimension.widths for dimension in problem.dimensions]
        count, most = len(allowed), max((len(widths) for widths in allowed), default=1)
        self.rows = np.arange(count)
        self.last: Choice = np.array([len(widths) - 1 for widths in allowed], np.int64)
        self.width: Floats = np.ones((count, most))
        self.value: Floats = np.zeros((count, most))
        for d, widths in enumerate(allowed):
            kept = np.concatenate([[0.0], np.cumsum(problem.dimensions[d].gains)])[list(widths)]
            self.width[d], self.value[d] = widths[-1], kept[-1]
            self.width[d, : len(widths)], self.value[d, : len(widths)] = widths, kept
        self.total = float(self.value[self.rows, self.last].sum()) or 1.0
        self.value /= self.total
        self.log = np.log(self.width)
        self.exact = [ExactCost(cost) for cost in problem.costs]
        self._tabulate_costs()

    def _tabulate_costs(self) -> None:
        """Monomials that several terms or costs have in common get one row."""
        top = self.widths(self.last)
        limiting = [j for j, cost in enumerate(self.exact) if cost.of(top) > cost.limit]
        self._limiting = [self.exact[j] for j in limiting]
        self._measurable = all(cost.limit > 0 for cost in self._limiting)
        monomials: dict[tuple[tuple[int, int], ...], int] = {}
        entries = []
        for row, j in enumerate(limiting):
            cost = self.problem.costs[j]
            for term in cost.terms:
                column = monomials.setdefault(tuple(sorted(term.powers)), len(monomials))
                entries.append((row, column, term.coefficient / (cost.limit or 1.0)))
        self.shares: Floats = np.zeros((len(limiting), len(monomials)))
        for row, column, share in entries:
            self.shares[row, column] += share
        self.exponents = np.zeros((len(monomials), len(self.rows)), np.int64)
        for powers, row in monomials.items():
            for index, exponent in powers:
                self.exponents[row, index] = exponent
        self._powers = self.exponents.astype(float)
        classes = sorted(set(self.exponents[self.exponents > 0].tolist()))
        self._classes = [(e, (self.exponents == e).astype(float)) for e in classes]

    def widths(self, choice: Choice) -> tuple[int, ...]:
        """The widths chosen."""
        return tuple(int(width) for width in self.width[self.rows, choice])

    def worth(self, choice: Choice) -> float:
        """Value kept, as a share of all."""
        return float(self.value[self.rows, choice].sum())

    def used(self, choice: Choice) -> Floats:
        """The limiting costs as shares of their limits."""
        return self.shares @ np.exp(self._powers @ self.log[self.rows, choice])

    def changes(self, choice: Choice, to: Choice) -> Floats:
        """How `used` would change, by cost and dimension, if only that dimension went to `to`."""
        parts = self.shares * np.exp(self._powers @ self.log[self.rows, choice])
        ratio = self.width[self.rows, to] / self.width[self.rows, choice]
        found = np.zeros((len(self.shares), len(self.rows)))
        for exponent, has in self._classes:
            found += (parts @ has) * (ratio**exponent - 1)
        return found

    def slopes(self, choice: Choice, d: int, prices: Floats) -> list[tuple[int, float]]:
        """(exponent, price per width ** exponent) of dimension d, the others being as chosen."""
        parts = prices @ self.shares * np.exp(self._powers @ self.log[self.rows, choice])
        width = float(self.width[d, choice[d]])
        return [(e, float(parts @ has[:, d]) / width**e) for e, has in self._classes]

    def fits(self, choice: Choice) -> bool:
        """Whether no limit is exceeded, exactly."""
        used = self.used(choice)
        if self._measurable and (used <= 1 - _DOUBT).all():
            return True
        if self._measurable and (used > 1 + _DOUBT).any():
            return False
        widths = self.widths(choice)
        return all(cost.of(widths) <= cost.limit for cost in self._limiting)

    def costs(self, choice: Choice) -> tuple[float, ...]:
        """Costs in their own units; one that is within its limit is not rounded beyond it."""
        widths = self.widths(choice)
        return tuple(float(Fraction(cost.of(widths), cost.scale)) for cost in self.exact)

    def gained(self, choice: Choice) -> float:
        """Value kept, in the unit of the gains."""
        pairs = zip(self.problem.dimensions, self.widths(choice), strict=True)
        return math.fsum(gain for dimension, width in pairs for gain in dimension.gains[:width])
