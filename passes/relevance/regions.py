"""Calls that mean one operator: written-out activations, and maps by way of frequencies.

A value that comes back to itself through elementwise calls alone,

    0.5 * x * (1 + tanh(0.8 * (x + 0.04 * x ** 3)))      x * sigmoid(x)      x * tanh(softplus(x))

is an elementwise function of ``x``, whatever its formula.  Rules for sums and products would take
its constants for contributions.

Complex numbers carry no relevance of their own: what is computed from real values by way of them is
one map of these values (see `frequencies`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from graphopt.cost.sizes import same_shape
from graphopt.passes.relevance import families
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.frequencies import degree, is_complex

_SIMPLE = (Family.ACTIVATION, Family.ADD, Family.SCALE, Family.PRODUCT)
_CASTS = frozenset(
    {"to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "dropout"}
)


def activations(graph: fx.Graph, inside: set[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Regions with one entry and one exit that are an elementwise function of their entry.

    Args:
        graph: The forward graph.
        inside: The carrying values.

    Returns:
        The calls of each region in order, by the last one.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in graph.nodes:
        if node not in inside or not _is_elementwise(node, inside):
            continue
        members = _closed(node, inside, order)
        if members is not None:
            for member in members:
                found.pop(member, None)  # a part of the larger one
            found[node] = tuple(sorted(members, key=order.__getitem__))
    return found


def centred(graph: fx.Graph, inside: set[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Values less their own mean, which is one linear map of them.

    Taken apart, next to nothing arrives at a mean that is close to zero.

    Args:
        graph: The forward graph.
        inside: The carrying values.

    Returns:
        The calls of each region in order, by the last one; regions may share calls.
    """
    found = {}
    for node in graph.nodes:
        if node not in inside or node.op != "call_function" or node.kwargs:
            continue
        if families.op_name(node) != "sub":
            continue
        value, mean = node.args[:2]
        called = isinstance(mean, fx.Node) and mean.op == "call_function"
        is_mean = called and families.op_name(mean) == "mean"
        if is_mean and mean.args[0] is value and _same_shape(value, node):
            found[node] = (mean, node)
    return found


def interior(graph: fx.Graph, regions: Mapping[fx.Node, tuple[fx.Node, ...]]) -> frozenset[fx.Node]:
    """Calls of regions that nothing else reads."""
    around: dict[fx.Node, set[fx.Node]] = {}
    for last, nodes in regions.items():
        for node in nodes[:-1]:
            around.setdefault(node, set()).add(last)
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        mine = around.get(node)
        if mine is not None and all(
            user in mine or (user in found and around[user] <= mine) for user in node.users
        ):
            found.add(node)
    return frozenset(found)


def complex_maps(graph: fx.Graph, inside: set[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Regions from real values through complex ones to a real one, which are homogeneous.

    Args:
        graph: The forward graph.
        inside: The carrying values.

    Returns:
        The calls of each region in order, by the last one; regions may share calls.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    found = {}
    for node in graph.nodes:
        if node not in inside or is_complex(node.meta.get("val")):
            continue
        stack = [s for s in node.all_input_nodes if s in inside and is_complex(s.meta.get("val"))]
        members = {node} if stack else set()
        while stack:
            member = stack.pop()
            if member not in members:
                members.add(member)
                stack += [s for s in member.all_input_nodes if _is_inner(s, inside)]
        nodes = tuple(sorted(members, key=order.__getitem__))
        if nodes and degree(nodes, inside) is not None:
            found[node] = nodes
    return found


def _is_inner(node: fx.Node, inside: set[fx.Node]) -> bool:
    return node in inside and is_complex(node.meta.get("val"))


def _closed(last: fx.Node, inside: set[fx.Node], order: dict[fx.Node, int]) -> set[fx.Node] | None:
    """The calls between ``last`` and the nearest value that all of it is made from, or None."""
    members = {last}
    open_ = {s for s in last.all_input_nodes if s in inside}
    if len(open_) < 2:
        return None
    while len(open_) > 1:
        latest = max(open_, key=order.__getitem__)
        open_.remove(latest)
        if not _is_elementwise(latest, inside):
            return None
        members.add(latest)
        open_.update(s for s in latest.all_input_nodes if s in inside)
    closed = all(user in members for m in members if m is not last for user in m.users)
    (entry,) = open_
    same = _same_shape(entry, last)
    return members if closed and same else None


def _is_elementwise(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether each element of the result depends on that element of the operands alone."""
    spec = families.spec_of(node)
    if node.op != "call_function" or spec is None:
        return False
    name = families.op_name(node)
    if name in families.MATRIX or (spec.family not in _SIMPLE and name not in _CASTS):
        return False
    operands = [s for s in node.all_input_nodes if s in inside]
    constants = [s for s in node.all_input_nodes if s not in inside]
    return all(_same_shape(s, node) for s in operands) and not any(_is_sized(s) for s in constants)


def _is_sized(constant: fx.Node) -> bool:
    value = constant.meta.get("val")
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _same_shape(first: fx.Node, second: fx.Node) -> bool:
    """Whether two values have the same shape, whatever the sizes of the inputs."""
    values = [n.meta.get("val") for n in (first, second)]
    left, right = (v.shape if isinstance(v, torch.Tensor) else None for v in values)
    return left is not None and right is not None and same_shape(left, right)
