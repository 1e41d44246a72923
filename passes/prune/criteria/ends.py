"""Where units end: the inputs of calls over whose places is summed."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import fx

from graphopt.ir.graphs import lookup
from graphopt.passes.prune.analysis import region_of
from graphopt.passes.prune.dimensions import Dimensions
from graphopt.passes.prune.rule import Value, values_in


def calls(
    module: fx.GraphModule, static: Collection[fx.Node] = ()
) -> Iterator[tuple[fx.Node, set[fx.Node]]]:
    """The calls of a graph and of its regions, and what by then depends on parameters alone.

    Args:
        module: The graph.
        static: Its placeholders that do.
    """
    known = set(static)
    for node in module.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "get_attr" or (sources and all(source in known for source in sources)):
            known.add(node)
        if node.op != "call_function":
            continue
        inner = region_of(module, node)
        if inner is None:
            yield node, known
        else:
            places = inner.graph.find_nodes(op="placeholder")
            operands = zip(places, node.args[len(node.args) - len(places) :], strict=True)
            yield from calls(inner, [place for place, operand in operands if operand in known])


def copies(before: fx.GraphModule, after: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """For each node of a graph and its regions that of a copy."""
    found: dict[fx.Node, fx.Node] = {}
    for original, node in zip(before.graph.nodes, after.graph.nodes, strict=True):
        found[original] = node
        if original.op == "get_attr":
            inner = lookup(before, str(original.target))
            if isinstance(inner, fx.GraphModule):
                found.update(copies(inner, lookup(after, str(node.target))))
    return found


def ends(
    dimensions: Dimensions, node: fx.Node, static: Collection[fx.Node], *, weights: bool = False
) -> Iterator[tuple[fx.Node, int, set[int]]]:
    """Inputs of a call, axes of them, and the units that end there, each once.

    Every factor of a product has the same ``x dL/dx``, so one of them is enough.

    Args:
        dimensions: The dimensions.
        node: The call.
        static: What depends on parameters alone.
        weights: Whether of several factors one that depends on parameters alone is taken, and no
            other; if not, one that depends on inputs, where there is one.
    """
    values, units = dimensions.analysis.values, dimensions.units
    seen = {
        unit
        for value in values_in(values.get(node))
        for labels in value.axes
        for unit in units.units_of(labels)
    }
    for source in sorted(node.all_input_nodes, key=lambda n: n in static):
        value, fake = values.get(source), source.meta.get("val")
        if not isinstance(value, Value) or (weights and source not in static):
            continue
        if isinstance(fake, torch.Tensor) and not fake.is_floating_point():
            continue
        for axis, labels in enumerate(value.axes):
            if units.is_free(labels) and (ending := units.units_of(labels) - seen):
                yield source, axis, ending
                seen |= ending
