"""The plain gradient, and none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.errors import UnsupportedError
from graphopt.passes.relevance.flow import Flow, times
from graphopt.passes.relevance.rules.base import Rule
from graphopt.passes.relevance.site import Site

SINK = "gradient"


@dataclass(frozen=True)
class Gradient(Rule):
    """The quotient goes backwards as the gradient does: gradient times input.

    It doesn't conserve: what is gained or lost at each operation is booked as ``gradient``.
    """

    name: ClassVar[str] = "gradient"
    needs_quotients: ClassVar[bool] = True

    def propagate(self, site: Site) -> None:
        """Hand on vector-Jacobian products."""
        if not all(flow.is_quotient for flow in site.flows.values()):
            raise UnsupportedError(
                "gradients can't be taken below a rule that hands relevance itself on",
                node=site.op.node,
                hint="use 'as-gradient' here",
            )
        sent = site.vjp()
        site.send_all(sent)
        for index, flow in site.flows.items():
            site.book(SINK, times(flow.tensor, site.results[index]))
        for node in site.op.operands:
            if node in sent:
                site.book_at(node, SINK, -times(sent[node], site.value(node)))


@dataclass(frozen=True)
class AsGradient(Rule):
    """Relevance itself goes backwards as a gradient does: ``R_in = J^T R``.

    It is what zennit does where a composite names no rule, and conserves on sums, averages over
    whole windows, and copies.  What is gained or lost elsewhere is booked as ``gradient``.
    """

    name: ClassVar[str] = "as-gradient"

    def propagate(self, site: Site) -> None:
        """Hand vector-Jacobian products of the relevance on."""
        for index, flow in site.flows.items():
            site.flows[index] = Flow(flow.relevance(site.results[index]), "relevance")
            site.book(SINK, site.flows[index].tensor)
        for node, tensor in site.vjp().items():
            if node in site.op.operands:
                site.send(node, tensor, "relevance")
                site.book_at(node, SINK, -tensor)


@dataclass(frozen=True)
class StopGradient(Rule):
    """Nothing is handed on.

    Attributes:
        sink: What it is booked as.
    """

    name: ClassVar[str] = "stop"

    sink: str = "stopped"

    def propagate(self, site: Site) -> None:
        """Book all that arrives."""
        for index, flow in site.flows.items():
            result = site.results[index]
            site.book(self.sink, times(flow.tensor, result) if flow.is_quotient else flow.tensor)
