"""Calls of a flat graph that come to less than they say, if they are seen together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graphopt.cost.sizes import same_shape, same_size
from graphopt.passes.relevance.padding import END

aten = torch.ops.aten

_RESHAPES = (aten.view.default, aten._unsafe_view.default)
_PLACE = {aten.slice.Tensor: 1, aten.slice_backward.default: 2}
"""Where the dimension stands among the arguments of a slice; start, stop and step follow."""


def is_all(node: fx.Node, source: fx.Node) -> bool:
    """Whether a slice or its gradient, a view or an expansion is all of its source."""
    if node.target in _PLACE:
        _, start, stop, step = _sliced(node)
        return start == 0 and stop == END and step == 1
    if node.target in (*_RESHAPES, aten.expand.default):
        return same_shape(node.meta["val"].shape, source.meta["val"].shape)
    return False


def _sliced(node: fx.Node) -> tuple[Any, Any, Any, Any]:
    """Dimension, start, stop and step of a slice."""
    given = node.args[_PLACE[node.target] :]  # type: ignore[index]
    dim, start, stop, step = (*given, *(0, None, None, 1)[len(given) :])
    return dim, 0 if start is None else start, END if stop is None else stop, step


def view_once(node: fx.Node) -> None:
    """View a value itself, not a view of it."""
    source = node.args[0] if node.args else None
    if node.target in _RESHAPES and isinstance(source, fx.Node) and source.target in _RESHAPES:
        base: Any = source.args[0]
        if base.meta["val"].is_contiguous():
            node.replace_input_with(source, base)


def join(node: fx.Node) -> None:
    """Join two gradients of slices that lie next to each other and make up the whole."""
    given: Any = node.args[:2]
    if node.target is not aten.add.Tensor or node.kwargs or not all(map(_is_padded, given)):
        return
    first, second = sorted(given, key=lambda n: _sliced(n)[1])
    parts = [n.args[0] for n in (first, second)]
    dim, start, middle, step = _sliced(first)
    other, begin, _, pace = _sliced(second)
    sizes = [n.meta["val"].shape[dim] for n in (*parts, node)]
    adjacent = start == 0 and begin == middle and (step, pace) == (1, 1)
    if dim == other and adjacent and same_size(sizes[0] + sizes[1], sizes[2]):
        with node.graph.inserting_before(node):
            joined = node.graph.call_function(aten.cat.default, (parts, dim))
        joined.meta = dict(node.meta)
        node.replace_all_uses_with(joined)


def _is_padded(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not aten.slice_backward.default:
        return False
    return all(isinstance(v, int) for v in _sliced(node))


def divide(node: fx.Node) -> None:
    """``c x y / x``, or its limit where ``x`` is zero, is ``c y``.

    The limit is what rules put there: unlike most of what a model writes, it lets infinity be.
    """
    quotient = node.args[0] if node.args else None
    if node.target is not aten.nan_to_num.default or not isinstance(quotient, fx.Node):
        return
    if node.args[2:] != (math.inf, -math.inf):
        return
    if quotient.target is not aten.div.Tensor or len(quotient.users) > 1:
        return
    product, divisor = quotient.args
    found = _factors(product, divisor)
    if found is None:
        return
    scale, other = found
    if scale == 1:
        node.replace_all_uses_with(other)
        return
    with node.graph.inserting_before(node):
        scaled = node.graph.call_function(aten.mul.Tensor, (other, scale))
    scaled.meta = dict(node.meta)
    node.replace_all_uses_with(scaled)


def _factors(product: Any, divisor: Any) -> tuple[float, fx.Node] | None:
    """``c`` and ``y`` of a product ``c x y`` whose one factor is ``x``, both of one shape."""
    if not _is_product(product):
        return None
    for factor, other in (product.args, product.args[::-1]):
        if not isinstance(other, fx.Node) or not _is_like(other, product):
            continue
        if factor is divisor:
            return 1, other
        if _is_product(factor):
            for inner, scale in (factor.args, factor.args[::-1]):
                if inner is divisor and isinstance(scale, int | float):
                    return scale, other
    return None


def _is_product(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.mul.Tensor


def _is_like(node: fx.Node, other: fx.Node) -> bool:
    a, b = node.meta["val"], other.meta["val"]
    return same_shape(a.shape, b.shape) and a.dtype == b.dtype
