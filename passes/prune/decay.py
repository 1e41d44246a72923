"""Weights of redundant units that go to zero while training goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphopt.passes.prune.analysis import Analysis, Slot
from graphopt.passes.prune.rewrite import zero_


class Decay:
    """Scales the parameters of some units; each element once, whichever of its axes lose it.

    Attributes:
        units: The units.
    """

    def __init__(self, analysis: Analysis, units: frozenset[int]) -> None:
        """Find the places of the units.

        Args:
            analysis: Of the program whose parameters are scaled.
            units: What is redundant.
        """
        self.units = units
        self._places: list[tuple[Slot, Mapping[int, tuple[int, ...]], Tensor]] = []
        for slot in analysis.slots.values():
            kept = analysis.kept(slot, units) if slot.is_trained else {}
            if kept:
                stays = torch.ones(slot.tensor.shape, dtype=torch.bool, device=slot.tensor.device)
                zero_(stays, kept)
                self._places.append((slot, kept, ~stays))

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply all of the units' weights; with 0 they are exactly zero, whatever they were."""
        for slot, kept, goes in self._places:
            if factor == 0:
                zero_(slot.tensor, kept)
            else:
                slot.tensor.mul_(torch.where(goes.to(slot.tensor.device), factor, 1.0))

    @torch.no_grad()
    def values(self) -> list[Tensor]:
        """What the units' weights are."""
        return [slot.tensor[goes.to(slot.tensor.device)].clone() for slot, _, goes in self._places]

    @torch.no_grad()
    def put(self, values: list[Tensor]) -> None:
        """Set the units' weights."""
        for (slot, _, goes), value in zip(self._places, values, strict=True):
            slot.tensor[goes.to(slot.tensor.device)] = value
