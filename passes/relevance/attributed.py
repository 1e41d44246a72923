"""What shall get a relevance, asked for by name: inputs, parameters, values inside of the model."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from graphopt.errors import UsageError, suggest
from graphopt.passes.relevance import tokens
from graphopt.passes.relevance.ops import is_floating
from graphopt.passes.relevance.tokens import Lookup


def sources(
    graph: fx.Graph, looked_up: Mapping[fx.Node, Lookup], attribute: Sequence[str]
) -> dict[fx.Node, str]:
    """Where relevance ends: floating inputs, and what integer ones look up, with the input's name.

    Args:
        graph: The forward graph.
        looked_up: What integer inputs look up.
        attribute: What shall get a relevance; inputs that aren't among it are left out if any is.
    """
    found = dict(tokens.named(looked_up))
    for node in graph.find_nodes(op="placeholder"):
        if is_floating(node.meta.get("val")):
            found[node] = node.name
    asked = {n for n in found.values() if any(fnmatch.fnmatchcase(n, g) for g in attribute)}
    if "inputs" not in attribute and asked:
        return {node: name for node, name in found.items() if name in asked}
    return found


def values(
    graph: fx.Graph,
    attribute: Sequence[str],
    sources: Mapping[fx.Node, str],
    inside: set[fx.Node],
) -> dict[str, fx.Node]:
    """Values and parameters that were asked for besides the inputs, by name.

    Args:
        graph: The forward graph.
        attribute: What shall get a relevance.
        sources: Where relevance ends, with the input's name.
        inside: The values between the sources and what is explained.

    Raises:
        UsageError: Nothing is called so.
    """
    parameters = {
        str(n.target): n for n in graph.find_nodes(op="get_attr") if is_floating(n.meta.get("val"))
    }
    inputs = set(sources.values())
    carrying = {  # several results of a call are values of their own
        n.name: n
        for n in graph.nodes
        if n in inside and n.name not in inputs and isinstance(n.meta.get("val"), Tensor)
    }
    named: dict[str, fx.Node] = {}
    for asked in attribute:
        glob = asked.removeprefix("node:")
        if asked == "parameters":
            named |= parameters
        if asked in ("inputs", "parameters") or glob in inputs:
            continue
        found = {
            name: node
            for name, node in (parameters | carrying).items()
            if fnmatch.fnmatchcase(name, glob)
        }
        if not found and not any(fnmatch.fnmatchcase(n, glob) for n in inputs):
            known = [*inputs, *parameters, *carrying]
            raise UsageError(
                f"nothing that carries relevance is called {asked!r}",
                hint=suggest(asked, known) or "ask for inputs, parameters, or names of nodes",
            )
        named |= found
    return named


def outside(
    named: Mapping[str, fx.Node], inner: frozenset[fx.Node], attribute: Sequence[str]
) -> dict[str, fx.Node]:
    """What was asked for, less what a glob fits inside of operations: no relevance arrives there.

    Raises:
        UsageError: Something inside of an operation was asked for by its own name.
    """
    for name, node in named.items():
        if node in inner and (name in attribute or f"node:{name}" in attribute):
            raise UsageError(
                f"{name!r} is a part of an operation, inside of which there is no relevance",
                node=node,
                hint="ask for the operation's result, or what it reads",
            )
    return {name: node for name, node in named.items() if node not in inner}
