"""A mean over samples and how far to trust it; the order and the rank correlation of scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.plain import to_plain

_ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A mean over samples.

    Attributes:
        mean: The mean.
        standard_error: Its standard error: the deviation of the samples by the root of their
            number; infinite with one sample alone.
        samples: How many samples.
    """

    mean: float
    standard_error: float
    samples: int

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.standard_error:.2g}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return to_plain(self)


def estimate(values: Tensor) -> Estimate:
    """The mean of one value a sample, with its standard error, in float64.

    Raises:
        UsageError: No value.
    """
    values = values.detach().to(torch.float64).flatten()
    if not len(values):
        raise UsageError("nothing to average over: no samples")
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Estimate(float(values.mean()), error, len(values))


def descending(values: Tensor, seed: int = 0) -> Tensor:
    """Indices from the largest to the smallest of each row; equal ones in random order.

    Args:
        values: ``(rows, n)``.
        seed: Of the order among equals. Left to the sort, it would be that of the positions, and
            a constant relevance would profit from where objects tend to be.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.rand(values.shape, generator=generator).argsort(1).to(values.device)
    order = values.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    return shuffled.gather(1, order)


def average_ranks(values: Tensor) -> Tensor:
    """Rank of each value in its row, from 0; equal ones share the mean of theirs.

    Args:
        values: ``(rows, n)``.

    Returns:
        ``(rows, n)``, float64.
    """
    ordered = values.sort(1).values
    values = values.contiguous()
    below = torch.searchsorted(ordered, values, right=False)
    upto = torch.searchsorted(ordered, values, right=True)
    return (below + upto - 1).to(torch.float64) / 2


def spearman(first: Tensor, second: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Spearman's rank correlation of each row; 0 where one of both is constant.

    Args:
        first: ``(rows, n)``.
        second: ``(rows, n)``.
        allowed: ``(rows, n)``, bool: which values count; None: all.

    Returns:
        ``(rows,)``, float64.
    """
    if allowed is None or bool(allowed.all()):
        return pearson(average_ranks(first), average_ranks(second))
    pairs = zip(first, second, allowed, strict=True)
    found = [spearman(a[keep][None], b[keep][None]) for a, b, keep in pairs]
    return torch.cat(found)


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of each row, in float64; 0 where one of both is constant.

    Constant is what varies by no more than rounding does.
    """
    a, level = _centred(first)
    b, other = _centred(second)
    scale = a.norm(dim=1) * b.norm(dim=1)
    varies = (a.norm(dim=1) > _ROUNDING * level) & (b.norm(dim=1) > _ROUNDING * other)
    return torch.where(varies, (a * b).sum(1) / scale, 0.0).clamp(-1, 1)


def _centred(values: Tensor) -> tuple[Tensor, Tensor]:
    values = values.to(torch.float64)
    return values - values.mean(1, keepdim=True), values.norm(dim=1)
