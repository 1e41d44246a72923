"""Criteria that look at gradients of parameters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import UnsupportedError
from graphopt.ir.program import Program
from graphopt.passes.prune.analysis import Slot
from graphopt.passes.prune.criteria.base import Calibration, Scores, add, places
from graphopt.passes.prune.criteria.ends import calls, ends
from graphopt.passes.prune.dimensions import Dimensions
from graphopt.passes.prune.outputs import gradients_of, loss_of


def taylor(dimensions: Dimensions, calibration: Calibration) -> Scores:
    """``E |sum w g|``, see `taylor2`."""
    return _taylor(dimensions, calibration, 1)


def taylor2(dimensions: Dimensions, calibration: Calibration) -> Scores:
    """``E (sum w g)^2`` over the weights that read the unit (Molchanov et al. 2019).

    g is the loss's gradient on a batch, E the mean over batches: the square of what the loss
    changes by to first order, when the unit is taken from those that read it.
    """
    return _taylor(dimensions, calibration, 2)


def hesso(dimensions: Dimensions, calibration: Calibration) -> Scores:
    """The five scores of HESSO, a fifth each (Chen et al. 2024, as its code has them).

    Over all weights x of a unit, g their mean gradient: ``||x||``; ``||x|| / size``;
    ``1 + cos(x, g)``; ``|x g|``; ``(x g)^2 / 2``; each relative to its l2 norm over all units.
    The gradient is the plain one of the batches: there is no training whose momentum could be had.
    """
    xx, gg, xg, size = (_zeros(dimensions) for _ in range(4))
    found = _mean_gradient(calibration)
    for slot, axis in places(dimensions):
        x = slot.tensor.detach().double()
        g = found.get(slot.path, torch.zeros_like(x))
        for total, value in ((xx, x * x), (gg, g * g), (xg, x * g), (size, torch.ones_like(x))):
            add(dimensions, slot, axis, value, total)
    scores = np.array([_five(xx[u], gg[u], xg[u], size[u]) for u in xx]).reshape(-1, 5)
    norms = np.linalg.norm(scores, axis=0)
    shared = (scores / np.where(norms > 0, norms, 1.0)).mean(axis=1)
    return dict(zip(xx, shared.tolist(), strict=True))


def _five(xx: float, gg: float, xg: float, size: float) -> tuple[float, ...]:
    norm, lengths = math.sqrt(xx), math.sqrt(xx * gg)
    cosine = xg / lengths if lengths else 0.0
    return norm, norm / max(size, 1.0), 1 + cosine, abs(xg), 0.5 * xg * xg


def _zeros(dimensions: Dimensions) -> Scores:
    return {unit: 0.0 for dim in dimensions.all for unit in dim.units}


def _mean_gradient(calibration: Calibration) -> dict[str, Tensor]:
    """The mean of the batches' gradients, by parameter."""
    total: dict[str, Tensor] = {}
    for found in gradients(calibration):
        for name, gradient in found.items():
            total[name] = total.get(name, 0.0) + gradient.double() / calibration.count
    return total


def _taylor(dimensions: Dimensions, calibration: Calibration, power: int) -> Scores:
    readers = _readers(dimensions, calibration.source)
    result: Scores = defaultdict(float)
    for found in gradients(calibration):
        total: Scores = {}
        for slot, axis in readers:
            gradient = found.get(slot.path)
            if gradient is not None:
                product = slot.tensor.detach().double() * gradient.double()
                add(dimensions, slot, axis, product, total)
        for unit, value in total.items():
            result[unit] += abs(value) ** power / calibration.count
    return dict(result)


def _readers(dimensions: Dimensions, source: Program) -> list[tuple[Slot, int]]:
    """Axes over which weights read their input; all axes of units that nothing reads like that."""
    values = dimensions.analysis.values
    graphs = [g for g in (source.module, source.eval_module) if g is not None]
    summed = {
        id(values[weight].axes[axis])
        for graph in graphs
        for node, static in calls(graph)
        for weight, axis, _ in ends(dimensions, node, static, weights=True)
    }
    everywhere = list(places(dimensions))
    reading = [(s, a) for s, a in everywhere if id(s.value.axes[a]) in summed]
    read = {u for s, a in reading for u in dimensions.units.units_of(s.value.axes[a])}
    rest = [(s, a) for s, a in everywhere if not dimensions.units.units_of(s.value.axes[a]) <= read]
    return [*reading, *rest]


def gradients(calibration: Calibration) -> Iterator[Mapping[str, Tensor]]:
    """Gradients of the loss on each batch, the model in eval mode; first those that are known.

    Raises:
        UnsupportedError: No batch gives any parameter a gradient.
    """
    yield from calibration.known
    module = calibration.program.emit().eval()
    names = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    wanted = {name: p for name, p in names.items() if p.requires_grad} or names
    any_found = any(calibration.known)
    for batch in calibration.batches:
        with torch.enable_grad():
            value = loss_of(module, batch, calibration.seed)
            found = gradients_of(value, list(wanted.values()))
        result = {n: g for n, g in zip(wanted, found, strict=True) if g is not None}
        any_found = any_found or bool(result)
        yield result
    if not any_found:
        raise UnsupportedError(
            "a criterion of gradients: no parameter got one",
            hint="give a loss that depends on the parameters, or a criterion of weights alone",
        )
