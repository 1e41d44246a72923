"""Signed sums: additions, reductions, averages, scaling, and homogeneous statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from graphopt.errors import UnsupportedError
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.flow import times
from graphopt.passes.relevance.rules.base import SUMS, Rule, Stabiliser
from graphopt.passes.relevance.rules.products import is_elementwise
from graphopt.passes.relevance.site import Site

_ADDITIONS = frozenset({"add", "sub", "rsub", "subtract"})


@dataclass(frozen=True)
class Proportional(Rule):
    """Each summand takes its share of the sum: ``R_a = a / (a + b) R``.

    Attributes:
        mode: ``signed`` as above, or ``absolute``: ``|a| / (|a| + |b|)`` (arXiv 2512.07010), which
            also shares among the factors of a product.  Differences (``x - mean(x)``) and
            statistics are always shared as signed.
        eps: Moves the sum away from zero; what that takes is booked as absorbed.
        stabiliser: What ``eps`` is relative to, see `Site.stabilised`.
    """

    name: ClassVar[str] = "proportional"
    families: ClassVar[tuple[Family, ...]] = (*SUMS, Family.PRODUCT)

    mode: Literal["signed", "absolute"] = "signed"
    eps: float = 0.0
    stabiliser: Stabiliser = "rms"

    def propagate(self, site: Site) -> None:
        """Hand on quotients (signed) or relevance (absolute)."""
        if site.op.family is Family.SCALE and _passes_through(site):
            return
        if site.op.family is Family.PRODUCT:
            self._factors(site)
            return
        one_sign = not site.op.is_region and site.op.name != "diff"
        if self.mode == "absolute" and site.op.family is not Family.STATISTIC and one_sign:
            _absolute(site)
            return
        share_signed(site, self.eps, self.stabiliser)

    def _factors(self, site: Site) -> None:
        if self.mode != "absolute" or not is_elementwise(site):
            raise UnsupportedError(
                "shares of a product by size are for elementwise ones, and absolute",
                node=site.op.node,
                hint="use the rule 'uniform' for products",
            )
        _share(site, {n: _factor(site, n).abs() for n in site.op.operands})


def share_signed(site: Site, eps: float, mode: str) -> None:
    """``R_a = a / (z + eps) R`` for each summand ``a`` of ``z``; the stabiliser's part is booked.

    A homogeneous statistic of degree ``d`` is ``1 / d`` times the sum of its inputs times its
    derivatives (Euler's theorem).
    """
    exact = eps == 0
    quotient = site.quotient() if exact else site.over(site.relevance(), site.result, eps, mode)
    sent = site.vjp(quotient)
    if site.op.family is Family.STATISTIC and site.op.spec.degree != 1.0:
        sent = {node: tensor / site.op.spec.degree for node, tensor in sent.items()}
    if site.op.family is Family.POOL:
        sent = _sampled(site, sent, quotient)
    site.send_all(sent)
    for node, addend in _constants(site):
        site.book_constant(node, times(quotient, addend))


def _sampled(site: Site, sent: dict[fx.Node, Tensor], quotient: Tensor) -> dict[fx.Node, Tensor]:
    """What goes to the values; the places at which they are sampled weigh them."""
    values: Any = site.op.argument(site.op.spec.data[0])
    if values not in site.op.operands:
        site.book_constant(values, times(quotient, site.result))
    return {n: tensor for n, tensor in sent.items() if n is values or n in site.followed}


def _passes_through(site: Site) -> bool:
    """Relevance itself goes through a scale unchanged."""
    operand = site.op.operands[0]
    same = site.value(operand).shape == site.result.shape
    if same and not site.followed and not site.flow.is_quotient:
        site.send(operand, site.flow.tensor, "relevance")
        return True
    return False


def _constants(site: Site) -> list[tuple[fx.Node | None, Tensor]]:
    """What a sum holds besides its data."""
    family, op = site.op.family, site.op
    # `diff` may be given what comes before and after
    padded = family is Family.REDUCE and bool(op.constants) and not op.is_region
    if not padded and (family is not Family.ADD or len(op.operands) > 1):
        return []
    node = next(iter(op.constants), None)
    return [(node, site.constant_part())]


def _absolute(site: Site) -> None:
    """Shares by size, for sums whose coefficients are one sign each."""
    if site.op.name in _ADDITIONS:
        _share(site, {n: _summand(site, n).abs() for n in site.op.operands})
        return
    operand, *others = site.op.operands
    if others or (site.op.family is Family.ADD and site.op.constants):
        raise UnsupportedError(
            "shares by size are for sums of values of one shape",
            node=site.op.node,
            hint="use the signed rule 'proportional' here",
        )
    size = site.value(operand).abs()
    leaf = size.detach().requires_grad_()
    with torch.enable_grad():
        total = site.op.run(lambda n: leaf if n is operand else site.whole(n))
    quotient = site.divided(site.relevance(), total.detach())
    (grad,) = torch.autograd.grad(total, leaf, quotient)
    site.send(operand, grad * size, "relevance")


def _share(site: Site, sizes: dict[fx.Node, Tensor]) -> None:
    """Hand on by sizes; constants take theirs."""
    constants = _constants(site)
    total = torch.zeros_like(site.result)
    for size in (*sizes.values(), *(c.abs() for _, c in constants)):
        total = total + size
    share = site.divided(site.relevance(), total)
    for node, size in sizes.items():
        site.send(node, (size * share).sum_to_size(site.value(node).shape), "relevance")
    for node, constant in constants:
        site.book_constant(node, constant.abs() * share)


def _summand(site: Site, node: fx.Node) -> Tensor:
    """What an operand adds to a sum."""
    scaled = site.op.argument(0 if site.op.name == "rsub" else 1)
    alpha: Any = site.op.node.kwargs.get("alpha", 1) if node is scaled else 1
    return site.value(node) if alpha == 1 else site.value(node) * alpha


def _factor(site: Site, node: fx.Node) -> Tensor:
    """What an operand multiplies a product with."""
    divides = site.op.name in ("div", "divide", "true_divide") and node is site.op.argument(1)
    return site.value(node).reciprocal() if divides else site.value(node)
