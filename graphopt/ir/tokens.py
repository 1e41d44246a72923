"""Effect tokens: how AOTAutograd keeps ops with effects in order; a plan has means of its own."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx


def drop_tokens(graph: fx.Graph, is_token: Any) -> None:
    """Calls effectful ops directly instead of through `with_effects`; tokens go.

    Args:
        graph: A joint graph, changed in place; ``meta["desc"]`` of placeholders and of the output
            says what each is.
        is_token: Whether a description is a token's.
    """
    wrapped = graph.find_nodes(op="call_function", target=torch.ops.higher_order.with_effects)
    for node in wrapped:
        _unwrap(graph, node)
    output = graph.output_node()
    values: Any = output.args[0]
    pairs = list(zip(values, output.meta["desc"], strict=True))
    kept = [(value, desc) for value, desc in pairs if not is_token(desc)]
    output.args = ([value for value, _ in kept],)
    output.meta["desc"] = [desc for _, desc in kept]
    for node in reversed(wrapped):
        for part in [*node.users]:
            graph.erase_node(part)
        graph.erase_node(node)
    for placeholder in graph.find_nodes(op="placeholder"):
        if is_token(placeholder.meta["desc"]):
            graph.erase_node(placeholder)


def _unwrap(graph: fx.Graph, node: fx.Node) -> None:
    """Puts the op beside the node; results 1, 2, ... are the op's own, result 0 is a token."""
    _, op, *args = node.args
    with graph.inserting_before(node):
        call = graph.call_function(op, tuple(args), dict(node.kwargs))  # type: ignore[arg-type]
    values = node.meta["val"][1:]
    call.meta = {**node.meta, "val": values[0] if len(values) == 1 else tuple(values) or None}
    for part in list(node.users):
        place: Any = part.args[1]
        if place == 0:
            continue
        result = call
        if len(values) > 1:
            with graph.inserting_before(part):
                result = graph.call_function(operator.getitem, (call, place - 1))
            result.meta = dict(part.meta)
        part.replace_all_uses_with(result)
