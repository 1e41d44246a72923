"""A user's function as a criterion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.errors import UnsupportedError
from graphopt.passes.prune.criteria.base import Calibration, Criterion, Scores, places
from graphopt.passes.prune.dimensions import Dimension, Dimensions


@dataclass(frozen=True)
class Part:
    """An axis of a parameter along which units of a dimension lie.

    Attributes:
        parameter: The parameter's name.
        tensor: The parameter, detached; not to be written to.
        axis: The axis.
        places: For each unit its places on the axis, none where it has none.
    """

    parameter: str
    tensor: Tensor
    axis: int
    places: tuple[tuple[int, ...], ...]

    def of(self, unit: int) -> Tensor:
        """What a unit has of the parameter, counted from 0: its places, the other axes whole."""
        index = torch.tensor(self.places[unit], dtype=torch.int64, device=self.tensor.device)
        return self.tensor.index_select(self.axis, index)


@dataclass(frozen=True)
class DimensionView:
    """A dimension as a user's criterion sees it.

    Attributes:
        name: A parameter's name and axis that it shows in.
        width: How many units it has.
        parts: The axes of parameters that they lie along; what was removed in an earlier round
            is zero.
    """

    name: str
    width: int
    parts: tuple[Part, ...]


UserFunction = Callable[[DimensionView], Sequence[float] | Tensor]


def custom(function: UserFunction) -> Criterion:
    """A criterion that asks a function for the scores of one dimension at a time."""

    def measure(dimensions: Dimensions, _: Calibration) -> Scores:
        result: Scores = {}
        for dim in dimensions.all:
            result.update(zip(dim.units, _asked(function, view(dimensions, dim)), strict=True))
        return result

    return Criterion(getattr(function, "__name__", type(function).__name__), measure)


def view(dimensions: Dimensions, dim: Dimension) -> DimensionView:
    """A dimension with its parameters."""
    parts = []
    for slot, axis in places(dimensions):
        found: dict[int, list[int]] = {unit: [] for unit in dim.units}
        labels = dimensions.units.canonical(slot.value.axes[axis]).tolist()
        for place, label in enumerate(labels):
            for unit in dimensions.units.members(label) & found.keys():
                found[unit].append(place)
        if any(found.values()):
            each = tuple(tuple(found[unit]) for unit in dim.units)
            parts.append(Part(slot.path, slot.tensor.detach(), axis, each))
    return DimensionView(dim.name, dim.width, tuple(parts))


def _asked(function: UserFunction, asked: DimensionView) -> list[float]:
    given = function(asked)
    try:
        found = [float(x) for x in (given.tolist() if isinstance(given, Tensor) else given)]
    except TypeError:
        found = []
    if len(found) != asked.width or any(score < 0 for score in found):
        raise UnsupportedError(
            f"the criterion gives {given!r:.80} for {asked.name}",
            hint=f"one score for each of its {asked.width} units, none of them negative",
        )
    return found
