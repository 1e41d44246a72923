"""Branch and bound over boxes of widths, each bounded by its Lagrangian dual.

The dual gap comes from few dimensions that others are multiplied with (residual streams): at the
best prices, allocations with such a dimension wide and with it narrow are equally good, one over
the limits and one within. Branching on the dimension in which these two differ most closes it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from ortools.linear_solver import pywraplp

from graphopt.solvers.width_bound import Relaxation
from graphopt.solvers.width_geometric import LogRelaxation
from graphopt.solvers.width_search import fill, shrink
from graphopt.solvers.width_table import Choice, Floats, WidthTable

_ROUNDING = 1e-13  # added to bounds, relative to what was added up for them
_ROUNDS = (40, 12)  # prices tried for the root and for any other box
_DEAREST = 1e6


@dataclass(order=True)
class Box:
    """Choices from `low` to `high`, and what is known of them."""

    order: tuple[float, int]
    low: Choice = field(compare=False)
    high: Choice = field(compare=False)
    prices: Floats = field(compare=False)
    near: Choice = field(compare=False)
    bound: float = field(compare=False, default=math.inf)
    split: tuple[int, int] = field(compare=False, default=(0, 0))


class Branching:
    """The search tree for one problem.

    Args:
        table: the problem.
        offer: called with every allocation met that is within the limits; returns the best worth.
        over: asked between steps whether to stop.
        tolerance: boxes are dropped whose bound is no more than this share above the best.
    """

    def __init__(
        self,
        table: WidthTable,
        offer: Callable[[Choice], float],
        over: Callable[[], bool],
        tolerance: float,
    ) -> None:
        """Begins with no boxes."""
        self.table, self.offer, self.over, self.tolerance = table, offer, over, tolerance
        self.relaxation = Relaxation(table)
        self.in_logs = False  # which relaxation bounds further boxes
        self.boxes: list[Box] = []
        self.worth = 0.0
        self.closed = 0.0  # the highest bound of the boxes dropped
        self.count = 0

    @property
    def bound(self) -> float:
        """No choice is worth more."""
        return max(self.boxes[0].bound if self.boxes else 0.0, self.closed, self.worth)

    def start(self, best: Choice) -> None:
        """Bounds the whole problem.

        Args:
            best: an allocation within the limits.
        """
        self.worth = self.offer(best)
        prices = np.full(len(self.table.shares), 0.5)
        self._push(np.zeros_like(best), self.table.last, prices, best, 1.0)

    def step(self) -> bool:
        """Branches on the box with the highest bound; returns whether any are left."""
        if not self.boxes:
            return False
        box = heapq.heappop(self.boxes)
        if self._hopeless(box.bound):
            self.closed = max(self.closed, box.bound)
            return bool(self.boxes)
        d, at = box.split
        high, low = box.high.copy(), box.low.copy()
        high[d], low[d] = at, at + 1
        for half in ((box.low, high), (low, box.high)):
            dropped = self._push(*half, box.prices, box.near, box.bound)
            self.closed = max(self.closed, dropped)
        return bool(self.boxes)

    def _hopeless(self, bound: float) -> bool:
        return bound * (1 - self.tolerance) <= self.worth

    def _push(self, low: Choice, high: Choice, prices: Floats, near: Choice, bound: float) -> float:
        """Narrows, bounds and keeps a box; returns its bound if it is dropped."""
        narrowed = self._narrow(low, high)
        if narrowed is None:
            return 0.0
        low, high = narrowed
        if self.table.fits(high):
            self.worth = self.offer(high)
            return 0.0
        self.count += 1
        box = Box((0.0, self.count), low, high, prices, np.clip(near, low, high), bound)
        self._bound_both(box)
        if self._hopeless(box.bound):
            return box.bound
        box.order = (-box.bound, self.count)
        heapq.heappush(self.boxes, box)
        return 0.0

    def _narrow(self, low: Choice, high: Choice) -> tuple[Choice, Choice] | None:
        """Without positions that can't meet the limits or beat the incumbent; None if empty."""
        table, low, high = self.table, low.copy(), high.copy()
        if not table.fits(low):
            return None
        spare = table.worth(high) - self.worth
        if spare < 0:
            return None
        for d in table.rows[low < high]:
            column = table.value[d]
            need = column[high[d]] - spare
            low_d = int(np.searchsorted(column[: high[d] + 1], need - 1e-12, "left"))
            if low_d > low[d]:
                low[d] = low_d
        if not table.fits(low):
            return None
        left = 1 - table.used(low) + 1e-9
        for d in table.rows[low < high]:
            width = table.width[d, low[d] : high[d] + 1]
            rise: Floats = np.zeros((len(table.shares), len(width)))
            for j, unit in enumerate(np.eye(len(table.shares))):
                for exponent, slope in table.slopes(low, int(d), unit):
                    rise[j] += slope * (width**exponent - width[0] ** exponent)
            allowed = (rise <= left[:, None]).all(axis=0)
            high[d] = low[d] + int(allowed.sum()) - 1
        return low, high

    def _bound_both(self, box: Box) -> None:
        """By both relaxations for the first box, by the better of them for all others."""
        rounds = _ROUNDS[self.count > 1]
        if not self.in_logs:
            self._bound(box, rounds)
        if self.in_logs or (self.count == 1 and not self._hopeless(box.bound)):
            logs = LogRelaxation(self.table, box.low, box.high)
            logs.solve(box.near, rounds, lambda bound: self._hopeless(bound) or self.over())
            self._repair(logs.choice)
            if self.in_logs or logs.bound < box.bound:
                self.in_logs, box.near, box.split = True, logs.choice, logs.split
            box.bound = min(box.bound, logs.bound)

    def _bound(self, box: Box, rounds: int) -> None:
        """Kelley's cutting planes for the best prices; every choice met is repaired and offered."""
        table = self.table
        dual = _Dual(table, box)
        for corner in (box.low, box.high):
            dual.add(corner)
        dearest = table.used(box.high)
        prices, best, stale = box.prices, math.inf, 0
        for _ in range(rounds):
            total, choice = self.relaxation.evaluate(box.low, box.high, box.near, prices)
            total += _ROUNDING * (1 + float(prices @ dearest))
            dual.add(choice)
            self._repair(choice)
            if total < best - 1e-9:
                stale = 0 if total < best - 0.02 * abs(best - dual.least) else stale + 1
                best, box.prices, box.near = total, prices, choice
            else:
                stale += 1
            box.bound = min(box.bound, total)
            if self._hopeless(box.bound) or self.over() or stale > 3:
                break
            prices = dual.solve()
            if best - dual.least <= 1e-7:
                break
        box.split = dual.split(box.prices, box.near)

    def _repair(self, choice: Choice) -> None:
        fitting = shrink(self.table, choice)
        if fitting is not None:
            self.worth = self.offer(fill(self.table, fitting))


class _Dual:
    """Choices of one box as planes under its dual function of the prices."""

    def __init__(self, table: WidthTable, box: Box) -> None:
        self.table, self.box = table, box
        self.choices: list[Choice] = []
        self.worth: list[float] = []
        self.left: list[Floats] = []
        self.least = -math.inf  # the dual bound can't be lower
        self.lp = pywraplp.Solver.CreateSolver("GLOP")
        spread = table.worth(box.high) - table.worth(box.low)
        left = np.maximum(1 - table.used(box.low), 1e-6)
        dearest = np.minimum(_DEAREST, spread / left + 1e-9)
        self.prices = [self.lp.NumVar(0.0, float(most), "") for most in dearest]
        self.level = self.lp.NumVar(-self.lp.infinity(), self.lp.infinity(), "")
        self.lp.Minimize(self.level)

    def add(self, choice: Choice) -> None:
        """A plane: what the choice is worth when it pays for the costs."""
        worth, left = self.table.worth(choice), 1 - self.table.used(choice)
        self.choices.append(choice)
        self.worth.append(worth)
        self.left.append(left)
        row = self.lp.Constraint(worth, self.lp.infinity())
        row.SetCoefficient(self.level, 1.0)
        for price, slack in zip(self.prices, left.tolist(), strict=True):
            row.SetCoefficient(price, -slack)

    def solve(self) -> Floats:
        """The prices where the planes are lowest."""
        if self.lp.Solve() != pywraplp.Solver.OPTIMAL:
            raise AssertionError("the planes have a lowest point: prices are bounded")
        self.least = self.level.solution_value()
        return np.maximum([price.solution_value() for price in self.prices], 0.0)

    def split(self, prices: Floats, near: Choice) -> tuple[int, int]:
        """A dimension and the last position of its lower half."""
        box, width, rows = self.box, self.table.width, self.table.rows
        left, worth = np.array(self.left), np.array(self.worth)
        level = worth + left @ prices
        within = (left >= 0).all(axis=1)
        first, second = near, near
        if within.any() and (~within).any():
            first = self.choices[int(np.where(within, level, -math.inf).argmax())]
            second = self.choices[int(np.where(within, -math.inf, level).argmax())]
        differ = np.abs(np.log(width[rows, first] / width[rows, second]))
        differ[box.low == box.high] = 0.0
        if not differ.any():
            differ = np.log(width[rows, box.high] / width[rows, box.low])
            first, second = box.low, box.high
        d = int(differ.argmax())
        middle = math.sqrt(width[d, first[d]] * width[d, second[d]])
        at = int(np.searchsorted(width[d, : box.high[d] + 1], middle, "right")) - 1
        return d, int(np.clip(at, box.low[d], box.high[d] - 1))
