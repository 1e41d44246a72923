"""Runs a graph node by node: each value by its node, and calls done otherwise where asked.

Whatever runs a captured graph on values, real or fake, does it here: `interpret` for the results,
`fill` for the values of its nodes.  A *hook* is handed each call, and a function that gives the
values of the nodes in front of it; it returns the call's value, mostly by `call`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.errors import GraphoptError, InputMismatch, RunError, UnsupportedError, first_line
from graphopt.ir.aliases import writes_to_values
from graphopt.ir.graphs import lookup

Value = Callable[[fx.Node], Any]
Hook = Callable[[fx.Node, Value], Any]


def call(node: fx.Node, value: Value) -> Any:
    """Run one call of a graph.

    Args:
        node: The call.
        value: Gives the value of each node that it reads.

    Raises:
        RunError: The operator fails on these values; names node, op and the user's line.
    """
    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except (GraphoptError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an operator may raise anything
        raise RunError(f"{type(error).__name__}: {first_line(error)}", node=node) from error


def held_by(module: fx.GraphModule) -> Value:
    """Looks ``get_attr`` nodes up in a module: its tensors, and the sub-graphs of its regions."""
    return lambda node: lookup(module, str(node.target))


def held_in(tensors: Mapping[str, Any]) -> Value:
    """Looks ``get_attr`` nodes up in a table, by target."""
    return lambda node: tensors[str(node.target)]


def interpret(
    graph: fx.Graph,
    inputs: Iterable[Any],
    attribute: Value,
    hook: Hook = call,
    *,
    copied: bool = True,
) -> Any:
    """Run a graph; a value is let go of as soon as nobody reads it any more.

    Args:
        graph: The graph.
        inputs: Values of its placeholders.
        attribute: Gives the value of a ``get_attr`` node, such as `held_by`.
        hook: Gives the value of a call.
        copied: Take copies of the inputs where the graph writes to values.

    Returns:
        The results, as the graph lists them.

    Raises:
        InputMismatch: More or fewer inputs than placeholders.
        GraphoptError: As `fill` does.
    """
    values = placed(graph, inputs)
    if copied and writes_to_values(graph):
        values = {n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()}
    fill(values, graph.nodes, attribute, hook, _last_uses(graph))
    return fx.map_arg(graph.output_node().args[0], values.__getitem__)


def fill(
    values: dict[fx.Node, Any],
    nodes: Iterable[fx.Node],
    attribute: Value,
    hook: Hook = call,
    done: Mapping[fx.Node, Iterable[fx.Node]] | None = None,
) -> None:
    """Run the nodes whose values aren't known yet.

    Args:
        values: What is known, such as what is `placed`; each value is put in when there is one.
        nodes: Nodes in the order of their graph.
        attribute: Gives the value of a ``get_attr`` node.
        hook: Gives the value of a call.
        done: After which node which values are let go of; None: all are kept.

    Raises:
        RunError: An operator fails on its values.
        UnsupportedError: A node that calls no function.
    """
    value = values.__getitem__
    for node in nodes:
        if node in values:
            pass
        elif node.op == "call_function":
            values[node] = hook(node, value)
        elif node.op == "get_attr":
            values[node] = attribute(node)
        elif node.op != "output":
            raise UnsupportedError(f"a {node.op} without a value can't be run", node=node)
        if done is not None:
            for each in done[node]:
                del values[each]


def placed(graph: fx.Graph, inputs: Iterable[Any]) -> dict[fx.Node, Any]:
    """The inputs by placeholder.

    Raises:
        InputMismatch: More or fewer inputs than placeholders.
    """
    inputs, nodes = list(inputs), graph.find_nodes(op="placeholder")
    if len(inputs) != len(nodes):
        raise InputMismatch(f"a graph of {len(nodes)} inputs was given {len(inputs)}")
    return dict(zip(nodes, inputs, strict=True))


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node the nodes whose values nobody reads after it; results are read at the end."""
    later = set(graph.output_node().all_input_nodes)
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        found[node] = [n for n in (node, *node.all_input_nodes) if n not in later]
        later.update(found[node])
    found[graph.output_node()] = []  # has no value
    return found
