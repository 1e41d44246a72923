"""Upper bounds on an allocation of widths: the Lagrangian relaxation by bucket elimination.

For given prices of the costs, the best allocation of the priced problem is found by eliminating
one dimension after another, as in nonserial dynamic programming (Bertele and Brioschi, 1972): the
largest total over a dimension, as a function of the widths it is multiplied with, is the message
to the dimensions that remain. A message is tabulated on a grid only. It is a maximum of functions
that are linear in (the power of) every single width, hence convex in it, so that interpolation
between grid points never falls below it; where a width occurs in several powers, the value at the
next lower grid point is taken instead, as messages fall with rising widths. So every total is a
bound for the whole problem, and the grids only decide how tight it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.solvers.width_table import Choice, Floats, WidthTable

_WIDEST = 4  # dimensions that a message may depend on
# Grid points a dimension, by the most dimensions that a message with it depends on.
_POINTS = {0: 33, 1: 33, 2: 17, 3: 9, 4: 6}


@dataclass(frozen=True)
class _Step:
    """The elimination of one dimension.

    Attributes:
        dimension: what is eliminated.
        scope: the dimensions its message depends on, in the order of their elimination.
        dropped: dimensions it is multiplied with that are taken at their least width instead:
            costs fall, so the bound stays one.
        terms: (row of the monomial, exponent of the dimension, {other dimension: exponent}).
        inputs: earlier steps whose messages depend on the dimension.
    """

    dimension: int
    scope: tuple[int, ...]
    dropped: frozenset[int]
    terms: tuple[tuple[int, int, dict[int, int]], ...]
    inputs: tuple[int, ...]


class _Axis:
    """Where messages are tabulated along one dimension, and how to read between."""

    def __init__(self, width: Floats, low: int, high: int, near: int, points: int, power: int):
        self.low, self.width = low, width[low : high + 1]
        self.grid = _grid(high - low, near - low, points)
        count = high - low + 1
        at = np.arange(count)
        left = np.clip(np.searchsorted(self.grid, at, "right") - 1, 0, max(0, len(self.grid) - 2))
        self.matrix: Floats = np.zeros((len(self.grid), count))
        if len(self.grid) == 1:
            self.matrix[0] = 1.0
            return
        if power:
            u = self.width**power
            part = (u - u[self.grid[left]]) / (u[self.grid[left + 1]] - u[self.grid[left]])
        else:
            part = (at >= self.grid[left + 1]).astype(float)
        self.matrix[left, at] = 1 - part
        self.matrix[left + 1, at] += part

    @property
    def grid_width(self) -> Floats:
        """Widths at the grid points."""
        return self.width[self.grid]


def _grid(last: int, near: int, points: int) -> Choice:
    """Positions 0 to `last`, all or `points` of them, denser about `near`."""
    if last < points:
        return np.arange(last + 1)
    half = max(1, (points - 1) // 2)
    steps = np.arange(half + 1) / half
    down, up = near, last - near
    left = near - np.round(np.maximum(down, 1) ** steps)[: half + 1] if down else np.array([0.0])
    right = near + np.round(np.maximum(up, 1) ** steps) if up else np.array([float(last)])
    return np.unique(np.concatenate([left, [near], right, [0, last]])).astype(np.int64)


class Relaxation:
    """The elimination order of one problem, to be evaluated for boxes and prices."""

    def __init__(self, table: WidthTable) -> None:
        """Orders the dimensions: those that are multiplied with the fewest others come first."""
        self.table = table
        self.steps: list[_Step] = []
        self._order()
        count = len(table.rows)
        crowd = [0] * count
        for step in self.steps:
            for d in step.scope:
                crowd[d] = max(crowd[d], len(step.scope))
        self.points = [_POINTS[size] for size in crowd]
        self.power = [self._power(d) for d in range(count)]
        constant = ~(table.exponents > 0).any(axis=1)
        self.constant = table.shares[:, constant].sum(axis=1)

    def _power(self, d: int) -> int:
        """The exponent with which a dimension is multiplied with others; 0 if several."""
        coupled = (self.table.exponents > 0).sum(axis=1) > 1
        found = set(self.table.exponents[coupled, d].tolist()) - {0}
        return found.pop() if len(found) == 1 else int(not found)

    def _order(self) -> None:
        exponents, weight = self.table.exponents, self._weights()
        near = {int(d): set(np.flatnonzero(weight[d]).tolist()) - {int(d)} for d in self.table.rows}
        waiting = set(np.flatnonzero((exponents > 0).any(axis=1)).tolist())
        holders: list[set[int]] = []  # dimensions of messages that no step has taken yet
        rank: dict[int, int] = {}
        scopes: list[tuple[int, set[int], frozenset[int], list[int], list[int]]] = []
        while near:
            d = min(near, key=lambda d: (len(near[d]), _fill_in(near, d), d))
            others = sorted(near.pop(d), key=lambda o: (-weight[d, o], o))
            scope, dropped = set(others[:_WIDEST]), frozenset(others[_WIDEST:])
            terms = sorted(t for t in waiting if exponents[t, d])
            waiting -= set(terms)
            inputs = [i for i, held in enumerate(holders) if d in held]
            for i in inputs:
                holders[i] = set()
            for other in others:
                near[other].discard(d)
                near[other] |= (scope - {other}) if other in scope else set()
            rank[d] = len(rank)
            holders.append(set(scope))
            scopes.append((d, scope, dropped, terms, inputs))
        for d, scope, dropped, terms, inputs in scopes:
            parts = tuple(
                (t, int(exponents[t, d]), {
                    int(o): int(exponents[t, o]) for o in np.flatnonzero(exponents[t]) if o != d
                })
                for t in terms
            )  # fmt: skip
            ordered = tuple(sorted(scope, key=rank.__getitem__))
            self.steps.append(_Step(d, ordered, dropped, parts, tuple(inputs)))

    def _weights(self) -> Floats:
        """How much of the costs every two dimensions have in common, at full widths."""
        has = (self.table.exponents > 0).astype(float)
        top = self.table.width[self.table.rows, self.table.last]
        size = self.table.shares.sum(axis=0) * np.prod(top**self.table.exponents, axis=1)
        return has.T @ (has * (size + 1e-300)[:, None])

    def evaluate(
        self, low: Choice, high: Choice, near: Choice, prices: Floats
    ) -> tuple[float, Choice]:
        """The bound for these prices, and the choice that is the best for them.

        Args:
            low: least positions.
            high: largest positions.
            near: positions about which the grids are dense.
            prices: of the limiting costs, per limit.

        Returns:
            A bound on `WidthTable.worth` within the box, and a choice (exactly the best if all
            grids are complete).
        """
        table = self.table
        axes = [
            _Axis(table.width[d], int(low[d]), int(high[d]), int(near[d]), points, power)
            for d, (points, power) in enumerate(zip(self.points, self.power, strict=True))
        ]
        value = [table.value[d, low[d] : high[d] + 1] for d in range(len(axes))]
        weights = prices @ table.shares
        messages: list[Floats] = []
        total = float(prices @ (1 - self.constant))
        for step in self.steps:
            message = self._eliminate(step, axes, value[step.dimension], weights, messages)
            messages.append(message)
            if not step.scope:
                total += float(message)
        return total, self._trace(axes, value, weights, messages)

    def _eliminate(
        self, step: _Step, axes: list[_Axis], value: Floats, weights: Floats,
        messages: list[Floats],
    ) -> Floats:  # fmt: skip
        """The message of a step: its largest total at every grid point of its scope."""
        own = axes[step.dimension]
        priced: dict[int, Floats] = {}
        for row, exponent, others in step.terms:
            part: Floats = np.full((1,) * len(step.scope), weights[row])
            for o, power in others.items():
                if o in step.dropped:
                    part = part * axes[o].width[0] ** power
                else:
                    part = part * _along(axes[o].grid_width ** power, step.scope, o)
            priced[exponent] = priced[exponent] + part if exponent in priced else part
        total: Floats = value.reshape((1,) * len(step.scope) + (-1,))
        for exponent, table in priced.items():
            total = total - table[..., None] * own.width**exponent
        for i in step.inputs:
            total = total + self._received(step, i, messages[i]) @ own.matrix
        message: Floats = total.max(axis=-1)
        shape = tuple(len(axes[d].grid) for d in step.scope)
        return np.broadcast_to(message, shape)

    def _received(self, step: _Step, i: int, message: Floats) -> Floats:
        """A message with the axes of a step's scope, then that of its dimension."""
        scope = list(self.steps[i].scope)  # begins with the step's own dimension
        for d in [d for d in scope if d in step.dropped]:
            message = np.take(message, 0, axis=scope.index(d))
            scope.remove(d)
        message = np.moveaxis(message, 0, -1)
        sizes = dict(zip([*scope[1:], scope[0]], message.shape, strict=True))
        return message.reshape([sizes.get(d, 1) for d in (*step.scope, step.dimension)])

    def _trace(
        self, axes: list[_Axis], value: list[Floats], weights: Floats, messages: list[Floats]
    ) -> Choice:
        """Goes back through the steps and takes the best width each time."""
        chosen = np.zeros(len(axes), np.int64)  # relative to the least position
        for step in reversed(self.steps):
            d = step.dimension
            total = value[d]
            for row, exponent, others in step.terms:
                price = weights[row]
                for o, power in others.items():
                    price = price * axes[o].width[chosen[o]] ** power
                total = total - price * axes[d].width ** exponent
            for i in step.inputs:
                message = messages[i]
                for other in reversed(self.steps[i].scope[1:]):
                    message = message @ axes[other].matrix[:, chosen[other]]
                total = total + message @ axes[d].matrix
            chosen[d] = int(total.argmax())
        return chosen + np.array([axis.low for axis in axes], np.int64)


def _along(values: Floats, scope: tuple[int, ...], d: int) -> Floats:
    """A vector as a table over a scope that varies along one dimension only."""
    return values.reshape([-1 if other == d else 1 for other in scope])


def _fill_in(near: dict[int, set[int]], d: int) -> int:
    """Pairs of neighbours that aren't neighbours of each other."""
    others = near[d]
    return sum(len(others - near[o]) - 1 for o in others)
