"""Scores and masks told apart in what a softmax reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.attention import Call
from graphopt.ir.graphs import lookup

aten = torch.ops.aten

MASKED = -1e4
"""Scores below this stand for minus infinity."""

_PRODUCTS = {
    aten.matmul, aten.bmm, aten.mm, aten.einsum, aten.baddbmm, aten.linear, aten.addmm,
    aten.convolution, aten.conv1d, aten.conv2d, aten.conv3d,
}  # fmt: skip
# Ops that move or convert what they read first, each element by itself.
_MOVING = {
    aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.transpose,
    aten.permute, aten.movedim, aten.unsqueeze, aten.squeeze, aten.expand, aten.clone,
    aten.contiguous, aten.alias, aten.view_as, aten.reshape_as,
}  # fmt: skip
_CONVERTING = {aten.to, aten._to_copy, aten.type_as}
_SELECTING = {aten.masked_fill, aten.where}
# How many calls are looked through for a mask that wasn't understood.
_LOOKED_THROUGH = 64


@dataclass(frozen=True)
class Parts:
    """What a softmax reads, taken apart.

    Attributes:
        scores: Without masks.
        terms: Masks and biases that are added.
        factors: One where a place counts, else zero, in the type of the scores.
    """

    scores: fx.Node
    terms: Sequence[fx.Node] = ()
    factors: Sequence[fx.Node] = ()


class Separator:
    """Tells scores from masks: scores come out of products of inputs with weights, masks don't."""

    def __init__(self, module: fx.GraphModule) -> None:
        """Look at every node of a graph, as it is before anything is added."""
        self.module = module
        self._inputs: set[fx.Node] = set()
        self._weights: set[fx.Node] = set()
        self._level: dict[fx.Node, int] = {}
        for node in module.graph.nodes:
            self._look(node)

    def reads_inputs(self, node: fx.Node) -> bool:
        """Whether values of the model's inputs, more than their sizes, reach a node."""
        return node in self._inputs

    def _look(self, node: fx.Node) -> None:
        sources = node.all_input_nodes
        reads = any(n in self._inputs for n in sources)
        if node.op == "placeholder" or (reads and not _is_size(node)):
            self._inputs.add(node)
        if node.op == "get_attr":
            value = lookup(self.module, str(node.target))
            if isinstance(value, Tensor) and value.is_floating_point():
                self._weights.add(node)
        elif any(n in self._weights for n in sources):
            self._weights.add(node)
        level = max((self._level[n] for n in sources), default=0)
        if _packet(node) in _PRODUCTS and node in self._inputs:
            level = max(level, 2 if node in self._weights else 1)
        self._level[node] = level

    def parts(self, x: fx.Node, add: Call) -> Parts | str:
        """Take apart what a softmax reads, or say why that can't be done.

        Args:
            x: What it reads.
            add: Adds calls in front of the softmax.
        """
        found = self._parts(x, add)
        hidden = self._hidden(found.scores)
        if hidden is not None:
            return f"a mask in front of it isn't understood ({hidden.name}: {hidden.target})"
        return found

    def _parts(self, x: fx.Node, add: Call) -> Parts:
        packet = _packet(x)
        if packet is aten.add and x.kwargs.get("alpha", 1) == 1:
            found = self._sum(x, add)
        elif packet is aten.baddbmm and not x.kwargs and self._level[_first(x)] < self._level[x]:
            found = Parts(add(aten.bmm.default, *x.args[1:3]), [_first(x)])
        elif packet in _SELECTING:
            found = self._selection(x, add)
        elif packet in _MOVING or packet in _CONVERTING:
            found = self._moved(x, add)
        else:
            found = None
        return Parts(x) if found is None else found

    def _sum(self, x: fx.Node, add: Call) -> Parts | None:
        first, second = x.args[:2]
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            return None
        if self._level[first] == self._level[second]:
            return None
        if self._level[first] < self._level[second]:
            first, second = second, first
        if not _is_tensor(second) or not second.meta["val"].is_floating_point():
            return None
        inner = self._parts(first, add)
        return Parts(inner.scores, [*inner.terms, second], inner.factors)

    def _selection(self, x: fx.Node, add: Call) -> Parts | None:
        """``masked_fill(scores, mask, low)``, ``where(mask, low, scores)`` or the other way."""
        if _packet(x) is aten.masked_fill:
            scores, condition, value = x.args[:3]
            counts = False
        else:
            condition, scores, value = x.args[:3]
            counts = True
            if self._is_low(scores):
                scores, value, counts = value, scores, False
        if not isinstance(condition, fx.Node) or not isinstance(scores, fx.Node):
            return None
        if not self._is_low(value):
            return None
        factor = add(aten.type_as.default, condition, scores)
        if not counts:
            factor = add(aten.rsub.Scalar, factor, 1)
        inner = self._parts(scores, add)
        return Parts(inner.scores, inner.terms, [*inner.factors, factor])

    def _moved(self, x: fx.Node, add: Call) -> Parts | None:
        source = _first(x)
        inner = self._parts(source, add)
        if not inner.terms and not inner.factors:
            return None
        converts = _packet(x) in _CONVERTING
        if not converts and not _same_shape(inner.scores, source):
            return None

        def moved(part: fx.Node) -> fx.Node:
            if not converts and part is not inner.scores:
                part = add(aten.expand_as.default, part, inner.scores)
            made = add(x.target, part, *x.args[1:], **x.kwargs)
            if "ties" in x.meta:
                made.meta["ties"] = x.meta["ties"]
            return made

        terms, factors = ([moved(part) for part in parts] for parts in (inner.terms, inner.factors))
        return Parts(moved(inner.scores), terms, factors)

    def _is_low(self, value: Any, depth: int = 8) -> bool:
        """Whether a value is a number that stands for minus infinity."""
        if isinstance(value, (int, float)):
            return value <= MASKED
        if not isinstance(value, fx.Node) or not depth:
            return False
        if value.op == "get_attr":
            held = lookup(self.module, str(value.target))
            return isinstance(held, Tensor) and held.numel() == 1 and float(held) <= MASKED
        if _packet(value) is aten.scalar_tensor:
            return self._is_low(value.args[0])
        if _packet(value) in (aten.full, aten.full_like, aten.new_full):
            return self._is_low(value.args[1 if _packet(value) is not aten.new_full else 2])
        if _packet(value) in _MOVING | _CONVERTING | {aten.lift_fresh_copy, aten.detach}:
            return self._is_low(value.args[0], depth - 1)
        return False

    def _hidden(self, scores: fx.Node) -> fx.Node | None:
        """A call in front of scores, behind their product, that selects among them."""
        seen, stack = {scores}, [scores]
        while stack and len(seen) < _LOOKED_THROUGH:
            node = stack.pop()
            if _packet(node) in _SELECTING and self._level.get(node, 0):
                return node
            if _packet(node) in _PRODUCTS:
                continue
            new = [n for n in node.all_input_nodes if n not in seen]
            seen.update(new)
            stack += new
        return None


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _first(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _is_size(node: fx.Node) -> bool:
    """Whether a node gives a number, not tensors."""
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _same_shape(made: fx.Node, source: fx.Node) -> bool:
    """Whether scores have the sizes of what they were taken from; moved scores are known to."""
    value = made.meta.get("val")
    return value is None or tuple(value.shape) == tuple(source.meta["val"].shape)
