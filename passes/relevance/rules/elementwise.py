"""Elementwise functions of one value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from graphopt.errors import UnsupportedError
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.rules.base import Rule
from graphopt.passes.relevance.site import Site

_PIECEWISE = frozenset({"relu", "leaky_relu", "prelu", "_prelu_kernel", "abs", "positive"})
"""Functions with ``f(x) = f'(x) x``: their derivative is the quotient."""


@dataclass(frozen=True)
class Identity(Rule):
    """All relevance goes through an elementwise function: ``R_in = R_out``."""

    name: ClassVar[str] = "identity"
    families: ClassVar[tuple[Family, ...]] = (
        Family.ACTIVATION,
        Family.NORM,
        Family.SOFTMAX,
        Family.SCALE,
    )

    def prepare(self, site: Site) -> Tensor | None:
        """``f(x) / x`` where it will be needed: one value is kept instead of two."""
        if site.slope is None or _is_piecewise(site):
            return None
        (operand,) = site.op.operands
        return slope_through_zero(site.value(operand), site.computed, site.slope)

    def propagate(self, site: Site) -> None:
        """Hand relevance on as it is, or its quotient times ``f(x) / x``."""
        (operand,) = site.op.operands
        flow, shape = site.flow, site.value(operand).shape
        if shape != site.result.shape:
            self._broadcast(site, operand)
        elif not flow.is_quotient:
            site.send(operand, flow.tensor, "relevance")
        elif _is_piecewise(site):
            site.send_all(site.vjp(flow.tensor), only=(operand,))
        elif site.slope is not None:
            site.send(operand, flow.tensor * site.prepared)
        else:
            site.send(operand, site.relevance(), "relevance")

    def _broadcast(self, site: Site, operand: fx.Node) -> None:
        """Each value takes what arrives at all results that are made from it alone."""
        if site.op.family is Family.SOFTMAX:
            raise UnsupportedError(
                "there is no one value to hand relevance on to: the result has another shape",
                node=site.op.node,
                hint="use the rule 'softmax-taylor'",
            )
        shape = site.value(operand).shape
        site.send(operand, site.relevance().sum_to_size(shape), "relevance")


def _is_piecewise(site: Site) -> bool:
    return site.op.name in _PIECEWISE and not site.op.is_region


def slope_through_zero(value: Tensor, result: Tensor, slope: float) -> Tensor:
    """``f(x) / x``, and its limit where ``x`` is zero."""
    # 0 / 0 is the only way to NaN here, but for NaN and infinity themselves
    return (result / value).nan_to_num(slope, math.inf, -math.inf)
