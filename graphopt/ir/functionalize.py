"""In-place ops of a pre-dispatch graph as functional ones, where nobody can tell the difference."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from graphopt.ir.aliases import affected, is_sure_view, shares, writes
from graphopt.ir.sharing import opname
from graphopt.ir.untouched import autocast_off

EFFECT = "writes to the memory of"
"""How the reason begins where an op changes what the graph doesn't own."""

_AUTOCAST = ("AutocastCPU", "AutocastCUDA")
# Random in-place ops whose functional twin draws the same numbers in the same order.
_SAME_DRAWS = frozenset("dropout feature_dropout alpha_dropout feature_alpha_dropout".split())


class _Refused(Exception):  # noqa: N818 - says why, it is no failure
    """Why an in-place op stays."""


def functionalize(module: fx.GraphModule) -> tuple[int, list[dict[str, str]]]:
    """Rewrite the in-place ops of one graph (sub-graphs are left alone).

    Args:
        module: Changed in place.

    Returns:
        How many ops were rewritten, and for those that stay ``{"node", "op", "reason"}``.
    """
    count, kept = 0, []
    for node in list(module.graph.nodes):
        if not writes(node):
            continue
        try:
            _rewrite(node)
            count += 1
        except _Refused as reason:
            kept.append({"node": node.name, "op": str(node.target), "reason": str(reason)})
    return count, kept


def _rewrite(node: fx.Node) -> None:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        raise _Refused("a sub-graph writes to its inputs")
    if not _in_place(target):
        raise _Refused("writes to something besides its first argument")
    written = node.args[0]
    assert isinstance(written, fx.Node)
    twin = functional_twin(target)
    if twin is None:
        raise _Refused("has no functional twin that does the same under autocast and randomness")
    reshaping = torch.Tag.inplace_view in target.tags  # changes one tensor's shape and no memory
    stale = _reshaped(written) if reshaping else _stale(node, written)
    result = _derive(node, twin)
    _check_same_form(written, node, result)
    _replace(node, twin, stale)


def functional_twin(
    target: torch._ops.OpOverload, *, autocast: bool = True
) -> torch._ops.OpOverload | None:
    """The functional op that computes what an in-place op writes, or None.

    Ops that autocast treats differently in their two forms, and random ops whose twin draws
    otherwise, have none.

    Args:
        target: The in-place op.
        autocast: Whether the twin may run under autocast.
    """
    name = opname(target)
    packet = getattr(getattr(torch.ops, target.namespace), name, None)
    if target.namespace != "aten" or packet is None:
        return None
    if torch.Tag.nondeterministic_seeded in target.tags and name not in _SAME_DRAWS:
        return None
    signature = _signature(target)
    for overload in packet.overloads():
        twin = getattr(packet, overload)
        if _signature(twin) == signature and not twin._schema.is_mutable:
            return None if autocast and _autocast_knows(twin) else twin
    return None


def _signature(target: torch._ops.OpOverload) -> list[tuple[str, str]]:
    """Names and types of the arguments; the first one's name differs between twins."""
    arguments = target._schema.arguments
    return [("", str(a.type)) if i == 0 else (a.name, str(a.type)) for i, a in enumerate(arguments)]


def _autocast_knows(target: torch._ops.OpOverload) -> bool:
    name = target.name()
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in _AUTOCAST)


def _in_place(target: torch._ops.OpOverload) -> bool:
    """Whether the op writes its first argument, nothing else, and returns it."""
    schema = target._schema
    writers = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    returned = [r for r in schema.returns if r.alias_info is not None and r.alias_info.is_write]
    return (
        len(writers) == len(returned) == len(schema.returns) == 1
        and writers[0].name == schema.arguments[0].name
        and target._opname.endswith("_")
    )


def _reshaped(written: fx.Node) -> list[fx.Node]:
    """What an op like `squeeze_` leaves stale: the one tensor object, but no view of it."""
    own = written.op == "call_function" and (not shares(written) or is_sure_view(written))
    if not own:
        raise _Refused("changes the shape of a tensor that may not be the graph's own")
    return [written]


def _stale(node: fx.Node, written: fx.Node) -> list[fx.Node]:
    """Nodes read after the write that hold the written memory: ``written`` and views of it.

    Raises:
        _Refused: The memory isn't the graph's own, or someone who reads it later can't be derived
            anew.
    """
    stale = []
    for holder in affected(written):
        if holder.op in ("placeholder", "get_attr"):
            what = "an input" if holder.op == "placeholder" else f"{holder.target}"
            raise _Refused(f"{EFFECT} {what}")
        if holder is node or not any(user > node for user in holder.users):
            continue
        if holder > node:  # made from the result of this very op
            continue
        if holder is not written and not _derived(holder, written):
            raise _Refused(f"{holder.name} may share its memory and is read later")
        stale.append(holder)
    return stale


def _derived(view: fx.Node, base: fx.Node) -> bool:
    """Whether ``view`` is made from ``base`` by sure views alone, from nothing that changes."""
    while view is not base:
        if not is_sure_view(view) or len(view.all_input_nodes) == 0:
            return False
        if any(u is not view.all_input_nodes[0] for u in view.all_input_nodes if _tensor(u)):
            return False
        view = view.all_input_nodes[0]
    return True


def _derive(node: fx.Node, twin: Any) -> Any:
    """What the functional twin gives on the fake inputs."""

    def fake(argument: fx.Node) -> Any:
        if "val" not in argument.meta:
            raise _Refused(f"{argument.name} has no metadata")
        return argument.meta["val"]

    args, kwargs = fx.map_arg((node.args, node.kwargs), fake)
    args, kwargs = pytree.tree_map(_differentiable, (args, kwargs))
    first = args[0]
    if not isinstance(first, FakeTensor):
        raise _Refused("has no metadata")
    try:
        with autocast_off(), enable_python_dispatcher(), torch.enable_grad(), first.fake_mode:
            result = twin(*args, **kwargs)
    except Exception as error:  # whatever an op raises on inputs that its twin doesn't take
        raise _Refused(
            f"its functional twin refuses these inputs: {type(error).__name__}"
        ) from None
    if "NotImplemented" in type(getattr(result, "grad_fn", None)).__name__:
        raise _Refused("its functional twin has no derivative")
    return result


def _differentiable(value: Any) -> Any:
    """A fake tensor that requires a gradient where it can, to see whether the op has one."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    return value.requires_grad_() if value.is_floating_point() or value.is_complex() else value


def _check_same_form(written: fx.Node, node: fx.Node, result: Any) -> None:
    """The functional result has to be of the shape, type and layout that the in-place op keeps."""
    assert isinstance(node.target, torch._ops.OpOverload)
    view = torch.Tag.inplace_view in node.target.tags
    kept = node.meta.get("val") if view else written.meta.get("val")
    same = (
        isinstance(kept, torch.Tensor)
        and isinstance(result, torch.Tensor)
        and kept.dtype == result.dtype
        and kept.device == result.device
        and _sizes(kept) == _sizes(result)
    )
    if not same:
        raise _Refused("its functional twin gives another shape, type or layout")


def _sizes(tensor: torch.Tensor) -> list[Any]:
    """Sizes and strides as plain values (the hints of symbolic ones)."""
    numbers = [*tensor.shape, *tensor.stride()]
    return [n if isinstance(n, int) else n.node.hint for n in numbers]


def _replace(node: fx.Node, twin: Any, stale: list[fx.Node]) -> None:
    """Put the twin after the op, let later readers read it, derive stale views anew, erase."""
    graph = node.graph
    written = node.args[0]
    assert isinstance(written, fx.Node)
    renewed: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(node):
        new = graph.create_node(
            "call_function", twin, node.args, dict(node.kwargs), name=opname(twin)
        )
        new.meta = dict(node.meta)
        renewed[written] = new
        for view in (v for v in sorted(stale) if v is not written):
            _renew(view, graph, renewed)
    for old in stale:
        old.replace_all_uses_with(renewed[old], delete_user_cb=lambda user: user > node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _renew(view: fx.Node, graph: fx.Graph, renewed: dict[fx.Node, fx.Node]) -> fx.Node:
    """Copies the chain of views that leads to ``view``, starting from renewed nodes."""
    if view in renewed:
        return renewed[view]
    base = view.all_input_nodes[0]
    _renew(base, graph, renewed)
    renewed[view] = graph.node_copy(view, lambda n: renewed.get(n, n))
    return renewed[view]


def _tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (torch.Tensor, list, tuple))
