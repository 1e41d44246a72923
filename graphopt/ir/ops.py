"""What a planner must know about an op: may it run again, and as what?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# Ops that copy, fill or select; like elementwise ones, they are bound by memory.
_MOVING = {
    aten._to_copy, aten.cat, aten.stack, aten.repeat, aten.constant_pad_nd, aten.flip, aten.roll,
    aten.embedding, aten.index, aten.index_select, aten.gather, aten.tril, aten.triu, aten.arange,
    aten.full, aten.full_like, aten.zeros_like, aten.ones_like, aten.scalar_tensor,
    aten.slice_scatter, aten.select_scatter, aten.hardswish, aten.copy,
}  # fmt: skip
_NORMALISING = {
    aten.native_layer_norm, aten.native_group_norm, aten._fused_rms_norm,
    aten._native_batch_norm_legit, aten._native_batch_norm_legit_functional,
    aten._native_batch_norm_legit_no_training,
}  # fmt: skip

# Namespaces whose ops do exactly what their schema and tags say.
_TRUSTED = {"aten", "prims", "graphopt"}


@dataclass(frozen=True)
class Form:
    """How a node is computed a second time.

    Attributes:
        target: The op.
        args: Its arguments, as nodes of the same graph.
        results: Which of the original's results it gives, at the same positions.
    """

    target: Any
    args: tuple[Any, ...]
    results: frozenset[int]


def recomputed_form(node: fx.Node) -> Form | None:
    """The op that gives a node's results again without its side results; None: the op itself.

    Training BatchNorm gives new running statistics as well; a second run would read statistics
    that the first one has already replaced, so it runs without any.
    """
    if node.target is aten._native_batch_norm_legit_functional.default and node.args[5] is True:
        x, weight, bias, _mean, _var, training, momentum, eps = node.args
        return Form(
            aten._native_batch_norm_legit.no_stats,
            (x, weight, bias, training, momentum, eps),
            frozenset({0, 1, 2}),
        )
    return None


def is_size(node: fx.Node) -> bool:
    """Whether a call computes with sizes."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.SymInt)


def is_random(node: fx.Node) -> bool:
    """Whether running the node draws random numbers."""
    if isinstance(node.target, torch._ops.OpOverload):
        drawing = torch.Tag.nondeterministic_seeded in node.target.tags
        return drawing and not _drops_nothing(node)
    return any(is_random(inner) for inner in _inner_nodes(node))


def _drops_nothing(node: fx.Node) -> bool:
    """Whether an op that could drop something out, such as attention, is told not to."""
    schema = node.target._schema  # type: ignore[union-attr]
    for place, argument in enumerate(schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[place] if place < len(node.args) else argument.default_value
            return bool(node.kwargs.get(argument.name, given) == 0)
    return False


def is_data_dependent(node: fx.Node) -> bool:
    """Whether the shape or Python value of the result depends on the data."""
    if isinstance(node.target, torch._ops.OpOverload):
        tags = node.target.tags
        return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
    return any(is_data_dependent(inner) for inner in _inner_nodes(node))


def is_effectful(node: fx.Node) -> bool:
    """Whether the node does something besides giving results, or might (a custom op)."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace not in _TRUSTED or target._schema.is_mutable or not _returns(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        inner = list(_inner_nodes(node))
        return not inner or any(is_effectful(n) for n in inner)
    return False


def is_repeatable(node: fx.Node) -> bool:
    """Whether running the node again gives the same values and does nothing else."""
    return not (is_random(node) or is_data_dependent(node) or is_effectful(node))


def is_memory_bound(node: fx.Node) -> bool:
    """Whether an op does little more than read its inputs and write its results.

    These are elementwise ops, copies, and normalisations, which read their input twice; products,
    reductions, softmax and draws are not.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or is_random(node):
        return False
    return torch.Tag.pointwise in target.tags or target.overloadpacket in _MOVING | _NORMALISING


def out_overload(target: object) -> tuple[torch._ops.OpOverload, str] | None:
    """The overload of an op that writes into a given tensor, and the name of that argument."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    inputs = [a.name for a in target._schema.arguments]
    for name in target.overloadpacket.overloads():
        overload = getattr(target.overloadpacket, name)
        written = [a.name for a in overload._schema.arguments if _is_written(a)]
        others = [a.name for a in overload._schema.arguments if not _is_written(a)]
        types = [str(a.type) for a in overload._schema.arguments if not _is_written(a)]
        same = [str(a.type) for a in target._schema.arguments]
        fits = len(written) == 1 and others == inputs and types == same
        if fits and written[0] not in inputs and _writes_directly(overload):
            return overload, written[0]
    return None


def _writes_directly(overload: torch._ops.OpOverload) -> bool:
    """Whether it has a kernel of its own; generated ones compute elsewhere and copy."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CPU")


def _is_written(argument: torch.Argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _returns(target: torch._ops.OpOverload) -> bool:
    return bool(target._schema.returns)


def _inner_nodes(node: fx.Node) -> list[fx.Node]:
    """Computations in the sub-graphs of a higher-order op."""
    root = node.graph.owning_module
    found = []
    for argument in node.all_input_nodes:
        if argument.op == "get_attr" and root is not None:
            module = (
                root.get_submodule(str(argument.target)) if _is_module(root, argument) else None
            )
            if isinstance(module, fx.GraphModule):
                found += [n for n in module.graph.nodes if n.op == "call_function"]
    return found


def _is_module(root: torch.nn.Module, node: fx.Node) -> bool:
    try:
        root.get_submodule(str(node.target))
    except AttributeError:
        return False
    return True
