"""What a selection is asked for, and what comes back, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Indices = NDArray[np.intp]


class SelectionError(ValueError):
    """A problem that makes no sense; the message says what to change."""


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The cost of a set, and how many are to be taken.

    Attributes:
        linear: [things], cost of each.
        factors: [rows, things], of floating type.
        offset: [rows].
        groups: [things], the group of each, counted from 0.
        counts: [groups], how many are taken of each.
    """

    linear: Floats
    factors: NDArray[np.floating]
    offset: Floats
    groups: NDArray[np.intp]
    counts: NDArray[np.intp]

    def __post_init__(self) -> None:
        """Checks sizes, finiteness and counts."""
        things = len(self.linear)
        if self.factors.shape != (len(self.offset), things) or len(self.groups) != things:
            raise SelectionError("linear, factors, offset and groups have sizes that don't fit")
        if not all(np.isfinite(a).all() for a in (self.linear, self.factors, self.offset)):
            raise SelectionError("costs must be finite")
        if things and not 0 <= self.groups.min() <= self.groups.max() < len(self.counts):
            raise SelectionError("a group without a count")
        sizes = np.bincount(self.groups, minlength=len(self.counts))
        if (self.counts < 0).any() or (self.counts > sizes).any():
            raise SelectionError("a group of which more are to be taken than it has")

    @cached_property
    def diagonal(self) -> Floats:
        """What each thing adds to the quadratic part with itself."""
        return np.einsum("ri,ri->i", self.factors, self.factors, dtype=np.float64)

    def state(self, taken: NDArray[Any]) -> Floats:
        """``offset + factors z``; z may be a mask or shares."""
        if taken.dtype == np.bool_:
            return self.offset + self.factors[:, taken].sum(1, dtype=np.float64)
        return self.offset + self.factors @ taken.astype(self.factors.dtype)

    def cost(self, taken: NDArray[Any]) -> float:
        """The objective."""
        state = self.state(taken)
        return float(self.linear @ taken + state @ state / 2)

    def slopes(self, state: Floats) -> Floats:
        """The objective's derivative."""
        return self.linear + state.astype(self.factors.dtype) @ self.factors

    def cheapest(self, costs: Floats) -> Mask:
        """The things of each group that cost least, as many as are asked for."""
        order = np.lexsort((costs, self.groups))
        starts = np.searchsorted(self.groups[order], np.arange(len(self.counts)))
        rank = np.arange(len(order)) - starts[self.groups[order]]
        taken = np.zeros(len(order), bool)
        taken[order[rank < self.counts[self.groups[order]]]] = True
        return taken


@dataclass(frozen=True, eq=False)
class Selection:
    """A set and what is proven about it.

    Attributes:
        taken: [things], bool.
        cost: its cost.
        start: the cost of the set that the search began with.
        bound: no set of these counts costs less.
        gap: cost - bound.
        status: "optimal" (the gap is rounding) or "feasible".
        blocks: how many blocks were solved.
        seconds: time used.
    """

    taken: Mask
    cost: float
    start: float
    bound: float
    gap: float
    status: str
    blocks: int
    seconds: float
