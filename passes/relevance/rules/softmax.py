"""Softmax as an operation of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.flow import times
from graphopt.passes.relevance.rules.base import Rule
from graphopt.passes.relevance.site import SOFTMAX, Site


@dataclass(frozen=True)
class SoftmaxTaylor(Rule):
    """The first-order term of softmax at ``x``: ``R_in = x (R - s sum(R))``.

    Achtibat et al. 2024 (AttnLRP), proposition 3.1.  As a quotient it is the gradient.  The bias
    of the expansion takes the rest, which is booked.
    """

    name: ClassVar[str] = "softmax-taylor"
    families: ClassVar[tuple[Family, ...]] = (Family.SOFTMAX,)

    def propagate(self, site: Site) -> None:
        """Hand quotients on."""
        (operand,) = site.op.operands
        quotient = site.quotient()
        sent = site.vjp(quotient)[operand]
        if sent.shape == site.result.shape:  # a row in which everything is masked
            sent = torch.where(site.result.isnan(), 0, sent)
        site.send(operand, sent)
        arrived = times(quotient, site.result)
        site.book(SOFTMAX, arrived)
        site.book_at(operand, SOFTMAX, -times(sent, site.value(operand)))
