"""Runs a graph node by node, with some of its calls done otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

Value = Callable[[fx.Node], Any]
Run = Callable[[fx.Node, Value], Any]


def call(node: fx.Node, value: Value) -> Any:
    """Run one call of a graph.

    Args:
        node: The call.
        value: Gives the value of each node that it reads.
    """
    args = fx.map_arg(node.args, value)
    kwargs = fx.map_arg(node.kwargs, value)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def interpret(graph: fx.Graph, inputs: Iterable[Any], attribute: Value, run: Run = call) -> Any:
    """Run a graph; a value is let go of as soon as nobody reads it any more.

    Args:
        graph: The graph.
        inputs: Values of its placeholders; where it writes to values, copies are taken of tensors.
        attribute: Gives the value of a ``get_attr`` node.
        run: Gives the value of a call, from the call and a function for what it reads.

    Returns:
        The results, as the graph lists them.
    """
    values: dict[fx.Node, Any] = {}
    last_use = _last_uses(graph)
    placeholders = iter(inputs)
    apart = writes_to_values(graph)
    for node in graph.nodes:
        if node.op == "placeholder":
            given = next(placeholders)
            values[node] = given.clone() if apart and isinstance(given, Tensor) else given
        elif node.op == "get_attr":
            values[node] = attribute(node)
        elif node.op == "output":
            return fx.map_arg(node.args[0], values.__getitem__)
        else:
            values[node] = run(node, values.__getitem__)
        for done in last_use.get(node, ()):
            del values[done]
    raise AssertionError("a graph ends with its output")


def writes(user: fx.Node) -> bool:
    """Whether a call writes to what it reads."""
    target = user.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def writes_to_values(graph: fx.Graph) -> bool:
    """Whether a call writes to what another one computed, or to an input."""
    return any(
        writes(node) and source.op != "get_attr"
        for node in graph.nodes
        for source in node.all_input_nodes[:1]
    )


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node the nodes whose values nobody reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for node, user in last.items():
        found.setdefault(user, []).append(node)
    return found
