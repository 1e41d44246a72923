"""Softmax in attention: its calls, and what of their arguments is score and what is mask.

    p = softmax(q k^T + mask)

A softmax stands alone or inside ``scaled_dot_product_attention``, which is written out. What
replaces it must tell masked places from low scores without comparing: the masks are looked for in
front of it, as terms (``scores + mask``) or as conditions (``masked_fill``, ``where``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from graphopt.ir.align import all_graphs
from graphopt.ir.attention import (
    Attention,
    Call,
    caller,
    is_attention,
    read_attention,
    write_result,
    write_scores,
)
from graphopt.ir.graphs import bind_graph, copy_graph
from graphopt.ir.metadata import refreshed
from graphopt.ir.program import Program
from graphopt.passes.linearize.masks import Parts, Separator
from graphopt.passes.linearize.sites import batch_of, hint

aten = torch.ops.aten

Normal = Literal["relu", "quad"]
_SOFTMAX = {aten.softmax, aten._softmax, aten.special_softmax, aten._safe_softmax}
_PRODUCTS = {aten.matmul, aten.bmm, aten.mm, aten.einsum, aten.baddbmm}
# What may stand between the probabilities and their product.
_BETWEEN = {
    aten.dropout, aten.native_dropout, aten.mul, aten.div, aten.to, aten.type_as, aten._to_copy,
    aten.clone, aten.contiguous, aten.view, aten.reshape, aten._unsafe_view, aten.flatten,
    aten.unflatten, aten.transpose, aten.permute, aten.expand, aten.unsqueeze, aten.squeeze,
    aten.masked_fill, aten.where, aten.slice, aten.select, aten.detach, aten.alias, aten.movedim,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class SoftmaxCall:
    """A softmax that was set apart to be replaced.

    Attributes:
        name: Of the call of `softmax_of` in the prepared graph.
        source: Of the call in the graph that came in.
        per_sample: Elements of one sample.
        scaled: Name of the product that scales the query, which can scale the scores; or None.
    """

    name: str
    source: str
    per_sample: int
    scaled: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A program with softmaxes set apart.

    Attributes:
        program: It computes what the source does; to be rewritten, not to be emitted.
        calls: The softmaxes that were set apart.
        left: Others by name: their size, and why they stay.
    """

    program: Program
    calls: tuple[SoftmaxCall, ...] = ()
    left: tuple[tuple[str, int, str], ...] = ()


def softmax_of(
    x: Tensor | None, scores: Tensor, terms: Sequence[Tensor], factors: Sequence[Tensor], dim: int
) -> Tensor:
    """What a softmax that was set apart gives.

    Args:
        x: What the softmax reads; None for an attention's, where a row that is masked wholly
            gives zeros.
        scores: What it reads without its masks.
        terms: Masks that are added.
        factors: Masks that are one where a place counts, else zero.
        dim: Over which it is taken.
    """
    if x is not None:
        return torch.softmax(x, dim)
    found: Tensor = aten._safe_softmax.default(masked(scores, terms, factors), dim)
    return found


def masked(scores: Tensor, terms: Sequence[Tensor], factors: Sequence[Tensor]) -> Tensor:
    """Scores with masked places at minus infinity."""
    for term in terms:
        scores = scores + term
    for factor in factors:
        scores = scores.masked_fill(factor == 0, -math.inf)
    return scores


def prepared(program: Program, apart: bool) -> Prepared:
    """Set the softmaxes apart whose result reaches a product.

    Args:
        program: The program; it is not changed.
        apart: Whether masks have to be told from scores.
    """
    module = copy_graph(program.module)
    preparing = _Preparing(module, apart)
    preparing.run()
    if not preparing.calls:
        return Prepared(program, (), tuple(preparing.left))
    root = program.skeleton.root
    bound = bind_graph(module, root)
    bound.graph.lint()
    changed = refreshed(program.replace(module=bound))
    return Prepared(changed, tuple(preparing.calls), tuple(preparing.left))


class _Preparing:
    def __init__(self, module: fx.GraphModule, apart: bool) -> None:
        self.module, self.graph, self.apart = module, module.graph, apart
        self.batch = batch_of(module.graph)
        self.separator = Separator(module)
        self.calls: list[SoftmaxCall] = []
        self.left: list[tuple[str, int, str]] = []

    def run(self) -> None:
        for inner in all_graphs(self.module):
            for node in list(inner.graph.nodes):
                if not _is_softmax(node) and not is_attention(node):
                    continue
                reason = "it is inside of a region" if inner.graph is not self.graph else None
                if reason is None and not self.separator.reads_inputs(node):
                    continue  # a constant
                self._one(node, reason)

    def _one(self, node: fx.Node, reason: str | None) -> None:
        if is_attention(node):
            query, key = node.args[0].meta["val"], node.args[1].meta["val"]  # type: ignore[union-attr]
            sizes = [*query.shape[:-1], key.shape[-2]]
        else:
            sizes = list(node.meta["val"].shape)
        per_sample = max(1, math.prod(hint(s) for s in sizes) // self.batch)
        with self.graph.inserting_before(node):
            add = caller(self.graph, node)
            if reason is None:
                attends = is_attention(node)
                found = self._attention(node, add) if attends else self._alone(node, add)
                if isinstance(found, str):
                    reason = found
                else:
                    scaled, made = found
                    name = scaled.name if scaled is not None else None
                    self.calls.append(SoftmaxCall(made.name, node.name, per_sample, name))
                    self.graph.erase_node(node)
        if reason is not None:
            self.left.append((node.name, per_sample, reason))

    def _attention(self, node: fx.Node, add: Call) -> tuple[fx.Node, fx.Node] | str:
        attention = read_attention(node)
        if not isinstance(attention, Attention):
            return attention
        parts = write_scores(add, attention)
        terms = [] if parts.additive is None else [parts.additive]
        factors = [] if parts.factor is None else [parts.factor]
        made = add(softmax_of, None, parts.scores, terms, factors, -1)
        node.replace_all_uses_with(write_result(add, attention, made))
        return parts.scaled, made

    def _alone(self, node: fx.Node, add: Call) -> tuple[None, fx.Node] | str:
        if not _reaches_product(node):
            return "its result reaches no product: it isn't attention"
        x, dim, *rest = node.args
        dtype = rest[0] if rest else node.kwargs.get("dtype")
        if not isinstance(x, fx.Node) or not isinstance(dim, int) or dtype is True:
            return f"no replacement for this form of {node.target}"
        parts: Parts | str = Parts(x)
        if self.apart:
            parts = self.separator.parts(x, add)
        if isinstance(parts, str):
            return parts
        scores = parts.scores
        if isinstance(dtype, torch.dtype):
            x = _converted(node, x, add)
            scores = x if scores is node.args[0] else _converted(node, scores, add)
        terms, factors = list(parts.terms), list(parts.factors)
        made = add(softmax_of, x, scores, terms, factors, dim)
        node.replace_all_uses_with(made)
        return None, made


def _converted(node: fx.Node, x: fx.Node, add: Call) -> fx.Node:
    """What a softmax reads in the type that it gives, which may follow the model's."""
    place = "args.2" if len(node.args) > 2 else "kwargs.dtype"
    dtype = node.args[2] if len(node.args) > 2 else node.kwargs["dtype"]
    made = add(aten.to.dtype, x, dtype)
    tie = node.meta.get("ties", {}).get(place)
    if tie is not None:
        made.meta["ties"] = {"args.1": tie}
    return made


def _is_softmax(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in _SOFTMAX


def _reaches_product(node: fx.Node) -> bool:
    """Whether probabilities, moved or scaled, become an operand of a product."""
    seen, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            packet: Any = getattr(user.target, "overloadpacket", user.target)
            if packet in _PRODUCTS:
                return True
            if packet in _BETWEEN and user not in seen:
                seen.add(user)
                stack.append(user)
    return False
