"""Input gradients of convolutions as convolutions, which don't need the input.

The operator for a convolution's backward pass reads the input for its size alone where no weight
gets a gradient, but it has to be kept for that.  The transposed convolution is the same map.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def without_inputs(graph: fx.Graph) -> None:
    """Rewrite all backward passes of convolutions that only the input gets a gradient of."""
    for node in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        mask: Any = node.args[10]
        users = list(node.users)
        if list(mask) == [True, False, False] and len(users) == 1:
            (user,) = users
            call = _call(node)
            if call is not None and user.target is operator.getitem and user.args[1] == 0:
                with graph.inserting_before(node):
                    new = _emit(graph, node, call)
                new.meta = {**user.meta, "val": user.meta["val"]}
                user.replace_all_uses_with(new)
                graph.erase_node(user)
                graph.erase_node(node)


def _call(node: fx.Node) -> tuple[bool, tuple[Any, ...]] | None:
    """Whether the weight is transposed, and the arguments behind it; None: left as it is."""
    _, source, weight, _, stride, padding, dilation, transposed, _, groups, _ = node.args
    sizes = [s.meta["val"].shape[2:] for s in (source, weight)]  # type: ignore[union-attr]
    if not all(isinstance(n, int) for shape in sizes for n in shape):
        return None
    lists: Any = (stride, padding, dilation)
    stride, padding, dilation = (_each(v, len(sizes[0])) for v in lists)
    zeros = [0] * len(stride)
    if transposed:
        return False, (None, stride, padding, dilation, False, zeros, groups)
    ones = [1] * len(stride)
    if [*sizes[1]] == ones and stride == ones and padding == zeros and groups == 1:
        return True, (None, ones, zeros, ones, False, zeros, 1)
    # what the strides leave over at the end of the input
    rest = [
        (n + 2 * p - d * (k - 1) - 1) % s
        for n, k, s, p, d in zip(*sizes, stride, padding, dilation, strict=True)
    ]
    return False, (None, stride, padding, dilation, True, rest, groups)


def _each(values: Sequence[int], dims: int) -> list[int]:
    """One value for each dimension: a single one stands for all."""
    return list(values) if len(values) == dims else list(values) * dims


def _emit(graph: fx.Graph, node: fx.Node, call: tuple[bool, tuple[Any, ...]]) -> fx.Node:
    gradient, weight = node.args[0], node.args[2]
    assert isinstance(weight, fx.Node)
    if call[0]:
        value = weight.meta["val"]
        weight = graph.call_function(aten.transpose.int, (weight, 0, 1))
        weight.meta = {**node.meta, "val": value.transpose(0, 1)}
    return graph.call_function(aten.convolution.default, (gradient, weight, *call[1]))
