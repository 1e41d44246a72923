"""Promises: which forward values the rules need, and how each of them will be there.

A rule may need an operand's value long after the forward pass made it.  Such a need is a promise
(the term is DynamicLRP's, arXiv 2512.07010, which resolves them while it runs; here they are known
when the graph is compiled): made by an operation, about a value, resolved at the call that gives it
(its arg node), from which a chain of views leads to the value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from graphopt.cost.sizes import Substitution, concrete, span_bytes, tensors_in
from graphopt.ir.storage import Role, StorageMap, storage_map
from graphopt.passes.relevance.marks import is_backward, mark_of, values_of
from graphopt.passes.relevance.ops import Op, is_getitem

Policy = Literal["keep", "alias", "recompute", "cancel"]


@dataclass(frozen=True)
class Promise:
    """A value that the rule of an operation needs, or would need without quotients.

    Attributes:
        origin: The operation, by its call in the forward graph.
        operand: The value: by its name in the forward graph; where the rule has prepared it, by
            its name in the flat graph.
        arg_node: The call of the flat graph that gives the memory in which the value lies; empty
            for ``cancel``.
        chain: The views between, from the arg node to the value.
        policy: ``keep``: its memory stays from the forward pass on; ``alias``: it lies in memory
            that another promise keeps, or that the caller owns (inputs and parameters);
            ``recompute``: it is computed again; ``cancel``: the rule hands a quotient on for which
            the value isn't needed.
        bytes: Memory that is held between forward and backward for it; 0 but for ``keep``.
    """

    origin: str
    operand: str
    arg_node: str
    chain: tuple[str, ...]
    policy: Policy
    bytes: int


def promises(graph: fx.Graph, ops: Iterable[Op], sizes: Substitution) -> list[Promise]:
    """The promises of a flat graph, in the order of the backward pass.

    Args:
        graph: The flat graph, with its marks.
        ops: The operations of the forward graph.
        sizes: What stands for symbolic sizes.
    """
    storage = storage_map(graph)
    backward = _backward_calls(graph)
    turn = backward[0] if backward else graph.output_node()
    early = _before(graph, turn)
    found: dict[tuple[str, fx.Node], Promise] = {}
    held: set[fx.Node] = set()
    for call in backward:
        mark = mark_of(call)
        assert mark is not None
        for value in call.all_input_nodes:
            key = (mark.owner, value)
            owner = storage.base[value]
            if key in found or not _is_forward(value, storage):
                continue
            policy = _policy(owner, storage, early, held)
            size = _bytes(owner, sizes) if policy == "keep" else 0
            held.add(owner)
            chain = tuple(_chain(value, owner))
            found[key] = Promise(mark.owner, _name(value), owner.name, chain, policy, size)
    needed = {(p.origin, name) for (_, v), p in found.items() for name in _names(v)}
    return [*found.values(), *_cancelled(ops, needed)]


def _backward_calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if is_backward(n)]


def _before(graph: fx.Graph, turn: fx.Node) -> set[fx.Node]:
    found = set()
    for node in graph.nodes:
        if node is turn:
            return found
        found.add(node)
    return found


def _is_forward(value: fx.Node, storage: StorageMap) -> bool:
    """Whether something read in the backward pass is a tensor of the forward pass."""
    if storage.role[value] is Role.SYMBOL or is_backward(storage.base[value]):
        return False
    return isinstance(value.meta.get("val"), torch.Tensor)


def _policy(owner: fx.Node, storage: StorageMap, early: set[fx.Node], held: set[fx.Node]) -> Policy:
    if storage.role[owner] in (Role.INPUT, Role.CONSTANT):
        return "alias"
    if owner not in early:
        return "recompute"
    return "alias" if owner in held else "keep"


def _bytes(owner: fx.Node, sizes: Substitution) -> int:
    return sum(concrete(span_bytes(t), sizes) for t in tensors_in(owner.meta.get("val")))


def _chain(value: fx.Node, owner: fx.Node) -> Iterator[str]:
    """Views from the memory's owner to a value."""
    path = []
    while value is not owner:
        path.append(value.name)
        value = value.all_input_nodes[0]
    yield from reversed(path)


def _names(value: fx.Node) -> tuple[str, ...]:
    """What the forward graph calls a value; through views on it if it has no name itself."""
    return values_of(value)


def _name(value: fx.Node) -> str:
    names = _names(value)
    return names[0] if names else value.name


def _cancelled(ops: Iterable[Op], needed: set[tuple[str, str]]) -> Iterator[Promise]:
    """What rules would need without quotients: operands and results."""
    for op in ops:
        if is_getitem(op.node):
            continue
        for value in dict.fromkeys((op.node, *op.operands)):
            if (op.node.name, value.name) not in needed:
                yield Promise(op.node.name, value.name, "", (), "cancel", 0)


def kept_bytes(found: Sequence[Promise]) -> int:
    """Bytes that are held between forward and backward."""
    return sum(promise.bytes for promise in found)
