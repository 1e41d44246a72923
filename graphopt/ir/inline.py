"""Splicing grad-mode regions (``wrap_with_set_grad_enabled``) into the graph around them."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.ir.aliases import subgraph, writes

_GRAD_REGION = "wrap_with_set_grad_enabled"


def regions(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The sub-graphs that a graph refers to."""
    for node in module.graph.find_nodes(op="get_attr"):
        inner = subgraph(node)
        if inner is not None:
            yield inner


def inline_regions(module: fx.GraphModule) -> tuple[int, list[dict[str, str]]]:
    """Splice in the grad-mode regions of one graph where that keeps the meaning.

    Args:
        module: Changed in place.

    Returns:
        How many were spliced in, and for those that stay ``{"node", "op", "reason"}``.
    """
    count, kept = 0, []
    for node in list(module.graph.nodes):
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        reason = _obstacle(node)
        if reason is None:
            _splice(node)
            count += 1
        else:
            kept.append({"node": node.name, "op": str(node.target), "reason": reason})
    return count, kept


def _obstacle(node: fx.Node) -> str | None:
    """Why a region has to stay, or None."""
    if str(node.target) != _GRAD_REGION and node.target.__name__ != _GRAD_REGION:  # type: ignore[union-attr]
        return "only grad-mode regions are inlined"
    enabled, body, *operands = node.args
    inner = subgraph(body) if isinstance(body, fx.Node) else None
    if inner is None or node.kwargs or not isinstance(node.meta.get("val"), (tuple, list)):
        return "an unknown form of region"
    inputs = inner.graph.find_nodes(op="placeholder")
    if len(inputs) != len(operands):
        return "an unknown form of region"
    if any(n.users for n in inner.graph.find_nodes(op="get_attr")):
        return "holds tensors or further regions of its own"
    sources = {i: o if isinstance(o, fx.Node) else i for i, o in zip(inputs, operands, strict=True)}
    differentiable = [n for n in inputs if _may_require_grad(sources[n])]
    if not differentiable:
        return None
    if enabled:
        return "gradients are switched on for something that may require them"
    return _detaching_obstacle(inner, differentiable)


def _detaching_obstacle(inner: fx.GraphModule, differentiable: list[fx.Node]) -> str | None:
    """Why detaching the inputs of a ``no_grad`` region would not mean the same, or None."""
    results = pytree.tree_leaves(inner.graph.output_node().args[0])
    if any(result in differentiable for result in results):
        return "returns a differentiable input as it is"
    if any(written in differentiable for n in inner.graph.nodes for written in writes(n)):
        return "writes to a differentiable input"
    return None


def _may_require_grad(node: fx.Node) -> bool:
    """Whether a value may take part in differentiation: anything floating that isn't constant."""
    leaves = [t for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, torch.Tensor)]
    if "val" in node.meta and not any(t.is_floating_point() or t.is_complex() for t in leaves):
        return False
    if node.op != "get_attr":
        return True
    owner: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part, None)
    return isinstance(owner, torch.nn.Parameter) or not isinstance(owner, torch.Tensor)


def _splice(node: fx.Node) -> None:
    """Copy the body of a region in place of the call, differentiable inputs detached."""
    graph = node.graph
    _, body, *operands = node.args
    assert isinstance(body, fx.Node)
    inner = subgraph(body)
    assert inner is not None
    env: dict[fx.Node, Any] = {}
    values = iter(operands)
    with graph.inserting_before(node):
        for member in inner.graph.nodes:
            if member.op == "placeholder":
                env[member] = _detached(next(values), graph, node)
            elif member.op == "output":
                continue
            elif member.op != "get_attr":  # an unused one
                env[member] = graph.node_copy(member, lambda n: env[n])
    flat = fx.map_arg(inner.graph.output_node().args[0], lambda n: env[n])
    outputs = list(flat) if isinstance(flat, (list, tuple)) else [flat]
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(user.args[1], int):
            _substitute(user, outputs[user.args[1]])
    graph.erase_node(node)
    if not body.users:
        graph.erase_node(body)


def _substitute(user: fx.Node, value: Any) -> None:
    if isinstance(value, fx.Node):
        user.replace_all_uses_with(value)
    else:
        for reader in list(user.users):
            reader.args, reader.kwargs = fx.map_arg(
                (reader.args, reader.kwargs), lambda n: value if n is user else n
            )
    user.graph.erase_node(user)


def _detached(value: Any, graph: fx.Graph, region: fx.Node) -> Any:
    if not isinstance(value, fx.Node) or not _may_require_grad(value):
        return value
    if region.args[0]:  # gradients switched on: `_obstacle` saw nothing differentiable
        return value
    tensor = value.meta.get("val")
    if not isinstance(tensor, torch.Tensor):
        return value
    detach = torch.ops.aten.detach.default
    new = graph.create_node("call_function", detach, (value,), name="detach")
    new.meta = {k: v for k, v in region.meta.items() if k in ("nn_module_stack", "stack_trace")}
    with torch.no_grad():
        new.meta["val"] = tensor.detach()
    return new
