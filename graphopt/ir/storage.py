"""Which node owns which storage in a functional ATen graph.

Views cost no bytes and live as long as their base; a multi-output op is one computation with
several values; sizes and other scalars cost nothing. Everything that plans memory reads the graph
through this file.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from graphopt.ir.sharing import gives_only_views, shared_arguments


class Role(Enum):
    """What a node is to a memory planner."""

    INPUT = "input"  # placeholder: owned by the caller, free
    CONSTANT = "constant"  # get_attr: owned by the module, free
    COMPUTE = "compute"  # allocates its outputs
    PROJECTION = "projection"  # getitem of a multi-output computation
    VIEW = "view"  # shares the storage of another node
    SYMBOL = "symbol"  # a size, a Python scalar, or nothing
    OUTPUT = "output"


@dataclass(frozen=True)
class StorageMap:
    """Roles and storage owners of all nodes of one graph.

    Attributes:
        role: The role of each node.
        base: For views, the storage owner (input, constant, computation or projection); for every
            other node, itself.
    """

    role: dict[fx.Node, Role]
    base: dict[fx.Node, fx.Node]

    def is_value(self, node: fx.Node) -> bool:
        """Whether the node owns bytes that a plan may free."""
        role = self.role[node]
        return role is Role.PROJECTION or (role is Role.COMPUTE and not is_tuple(node))

    def operands(self, node: fx.Node) -> Iterator[fx.Node]:
        """Storage owners that `node` reads, each once, in argument order."""
        seen: set[fx.Node] = set()
        for argument in node.all_input_nodes:
            owner = self.base[argument]
            if owner not in seen and self.role[owner] is not Role.SYMBOL:
                seen.add(owner)
                yield owner


def storage_map(graph: fx.Graph) -> StorageMap:
    """Assigns roles and storage owners.

    Args:
        graph: A functional ATen graph whose nodes carry `meta["val"]`.
    """
    role: dict[fx.Node, Role] = {}
    base: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        role[node], base[node] = _classify(node, role, base)
    return StorageMap(role, base)


def is_tuple(node: fx.Node) -> bool:
    """Whether the node returns several values."""
    return isinstance(node.meta.get("val"), tuple | list)


def _classify(
    node: fx.Node, role: dict[fx.Node, Role], base: dict[fx.Node, fx.Node]
) -> tuple[Role, fx.Node]:
    if node.op == "placeholder":
        return Role.INPUT, node
    if node.op == "get_attr":
        return Role.CONSTANT, node
    if node.op == "output":
        return Role.OUTPUT, node
    if node.target is operator.getitem:
        owner = node.args[0]
        assert isinstance(owner, fx.Node)
        if role[owner] is Role.VIEW:  # one part of split, unbind, ...
            return Role.VIEW, base[owner]
        return (Role.PROJECTION, node) if _has_tensor(node) else (Role.SYMBOL, node)
    aliased = aliased_input(node)
    if aliased is not None:
        return Role.VIEW, base[aliased]
    if not _has_tensor(node) and _is_symbolic_op(node):
        return Role.SYMBOL, node
    return Role.COMPUTE, node


def aliased_input(node: fx.Node) -> fx.Node | None:
    """The argument whose storage the result of `node` shares, if any."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not _has_tensor(node):
        return None
    if not gives_only_views(target):
        return None
    shared = shared_arguments(target)
    for position, argument in enumerate(target._schema.arguments):
        if argument.name in shared and position < len(node.args):
            value = node.args[position]
            return value if isinstance(value, fx.Node) else None
    return None


def _has_tensor(node: fx.Node) -> bool:
    return _contains_tensor(node.meta.get("val"))


def _contains_tensor(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_contains_tensor(v) for v in value)
    return isinstance(value, torch.Tensor)


def _is_symbolic_op(node: fx.Node) -> bool:
    """Whether the node only does arithmetic on sizes (no data is read, nothing is asserted)."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace == "aten" and node.target._opname.startswith("sym_")
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    return node.meta.get("val") is not None
