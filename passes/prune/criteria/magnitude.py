"""Criteria that look at weights alone."""

from __future__ import annotations

import math

import numpy as np
import torch

from graphopt.passes.prune.criteria.base import Calibration, Scores, add, places
from graphopt.passes.prune.dimensions import Dimensions


def l2(dimensions: Dimensions, _: Calibration) -> Scores:
    """Root mean square of a unit's weights, relative to the mean of its dimension."""
    return _normalised(dimensions, root_mean_squares(dimensions))


def bn_scale(dimensions: Dimensions, _: Calibration) -> Scores:
    """The same of its normalisations' weights alone, where there are any (Liu et al. 2017)."""
    scales = root_mean_squares(dimensions, scales=True)
    return _normalised(dimensions, {**root_mean_squares(dimensions), **scales})


def drawn(dimensions: Dimensions, calibration: Calibration) -> Scores:
    """Uniformly distributed random numbers."""
    units = [unit for dim in dimensions.all for unit in dim.units]
    numbers = np.random.default_rng(calibration.seed).random(len(units))
    return dict(zip(units, numbers.tolist(), strict=True))


def root_mean_squares(dimensions: Dimensions, *, scales: bool = False) -> Scores:
    """Root mean square of the weights of each unit; or of scales of norms alone."""
    total: Scores = {}
    count: Scores = {}
    for slot, axis in places(dimensions):
        if scales and (slot.tensor.dim() > 1 or not slot.path.endswith("weight")):
            continue
        squares = slot.tensor.detach().double().square()
        add(dimensions, slot, axis, squares, total)
        add(dimensions, slot, axis, torch.ones_like(squares), count)
    return {unit: math.sqrt(total[unit] / max(count[unit], 1)) for unit in total}


def _normalised(dimensions: Dimensions, scores: Scores) -> Scores:
    """Relative to the mean of the dimension: magnitudes of different layers don't compare."""
    result: Scores = {}
    for dim in dimensions.all:
        mean = sum(scores.get(u, 0.0) for u in dim.units) / dim.width or 1.0
        result.update({u: scores.get(u, 0.0) / mean for u in dim.units})
    return result
