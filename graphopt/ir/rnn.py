"""Multi-layer recurrent ops with dropout, split into one op a layer.

PyTorch's own decomposition of these ops, which tracing through autograd uses, leaves the dropout
between layers out (`_rnn_helper` in `torch/_decomp/decompositions.py`, torch 2.9 to 2.13). Split by
layer, the dropout is an op of the graph, drawn in the same order and layout as the fused op draws.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphopt.errors import UnsupportedError

aten = torch.ops.aten

_STATES = {
    aten.lstm.input: 2,
    aten.gru.input: 1,
    aten.rnn_tanh.input: 1,
    aten.rnn_relu.input: 1,
}
_PACKED = {aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data}


def split_dropout_layers(graph: fx.Graph) -> None:
    """Rewrites, in place, every multi-layer recurrent op that applies dropout.

    Args:
        graph: A forward-level graph.

    Raises:
        UnsupportedError: Such an op runs on a packed sequence.
    """
    for node in list(graph.nodes):
        if node.target in _PACKED and _drops(node, offset=4):
            raise UnsupportedError(
                "Dropout between the layers of a recurrent net on a packed sequence cannot be "
                "planned: torch's decomposition leaves the dropout out.",
                node=node,
                hint="Pad the sequences, or set dropout=0.",
            )
        if node.target in _STATES and _drops(node, offset=3):
            with graph.inserting_before(node):
                results = _layer_by_layer(graph, node)
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(node)


def _drops(node: fx.Node, offset: int) -> bool:
    """Whether the op has several layers, runs in training mode and drops something."""
    arguments: tuple[Any, ...] = node.args
    _biases, layers, probability, train = arguments[offset : offset + 4]
    return bool(layers > 1 and train and probability > 0)


def _layer_by_layer(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    arguments: tuple[Any, ...] = node.args
    x, hx, params, biases, layers, probability, _train, bidirectional, batch_first = arguments
    op: Any = node.target
    states = _STATES[op]
    directions = 2 if bidirectional else 1
    count = len(params) // layers
    x = graph.call_function(aten.transpose.int, (x, 0, 1)) if batch_first else x
    finals: list[list[fx.Node]] = [[] for _ in range(states)]
    for layer in range(layers):
        if layer:
            x = graph.call_function(aten.dropout.default, (x, probability, True))
        first, last = layer * directions, (layer + 1) * directions
        parts = [
            graph.call_function(aten.slice.Tensor, (h, 0, first, last))
            for h in (hx if states == 2 else [hx])
        ]
        weights = list(params[layer * count : (layer + 1) * count])
        state: Any = parts if states == 2 else parts[0]
        options = (biases, 1, 0.0, True, bidirectional, False)
        run = graph.call_function(op, (x, state, weights, *options))
        x = graph.call_function(operator.getitem, (run, 0))
        for index, final in enumerate(finals):
            final.append(graph.call_function(operator.getitem, (run, index + 1)))
    x = graph.call_function(aten.transpose.int, (x, 0, 1)) if batch_first else x
    return [x, *(graph.call_function(aten.cat.default, (final, 0)) for final in finals)]
