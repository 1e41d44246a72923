"""Lower bounds on the damage: the Lagrangian dual, its prices found by column generation.

Dantzig and Wolfe (1960): a linear program mixes the picks known for every block; its prices of the
limits (and of the levels along the paths) say which pick is missing. For any prices the sum of the
blocks' best priced picks is a bound, so rounding in the linear program can't make it wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ortools.linear_solver import pywraplp

from graphopt.solvers.nonlinearity_fill import Menu
from graphopt.solvers.nonlinearity_table import Choice, Mode, Pick, Table

_ROUNDS = 400
_CLOSE = 1e-10  # of the linear program's value and the bound, relatively


@dataclass(frozen=True)
class Prices:
    """What the dual knows.

    Attributes:
        uses: damage that one unit of every limited quantity is worth.
        levels: damage that a level is worth, by site.
        constant: part of the bound that no choice changes.
    """

    uses: tuple[float, float, float]
    levels: tuple[float, ...]
    constant: float

    def deep(self, table: Table, mode: Mode) -> float:
        """The price of a mode's levels."""
        members = table.blocks[mode.block].members
        return sum(self.levels[m] * level for m, level in zip(members, mode.levels, strict=True))

    def best(self, table: Table, modes: list[Mode]) -> tuple[float, Pick]:
        """The least damage plus priced use of a block, and its pick."""
        totals = []
        for mode in modes:
            total, kept = mode.best(self.uses)
            totals.append((total + self.deep(table, mode), (mode, kept)))
        return min(totals, key=lambda item: item[0])


class Dual:
    """The linear program over the picks known, and the best bound so far.

    Attributes:
        bound: no choice from the menu within the limits has less damage.
        prices: those of the bound; None before the first.
    """

    def __init__(self, table: Table, menu: Menu, known: Choice) -> None:
        """Starts with a choice within the limits and the ends of all modes."""
        self.table, self.menu = table, menu
        self.bound, self.value, self.noise = 0.0, -math.inf, 0.0
        self.prices: Prices | None = None
        self.unit = max(table.damage(known), 1e-300)
        self.scale = [max(limit, 0.5) for limit in table.limits]
        self.solver = pywraplp.Solver.CreateSolver("GLOP")
        self.inf = self.solver.infinity()
        self.pairs = [self.solver.Constraint(1.0, 1.0) for _ in table.blocks]
        self.rows = [
            self.solver.Constraint(-self.inf, limit / scale)
            for limit, scale in zip(table.limits, self.scale, strict=True)
        ]
        self._depth_rows()
        self.columns: set[tuple[int, int]] = set()
        for pick in known:
            self._add(pick)
        for modes in menu:
            for mode in modes:
                self._add((mode, mode.low))
                self._add((mode, mode.high))

    def _depth_rows(self) -> None:
        """Levels on arrival: of a site, at least those before it plus its own."""
        table, most = self.table, self.table.problem.max_depth
        self.steps: list[tuple[int | None, int, int, pywraplp.Constraint]] = []
        if most is None:
            return
        count = len(table.problem.sites)
        self.top = [most] * count
        for site, after in table.paths.exits:
            self.top[site] = min(self.top[site], most - after)
        reached = [self.solver.NumVar(0.0, float(max(0, top)), "") for top in self.top]
        steps = [(None, site, levels) for site, levels in table.paths.entries]
        self.into: list[list[pywraplp.Constraint]] = [[] for _ in range(count)]
        for before, site, levels in [*steps, *table.paths.between]:
            row = self.solver.Constraint(-self.inf, float(-levels))
            row.SetCoefficient(reached[site], -1.0)
            if before is not None:
                row.SetCoefficient(reached[before], 1.0)
            self.steps.append((before, site, levels, row))
            self.into[site].append(row)

    def _add(self, pick: Pick) -> bool:
        """Adds a pick as a column; whether it is new."""
        mode, kept = pick
        if (id(mode), kept) in self.columns:
            return False
        self.columns.add((id(mode), kept))
        column = self.solver.NumVar(0.0, self.inf, "")
        self.solver.Objective().SetCoefficient(column, mode.damage(kept) / self.unit)
        self.pairs[mode.block].SetCoefficient(column, 1.0)
        for row, use, scale in zip(self.rows, mode.use(kept), self.scale, strict=True):
            row.SetCoefficient(column, use / scale)
        if self.steps:
            members = self.table.blocks[mode.block].members
            for site, levels in zip(members, mode.levels, strict=True):
                for row in self.into[site]:
                    row.SetCoefficient(column, float(levels))
        return True

    def run(self, over: Callable[[], bool]) -> None:
        """Generates columns until the bound can't rise any more."""
        for _ in range(_ROUNDS):
            if over() or self.solver.Solve() != pywraplp.Solver.OPTIMAL:
                return
            value = self.solver.Objective().Value() * self.unit
            picks = self.price(self._prices())
            if value - self.bound <= _CLOSE * value:
                return
            if sum(self._add(pick) for pick in picks) == 0:
                return

    def _prices(self) -> Prices:
        """Those of the linear program's solution."""
        uses = [
            max(0.0, -row.dual_value()) * self.unit / scale if limited else 0.0
            for row, scale, limited in zip(self.rows, self.scale, self.table.limited, strict=True)
        ]
        levels = [0.0] * len(self.table.problem.sites)
        slope, constant = list(levels), 0.0
        for before, site, between, row in self.steps:
            price = max(0.0, -row.dual_value()) * self.unit
            levels[site] += price
            constant += price * between
            slope[site] -= price
            if before is not None:
                slope[before] += price
        if self.steps:
            constant += sum(min(0.0, s * top) for s, top in zip(slope, self.top, strict=True))
        return self.fixed((uses[0], uses[1], uses[2]), tuple(levels), constant)

    def fixed(
        self, uses: tuple[float, float, float], levels: tuple[float, ...] = (), constant: float = 0
    ) -> Prices:
        """Prices with the constant that belongs to them."""
        constant -= sum(price * limit for price, limit in zip(uses, self.table.limits, strict=True))
        return Prices(uses, levels or (0.0,) * len(self.table.problem.sites), constant)

    def price(self, prices: Prices) -> list[Pick]:
        """The best priced picks; takes the bound that they give if it is better."""
        found = [prices.best(self.table, modes) for modes in self.menu]
        parts = [prices.constant, *(total for total, _ in found)]
        noise = 1e-14 * sum(map(abs, parts))
        value = math.fsum(parts) - noise
        if value > self.value:
            self.value, self.noise, self.prices = value, noise, prices
            self.bound = max(value, self.bound)
        return [pick for _, pick in found]

    def narrowed(self, worst: float) -> list[list[tuple[Mode, int, int]]]:
        """What a choice with no more damage than `worst` can consist of: modes and numbers kept."""
        if self.prices is None:
            return [[(mode, mode.low, mode.high) for mode in modes] for modes in self.menu]
        found = []
        slack = worst - self.value + 10 * self.noise + 1e-12 * worst
        for modes in self.menu:
            least, _ = self.prices.best(self.table, modes)
            ways = []
            for mode in modes:
                room = least + slack - self.prices.deep(self.table, mode)
                if span := _span(mode, self.prices.uses, room):
                    ways.append((mode, *span))
            found.append(ways)
        return found


def _span(mode: Mode, uses: tuple[float, float, float], room: float) -> tuple[int, int] | None:
    """The numbers kept whose damage plus priced use is within a bound."""
    least, middle = mode.best(uses)
    if least > room:
        return None
    each, base = mode.each(uses), sum(p * u for p, u in zip(uses, mode.base, strict=True))

    def within(kept: int) -> bool:
        return base + each * kept + mode.damage(kept) <= room

    return _last(within, middle, mode.low), _last(within, middle, mode.high)


def _last(within: Callable[[int], bool], inside: int, end: int) -> int:
    """The last number from `inside` towards `end` that is within; all before it are."""
    if within(end):
        return end
    while abs(end - inside) > 1:
        middle = (inside + end) // 2
        inside, end = (middle, end) if within(middle) else (inside, middle)
    return inside
