"""Step functions that stand in for the derivative of an activation."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Array = np.ndarray

# Samples are put into this many bins of equal count before the best steps are looked for.
_BINS = 512
# A threshold that nothing exceeds.
_NEVER = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Steps:
    """A piecewise constant function.

    Attributes:
        thresholds: Where it jumps, ascending: a value belongs to the segment after all thresholds
            that it is greater than.
        levels: Its values, one more than thresholds.
    """

    thresholds: tuple[float, ...]
    levels: tuple[float, ...]

    def __call__(self, x: Array) -> Array:
        """Its values at x."""
        return np.asarray(self.levels)[np.searchsorted(self.thresholds, x, side="left")]

    def error(self, x: Array, derivative: Array) -> float:
        """Relative distance from a derivative, over samples."""
        norm = float(np.linalg.norm(derivative))
        return float(np.linalg.norm(self(x) - derivative)) / norm if norm else 0.0


def _published(weights: tuple[float, ...], thresholds: tuple[float, ...]) -> Steps:
    return Steps(thresholds, (0.0, *np.cumsum(weights).tolist()))


# Yang et al., ICML 2024: weights and change points of LowMemoryBP's kernels.
REGELU2 = _published(
    (-0.04922261145617846, 1.0979632065417297, -0.048740595085551286),
    (-3.1858810036855245, -0.001178821281161997, 3.190832613414926),
)
RESILU2 = _published(
    (-0.04060357190528599, 1.080925428529668, -0.040321856624382146),
    (-6.3050461001646445, -0.0008684942046214787, 6.325815242089708),
)


def fit_steps(x: Array, derivative: Array, count: int = 4) -> Steps:
    """The step function nearest to a derivative over samples, by dynamic programming.

    After Novikov et al., "Few-bit Backward" (2022). It is optimal among those whose thresholds
    separate bins of equal count.

    Args:
        x: Samples of the activation's input.
        derivative: The derivative there.
        count: Segments; four are two bits.
    """
    order = np.argsort(x, kind="stable")
    x, derivative = x[order], derivative[order]
    edges = np.unique(np.linspace(0, len(x), min(_BINS, len(x)) + 1).astype(int))
    sums = np.concatenate([[0.0], np.cumsum(derivative)])[edges]
    squares = np.concatenate([[0.0], np.cumsum(derivative**2)])[edges]
    cuts = _best_cuts(edges.astype(float), sums, squares, min(count, len(edges) - 1))
    levels = [(sums[high] - sums[low]) / (edges[high] - edges[low]) for low, high in pairwise(cuts)]
    places = edges[cuts[1:-1]]
    thresholds = [float((x[place - 1] + x[place]) / 2) for place in places]
    missing = count - len(levels)
    return Steps((*thresholds, *[_NEVER] * missing), (*map(float, levels), *[0.0] * missing))


def _best_cuts(counts: Array, sums: Array, squares: Array, segments: int) -> list[int]:
    """Bin edges, first and last included, that split the bins with least squared error."""
    bins = len(counts) - 1
    low, high = np.meshgrid(np.arange(bins + 1), np.arange(bins + 1), indexing="ij")
    width = np.where(high > low, counts[high] - counts[low], 1.0)
    cost = squares[high] - squares[low] - (sums[high] - sums[low]) ** 2 / width
    cost = np.where(high > low, cost, np.inf)
    best, came = cost[0], []
    for _ in range(segments - 1):
        total = best[:, None] + cost
        came.append(np.argmin(total, axis=0))
        best = total[came[-1], np.arange(bins + 1)]
    cuts = [bins]
    for origin in reversed(came):
        cuts.append(int(origin[cuts[-1]]))
    return [0, *reversed(cuts)] if segments > 1 else [0, bins]
