"""Values that are moved, copied, selected or masked: relevance goes the same way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from graphopt.passes.relevance import families
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.flow import Flow, times
from graphopt.passes.relevance.rules.base import Rule
from graphopt.passes.relevance.site import Site

_FILLED = frozenset(
    {"masked_fill", "where", "index_fill", "scatter", "index_put", "pad", "constant_pad_nd",
     "max_unpool2d", "max_unpool3d"}
)  # fmt: skip


@dataclass(frozen=True)
class Route(Rule):
    """Relevance goes back to where each value came from; what was filled in is a constant."""

    name: ClassVar[str] = "route"
    families: ClassVar[tuple[Family, ...]] = (Family.ROUTE,)

    def propagate(self, site: Site) -> None:
        """Hand relevance on in the form in which it arrives."""
        _same_form(site)
        form = next(iter(site.flows.values())).form
        for node, tensor in site.vjp().items():
            site.send(node, tensor, form)
        if (site.op.constants or site.op.name in _FILLED) and not _fills_nothing(site):
            site.book_constant(_first(site.op.constants), _filled(site))


@dataclass(frozen=True)
class WinnerTakesAll(Rule):
    """The largest value takes all."""

    name: ClassVar[str] = "winner-takes-all"
    families: ClassVar[tuple[Family, ...]] = (Family.MAX,)

    def propagate(self, site: Site) -> None:
        """Hand relevance on in the form in which it arrives."""
        _same_form(site)
        flow = next(iter(site.flows.values()))
        sent = site.vjp()
        for node, tensor in sent.items():
            site.send(node, tensor, flow.form)
        if site.op.constants:
            (operand,) = site.op.operands
            won = flow.relevance(site.result)
            kept = sent[operand] if not flow.is_quotient else sent[operand] * site.value(operand)
            if site.op.name in families.SCATTERED:  # the values stand elsewhere
                site.book_constant(site.op.constants[0], won)
                site.book_constant(site.op.constants[0], -kept, at=operand)
            else:
                site.book_constant(site.op.constants[0], won - _spread(kept, won))


def _fills_nothing(site: Site) -> bool:
    """Whether what is filled in is zero, of which a quotient gives nothing."""
    value = {"pad": 3, "constant_pad_nd": 2}.get(site.op.name)
    if value is None or not site.flow.is_quotient:
        return False
    constant = site.op.name != "pad" or site.op.argument(2) in (None, "constant")
    return constant and site.op.argument(value) in (None, 0, 0.0)


def _spread(part: Tensor, like: Tensor) -> Tensor:
    """Sums over what a value was broadcast to, in equal parts at the places of the result."""
    if part.shape == like.shape:
        return part
    return torch.broadcast_to(part * (part.numel() / like.numel()), like.shape)


def _same_form(site: Site) -> None:
    """Bring what arrives at several results into one form."""
    if len({flow.form for flow in site.flows.values()}) > 1:
        results = site.results
        for index, flow in site.flows.items():
            site.flows[index] = Flow(flow.relevance(results[index]), "relevance")


def _filled(site: Site) -> Tensor:
    """Relevance at places that hold a constant."""
    if site.flow.is_quotient:
        return times(site.flow.tensor, site.constant_part())
    ones = {n: torch.ones_like(site.value(n)) for n in site.op.operands}
    moved = site.op.run(lambda n: ones[n] if n in ones else site.whole(n))
    share = (moved - site.constant_part()).nan_to_num()
    return site.flow.tensor * (1 - share)


def _first(nodes: tuple[fx.Node, ...]) -> fx.Node | None:
    return nodes[0] if nodes else None
