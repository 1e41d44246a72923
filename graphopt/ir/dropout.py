"""Dropout in two ops: a mask, drawn once, and a product, which can be computed again from it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_LIBRARY = torch.library.Library("graphopt", "FRAGMENT")
_LIBRARY.define(
    "dropout_mask(Tensor x, float p) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
)


def _mask_cpu(x: Tensor, p: float) -> Tensor:
    """The draws of `native_dropout` on the CPU: in the order in which the memory of `x` lies."""
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)


def _mask_elsewhere(x: Tensor, p: float) -> Tensor:
    return torch.native_dropout(x, p, True)[1]


_LIBRARY.impl("dropout_mask", _mask_cpu, "CPU")
_LIBRARY.impl("dropout_mask", _mask_elsewhere, "CUDA")


@torch.library.register_fake("graphopt::dropout_mask", lib=_LIBRARY)
def _mask_fake(x: Tensor, p: float) -> Tensor:
    return torch.empty_like(x, dtype=torch.bool)


def split_dropout(graph: fx.Graph) -> None:
    """Rewrites every training `native_dropout` in place; values and draws stay bit for bit."""
    for node in graph.find_nodes(op="call_function", target=aten.native_dropout.default):
        x, p, train = node.args
        if train is not False and isinstance(x, fx.Node) and isinstance(p, float | int):
            _split(graph, node, x, float(p))
    for node in graph.find_nodes(op="call_function", target=aten.native_dropout_backward.default):
        if node.meta["val"].device.type == "cpu":  # where it is no kernel of its own
            gradient, mask, scale = node.args
            _scaled_product(graph, node, gradient, mask, _rounded(scale, gradient))


def _split(graph: fx.Graph, node: fx.Node, x: fx.Node, p: float) -> None:
    """The op becomes its mask, its first result the product: nodes that are results stay nodes."""
    scale = _rounded(1 / (1 - p) if p < 1 else 0.0, x)
    parts = list(node.users)
    _become(node, torch.ops.graphopt.dropout_mask.default, x, p)
    for part in parts:
        assert part.target is operator.getitem
        if part.args[1] == 1:
            part.replace_all_uses_with(node)
            graph.erase_node(part)
        else:
            _scaled_product(graph, part, x, node, scale)


def _scaled_product(graph: fx.Graph, node: fx.Node, x: Any, mask: Any, scale: Any) -> None:
    with graph.inserting_before(node):
        product = graph.call_function(aten.mul.Tensor)
    product.meta = dict(node.meta)
    _become(product, aten.mul.Tensor, x, mask)
    _become(node, aten.mul.Tensor, product, scale)


def _rounded(scale: float, x: fx.Node) -> float:
    """Eager multiplies by a scaled mask of the input's type, forward and backward."""
    return float(torch.tensor(scale, dtype=x.meta["val"].dtype))


def _become(node: fx.Node, target: Callable[..., Any], *args: Any) -> None:
    """Makes the node another call; its value is derived anew."""
    node.target, node.args = target, args
    fakes = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
    with fakes[0].fake_mode, torch.no_grad():
        node.meta["val"] = target(*fakes)
