"""First layers: rules that look at the weights, and at what an input may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.rules.affine import Affine, channel, negative, positive, same
from graphopt.passes.relevance.rules.base import ByWeights, Stabiliser
from graphopt.passes.relevance.site import Site

Bound = float | tuple[float, ...]


@dataclass(frozen=True)
class WSquare(ByWeights):
    """By squared weights, whatever the input (Montavon et al. 2017, equation 12).

    Attributes:
        bias: Whether the squared bias takes its share, as in zennit.
        eps: Moves the sum away from zero.
        stabiliser: What ``eps`` is relative to.
    """

    name: ClassVar[str] = "w-square"

    bias: bool = False
    eps: float = 0.0
    stabiliser: Stabiliser = "rms"

    def propagate(self, site: Site) -> None:
        """Hand relevance on."""
        affine = Affine(site)
        total = affine.run(torch.ones_like(affine.x), torch.square)
        if self.bias:
            total = affine.added(total, torch.square)
        quotient = site.over(site.relevance(), total, self.eps, self.stabiliser)
        affine.send(affine.vjp(torch.square, quotient), "relevance")
        if self.bias:
            affine.take(quotient, torch.square)


@dataclass(frozen=True)
class Flat(ByWeights):
    """The same to each input that a result reads (Bach et al. 2016).

    Attributes:
        eps: Moves the number of inputs away from zero.
        stabiliser: What ``eps`` is relative to.
    """

    name: ClassVar[str] = "flat"

    eps: float = 0.0
    stabiliser: Stabiliser = "rms"

    def propagate(self, site: Site) -> None:
        """Hand relevance on."""
        affine = Affine(site)
        total = affine.run(torch.ones_like(affine.x), torch.ones_like)
        quotient = site.over(site.relevance(), total, self.eps, self.stabiliser)
        affine.send(affine.vjp(torch.ones_like, quotient), "relevance")


@dataclass(frozen=True)
class ZBox(ByWeights):
    """For inputs between bounds, such as pixels (Montavon et al. 2017, equation 17).

    Attributes:
        low: Smallest value of an input; a number, or one for each channel.
        high: Largest value.
        eps: Moves the sum away from zero.
        stabiliser: What ``eps`` is relative to.
    """

    name: ClassVar[str] = "z-box"

    low: Bound = -3.0
    high: Bound = 3.0
    eps: float = 0.0
    stabiliser: Stabiliser = "rms"

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = (b if isinstance(b, tuple) else (b,) for b in (self.low, self.high))
        numbers = all(isinstance(v, int | float) for v in (*low, *high))
        fits = numbers and (len(low) == len(high) or 1 in (len(low), len(high)))
        size = max(len(low), len(high))
        pairs = zip(low * size, high * size, strict=False) if fits else ()
        if not fits or any(a > b for a, b in pairs):
            raise UsageError(
                f"z-box from {self.low} to {self.high}",
                hint="a number for low and high, low <= high, or one for each channel",
            )

    def propagate(self, site: Site) -> None:
        """Hand relevance on; the bias takes nothing."""
        affine = Affine(site)
        low, high = (_spread(b, site, affine.x) for b in (self.low, self.high))
        total = affine.run(affine.x, same) - affine.run(low, positive) - affine.run(high, negative)
        quotient = site.over(site.relevance(), total, self.eps, self.stabiliser)
        sent = affine.x * affine.pull(quotient)
        sent = sent - low * affine.vjp(positive, quotient) - high * affine.vjp(negative, quotient)
        affine.send(sent, "relevance")


def _spread(bound: Any, site: Site, x: Tensor) -> Tensor:
    """A bound for each value of the input."""
    if isinstance(bound, int | float):
        return torch.full_like(x, bound)
    dim = channel(site) if site.op.family is Family.CONV else -1
    if len(bound) not in (1, x.shape[dim]):
        raise UsageError(
            f"z-box has {len(bound)} bounds for {x.shape[dim]} channels", node=site.op.node
        )
    values = torch.tensor(bound, dtype=x.dtype, device=x.device)
    return values.reshape(-1, *[1] * (-dim - 1)).expand_as(x)
