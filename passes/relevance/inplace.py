"""Writes in place as new values, so that every value of a graph is one value."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.aliases import affected, is_sure_view, shares
from graphopt.ir.functionalize import functional_twin
from graphopt.ir.graphs import copy_place
from graphopt.passes.relevance.marks import MARK

aten = torch.ops.aten


def functionalize_writes(graph: fx.Graph) -> None:
    """Replace each write in place by a new value that all later readers read; changes the graph.

    A write to a view is a new value of what it is a view of.  Writes to inputs and buffers don't
    leave the graph any more.  What can't be rewritten (a view of an unknown kind) stays.
    """
    for node in list(graph.nodes):
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and _writes_first(target):
            _rewrite(graph, node)


def _writes_first(target: torch._ops.OpOverload) -> bool:
    """Whether a call writes to its first argument alone, and returns it."""
    written = [a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments]
    return sum(written) == 1 and written[0] and len(target._schema.returns) == 1


def _rewrite(graph: fx.Graph, node: fx.Node) -> None:
    written = node.args[0]
    copies = node.target in (aten.copy_.default, aten.fill_.Tensor)
    twin = aten.expand_as.default if copies else _twin(node.target)
    chain = _chain(written)
    if twin is None or chain is None or not isinstance(written, fx.Node):
        return
    stale = [n for n in affected(written) if n not in chain and _is_stale(n, node, written)]
    if not all(is_sure_view(n) for n in stale):
        return
    with graph.inserting_before(node):
        args = (node.args[1], written) if copies else node.args
        call = graph.call_function(twin, args, {} if copies else dict(node.kwargs))
        value = _cast(graph, _described(call, written, node), node)
        if copies:  # memory of its own
            value = _described(graph.call_function(aten.clone.default, (value,)), written, node)
        for view, base in itertools.pairwise(chain):
            value = _described(_INVERSES[_name(view)](graph, view, base, value), base, node)
        # the new value has the memory of the old one, and views of it are views of the new one
        value.meta["val"] = chain[-1].meta["val"]
        renewed = {chain[-1]: value}
        for view in sorted({*chain, *stale}):
            _renew(graph, view, renewed)
    for old in (*chain, *stale):
        old.replace_all_uses_with(renewed[old], delete_user_cb=lambda user: user > node)
    node.replace_all_uses_with(renewed[written])
    graph.erase_node(node)


def _twin(target: Any) -> torch._ops.OpOverload | None:
    """The functional form; explanations run without autocast, whose casts are calls by now."""
    return functional_twin(target, autocast=False)


def _chain(node: Any) -> list[fx.Node] | None:
    """A view, what it is a view of, and so on; None where that isn't known."""
    chain = [node]
    while (base := _base(chain[-1])) is not None:
        if _name(chain[-1]) not in _INVERSES:
            return None
        chain.append(base)
    return chain


def _base(node: fx.Node) -> fx.Node | None:
    """What a value shares its memory with, as far as its fake tensor tells."""
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    base = node.all_input_nodes[0]
    may = base in shares(node) and _same_memory(node, base)
    return base if may or is_sure_view(node) else None


def _same_memory(first: fx.Node, second: fx.Node) -> bool:
    values = [n.meta.get("val") for n in (first, second)]
    if not all(isinstance(v, Tensor) for v in values):
        return False
    left, right = (v.untyped_storage()._cdata for v in values)  # type: ignore[union-attr]
    return left == right


def _is_stale(view: fx.Node, node: fx.Node, written: fx.Node) -> bool:
    """Whether a value was taken before a write, shares its memory and is read later."""
    before = view is not node and view < node and any(user > node for user in view.users)
    return before and (is_sure_view(view) or _same_memory(view, written))


def _renew(graph: fx.Graph, view: fx.Node, renewed: dict[fx.Node, fx.Node]) -> fx.Node:
    if view not in renewed:
        base = view.all_input_nodes[0]
        if base not in renewed and _base(view) is not None:
            _renew(graph, base, renewed)
        renewed[view] = graph.node_copy(view, lambda n: renewed.get(n, n))
    return renewed[view]


def _described(new: fx.Node, like: fx.Node, node: fx.Node) -> fx.Node:
    copy_place(new, node, MARK)
    new.meta["val"] = like.meta["val"].clone()
    return new


def _cast(graph: fx.Graph, new: fx.Node, node: fx.Node) -> fx.Node:
    """A write keeps the type of what is written to."""
    kept = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    read = [a.meta.get("val") for a in node.all_input_nodes]
    if all(not isinstance(v, Tensor) or v.dtype == kept for v in read):
        return new
    return _described(graph.call_function(aten.to.dtype, (new, kept)), new, node)


def _name(node: fx.Node) -> str:
    target = node.target
    return target._opname if isinstance(target, torch._ops.OpOverload) else ""


Inverse = Callable[[fx.Graph, fx.Node, fx.Node, fx.Node], fx.Node]


def _scattered(target: Any) -> Inverse:
    def inverse(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
        if base.meta["val"].is_complex() and len(view.args) > 1 and _name(view) != "diagonal":
            return _as_real(graph, target, view, base, value)
        return graph.call_function(target, (base, value, *view.args[1:]), dict(view.kwargs))

    return inverse


def _as_real(graph: fx.Graph, target: Any, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    """Complex numbers are put in their place as pairs: nothing else can be differentiated."""
    pairs = []
    for each in (base, value):
        plain = graph.call_function(aten.resolve_conj.default, (each,))
        plain.meta["val"] = each.meta["val"].clone()
        pair = graph.call_function(aten.view_as_real.default, (plain,))
        pair.meta["val"] = torch.view_as_real(each.meta["val"].resolve_conj())
        pairs.append(pair)
    dim: Any = view.args[1]
    args = (*pairs, dim % base.meta["val"].ndim, *view.args[2:])
    whole = graph.call_function(target, args, dict(view.kwargs))
    whole.meta["val"] = pairs[0].meta["val"].clone()
    return graph.call_function(aten.view_as_complex.default, (whole,))


def _reshaped(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    return graph.call_function(aten.view_as.default, (value, base))


def _same(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    return graph.call_function(aten.alias.default, (value,))


def _transposed(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    return graph.call_function(view.target, (value, *view.args[1:]))  # type: ignore[arg-type]


def _permuted(graph: fx.Graph, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    order: Any = view.args[1]
    inverse = sorted(range(len(order)), key=[d % len(order) for d in order].__getitem__)
    return graph.call_function(aten.permute.default, (value, inverse))


_INVERSES: dict[str, Inverse] = {
    "slice": _scattered(aten.slice_scatter.default),
    "select": _scattered(aten.select_scatter.default),
    "diagonal": _scattered(aten.diagonal_scatter.default),
    "transpose": _transposed,
    "permute": _permuted,
    **dict.fromkeys(
        ("view", "reshape", "flatten", "squeeze", "unsqueeze", "unflatten", "view_as"), _reshaped
    ),
    **dict.fromkeys(("detach", "alias", "to", "contiguous", "type_as", "dropout"), _same),
}
