"""Elementwise functions of one value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from graphopt.errors import UnsupportedError
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.origins import Origin
from graphopt.passes.relevance.rules.base import Rule
from graphopt.passes.relevance.site import CONSTANTS, Site

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
        origin = site.origin
        if origin is None or origin.value or _is_piecewise(site):
            return None
        return _secant(site, origin)

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
        elif site.prepared is not None:
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


@dataclass(frozen=True)
class Secant(Identity):
    """What a function is at zero is a constant; the rest goes through it.

    ``R_in = R_out (f(x) - f(0)) / f(x)``, and ``R_out f(0) / f(x)`` stays as a constant's, as a
    bias's would.  For ReLU, GELU, tanh and all else with ``f(0) = 0`` that is the identity; for a
    sigmoid, softplus or exponential the identity would hand on ``R / x``, which explodes where
    ``x`` is near zero, and turns signs around where ``x`` is negative and ``f(x)`` is not.  Where
    ``f(0)`` isn't a number (logarithm, reciprocal) all goes through.
    """

    name: ClassVar[str] = "secant"
    families: ClassVar[tuple[Family, ...]] = (Family.ACTIVATION,)

    def prepare(self, site: Site) -> Tensor | None:
        """``(f(x) - f(0)) / x`` where it will be needed."""
        origin = _lifted(site)
        return super().prepare(site) if origin is None else _secant(site, origin)

    def propagate(self, site: Site) -> None:
        """Hand on the secant's part, and book the constant's."""
        origin = _lifted(site)
        if origin is None:
            super().propagate(site)
            return
        # where f(x) = 0 there is nothing to share, though f(0) and the rest of it cancel
        quotient = torch.where(site.result == 0, 0, site.quotient())
        (operand,) = site.op.operands
        site.send(operand, quotient * site.prepared)
        site.book(CONSTANTS, quotient * origin.value)


def _lifted(site: Site) -> Origin | None:
    """The origin of a function for which ``f(0)`` is a number other than zero."""
    origin = site.origin
    return origin if origin is not None and origin.value else None


def _is_piecewise(site: Site) -> bool:
    return site.op.name in _PIECEWISE and not site.op.is_region


def _secant(site: Site, origin: Origin) -> Tensor:
    """``(f(x) - f(0)) / x``, and its limit ``f'(0)`` where ``x`` is zero."""
    (operand,) = site.op.operands
    value, result = site.value(operand), site.computed
    if not origin.value:
        # 0 / 0 is the only way to NaN here, but for NaN and infinity themselves
        return (result / value).nan_to_num(origin.slope, math.inf, -math.inf)
    # nearer than this f(x) - f(0) is rounding, and the limit as good as the secant
    near = value.abs() < torch.finfo(value.dtype).eps ** 0.5
    risen = (result - origin.value) / torch.where(near, 1, value)
    return torch.where(near, origin.slope, risen)
