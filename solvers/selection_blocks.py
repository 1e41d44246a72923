"""Solving a block of a selection, all else as it is: by swaps, small ones by trying everything."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from graphopt.solvers.selection_problem import Floats, Mask

TINY = 12
"""Things of a block of which all subsets are tried."""


def swapped(linear: Floats, quadratic: Floats, groups: NDArray[np.intp], start: Mask) -> Mask:
    """Swaps within groups, the best one first, until none makes the block cheaper."""
    taken = start.copy()
    slopes = linear + quadratic @ taken
    half = np.diagonal(quadratic) / 2
    allowed = groups[:, None] == groups
    scale = float(np.abs(linear).max() + half.max())
    for _ in range(4 * len(taken)):
        out, into = np.flatnonzero(taken), np.flatnonzero(~taken)
        change = (half[out] - slopes[out])[:, None] + (half[into] + slopes[into])
        change -= quadratic[np.ix_(out, into)]
        change[~allowed[np.ix_(out, into)]] = np.inf
        place = int(np.argmin(change)) if change.size else -1
        if place < 0 or not change.ravel()[place] < -1e-12 * scale:
            break
        i, j = out[place // len(into)], into[place % len(into)]
        taken[i], taken[j] = False, True
        slopes += quadratic[:, j] - quadratic[:, i]
    return taken


def exhausted(linear: Floats, quadratic: Floats, groups: NDArray[np.intp], start: Mask) -> Mask:
    """The best of all subsets with as many of each group as the block has."""
    count = len(start)
    every = _subsets(count)
    for group in np.unique(groups):
        inside = groups == group
        every = every[every[:, inside].sum(1) == start[inside].sum()]
    shares = every.astype(np.float64)
    costs = shares @ linear + np.einsum("si,si->s", shares @ quadratic, shares) / 2
    best = int(np.argmin(costs))
    now = start.astype(np.float64)
    return every[best] if costs[best] < now @ linear + now @ quadratic @ now / 2 else start


@lru_cache(maxsize=TINY + 1)
def _subsets(count: int) -> Mask:
    return (np.arange(1 << count)[:, None] >> np.arange(count) & 1).astype(bool)
