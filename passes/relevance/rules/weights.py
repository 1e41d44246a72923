"""Linear layers and convolutions: rules that look at contributions ``w_ij x_i`` and their signs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.rules.affine import Affine, Change, negative, positive
from graphopt.passes.relevance.rules.base import SUMS, WEIGHTED, ByWeights, Rule, Stabiliser
from graphopt.passes.relevance.rules.sums import share_signed
from graphopt.passes.relevance.site import EPSILON, Site


@dataclass(frozen=True)
class Epsilon(Rule):
    """``R_i = x_i sum_j w_ij / (z_j + eps) R_j`` (Bach et al. 2015, equation 58).

    On sums and averages, which have no bias, it is zennit's Norm.

    Attributes:
        eps: Moves ``z`` away from zero; 0 is LRP-0, which needs no division.
        stabiliser: What ``eps`` is relative to, see `Site.stabilised`.
    """

    name: ClassVar[str] = "epsilon"
    families: ClassVar[tuple[Family, ...]] = (*WEIGHTED, *SUMS)

    eps: float = 0.0
    stabiliser: Stabiliser = "rms"

    @property
    def folds(self) -> bool:
        """LRP-0 gives the same before and after."""
        return self.eps != 0

    def propagate(self, site: Site) -> None:
        """Hand quotients on; bias and stabiliser are booked."""
        if site.op.family not in WEIGHTED:
            share_signed(site, self.eps, self.stabiliser)
            return
        affine = Affine(site)
        if self.eps == 0:
            quotient = site.quotient()
            site.send_all(site.vjp(quotient))
        else:
            quotient = site.over(site.relevance(), affine.z, self.eps, self.stabiliser)
            site.send_all(affine.pulled(quotient))
        if not affine.has_data_bias:
            affine.take(quotient)


@dataclass(frozen=True)
class Gamma(ByWeights):
    """Positive contributions count more: weights ``w + gamma max(w, 0)``.

    Montavon et al. 2019, with the four terms for inputs and results of either sign (Andéol et al.
    2021): where a result is negative, negative contributions are favoured.  The matching part of
    the bias is favoured too.

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
        """Hand quotients on, one for each sign of the input.

        With ``c`` split by the sign of ``z`` into ``a`` and ``b``, what arrives at a positive input
        is ``(W + g W+)^T a + (W + g W-)^T b``, which is ``W^T (a + (1 + g) b) + g W+^T (a - b)``;
        at a negative one W+ and W- change places.
        """
        affine = Affine(site)
        gamma = self.gamma
        above = affine.added(affine.sum_of(positive, negative), positive)
        is_above = affine.z > 0
        favoured = torch.where(is_above, above, affine.z - above)
        total = affine.z + gamma * favoured
        quotient = site.over(site.relevance(), total, self.eps, self.stabiliser)
        a, b = torch.where(is_above, quotient, 0), torch.where(is_above, 0, quotient)
        parts = gamma * affine.vjp(positive, a - b)
        if site.is_nonnegative(affine.input):
            affine.send(affine.pull(a + (1 + gamma) * b) + parts)
        else:
            of_a, of_b = affine.pull(a), affine.pull(b)
            for_positive = of_a + (1 + gamma) * of_b + parts
            for_negative = (1 + gamma) * of_a + of_b - parts
            affine.send(torch.where(affine.x >= 0, for_positive, for_negative))
        affine.take(a, lambda w: w + gamma * positive(w))
        affine.take(b, lambda w: w + gamma * negative(w))


@dataclass(frozen=True)
class AlphaBeta(ByWeights):
    """Positive and negative contributions apart: ``alpha - beta = 1`` (Bach et al. 2015, eq. 60).

    Attributes:
        alpha: Weight of the positive ones.
        beta: Weight of the negative ones.
        missing: What becomes of the share of a sign that nothing contributes with: the ``other``
            one takes all, or it is absorbed (``absorb``, as in zennit); without beta it always is,
            as in z-plus.
        eps: Moves either sum away from zero.
        stabiliser: What ``eps`` is relative to.
    """

    name: ClassVar[str] = "alpha-beta"

    alpha: float = 2.0
    beta: float = 1.0
    missing: Literal["other", "absorb"] = "other"
    eps: float = 0.0
    stabiliser: Stabiliser = "rms"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0 or self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise UsageError("alpha-beta needs alpha - beta = 1, neither of them negative")

    def propagate(self, site: Site) -> None:
        """Hand quotients on, one for each sign of the input."""
        affine = Affine(site)
        above = affine.added(affine.sum_of(positive, negative), positive)
        below = affine.added(affine.sum_of(negative, positive), negative)
        plus, minus = self._shares(site, above, below)
        c_plus = site.over(plus, above, self.eps, self.stabiliser)
        c_minus = site.over(minus, below, self.eps, self.stabiliser)

        def sent(up: Change, down: Change) -> Tensor:
            found = affine.vjp(up, c_plus)
            return found + affine.vjp(down, c_minus) if self.beta else found

        sends = affine.by_sign(lambda: sent(positive, negative), lambda: sent(negative, positive))
        affine.send(sends)
        affine.take(c_plus, positive)
        affine.take(c_minus, negative)

    def _shares(self, site: Site, above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        relevance = site.relevance()
        plus, minus = self.alpha * relevance, -self.beta * relevance
        if self.missing == "absorb" or self.beta == 0:
            return plus, minus
        no_plus, no_minus = above == 0, below == 0
        plus = torch.where(no_minus, relevance, plus)
        minus = torch.where(no_plus, relevance, minus)
        none = torch.where(no_plus & no_minus, relevance, 0)
        site.book(EPSILON, none)
        return torch.where(no_plus, 0, plus), torch.where(no_minus, 0, minus)


@dataclass(frozen=True)
class ZPlus(ByWeights):
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
        total = affine.added(affine.sum_of(positive, negative), positive)
        quotient = site.over(site.relevance(), total, self.eps, self.stabiliser)
        affine.send(
            affine.by_sign(
                lambda: affine.vjp(positive, quotient), lambda: affine.vjp(negative, quotient)
            )
        )
        affine.take(quotient, positive)
