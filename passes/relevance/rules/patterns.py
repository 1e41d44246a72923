"""Patterns: what a layer's input looks like where the layer answers, instead of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.errors import UnsupportedError
from graphopt.passes.relevance.rules.affine import Affine
from graphopt.passes.relevance.rules.base import ByWeights
from graphopt.passes.relevance.site import CONSTANTS, Site

SINK = "pattern"


@dataclass(frozen=True)
class PatternAttribution(ByWeights):
    """``R_i = sum_j w_ij a_ij R_j`` for the pattern ``a`` of each neuron (Kindermans et al. 2018).

    A pattern has ``sum_i w_ij a_ij = 1``, so that only what falls on padding is lost.
    """

    name: ClassVar[str] = "pattern-attribution"

    def propagate(self, site: Site) -> None:
        """Hand relevance on; the bias takes nothing."""
        affine = Affine(site)
        _replaced(affine, affine.weight * _pattern(affine), CONSTANTS)


@dataclass(frozen=True)
class PatternNet(ByWeights):
    """``S_i = sum_j a_ij S_j``: the estimated signal itself (Kindermans et al. 2018).

    It isn't conserved; the ledger books the difference as ``pattern``.
    """

    name: ClassVar[str] = "pattern-net"

    def propagate(self, site: Site) -> None:
        """Hand the signal on."""
        affine = Affine(site)
        _replaced(affine, affine.unscaled(_pattern(affine)), SINK)


def _pattern(affine: Affine) -> Tensor:
    found = affine.site.pattern()
    if found is None or found.shape != affine.weight.shape:
        raise UnsupportedError(
            "there is no pattern for this layer's weights",
            node=affine.site.op.node,
            hint="patterns come from data: explain(..., data=batches)",
        )
    return found.to(affine.weight)


def _replaced(affine: Affine, weight: Tensor, sink: str) -> None:
    relevance = affine.site.relevance()
    affine.send(affine.vjp(lambda _: weight, relevance), "relevance")
    total = affine.run(torch.ones_like(affine.x), lambda _: weight)
    affine.site.book(sink, relevance * (1 - total))
