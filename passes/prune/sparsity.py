"""The PQ index: how much of a dimension its weights alone say can go.

For values w of d units and 0 < p < q the index ``I = 1 - d^(1/q - 1/p) |w|_p / |w|_q`` is 0 where
all are equal and near 1 where few hold everything. Whoever removes units whose powers
``|w_i|^p`` sum up to at most eta times those that stay keeps at least
``d (1 + eta)^(-q / (q - p)) (1 - I)^(p q / (q - p))`` units (Diao et al. 2023; it follows from
Hoelder's inequality).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt.passes.prune.criteria.magnitude import root_mean_squares
from graphopt.passes.prune.dimensions import Dimensions

_P, _Q = 0.5, 1.0  # as in the paper's experiments


def pq_index(values: Sequence[float], p: float = _P, q: float = _Q) -> float:
    """The index of values, between 0 and 1; of zeros it is 0."""
    w = np.abs(np.asarray(values, dtype=float))
    if not w.any():
        return 0.0
    w = w / w.max()
    norms = [float((w**power).sum()) ** (1 / power) for power in (p, q)]
    return 1 - len(w) ** (1 / q - 1 / p) * norms[0] / norms[1]


def retained(values: Sequence[float], eta: float = 0.0, p: float = _P, q: float = _Q) -> float:
    """The lower bound on how many units stay, not rounded."""
    index = pq_index(values, p, q)
    return len(values) * (1 + eta) ** (-q / (q - p)) * (1 - index) ** (p * q / (q - p))


def pq_gains(dimensions: Dimensions, widths: Sequence[int]) -> list[tuple[float, ...]]:
    """Gains of which a threshold keeps each dimension's lower bound for one eta.

    The bound of every dimension has the factor ``(1 + eta)^(-q / (q - p))`` in common; the k-th
    unit stays if k is at most this factor times the bound at eta = 0, so that bound over k is the
    gain. The threshold that a budget leaves is the least eta for all.

    Args:
        dimensions: The dimensions; their values are root mean squares of units' weights.
        widths: How many units are left of each.
    """
    values = root_mean_squares(dimensions)
    found = []
    for dim, width in zip(dimensions.all, widths, strict=True):
        kept = retained([values.get(unit, 0.0) for unit in dim.units])
        found.append(tuple(kept / (k + 1) for k in range(width)))
    return found
