"""Which elements reach a comparison, counted by running the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.ir.interpret import Value, call, held_by, interpret
from graphopt.ir.untouched import buffers_kept
from graphopt.private.lower import Model, graph_of

aten = torch.ops.aten

COMPARING = frozenset(
    {
        aten.relu, aten.relu6, aten.hardtanh, aten.clamp, aten.clamp_min, aten.clamp_max, aten.clip,
        aten.leaky_relu, aten.prelu, aten.rrelu, aten.elu, aten.celu, aten.selu, aten.threshold,
        aten.hardswish, aten.hardsigmoid, aten.hardshrink, aten.softshrink, aten.abs, aten.sign,
        aten.sgn, aten.maximum, aten.minimum, aten.fmax, aten.fmin, aten.where, aten.max, aten.min,
        aten.amax, aten.amin, aten.argmax, aten.argmin, aten.topk, aten.sort, aten.median,
        aten.lt, aten.le, aten.gt, aten.ge, aten.eq, aten.ne, aten.max_pool1d, aten.max_pool2d,
        aten.max_pool3d, aten.max_pool1d_with_indices, aten.max_pool2d_with_indices,
        aten.max_pool3d_with_indices, aten.adaptive_max_pool1d, aten.adaptive_max_pool2d,
        aten.adaptive_max_pool3d, aten.fractional_max_pool2d, aten.heaviside, aten.cummax,
        aten.cummin, aten.masked_fill, aten.isfinite, aten.isnan,
    }
)  # fmt: skip
"""Ops that a protocol has to compare for, in-place forms apart."""


def comparisons(model: Model, *inputs: Any, **kwargs: Any) -> dict[str, float]:
    """Count the elements that reach a comparison-like op, by running the graph in eval mode.

    The elements of a node are those of its largest tensor operand that depends on the inputs: a
    ReLU counts its input, a max-pool the elements that it pools, a comparison of two tensors the
    pairs.  Ops on parameters and constants alone count nothing, nor does a ``where`` or a
    ``masked_fill`` with such a condition.

    Args:
        model: A module, a program or a graph module.
        inputs: Positional inputs; the first tensor's first dimension is the batch.
        kwargs: Keyword inputs.

    Returns:
        Graph node -> elements a sample, of the nodes that compare at all.
    """
    graph, flat = graph_of(model, inputs, kwargs)
    batch = next((x.shape[0] for x in flat if isinstance(x, torch.Tensor) and x.dim()), 1)
    counts: dict[str, int] = {}
    dependent = set(graph.graph.find_nodes(op="placeholder"))

    def counted(node: fx.Node, value: Value) -> Any:
        result = call(node, value)
        if dependent.intersection(node.all_input_nodes):
            dependent.add(node)
            counts[node.name] = _elements(node, dependent, value)
        return result

    with torch.no_grad(), buffers_kept(graph):
        interpret(graph.graph, flat, held_by(graph), counted)
    return {name: count / batch for name, count in counts.items() if count}


def _elements(node: fx.Node, dependent: set[fx.Node], value: Value) -> int:
    """Elements that a node compares."""
    packet = functional(getattr(node.target, "overloadpacket", None))
    if packet not in COMPARING:
        return 0
    choosing = {aten.where: 0, aten.masked_fill: 1}.get(packet)
    given = node.args if choosing is None else (node.args[choosing],)
    read = [x for x in pytree.tree_leaves(given) if isinstance(x, fx.Node) and x in dependent]
    sizes = [v.shape for v in map(value, read) if isinstance(v, torch.Tensor)]
    return torch.Size(torch.broadcast_shapes(*sizes)).numel() if sizes else 0


def functional(packet: Any) -> Any:
    """The packet of an op's out-of-place twin."""
    name = getattr(packet, "__name__", "")
    return getattr(aten, name[:-1], packet) if name.endswith("_") else packet
