"""Sigmoids and softplus that were written with exponentials.

A sigmoid is a gate, and an exponential isn't, so what was meant decides where relevance goes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.passes.relevance.families import calls, op_name

aten = torch.ops.aten

Meant = tuple[Any, tuple[Any, ...]]
"""An operator, and its arguments; an argument that is a pair is called first."""


def meant_by(node: fx.Node) -> Meant | None:
    """The operator that the last call of a formula means.

    Args:
        node: A call of a functional graph.

    Returns:
        ``1 / (1 + exp(-x))`` and ``exp(x) / (1 + exp(x))``: sigmoid of ``x``;
        ``log(1 + exp(x))`` and ``log1p(exp(x))``: softplus of ``x``; else None.
    """
    name = op_name(node)
    if name in ("reciprocal", "div", "pow"):
        return _sigmoid(name, node.args) if not node.kwargs else None
    exponential = node.args[0] if name == "log1p" else None
    if name == "log":
        exponential = _less_one(node.args[0])
    if not calls(exponential, "exp"):
        return None
    return aten.softplus.default, (exponential.args[0],)


def _sigmoid(name: str, args: tuple[Any, ...]) -> Meant | None:
    over, under = (1, args[0]) if name == "reciprocal" else (args[0], args[-1])
    if name == "pow":
        over, under = (1, args[0]) if args[1] == -1 else (None, None)
    exponential = _less_one(under)
    if not calls(exponential, "exp"):
        return None
    x = exponential.args[0]
    if over is exponential:
        return aten.sigmoid.default, (x,)
    if not _is_one(over):
        return None
    negative = x.args[0] if calls(x, "neg") else (aten.neg.default, (x,))
    return aten.sigmoid.default, (negative,)


def _less_one(node: Any) -> Any:
    """What one is added to, or None."""
    if not calls(node, "add") or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    return first if _is_one(second) else second if _is_one(first) else None


def _is_one(value: Any) -> bool:
    return isinstance(value, int | float) and value == 1
