"""The fused attention, as the operations that it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt.errors import UnsupportedError
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.flow import times
from graphopt.passes.relevance.rules.base import Rule
from graphopt.passes.relevance.site import CONSTANTS, SOFTMAX, Site


class Attention:
    """Arguments of one ``scaled_dot_product_attention``.

    Attributes:
        query: ``[..., heads, length, width]``.
        key: ``[..., heads, keys, width]``, repeated for grouped heads.
        value: ``[..., heads, keys, width of values]``, likewise.
        mask: True where a key counts, or added to the scores; or None.
        scale: Of the scores.
        repeats: How many heads of queries share one of keys and values.

    Raises:
        UnsupportedError: It has dropout: which weights were dropped isn't known afterwards.
    """

    def __init__(self, site: Site) -> None:
        q, k, v, mask, rate, causal, scale, grouped = (site.argument(i) for i in range(8))
        if rate:
            raise UnsupportedError(
                "attention drops some of its weights at random, in eval mode too",
                node=site.op.node,
                hint="dropout_p=self.dropout if self.training else 0.0",
            )
        self.query = q
        self.repeats = q.shape[-3] // k.shape[-3] if grouped else 1
        self.key, self.value = self._repeated(k), self._repeated(v)
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.mask, self.causal = mask, bool(causal)
        if causal:
            size = (q.shape[-2], k.shape[-2])
            self.mask = torch.ones(size, dtype=torch.bool, device=q.device).tril()

    def probabilities(self) -> Tensor:
        """Softmax of the scores; zero in rows where everything is masked."""
        scores = (self.query * self.scale) @ self.key.transpose(-1, -2)
        if self.mask is None or self.causal:
            if self.mask is not None:  # a causal row always has a place that counts
                scores = torch.where(self.mask, scores, -torch.inf)
            return scores.softmax(-1)
        if self.mask.dtype == torch.bool:
            scores = torch.where(self.mask, scores, -torch.inf)
        else:
            scores = scores + self.mask
        return scores.softmax(-1).nan_to_num()

    def _repeated(self, x: Tensor) -> Tensor:
        return x if self.repeats == 1 else x.repeat_interleave(self.repeats, -3)

    def shared(self, c: Tensor) -> Tensor:
        """Sums over the heads that share a key or value."""
        if self.repeats == 1:
            return c
        return c.unflatten(-3, (c.shape[-3] // self.repeats, self.repeats)).sum(-3)


@dataclass(frozen=True)
class CPAttention(Rule):
    """Probabilities are constants, values take all (Ali et al. 2022, conservative propagation)."""

    name: ClassVar[str] = "cp-attention"
    families: ClassVar[tuple[Family, ...]] = (Family.ATTENTION,)

    def propagate(self, site: Site) -> None:
        """Hand quotients on to the values."""
        quotient = site.quotient()
        value = _operands(site)[2]
        if value not in site.op.operands:
            site.book_constant(value, times(quotient, site.result))
            return
        attention = Attention(site)
        sent = attention.probabilities().transpose(-1, -2) @ quotient
        site.send(value, _as(attention.shared(sent), site.value(value)))


@dataclass(frozen=True)
class AttnLRP(Rule):
    """Halves at both products, the Taylor rule at softmax (Achtibat et al. 2024)."""

    name: ClassVar[str] = "attnlrp"
    families: ClassVar[tuple[Family, ...]] = (Family.ATTENTION,)

    def propagate(self, site: Site) -> None:
        """Hand quotients on to queries, keys and values."""
        quotient = site.quotient()
        nodes = _operands(site)
        inside = [n in site.op.operands for n in nodes]
        mask = site.argument(3)
        if all(inside) and len(set(nodes)) == 3 and (mask is None or mask.dtype == torch.bool):
            _as_gradient(site, quotient, nodes)
            return
        attention = Attention(site)
        # a factor that is a constant takes nothing, and the other one all
        split = inside[2] and (inside[0] or inside[1])
        probabilities = attention.probabilities()
        if inside[2]:
            sent = attention.shared(probabilities.transpose(-1, -2) @ quotient)
            site.send(nodes[2], _as(sent / 2 if split else sent, site.value(nodes[2])))
        if not (inside[0] or inside[1]):
            return
        slopes = quotient @ attention.value.transpose(-1, -2)
        slopes = slopes / 2 if split else slopes
        arrived = probabilities * slopes
        total = arrived.sum(-1, keepdim=True)
        scores = arrived - probabilities * total
        _to_scores(site, attention, nodes, scores, inside)
        _book_softmax(site, attention, total, scores)


def _as_gradient(site: Site, quotient: Tensor, nodes: list[fx.Node]) -> None:
    """The fused operator's own gradient, shared: a half to values, a quarter to the others.

    The softmax absorbs the half that values don't take, less what queries and keys do.  Scores are
    linear in either, so that a sample's queries and keys take the same, the sum of score times
    gradient: one of the sums is enough.
    """
    query, key, value = nodes
    quarter = quotient * 0.25
    sent = site.vjp(quarter)
    site.book(SOFTMAX, times(quarter, site.result), share=2)
    site.book_at(query, SOFTMAX, times(sent[query], site.value(query)), share=-2)
    site.send(query, sent[query])
    site.send(key, sent[key])
    site.send(value, 2 * sent[value])


def _to_scores(
    site: Site,
    attention: Attention,
    nodes: list[fx.Node],
    scores: Tensor,
    inside: list[bool],
) -> None:
    share = attention.scale / (inside[0] + inside[1])
    if inside[0]:
        site.send(nodes[0], _as(scores @ attention.key * share, site.value(nodes[0])))
    if inside[1]:
        sent = scores.transpose(-1, -2) @ attention.query * share
        site.send(nodes[1], _as(attention.shared(sent), site.value(nodes[1])))


def _book_softmax(site: Site, attention: Attention, total: Tensor, scores: Tensor) -> None:
    product = (scores @ attention.key * attention.query).sum(-1, keepdim=True) * attention.scale
    mask = attention.mask
    added: Tensor | float = 0.0
    if mask is not None and mask.dtype != torch.bool:
        added = times(scores, mask).sum(-1, keepdim=True)
        node: Any = site.op.argument(3)
        if node in site.op.operands:
            site.send(node, _as(scores, mask))
        else:
            site.book(CONSTANTS, added)
    site.book(SOFTMAX, total - product - added)


def _operands(site: Site) -> list[Any]:
    return [site.op.node.args[i] for i in range(3)]


def _as(c: Tensor, value: Tensor) -> Tensor:
    """Sums over dimensions in which a value was broadcast."""
    return c if c.shape == value.shape else c.sum_to_size(value.shape)
