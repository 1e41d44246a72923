"""Products of several data operands, elementwise or as matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from graphopt.passes.relevance import families
from graphopt.passes.relevance.flow import times
from graphopt.passes.relevance.roles import Role
from graphopt.passes.relevance.rules.base import Rule
from graphopt.passes.relevance.site import BIAS, Site


@dataclass(frozen=True)
class Uniform(Rule):
    """Each of ``n`` factors takes ``1/n``, whichever way the product is associated.

    Achtibat et al. 2024 (AttnLRP), proposition 3.3, for ``n = 2``; by counting factors it is the
    same for ``(ab)c`` and ``a(bc)``, which halves at each product are not (arXiv 2510.18810).

    Attributes:
        gates: ``stop``: what a softmax or a sigmoid made is a weight on the other operand, which
            takes all (Arras et al. 2017; conservative propagation, Ali et al. 2022); ``share``:
            it is a factor as any other.
    """

    name: ClassVar[str] = "uniform"

    gates: Literal["stop", "share"] = "share"

    def propagate(self, site: Site) -> None:
        """Hand quotients on; relevance itself where a product only scales one value."""
        takers = self._takers(site)
        total = sum(takers.values())
        if len(takers) == 1 and not site.flow.is_quotient:
            (operand,) = takers
            elementwise = site.op.name not in families.MATRIX and site.op.name != "outer"
            if elementwise and site.value(operand).shape == site.result.shape:
                site.send(operand, site.flow.tensor, "relevance")
                return
        quotient = site.quotient()
        for node, tensor in site.vjp(quotient).items():
            if node in takers:
                share = takers[node] / total
                site.send(node, tensor if share == 1 else tensor * share)
        bias = site.argument(site.op.spec.bias)
        if bias is not None:
            site.book(BIAS, times(quotient, _broadcast(site, bias)))

    def _takers(self, site: Site) -> dict[fx.Node, int]:
        roles = {o: site.role(o) for o in site.op.operands}
        stopped = {Role.NORMALISER} | ({Role.GATE} if self.gates == "stop" else set())
        found = [o for o, role in roles.items() if role not in stopped]
        if not found:
            found = [o for o, role in roles.items() if role is not Role.NORMALISER]
        return {o: site.factors(o) for o in found or list(roles)}


def _broadcast(site: Site, bias):  # type: ignore[no-untyped-def]
    if site.op.name.startswith("conv"):
        return bias.reshape(-1, *[1] * (site.result.ndim - 2))
    return bias
