"""Compare two traces of one model: which nodes correspond, and in which arguments they differ."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.ir.graphs import lookup


@dataclass
class Alignment:
    """Corresponding nodes of two graphs (sub-graphs included) and what is left over.

    Attributes:
        pairs: Corresponding nodes, in order.
        first: Nodes that only the first graph has.
        second: Nodes that only the second graph has.
    """

    pairs: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    first: list[fx.Node] = field(default_factory=list)
    second: list[fx.Node] = field(default_factory=list)


def align(first: fx.GraphModule, second: fx.GraphModule) -> Alignment:
    """Pair the nodes of two graphs in order, by op and module path."""
    result = Alignment()
    _align(first, second, result)
    return result


def _align(first: fx.GraphModule, second: fx.GraphModule, result: Alignment) -> None:
    mine, theirs = _computing(first), _computing(second)
    my_keys = [_key(first, node) for node in mine]
    their_keys = [_key(second, node) for node in theirs]
    pairs: list[tuple[fx.Node, fx.Node]] = []
    if my_keys == their_keys:
        pairs = list(zip(mine, theirs, strict=True))
    else:
        matcher = difflib.SequenceMatcher(None, my_keys, their_keys, autojunk=False)
        for tag, a, b, c, d in matcher.get_opcodes():
            if tag == "equal":
                pairs += zip(mine[a:b], theirs[c:d], strict=True)
            else:
                result.first += mine[a:b]
                result.second += theirs[c:d]
    for one, other in pairs:
        result.pairs.append((one, other))
        for a, b in zip(_inner(first, one), _inner(second, other), strict=False):
            _align(a, b, result)


def _computing(module: fx.GraphModule) -> list[fx.Node]:
    """All nodes but reads of parameters and sub-graphs, which are compared where they are used."""
    return [node for node in module.graph.nodes if node.op != "get_attr"]


def _key(module: fx.GraphModule, node: fx.Node) -> Any:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    target = str(node.target) if node.op == "call_function" else node.op
    return target, stack[-1][0] if stack else "", len(_inner(module, node))


def _inner(module: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    sources = [n for n in node.all_input_nodes if n.op == "get_attr"]
    values = [lookup(module, str(n.target)) for n in sources]
    return [value for value in values if isinstance(value, fx.GraphModule)]


Same = Callable[[fx.Node, fx.Node], bool]


def differences(first: fx.Node, second: fx.Node, same: Same) -> dict[str, tuple[Any, Any]] | None:
    """Literal arguments in which two corresponding nodes differ.

    Args:
        first: A node of the first graph.
        second: The corresponding node of the second.
        same: Whether a node of the first graph and one of the second stand for one value.

    Returns:
        Argument place -> (value in the first, value in the second); None where the nodes differ in
        more than literals.
    """
    found: dict[str, tuple[Any, Any]] = {}
    matching = _compare("args", first.args, second.args, same, found)
    matching &= _compare("kwargs", dict(first.kwargs), dict(second.kwargs), same, found)
    return found if matching else None


def _compare(place: str, a: Any, b: Any, same: Same, found: dict[str, tuple[Any, Any]]) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return isinstance(a, fx.Node) and isinstance(b, fx.Node) and same(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return False
        parts = enumerate(zip(a, b, strict=True))
        return all([_compare(f"{place}.{i}", x, y, same, found) for i, (x, y) in parts])
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return False
        return all([_compare(f"{place}.{k}", a[k], b[k], same, found) for k in a])
    if isinstance(a, slice) and isinstance(b, slice):
        parts = [(a.start, b.start), (a.stop, b.stop), (a.step, b.step)]
        return all(_compare(place, x, y, same, {}) and _equal(x, y) for x, y in parts)
    if not _equal(a, b):
        found[place] = (a, b)
    return True


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node):
        return True
    return type(a) is type(b) and (a == b or (a != a and b != b))


def correspondence(alignment: Alignment) -> Same:
    """``same`` for nodes that `align` paired; reads of the same tensor are the same value."""
    partner = {id(second): first for first, second in alignment.pairs}

    def same(first: fx.Node, second: fx.Node) -> bool:
        if first.op == "get_attr" and second.op == "get_attr":
            return _same_read(first, second)
        return partner.get(id(second)) is first

    return same


def _same_read(first: fx.Node, second: fx.Node) -> bool:
    modules = [n.graph.owning_module for n in (first, second)]
    values = [lookup(m, str(n.target)) for m, n in zip(modules, (first, second), strict=True)]
    if isinstance(values[0], fx.GraphModule):
        return isinstance(values[1], fx.GraphModule)
    lifted = "lifted_tensor"
    both = lifted in str(first.target) and lifted in str(second.target)
    return first.target == second.target or both


def all_graphs(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """A graph module and the sub-graphs that it reads, at any depth."""
    yield module
    for node in module.graph.find_nodes(op="get_attr"):
        value = lookup(module, str(node.target))
        if isinstance(value, fx.GraphModule):
            yield from all_graphs(value)
