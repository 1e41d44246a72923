"""What criteria have in common: what they are, what they look at, sums over the places of units."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from graphopt.batches import Batch
from graphopt.ir.program import Program
from graphopt.passes.prune.analysis import Slot
from graphopt.passes.prune.dimensions import Dimensions

Scores = dict[int, float]
"""A score for each unit; those that are missing have 0."""


@dataclass(frozen=True)
class Calibration:
    """What criteria may look at.

    Attributes:
        program: The program as it stands, what was removed before set to zero.
        source: The program of which the dimensions were found; node by node the same graphs.
        batches: Batches; those without a loss are given `graphopt.comparison.probe_loss`, a fixed
            projection of the outputs: what is then estimated is how far the outputs move.
        seed: Of random scores, and of random draws in training mode.
        known: Gradients that are known already, of one batch each, by the parameters' names.
    """

    program: Program
    source: Program
    batches: Sequence[Batch]
    seed: int
    known: tuple[Mapping[str, Tensor], ...] = ()

    @property
    def count(self) -> int:
        """Of how many batches there are gradients."""
        return len(self.batches) + len(self.known)


@dataclass(frozen=True)
class Criterion:
    """A way of telling what units are worth.

    Attributes:
        name: In options and reports.
        measure: From dimensions and a calibration to scores.
        needs: What it looks at besides weights. A criterion that looks at gradients or activations
            holds for small changes only, and is asked anew in every round.
        adds_up: Whether scores estimate what the loss or the outputs lose, so that a sum over
            units of all dimensions means something and may be maximised.
        measured: Whether scores rank units only, and widths follow from measured curves.
    """

    name: str
    measure: Callable[[Dimensions, Calibration], Scores]
    needs: Literal["nothing", "gradients", "activations"] = "nothing"
    adds_up: bool = False
    measured: bool = False

    @property
    def reads_data(self) -> bool:
        """Whether batches matter."""
        return self.measured or self.needs != "nothing"


def places(dimensions: Dimensions) -> Iterator[tuple[Slot, int]]:
    """Axes of parameters that have units."""
    for slot in dimensions.analysis.slots.values():
        for axis, labels in enumerate(slot.value.axes):
            if slot.is_trained and dimensions.units.is_free(labels):
                yield slot, axis


def add(dimensions: Dimensions, slot: Slot, axis: int, values: Tensor, total: Scores) -> None:
    """Add to each unit the sum of a tensor's elements at its places.

    Args:
        dimensions: The dimensions.
        slot: A parameter.
        axis: One of its axes.
        values: Of the parameter's shape.
        total: Grows.
    """
    others = [i for i in range(values.dim()) if i != axis]
    sums = (values.sum(others) if others else values).tolist()
    labels = dimensions.units.canonical(slot.value.axes[axis]).tolist()
    for label, value in zip(labels, sums, strict=True):
        for unit in dimensions.units.members(label):
            total[unit] = total.get(unit, 0.0) + value
