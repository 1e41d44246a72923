"""Products of several data operands, elementwise or as matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from graphopt.errors import UsageError, suggest
from graphopt.passes.relevance import families
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.flow import times
from graphopt.passes.relevance.roles import Role
from graphopt.passes.relevance.rules.base import Rule
from graphopt.passes.relevance.site import BIAS, Site

_STOPPABLE = [role.value for role in Role if role is not Role.VALUE]


@dataclass(frozen=True)
class Uniform(Rule):
    """Each of ``n`` factors takes ``1/n``, whichever way the product is associated.

    Achtibat et al. 2024 (AttnLRP), proposition 3.3, for ``n = 2``; by counting factors it is the
    same for ``(ab)c`` and ``a(bc)``, which halves at each product are not (arXiv 2510.18810).

    Attributes:
        stop: Roles of operands that are taken for constants, so that the others take all:
            ``attention`` and ``gate``, what a softmax or a sigmoid made (Arras et al. 2017;
            conservative propagation, Ali et al. 2022), ``selection``, the parameters of a selective
            scan (Jafari et al. 2024), and ``activated``, the activation of a gated MLP.
            Normalisers always are.
    """

    name: ClassVar[str] = "uniform"
    families: ClassVar[tuple[Family, ...]] = (Family.PRODUCT,)

    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for role in self.stop:
            if role not in _STOPPABLE:
                hint = suggest(str(role), _STOPPABLE) or f"known: {', '.join(_STOPPABLE)}"
                raise UsageError(f"operands of a product have no role {role!r}", hint=hint)

    def propagate(self, site: Site) -> None:
        """Hand quotients on; relevance itself where a product only scales one value."""
        takers = site.takers((Role.NORMALISER, *self.stop))
        bias = site.op.argument(site.op.spec.bias)
        # what is both factors (a Gram matrix) gets the gradient of both
        places = [site.op.argument(place) for place in site.op.spec.data]
        total = sum(count * max(1, places.count(node)) for node, count in takers.items())
        if len(takers) == 1 and bias is None and not site.flow.is_quotient:
            (operand,) = takers
            if is_elementwise(site) and site.value(operand).shape == site.result.shape:
                site.send(operand, site.flow.tensor, "relevance")
                return
        quotient = site.quotient()
        shares = {node: count / total for node, count in takers.items()}
        first = 1.0
        if len({*shares.values()}) == 1 and bias is None and is_elementwise(site):
            first = next(iter(shares.values()))  # one multiplication instead of one for each
        for node, tensor in site.vjp(quotient if first == 1 else quotient * first).items():
            if node in takers:
                share = shares[node] / first
                site.send(node, tensor if share == 1 else tensor * share)
            elif node is bias:  # added to the product, as in baddbmm
                site.send(node, tensor)
        if bias is not None and bias not in site.op.operands:
            site.book(BIAS, times(quotient, added(site, bias)))


def is_elementwise(site: Site) -> bool:
    """Whether each element of a product has factors of its own."""
    name = site.op.name
    mixing = name in families.MATRIX or name == "outer" or site.op.spec.weight is not None
    return not mixing


def added(site: Site, bias: fx.Node) -> Tensor:
    """What is added to a product, broadcast to the result."""
    value: Any = site.whole(bias)
    if site.op.name.startswith(("conv", "_conv")):
        weight: Any = site.argument(site.op.spec.weight)
        value = value.reshape(-1, *[1] * (weight.ndim - 2))
    return value * site.op.node.kwargs.get("beta", 1)
