"""Linear layers and convolutions: rules that look at the signs of inputs and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from graphopt.passes.relevance import families
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.flow import signed, times
from graphopt.passes.relevance.rules.base import Rule
from graphopt.passes.relevance.rules.sums import stabilised_quotient
from graphopt.passes.relevance.site import BIAS, EPSILON, Site

Stabiliser = Literal["rms", "sign", "unsigned", "clip"]
Change = Callable[[Tensor], Tensor]

TINY = 1e-30
"""Keeps empty sums from being divided by; absorbed relevance is booked all the same."""


@dataclass(frozen=True)
class Epsilon(Rule):
    """``R_i = x_i sum_j w_ij / (z_j + eps) R_j`` (Bach et al. 2015, equation 58).

    Attributes:
        eps: Moves ``z`` away from zero; 0 is LRP-0, which needs no division.
        stabiliser: What ``eps`` is relative to, see `Site.stabilised`.
    """

    name: ClassVar[str] = "epsilon"

    eps: float = 0.0
    stabiliser: Stabiliser = "rms"

    def propagate(self, site: Site) -> None:
        """Hand quotients on; bias and stabiliser are booked."""
        quotient = stabilised_quotient(site, self.eps, self.stabiliser)
        site.send_all(site.vjp(quotient))
        book_bias(site, quotient)


def book_bias(site: Site, quotient: Tensor, change: Change = lambda b: b) -> None:
    """Book what the bias takes."""
    bias = site.argument(site.op.spec.bias)
    if bias is None or site.op.argument(site.op.spec.bias) in site.op.operands:
        return
    bias = change(bias)
    if bias.ndim == 1:
        site.book_bias(bias, quotient, channel(site))
    else:
        site.book(BIAS, times(quotient, bias))


def channel(site: Site) -> int:
    """The dimension of the result that the bias lies along."""
    if site.op.family is not Family.CONV:
        return -1
    weight: Any = site.argument(site.op.spec.weight)
    return site.result.ndim - (weight.ndim - 2) - 1


class Affine:
    """A linear layer as a function of its input and of changed weights."""

    def __init__(self, site: Site) -> None:
        self.site = site
        op = site.op
        self.bias_node = op.argument(op.spec.bias)
        (self.input,) = [n for n in op.operands if n is not self.bias_node]
        self.weight_nodes = [n for n in op.constants if n is not self.bias_node]
        self.x = site.value(self.input)

    @property
    def bias(self) -> Tensor | None:
        """The bias, or None."""
        found = self.site.argument(self.site.op.spec.bias)
        return found if isinstance(found, Tensor) else None

    def run(self, x: Tensor, weight: Change, bias: Change | None = None) -> Tensor:
        """The result for another input, with weights and bias changed; None: no bias."""
        value = self.site.whole

        def lookup(node: Any) -> Any:
            if node is self.input:
                return x
            if node is self.bias_node:
                return torch.zeros_like(value(node)) if bias is None else bias(value(node))
            return weight(value(node)) if node in self.weight_nodes else value(node)

        return self.site.op.run(lookup)

    def vjp(self, weight: Change, cotangent: Tensor) -> Tensor:
        """``W'^T c`` for changed weights."""
        leaf = torch.zeros_like(self.x).requires_grad_()
        with torch.enable_grad():
            result = self.run(leaf, weight)
        (grad,) = torch.autograd.grad(result, leaf, cotangent)
        return grad


def _positive(t: Tensor) -> Tensor:
    return t.clamp(min=0)


def _negative(t: Tensor) -> Tensor:
    return t.clamp(max=0)


def _shared(site: Site, relevance: Tensor, total: Tensor) -> Tensor:
    """``R / z`` for a sum of one sign, which is zero only where nothing contributes."""
    return site.divided(relevance, total)


@dataclass(frozen=True)
class Gamma(Rule):
    """Positive contributions count more: weights ``w + gamma max(w, 0)``.

    Montavon et al. 2019, with the four terms for inputs and results of either sign (Andéol et al.
    2021): where a result is negative, negative contributions are favoured.

    Attributes:
        gamma: How much more; 0 is LRP-0, infinity z-plus.
        eps: Moves the modified ``z`` away from zero.
        stabiliser: What ``eps`` is relative to.
    """

    name: ClassVar[str] = "gamma"

    gamma: float = 0.25
    eps: float = 0.0
    stabiliser: Stabiliser = "rms"

    def propagate(self, site: Site) -> None:
        """Hand quotients on, one for each sign of the input."""
        affine = Affine(site)
        relevance = site.relevance()
        up: Change = lambda w: w + self.gamma * _positive(w)  # noqa: E731
        down: Change = lambda w: w + self.gamma * _negative(w)  # noqa: E731
        positive_x, negative_x = _positive(affine.x), _negative(affine.x)
        above = affine.run(positive_x, up, up) + affine.run(negative_x, down)
        below = affine.run(positive_x, down, down) + affine.run(negative_x, up)
        is_above = site.result > 0
        total = torch.where(is_above, above, below)
        quotient = _over(site, relevance, total, self.eps, self.stabiliser)
        c_above = torch.where(is_above, quotient, 0)
        c_below = torch.where(is_above, 0, quotient)
        for_positive = affine.vjp(up, c_above) + affine.vjp(down, c_below)
        for_negative = affine.vjp(down, c_above) + affine.vjp(up, c_below)
        site.send(affine.input, torch.where(affine.x >= 0, for_positive, for_negative))
        book_bias(site, c_above, up)
        book_bias(site, c_below, down)


def _over(site: Site, relevance: Tensor, total: Tensor, eps: float, mode: str) -> Tensor:
    if eps == 0:
        return site.divided(relevance, total)
    moved = site.stabilised(eps, mode, total)
    quotient = relevance / moved
    site.book(EPSILON, quotient * (moved - total))
    return quotient


@dataclass(frozen=True)
class AlphaBeta(Rule):
    """Positive and negative contributions apart: ``alpha - beta = 1`` (Bach et al. 2015, eq. 60).

    Attributes:
        alpha: Weight of the positive ones.
        beta: Weight of the negative ones.
        eps: Moves either sum away from zero.
        stabiliser: What ``eps`` is relative to.
    """

    name: ClassVar[str] = "alpha-beta"

    alpha: float = 2.0
    beta: float = 1.0
    eps: float = 0.0
    stabiliser: Stabiliser = "rms"

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise ValueError("alpha-beta needs alpha - beta = 1, neither of them negative")

    def propagate(self, site: Site) -> None:
        """Hand quotients on, one for each sign of the input."""
        affine = Affine(site)
        relevance = site.relevance()
        # where one sign contributes nothing, the other one takes all
        above, below = self._sums(affine)
        plus = torch.where(below == 0, 1.0, self.alpha).to(relevance.dtype)
        minus = torch.where(above == 0, -1.0, self.beta).to(relevance.dtype)
        minus = torch.where(below == 0, 0.0, minus)
        plus = torch.where(above == 0, 0.0, plus)
        c_plus = self._quotient(site, relevance * plus, above)
        c_minus = self._quotient(site, -relevance * minus, below)
        site.book(EPSILON, torch.where((above == 0) & (below == 0), relevance, 0))
        for_positive = affine.vjp(_positive, c_plus)
        for_negative = affine.vjp(_negative, c_plus)
        if self.beta:
            for_positive = for_positive + affine.vjp(_negative, c_minus)
            for_negative = for_negative + affine.vjp(_positive, c_minus)
            book_bias(site, c_minus, _negative)
        book_bias(site, c_plus, _positive)
        site.send(affine.input, torch.where(affine.x >= 0, for_positive, for_negative))

    def _sums(self, affine: Affine) -> tuple[Tensor, Tensor]:
        positive_x, negative_x = _positive(affine.x), _negative(affine.x)
        above = affine.run(positive_x, _positive, _positive) + affine.run(negative_x, _negative)
        below = affine.run(positive_x, _negative, _negative) + affine.run(negative_x, _positive)
        return above, below

    def _quotient(self, site: Site, relevance: Tensor, total: Tensor) -> Tensor:
        return _over(site, relevance, total, self.eps, self.stabiliser)


@dataclass(frozen=True)
class ZPlus(Rule):
    """Positive contributions alone: alpha-beta with 1 and 0 (Montavon et al. 2017, equation 15).

    Attributes:
        eps: Moves the sum away from zero.
        stabiliser: What ``eps`` is relative to.
    """

    name: ClassVar[str] = "z-plus"

    eps: float = 0.0
    stabiliser: Stabiliser = "rms"

    def propagate(self, site: Site) -> None:
        """Hand quotients on, one for each sign of the input."""
        affine = Affine(site)
        total = affine.run(_positive(affine.x), _positive, _positive)
        total = total + affine.run(_negative(affine.x), _negative)
        quotient = _over(site, site.relevance(), total, self.eps, self.stabiliser)
        for_positive = affine.vjp(_positive, quotient)
        for_negative = affine.vjp(_negative, quotient)
        site.send(affine.input, torch.where(affine.x >= 0, for_positive, for_negative))
        book_bias(site, quotient, _positive)


@dataclass(frozen=True)
class WSquare(Rule):
    """By squared weights, whatever the input (Montavon et al. 2017, equation 12)."""

    name: ClassVar[str] = "w-square"

    def propagate(self, site: Site) -> None:
        """Hand relevance on."""
        _by_weights(site, torch.square)


@dataclass(frozen=True)
class Flat(Rule):
    """The same to each input that a result reads (Bach et al. 2016)."""

    name: ClassVar[str] = "flat"

    def propagate(self, site: Site) -> None:
        """Hand relevance on."""
        _by_weights(site, torch.ones_like)


def _by_weights(site: Site, change: Change) -> None:
    affine = Affine(site)
    total = affine.run(torch.ones_like(affine.x), change)
    quotient = site.divided(site.relevance(), total)
    site.send(affine.input, affine.vjp(change, quotient), "relevance")


@dataclass(frozen=True)
class ZBox(Rule):
    """For inputs between bounds, such as pixels (Montavon et al. 2017, equation 17).

    Attributes:
        low: Smallest value of an input; a number, or one for each channel.
        high: Largest value.
        eps: Moves the sum away from zero.
        stabiliser: What ``eps`` is relative to.
    """

    name: ClassVar[str] = "z-box"

    low: float | tuple[float, ...] = -3.0
    high: float | tuple[float, ...] = 3.0
    eps: float = 0.0
    stabiliser: Stabiliser = "rms"

    def propagate(self, site: Site) -> None:
        """Hand relevance on; the bias takes nothing."""
        affine = Affine(site)
        low, high = (_bound(b, affine.x) for b in (self.low, self.high))
        same: Change = lambda w: w  # noqa: E731
        total = (
            affine.run(affine.x, same) - affine.run(low, _positive) - affine.run(high, _negative)
        )
        quotient = _over(site, site.relevance(), total, self.eps, self.stabiliser)
        sent = affine.x * affine.vjp(same, quotient)
        sent = sent - low * affine.vjp(_positive, quotient) - high * affine.vjp(_negative, quotient)
        site.send(affine.input, sent, "relevance")


def _bound(bound: float | tuple[float, ...], x: Tensor) -> Tensor:
    if isinstance(bound, int | float):
        return torch.full_like(x, bound)
    values = torch.tensor(bound, dtype=x.dtype, device=x.device)
    return values.reshape(-1, *[1] * (x.ndim - 2)).expand_as(x)


__all__ = [
    "AlphaBeta",
    "Epsilon",
    "Flat",
    "Gamma",
    "WSquare",
    "ZBox",
    "ZPlus",
    "families",
    "signed",
]
