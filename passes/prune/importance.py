"""Criteria: what a unit is worth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from graphopt.batches import Batch
from graphopt.comparison import probe_loss
from graphopt.errors import NonFiniteError, UnsupportedError
from graphopt.ir.program import Program
from graphopt.passes.prune.analysis import Slot
from graphopt.passes.prune.dimensions import Dimensions

Criterion = Literal["l2", "bn_scale", "taylor", "taylor2", "distortion", "random"]
Scores = dict[int, float]


@dataclass(frozen=True)
class Calibration:
    """What criteria may look at.

    Attributes:
        program: The program.
        batches: Batches; those without a loss are given `graphopt.comparison.probe_loss`, a fixed
            projection of the outputs: what is then estimated is how far the outputs move.
        seed: Of random scores, and of random draws in training mode.
    """

    program: Program
    batches: Sequence[Batch]
    seed: int


def score(criterion: Criterion, dimensions: Dimensions, calibration: Calibration) -> Scores:
    """What each unit is worth: not negative, larger is more.

    Args:
        criterion: ``l2``: root mean square of a unit's weights, relative to the mean of its
            dimension. ``bn_scale``: the same of its normalisations' weights alone, where there are
            any (Liu et al. 2017). ``taylor``: ``E |sum w g|``, ``taylor2``: ``E (sum w g)^2`` over
            the weights that read the unit, g the loss's gradient on a batch (Molchanov et al.
            2019): what the loss would change by to first order. ``distortion``: ranked as by
            ``l2``; widths are then chosen by measured curves
            (`graphopt.passes.prune.distortion`).
            ``random``: uniform.
        dimensions: The dimensions.
        calibration: Data, for those criteria that look at it.

    Raises:
        NonFiniteError: A score is NaN or infinite.
        UnsupportedError: There is nothing that a gradient could be had of.
    """
    units = [unit for dim in dimensions.all for unit in dim.units]
    if criterion == "random":
        drawn = np.random.default_rng(calibration.seed).random(len(units))
        found = dict(zip(units, drawn.tolist(), strict=True))
    elif criterion in ("taylor", "taylor2"):
        found = _taylor(dimensions, calibration, 1 if criterion == "taylor" else 2)
    else:
        found = _normalised(dimensions, _magnitudes(dimensions, criterion == "bn_scale"))
    for unit, value in found.items():
        if not math.isfinite(value):
            name = next(dim.name for dim in dimensions.all if unit in dim.units)
            raise NonFiniteError(
                f"the criterion {criterion} gives {value} for a unit of {name}",
                hint="are the loss and its gradients finite on the calibration data?",
            )
    return {unit: found.get(unit, 0.0) for unit in units}


def _magnitudes(dimensions: Dimensions, scales: bool) -> Scores:
    """Root mean square of the weights of each unit."""
    total, count = _squares(dimensions, scales)
    if scales:  # units without a normalisation are ranked by all of their weights
        rest, places = _squares(dimensions, False)
        total, count = {**rest, **total}, {**places, **count}
    return {unit: math.sqrt(total[unit] / max(count[unit], 1)) for unit in total}


def _squares(dimensions: Dimensions, scales: bool) -> tuple[Scores, dict[int, int]]:
    """For each unit the sum of its weights' squares and their number; or of scales of norms."""
    total: Scores = {}
    count: dict[int, int] = {}
    for slot, axis in _places(dimensions):
        if scales and (slot.tensor.dim() > 1 or not slot.path.endswith("weight")):
            continue
        _add(dimensions, slot, axis, slot.tensor.detach().double().square(), total, count)
    return total, count


def _places(dimensions: Dimensions) -> Iterator[tuple[Slot, int]]:
    """Axes of parameters that have units."""
    for slot in dimensions.analysis.slots.values():
        for axis, labels in enumerate(slot.value.axes):
            if slot.is_trained and dimensions.units.is_free(labels):
                yield slot, axis


def _add(
    dimensions: Dimensions,
    slot: Slot,
    axis: int,
    values: Tensor,
    total: Scores,
    count: dict[int, int],
) -> None:
    others = [i for i in range(values.dim()) if i != axis]
    sums = (values.sum(others) if others else values).tolist()
    each = values.numel() // max(values.shape[axis], 1)
    labels = dimensions.units.canonical(slot.value.axes[axis]).tolist()
    for label, value in zip(labels, sums, strict=True):
        for unit in dimensions.units.members(label):
            total[unit] = total.get(unit, 0.0) + value
            count[unit] = count.get(unit, 0) + each


def _normalised(dimensions: Dimensions, scores: Scores) -> Scores:
    """Relative to the mean of the dimension: magnitudes of different layers don't compare."""
    result: Scores = {}
    for dim in dimensions.all:
        mean = sum(scores.get(u, 0.0) for u in dim.units) / dim.width or 1.0
        result.update({u: scores.get(u, 0.0) / mean for u in dim.units})
    return result


def _taylor(dimensions: Dimensions, calibration: Calibration, power: int) -> Scores:
    """What the loss changes by, to first order, when a unit is taken from those that read it."""
    readers = _readers(dimensions)
    result: Scores = {}
    batches = 0
    for gradients in _gradients(calibration):
        total: Scores = {}
        for slot, axis in readers:
            gradient = gradients.get(slot.path)
            if gradient is not None:
                product = slot.tensor.detach().double() * gradient.double()
                _add(dimensions, slot, axis, product, total, {})
        for unit, value in total.items():
            result[unit] = result.get(unit, 0.0) + abs(value) ** power
        batches += 1
    if not result:
        raise UnsupportedError(
            "a criterion of gradients: no parameter got one",
            hint="give a loss that depends on the parameters, or criterion=l2",
        )
    return {unit: value / batches for unit, value in result.items()}


def _readers(dimensions: Dimensions) -> list[tuple[Slot, int]]:
    """Axes over which weights read their input; all axes of units that nothing reads like that."""
    everywhere = list(_places(dimensions))
    consumed = dimensions.analysis.consumed
    reading = [(s, a) for s, a in everywhere if id(s.value.axes[a]) in consumed]
    read = {u for s, a in reading for u in dimensions.units.units_of(s.value.axes[a])}
    rest = [(s, a) for s, a in everywhere if not dimensions.units.units_of(s.value.axes[a]) <= read]
    return [*reading, *rest]


def _gradients(calibration: Calibration) -> Iterator[dict[str, Tensor]]:
    """Gradients of the loss on each batch, the model in eval mode."""
    module = calibration.program.emit().eval()
    names = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    wanted = {name: p for name, p in names.items() if p.requires_grad} or names
    for batch in calibration.batches:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(calibration.seed)
            value = batch.loss(module(*batch.args, **batch.kwargs), probe_loss)
            found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
        yield {n: g for n, g in zip(wanted, found, strict=True) if g is not None}
