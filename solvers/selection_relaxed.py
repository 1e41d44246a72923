"""The linear relaxation of a selection, by Frank and Wolfe's method."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from graphopt.solvers.selection_problem import Floats, Mask, Quadratic

_EXACT = 1e-9  # a slope below this, relatively, is rounding
_CLOSE = 1e-6  # the relaxation ends at a gap of this, relatively
_RELAXED = 200  # corners of the relaxation
_CORRECTIONS = 200  # moves between them before the next one


def relaxed(
    problem: Quadratic, start: Mask, late: Callable[[], bool] = lambda: False
) -> tuple[float, Mask]:
    """The linear relaxation: a lower bound, and the set that its solution rounds to.

    Frank and Wolfe's method, fully corrective: among all mixtures of the corners met so far the
    best one is found before the next corner is looked for.  The bound is the best value less the
    duality gap that is left.

    Args:
        problem: the problem.
        start: a set of the counts asked for, the first corner.
        late: asked before each step whether to end.
    """
    mixture, bound, corner = _Mixture(), -math.inf, start
    packed: list[NDArray[np.uint8]] = []
    for _ in range(_RELAXED):
        packed.append(np.packbits(corner))
        mixture.add(problem.state(corner), float(problem.linear @ corner))
        mixture.correct()
        slopes = problem.slopes(mixture.state)
        corner = problem.cheapest(slopes)
        # The tangent at the mixture lies below the objective everywhere.
        square = float(mixture.state @ mixture.state)
        lowest = float(slopes @ corner) + float(mixture.state @ problem.offset) - square / 2
        bound = max(bound, lowest)
        if late() or mixture.value - bound <= _CLOSE * abs(mixture.value):
            break
    shares = np.zeros(len(start))
    for share, bits in zip(mixture.shares, packed, strict=True):
        shares += share * np.unpackbits(bits, count=len(start))
    return bound, problem.cheapest(-shares)


class _Mixture:
    """Shares of corners of a relaxation, and the state that they mix to."""

    def __init__(self) -> None:
        self.states: list[Floats] = []
        self.linear: list[float] = []
        self.shares: Floats = np.zeros(0)
        self.gram: Floats = np.zeros((0, 0))

    def add(self, state: Floats, linear: float) -> None:
        """One corner more, of no share unless it is the first."""
        self.states.append(state)
        self.linear.append(linear)
        products = np.stack(self.states) @ state
        count = len(self.states)
        gram = np.zeros((count, count))
        gram[:-1, :-1] = self.gram
        gram[-1] = gram[:, -1] = products
        self.gram = gram
        self.shares = np.append(self.shares, float(count == 1))

    def correct(self) -> None:
        """Moves shares from the corner that costs most to the one that costs least, exactly."""
        linear = np.array(self.linear)
        slopes = linear + self.gram @ self.shares
        for _ in range(_CORRECTIONS):
            held = np.flatnonzero(self.shares > 0)
            to, out = int(np.argmin(slopes)), int(held[np.argmax(slopes[held])])
            better = float(slopes[out] - slopes[to])
            if better <= _EXACT * float(np.abs(slopes).max()):
                break
            curvature = float(self.gram[to, to] + self.gram[out, out] - 2 * self.gram[to, out])
            part = float(self.shares[out])
            moved = min(part, better / curvature) if curvature > 0 else part
            self.shares[to] += moved
            self.shares[out] = 0.0 if moved == part else part - moved
            slopes += moved * (self.gram[to] - self.gram[out])

    @property
    def state(self) -> Floats:
        """The state of the mixture."""
        return self.shares @ np.stack(self.states)

    @property
    def value(self) -> float:
        """The objective of the mixture."""
        return float(self.shares @ np.array(self.linear)) + float(self.state @ self.state) / 2
