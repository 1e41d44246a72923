"""Where relevance ends: floating inputs, and what integer ones look up.

An embedding of token ids carries the relevance of the tokens, although ids themselves are no
values.  An index often isn't the input but a copy of it: shifted to the right, with padding filled
in, offset by the table it is for.  So relevance at the looked-up rows goes back along the copies to
the places of the input that they were made from; rows looked up by a constant (the start token) are
parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.interpret import call
from graphopt.passes.relevance import families
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.ops import is_floating, is_mask, values_read

_ELEMENTWISE = frozenset(
    """
    add sub rsub mul neg abs clamp clamp_min clamp_max remainder fmod floor_divide bitwise_and
    bitwise_or bitwise_xor eq ne gt ge lt le minimum maximum logical_not logical_and
    """.split()
)
"""Functions of each element of an index: the place stays the same."""

_CASTS = frozenset({"to", "_to_copy", "type_as", "float", "double", "half", "long", "int"})
_SAME = _CASTS | {"clone", "contiguous", "alias", "lift_fresh_copy"}


@dataclass(frozen=True)
class Lookup:
    """Rows that integer inputs look up.

    Attributes:
        index: The index; its dimensions are the first ones of the rows.
        inputs: The placeholders that it is made from, by name.
    """

    index: fx.Node
    inputs: Mapping[str, fx.Node]


class Copies:
    """Places of integer inputs in the values that are made from them by copying."""

    def __init__(self) -> None:
        self._inputs: dict[fx.Node, tuple[fx.Node, ...]] = {}

    def inputs(self, node: Any) -> tuple[fx.Node, ...]:
        """The integer placeholders that an index is made from, place by place."""
        if not isinstance(node, fx.Node):
            return ()
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [o for o in operands(top) if o not in self._inputs]
            if top in self._inputs or not missing:
                self._inputs[top] = self._of(stack.pop())
            else:
                stack += missing
        return self._inputs[node]

    def _of(self, node: fx.Node) -> tuple[fx.Node, ...]:
        if node.op == "placeholder":
            return () if is_floating(node.meta.get("val")) else (node,)
        return tuple(dict.fromkeys(i for o in operands(node) for i in self._inputs[o]))


def operands(node: fx.Node) -> list[fx.Node]:
    """What the places of an index come from; nothing if it is no copy."""
    if node.op != "call_function" or is_floating(node.meta.get("val")):
        return []
    name, spec = families.op_name(node), families.spec_of(node)
    if name in _ELEMENTWISE:
        return [a for a in node.args[:2] if isinstance(a, fx.Node)]
    if name == "one_hot":
        return [node.args[0]]  # type: ignore[list-item]
    if spec is None or spec.family is not Family.ROUTE or name == "embedding":
        return []
    found = []
    for place in spec.data:
        given = node.args[place] if place < len(node.args) else None
        found += given if isinstance(given, list | tuple) else [given]
    return [a for a in found if isinstance(a, fx.Node)]


def lookups(graph: fx.Graph) -> dict[fx.Node, Lookup]:
    """The values that integer inputs look up.

    Embeddings, rows of a table, one-hot vectors; where there is neither one of these nor a floating
    input, integers that are cast.
    """
    copies = Copies()
    found: dict[fx.Node, Lookup] = {}
    cast: dict[fx.Node, Lookup] = {}
    data: set[fx.Node] = set()  # what depends on a floating input or on what was looked up
    floating = False
    for node in graph.nodes:
        if not is_floating(node.meta.get("val")) or node.op not in ("placeholder", "call_function"):
            continue
        floating |= node.op == "placeholder"
        if node.op == "placeholder" or any(n in data for n in values_read(node)):
            data.add(node)
            continue  # rows of a value take its relevance, as neighbours in a graph do
        index = _index(node)
        inputs = copies.inputs(index)
        if not inputs:
            continue
        lookup = Lookup(index, {i.name: i for i in inputs})
        certain = families.op_name(node) not in _CASTS or _is_one_hot(index)
        (found if certain else cast)[node] = lookup
        if certain:
            data.add(node)
    return found if found or floating else cast


def _index(node: fx.Node) -> Any:
    """The index that a floating value is looked up by, or None."""
    name, args = families.op_name(node), node.args
    if name == "embedding":
        return args[1]
    if name == "index_select" and args[1] == 0:
        return args[2]
    if name == "index":
        places: Any = args[1]
        return places[0] if len(places) == 1 and not is_mask(places[0].meta["val"]) else None
    return args[0] if name in _CASTS else None


def _is_one_hot(node: Any) -> bool:
    while isinstance(node, fx.Node) and families.op_name(node) in _SAME:
        node = node.args[0]
    return isinstance(node, fx.Node) and families.op_name(node) == "one_hot"


def places(
    lookup: Lookup, values: Mapping[fx.Node, Any], leaves: Mapping[fx.Node, Tensor]
) -> Tensor:
    """An index as a linear map of numbers at the places of the inputs.

    Args:
        lookup: The rows.
        values: Values of the graph.
        leaves: Floating numbers of the shape of each input.

    Returns:
        Of the shape of the index: at each place the number at the place that it was copied from,
        zero where it comes from a constant.
    """
    found: dict[fx.Node, Any] = dict(leaves)
    like = next(iter(leaves.values()))

    def of(node: fx.Node) -> Any:
        if node not in found:
            parts = operands(node)
            value = values[node]
            zero = parts or not isinstance(value, Tensor)
            found[node] = _moved(node, parts, of, values) if zero else _zeros(value, like)
        return found[node]

    return of(lookup.index)


def _zeros(value: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(value, dtype=like.dtype)


def _moved(
    node: fx.Node,
    parts: list[fx.Node],
    of: Callable[[fx.Node], Any],
    values: Mapping[fx.Node, Any],
) -> Any:
    name = families.op_name(node)
    if name in _SAME:
        return of(parts[0])
    if name == "one_hot":
        return of(parts[0]).unsqueeze(-1).expand(values[node].shape)
    if name in _ELEMENTWISE:
        moved = [of(p) for p in parts]
        made = [
            m for p, m in zip(parts, moved, strict=True) if operands(p) or p.op == "placeholder"
        ]
        total: Any = sum(made or moved)
        return torch.broadcast_to(total / max(len(made), 1), values[node].shape)
    return call(node, lambda n: of(n) if n in parts else values[n])


def returned(
    lookup: Lookup, values: Mapping[fx.Node, Any], relevance: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Relevance of looked-up rows, at the inputs.

    Args:
        lookup: The rows.
        values: Values of the graph.
        relevance: Of the rows.

    Returns:
        Relevance of each input, of its shape, and the part of what was given that belongs to inputs
        and not to constants.
    """
    index = values[lookup.index]
    dims = list(range(index.ndim, relevance.ndim))
    rows = relevance.sum(dims) if dims else relevance
    if lookup.index.op == "placeholder":
        return {next(iter(lookup.inputs)): rows}, relevance
    leaves = {
        node: torch.ones_like(values[node], dtype=rows.dtype).requires_grad_()
        for node in lookup.inputs.values()
    }
    with torch.enable_grad():
        share = places(lookup, values, leaves)
    # what is filled in is a number of its own, which is no place
    filled = places(lookup, values, {n: torch.zeros_like(leaf) for n, leaf in leaves.items()})
    found = torch.autograd.grad(share, list(leaves.values()), rows, allow_unused=True)
    parts = {
        name: torch.zeros_like(leaves[node]) if grad is None else grad
        for (name, node), grad in zip(lookup.inputs.items(), found, strict=True)
    }
    share = (share.detach() - filled).reshape(*share.shape, *[1] * len(dims))
    return parts, relevance * share


def at_table(
    lookup: Lookup, values: Mapping[fx.Node, Any], table: Tensor, relevance: Tensor
) -> Tensor:
    """Relevance of looked-up rows, at the rows of the table that they are copies of."""
    return torch.zeros_like(table).index_put((values[lookup.index],), relevance, accumulate=True)


def marked(
    lookup: Lookup, values: Mapping[fx.Node, Any], rows: Tensor, mark: Callable[[Tensor], Tensor]
) -> Tensor:
    """Rows with a number added that depends on the places that they were looked up by.

    Args:
        lookup: The rows.
        values: Values of the graph.
        rows: The rows.
        mark: Makes the numbers at an input's places from zeros of its shape.
    """
    leaves = {
        node: mark(torch.zeros_like(values[node], dtype=rows.dtype))
        for node in lookup.inputs.values()
    }
    added = places(lookup, values, leaves)
    return rows + added.reshape(*added.shape, *[1] * (rows.ndim - added.ndim))


def named(found: Mapping[fx.Node, Lookup]) -> Iterator[tuple[fx.Node, str]]:
    """Pairs of rows and the name of the first input that they come from."""
    for node, lookup in found.items():
        yield node, next(iter(lookup.inputs))
