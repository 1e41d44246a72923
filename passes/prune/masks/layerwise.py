"""Layer-adaptive pruning: how many weights each matrix keeps, by measured curves of distortion.

Each matrix in turn is pruned alone to a row of shares, its best weights kept, and the outputs move
by so much.  That these distortions add up over matrices is the one assumption; which share each
gets is then a multiple choice knapsack, solved to a proven gap.  After Xu et al., "Efficient Joint
Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks" (ICCV 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from graphopt.passes.prune.masks.matrices import Matrix
from graphopt.passes.prune.masks.patterns import Pattern, best
from graphopt.passes.prune.masks.trial import Trial
from graphopt.pipeline import Progress
from graphopt.solvers.surviving import Layer, Survival, survive

# Shares of a matrix at which its curve is measured, and on how many points it is drawn between.
_SHARES = (0.0, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_POINTS = 200
_ROWS = 128
"""Examples on which curves are measured."""


@dataclass(frozen=True)
class Curve:
    """What the outputs lose when one matrix alone is pruned.

    Attributes:
        counts: Weights kept, rising; the last is all of them.
        losses: The distortion at each.
    """

    counts: tuple[int, ...]
    losses: tuple[float, ...]

    def options(self, least: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The curve drawn between the points that were measured, from ``least`` weights on."""
        first, last = min(least, self.counts[-1]), self.counts[-1]
        counts = np.unique(np.linspace(first, last, _POINTS).round().astype(np.int64))
        losses = np.interp(counts, self.counts, self.losses)
        return tuple(counts.tolist()), tuple(losses.tolist())


def curves(
    matrices: Sequence[Matrix],
    scores: Mapping[str, Tensor],
    alive: Mapping[str, int],
    trial: Trial,
    progress: Progress,
) -> dict[str, Curve]:
    """Measure the curve of each matrix.

    Args:
        matrices: The weights.
        scores: What each weight is worth.
        alive: How many of each matrix earlier masks keep.
        trial: Measures.
        progress: Told what goes on.
    """
    found = {}
    for number, matrix in enumerate(matrices):
        progress(f"measuring the distortion by {matrix.name}", number / len(matrices))
        whole = alive[matrix.name]
        counts = sorted({round(share * whole) for share in _SHARES} - {whole})
        losses = [
            trial.distortion({matrix.name: best(scores[matrix.name], count)}, _ROWS)
            for count in counts
        ]
        found[matrix.name] = Curve((*counts, whole), (*losses, 0.0))
    return found


def allocated(
    curve: Mapping[str, Curve], least: Mapping[str, int], count: int, time_limit: float
) -> tuple[dict[str, int], Survival]:
    """How many weights each matrix keeps: the least distortion within ``count`` in all.

    Returns:
        The counts, and the solver's answer, whose loss is the distortion that is predicted.
    """
    layers = [Layer(name, *c.options(least[name])) for name, c in curve.items()]
    found = survive(layers, count, time_limit=time_limit)
    kept = dict(zip(curve, found.kept, strict=True))
    if found.status != "infeasible":
        _spend(kept, curve, count - sum(kept.values()))
    return kept, found


def _spend(kept: dict[str, int], curve: Mapping[str, Curve], left: int) -> None:
    """Give what the points of the curves leave over to the matrices that gain most by it."""

    def slope(name: str) -> float:
        c, at = curve[name], kept[name]
        more = min(at + max(1, left), c.counts[-1])
        gain = np.interp(at, c.counts, c.losses) - np.interp(more, c.counts, c.losses)
        return -float(gain) / max(1, more - at)

    for name in sorted(kept, key=slope):
        more = min(left, curve[name].counts[-1] - kept[name])
        kept[name] += more
        left -= more


def patterned(
    eligible: Sequence[Matrix],
    dense: int,
    losses: Mapping[str, float],
    pattern: Pattern,
    count: int,
    time_limit: float,
) -> tuple[set[str], Survival]:
    """Which matrices get a pattern so that no more than ``count`` weights are kept in all.

    Args:
        eligible: Those that can.
        dense: Weights that are kept in all others.
        losses: What is lost where one alone gets it.
        pattern: The pattern.
        count: Weights kept in all.
        time_limit: Seconds.
    """
    layers = [
        Layer(m.name, (m.size * pattern.n // pattern.m, m.size), (losses[m.name], 0.0))
        for m in eligible
    ]
    found = survive(layers, count - dense, time_limit=time_limit)
    names = [m.name for m in eligible]
    return {n for n, option in zip(names, found.options, strict=True) if option == 0}, found
