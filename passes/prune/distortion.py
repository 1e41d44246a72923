"""Rate-distortion curves: what the outputs lose when one dimension alone gets narrower.

First-order scores of single units add up badly: a layer whose units each matter little may be the
only way through the network.  So widths are chosen by measured curves: each dimension in turn keeps
its best units only, all others keep everything, and the outputs move by so much.  That these losses
add up over dimensions is the one assumption left (as in RD-ViT-Prune; Akimoto et al. 2024).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from graphopt.batches import Batch
from graphopt.ir.program import Program
from graphopt.passes.prune.dimensions import Dimension, Dimensions
from graphopt.passes.prune.outputs import distance, floating_outputs, loss_of
from graphopt.passes.prune.rewrite import zero_
from graphopt.pipeline import Progress

# Widths at which each curve is measured, as shares of the full width.
_GRID = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


class Distortion:
    """Measures how far outputs move when units are masked."""

    def __init__(
        self, program: Program, dimensions: Dimensions, batches: Sequence[Batch], seed: int
    ) -> None:
        self.module = program.emit().eval()
        self.dimensions, self.batches, self.seed = dimensions, batches, seed
        self.parameters = [
            (slot, self.module.get_parameter(slot.path))
            for slot in dimensions.analysis.slots.values()
            if slot.is_trained
        ]
        with torch.no_grad():
            self.exact = [floating_outputs(self.module, batch, seed) for batch in batches]

    def curves(
        self, ranked: Sequence[Sequence[int]], progress: Progress
    ) -> list[tuple[list[int], list[float]]]:
        """For each dimension widths, rising, and the distortion at each.

        Args:
            ranked: The units of each dimension, those that go last first.
            progress: Told what goes on.
        """
        found = []
        for index, (dim, units) in enumerate(zip(self.dimensions.all, ranked, strict=True)):
            progress(f"measuring {dim.name}", index / len(self.dimensions.all))
            widths = sorted({max(1, round(share * dim.width)) for share in _GRID} - {dim.width})
            losses = [self.of(frozenset(units[width:])) for width in widths]
            found.append(([*widths, dim.width], [*losses, 0.0]))
        return found

    @torch.no_grad()
    def of(self, removed: frozenset[int], some: Sequence[int] | None = None) -> float:
        """Squared distance of the outputs from the full network's, relative to their spread.

        Args:
            removed: Units that are masked.
            some: Indices of the batches to measure on; all if None.
        """
        chosen = range(len(self.batches)) if some is None else some
        with self._masked(removed):
            return statistics.fmean(
                distance(self.exact[i], floating_outputs(self.module, self.batches[i], self.seed))
                for i in chosen
            )

    @torch.no_grad()
    def loss(self, removed: frozenset[int], some: Sequence[int] | None = None) -> float:
        """The mean loss of the batches, arguments as of `of`."""
        chosen = range(len(self.batches)) if some is None else some
        with self._masked(removed):
            return statistics.fmean(
                float(loss_of(self.module, self.batches[i], self.seed)) for i in chosen
            )

    @contextmanager
    def _masked(self, removed: frozenset[int]) -> Iterator[None]:
        """All parameters of some units zero, for a while."""
        saved: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for slot, parameter in self.parameters:
                kept = self.dimensions.analysis.kept(slot, removed)
                if kept:
                    saved.append((parameter, parameter.detach().clone()))
                    zero_(parameter, kept)
            yield
        finally:
            for parameter, values in saved:
                parameter.copy_(values)


def gains(dim: Dimension, widths: Sequence[int], losses: Sequence[float]) -> tuple[float, ...]:
    """What each unit more is worth, falling: the slopes of the curve's lower convex hull.

    Args:
        dim: The dimension.
        widths: Where the curve was measured, rising; the last is the full width.
        losses: The distortion at each.
    """
    hull: list[tuple[int, float]] = []
    highest = [*np.maximum.accumulate(losses[::-1])[::-1]]
    start = (0, float(highest[0]) + abs(float(highest[0])) * widths[0])
    for point in (start, *zip(widths, map(float, highest), strict=True)):
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    result: list[float] = []
    for left, right in itertools.pairwise(hull):
        result += [max(0.0, -_slope(left, right))] * (right[0] - left[0])
    assert len(result) == dim.width
    return tuple(sorted(result, reverse=True))


def _slope(left: tuple[int, float], right: tuple[int, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
