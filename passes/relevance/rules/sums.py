"""Signed sums: additions, reductions, averages, scaling, and homogeneous statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.flow import times
from graphopt.passes.relevance.rules.base import Rule
from graphopt.passes.relevance.site import EPSILON, Site


@dataclass(frozen=True)
class Proportional(Rule):
    """Each summand takes its share of the sum: ``R_a = a / (a + b) R``.

    Attributes:
        mode: ``signed`` as above, or ``absolute``: ``|a| / (|a| + |b|)`` (Lee et al., DynamicLRP).
        eps: Moves the sum away from zero; what that takes is booked as absorbed.
        stabiliser: What ``eps`` is relative to, see `Site.stabilised`.
    """

    name: ClassVar[str] = "proportional"

    mode: Literal["signed", "absolute"] = "signed"
    eps: float = 0.0
    stabiliser: Literal["rms", "sign", "unsigned", "clip"] = "rms"

    def propagate(self, site: Site) -> None:
        """Hand on quotients (signed) or relevance (absolute)."""
        if site.op.family is Family.SCALE and _passes_through(site):
            return
        if self.mode == "absolute" and site.op.family is not Family.STATISTIC:
            _absolute(site)
            return
        quotient = stabilised_quotient(site, self.eps, self.stabiliser)
        degree = site.op.spec.degree if site.op.family is Family.STATISTIC else 1.0
        sent = site.vjp(quotient)
        if degree != 1.0:
            sent = {node: tensor / degree for node, tensor in sent.items()}
        site.send_all(sent)
        if site.op.family is Family.ADD:
            for node, addend in _constants(site):
                site.book_constant(node, times(quotient, addend))


def stabilised_quotient(site: Site, eps: float, mode: str) -> Tensor:
    """``R / (z + eps)``; what the stabiliser takes is booked."""
    if eps == 0:
        return site.quotient()
    moved = site.stabilised(eps, mode)
    quotient = site.relevance() / moved
    site.book(EPSILON, quotient * (moved - site.result))
    return quotient


def _passes_through(site: Site) -> bool:
    """Relevance itself goes through a scale unchanged."""
    operand = site.op.operands[0]
    same = site.value(operand).shape == site.result.shape
    if same and not site.flow.is_quotient:
        site.send(operand, site.flow.tensor, "relevance")
        return True
    return False


def _constants(site: Site) -> list[tuple[fx.Node | None, Tensor]]:
    """What a sum holds besides its data."""
    if len(site.op.operands) > 1:
        return []
    if site.op.name in ("log_softmax", "_log_softmax"):
        operand = next(iter(site.op.operands))
        return [(None, site.result - site.value(operand))]
    node = site.op.constants[0] if site.op.constants else None
    return [(node, site.constant_part())]


def _absolute(site: Site) -> None:
    """Shares by size, for sums whose coefficients are one sign each."""
    relevance = site.relevance()
    sizes = {n: site.value(n).abs() for n in site.op.operands}
    if site.op.family is Family.ADD:
        addend = torch.zeros_like(site.result)
        for _, constant in _constants(site):
            addend = addend + constant.abs()
        total = sum(sizes.values(), addend)
        share = site.divided(relevance, total)
        for node in site.op.operands:
            part = (sizes[node] * share).sum_to_size(site.value(node).shape)
            site.send(node, part, "relevance")
        for node, constant in _constants(site):
            site.book_constant(node, constant.abs() * share)
        return
    operand = site.op.operands[0]
    leaf = sizes[operand].detach().requires_grad_()
    with torch.enable_grad():
        total = site.op.run(lambda n: leaf if n is operand else site.whole(n))
    (grad,) = torch.autograd.grad(total, leaf, site.divided(relevance, total.detach()))
    site.send(operand, grad * sizes[operand], "relevance")
