"""Regions of a graph as calls like any others, so that relevance passes through them.

Grad mode says nothing about values, autocast becomes the casts that it stands for, and of a
condition both branches run, of which `torch.where` takes one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.aliases import subgraph
from graphopt.ir.graphs import copy_place, lookup

aten = torch.ops.aten

Body = Callable[[fx.Node, fx.GraphModule, list[Any]], list[Any]]

_CASTS = frozenset({"to", "_to_copy", "type_as", "float", "double", "half"})


def inline_regions(module: fx.GraphModule) -> None:
    """Put the bodies of grad-mode, autocast and conditional regions in their place.

    Regions of another kind, or of an unknown form, stay.

    Args:
        module: Changed in place.
    """
    changed = True
    while changed:
        changed = False
        for node in list(module.graph.nodes):
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                changed |= _inlined(module, node)


def _inlined(module: fx.GraphModule, node: fx.Node) -> bool:
    inline = _KINDS.get(node.target.name())  # type: ignore[union-attr]
    if inline is None or node.kwargs or any(u.target is not operator.getitem for u in node.users):
        return False
    with module.graph.inserting_before(node):
        results = inline(module, node)
    if results is None:
        return False
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    return True


def _grad_mode(module: fx.GraphModule, node: fx.Node) -> list[Any] | None:
    _, body, *operands = node.args
    return _spliced(module, body, operands)


def _autocast(module: fx.GraphModule, node: fx.Node) -> list[Any] | None:
    *_, enabled, _, body = node.args[:5]
    return _spliced(module, body, list(node.args[5:]), casts=bool(enabled))


def _cond(module: fx.GraphModule, node: fx.Node) -> list[Any] | None:
    chosen, first, second, operands = node.args
    value = chosen.meta.get("val") if isinstance(chosen, fx.Node) else None
    if not isinstance(value, Tensor):
        return None
    branches = [_spliced(module, body, list(operands)) for body in (first, second)]  # type: ignore[arg-type]
    if branches[0] is None or branches[1] is None:
        return None
    results = []
    for left, right in zip(*branches, strict=True):
        new = module.graph.call_function(aten.where.self, (chosen, left, right))
        copy_place(new, node)
        new.meta["val"] = left.meta["val"]
        results.append(new)
    return results


_KINDS: dict[str, Callable[[fx.GraphModule, fx.Node], list[Any] | None]] = {
    "wrap_with_set_grad_enabled": _grad_mode,
    "wrap_with_autocast": _autocast,
    "cond": _cond,
}


def _spliced(
    module: fx.GraphModule, body: Any, operands: list[Any], casts: bool = False
) -> list[Any] | None:
    """Copy a body to the place of insertion; its results, or None if it holds tensors of its own.

    Args:
        module: Where to.
        body: The node that fetches it.
        operands: What its placeholders stand for.
        casts: Whether its calls cast what they read to the type of their results.
    """
    inner = subgraph(body)
    if inner is None or not all(_is_shared(module, inner, n) for n in inner.graph.nodes):
        return None
    env: dict[fx.Node, Any] = dict(
        zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True)
    )
    for member in inner.graph.nodes:
        if member.op == "get_attr" and subgraph(member) is not None:
            name = f"{body.target}_{member.target}"
            setattr(module, name, subgraph(member))
            env[member] = module.graph.create_node("get_attr", name)
        elif member.op in ("call_function", "get_attr"):
            env[member] = module.graph.node_copy(member, env.__getitem__)
            if casts and member.op == "call_function":
                _cast(module.graph, env[member])
    flat = inner.graph.output_node().args[0]
    results = flat if isinstance(flat, list | tuple) else (flat,)
    return [env[n] if isinstance(n, fx.Node) else n for n in results]


def _is_shared(module: fx.GraphModule, inner: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a tensor that a body fetches is the outer one of that name."""
    if node.op != "get_attr" or not node.users or subgraph(node) is not None:
        return True
    try:
        return lookup(module, str(node.target)) is lookup(inner, str(node.target))
    except AttributeError:
        return False


def _cast(graph: fx.Graph, node: fx.Node) -> None:
    """What autocast does before a call: floating operands are of the result's type."""
    value: Any = node.meta.get("val")
    target: Any = node.target
    floating = isinstance(value, Tensor) and value.is_floating_point()
    if not floating or not isinstance(target, torch._ops.OpOverload) or target._opname in _CASTS:
        return
    for operand in node.all_input_nodes:
        given = operand.meta.get("val")
        if not isinstance(given, Tensor) or not given.is_floating_point():
            continue
        if given.dtype != value.dtype:
            with graph.inserting_before(node):
                new = graph.call_function(aten.to.dtype, (operand, value.dtype))
            copy_place(new, node)
            new.meta["val"] = given.to(value.dtype)
            node.replace_input_with(operand, new)
