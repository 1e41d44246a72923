"""What operators give for values that are zero but for a part: see `padding`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphopt.cost.sizes import same_shape, same_size
from graphopt.passes.relevance.padding import (
    RULES,
    Padding,
    Part,
    Rule,
    count,
)

aten = torch.ops.aten

Found = Part | fx.Node | None


def crop(graph: fx.Graph) -> None:
    """Leave zeros out where the calls of a flat graph can do without; changes the graph."""
    Padding(graph).run()


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def known(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, rule))
        return rule

    return known


# --- place by place -------------------------------------------------------------------------------

# Arguments one of which has to be zero for the result to be
_ANY = {
    aten.mul.Tensor: (0, 1),
    aten.mul.Scalar: (0,),
    aten.div.Tensor: (0,),
    aten.div.Scalar: (0,),
    aten.threshold_backward.default: (1,),
    aten.neg.default: (0,),
    aten.abs.default: (0,),
    aten._to_copy.default: (0,),
    aten.clone.default: (0,),
}
# Arguments all of which have to be
_ALL = {aten.add.Tensor: (0, 1), aten.sub.Tensor: (0, 1), aten.where.self: (1, 2)}


@_rule(*_ANY, *_ALL)
def _pointwise(padding: Padding, node: fx.Node) -> Found:
    places = _ANY.get(node.target) or _ALL[node.target]  # type: ignore[arg-type]
    given = [node.args[i] for i in places if i < len(node.args)]
    parts = [p for a in given if (p := padding.part(a)) is not None]
    zeros = sum(_is_zero(a) for a in given)
    if not parts or (node.target in _ALL and len(parts) + zeros < len(given)):
        return None
    first = parts[0]
    shape = tuple(node.meta["val"].shape)
    held = [padding.part(a, plain=False) for a in node.all_input_nodes]
    fits = all(p.fits(first) for p in held if p is not None)
    if not fits or len(shape) != len(first.shape) or not _is_as_long(shape, first):
        return None
    if not all(p is None or padding.part(a) for a, p in zip(node.all_input_nodes, held)):  # noqa: B905
        return None
    args = [padding.cropped(node, a, first) for a in node.args]
    core = padding.emit(node, node.target, *args, **node.kwargs)
    return replace(first, core=core, shape=shape)


def _is_as_long(shape: Sequence[Any], part: Part) -> bool:
    return same_size(shape[part.dim], part.shape[part.dim])


def _is_zero(value: Any) -> bool:
    if isinstance(value, fx.Node):
        given: Any = value.args
        return value.target is aten.scalar_tensor.default and given[0] == 0
    return isinstance(value, int | float) and value == 0


# --- other shapes ---------------------------------------------------------------------------------


@_rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(padding: Padding, node: fx.Node) -> Found:
    part = padding.part(node.args[0], plain=False)
    assert part is not None
    shape = tuple(node.meta["val"].shape)
    for dim, size in enumerate(shape):
        before = same_size(count(shape[:dim]), count(part.shape[: part.dim]))
        if before and same_size(size, part.shape[part.dim]):
            sizes: list[Any] = [*node.args[1]]  # type: ignore[misc]
            sizes[dim] = part.core.meta["val"].shape[part.dim]
            if not isinstance(sizes[dim], int):
                return None
            core = padding.viewed(node, part.core, sizes)
            return Part(core, shape, dim, part.start, part.stop)
    return part  # the places are merged with others: what reads it has to know


@_rule(aten.transpose.int, aten.t.default, aten.permute.default)
def _transpose(padding: Padding, node: fx.Node) -> Found:
    part = padding.part(node.args[0])
    if part is None:
        return None
    order = list(range(len(part.shape)))
    if node.target is aten.permute.default:
        order = [d % len(order) for d in node.args[1]]  # type: ignore[union-attr,operator]
    elif len(order) > 1:
        dims: Any = node.args[1:] or (0, 1)
        first, second = (d % len(order) for d in dims)
        order[first], order[second] = order[second], order[first]
    core = padding.emit(node, node.target, part.core, *node.args[1:])
    shape = tuple(part.shape[d] for d in order)
    return replace(part, core=core, shape=shape, dim=order.index(part.dim))


@_rule(aten.unsqueeze.default, aten.squeeze.dim)
def _squeeze(padding: Padding, node: fx.Node) -> Found:
    part = padding.part(node.args[0])
    if part is None:
        return None
    shape = tuple(node.meta["val"].shape)
    given: Any = node.args[1]
    at = given % max(len(shape), len(part.shape))
    if node.target is aten.squeeze.dim and (at == part.dim or len(shape) == len(part.shape)):
        return None
    moved = len(shape) - len(part.shape) if at < part.dim + (len(shape) > len(part.shape)) else 0
    core = padding.emit(node, node.target, part.core, *node.args[1:])
    return replace(part, core=core, shape=shape, dim=part.dim + moved)


@_rule(aten.slice.Tensor)
def _slice(padding: Padding, node: fx.Node) -> Found:
    part = padding.part(node.args[0])
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    if part is None or dim % len(part.shape) == part.dim:
        return None
    core = padding.emit(node, node.target, part.core, *node.args[1:])
    return replace(part, core=core, shape=tuple(node.meta["val"].shape))


@_rule(aten.cat.default)
def _cat(padding: Padding, node: fx.Node) -> Found:
    values: Any = node.args[0]
    parts = [padding.part(v) for v in values]
    first = parts[0]
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    if first is None or not all(p is not None and p.fits(first) for p in parts):
        return None
    if dim % len(first.shape) == first.dim:
        return None
    core = padding.emit(node, node.target, [p.core for p in parts if p is not None], dim)
    return replace(first, core=core, shape=tuple(node.meta["val"].shape))


# --- sums and products ----------------------------------------------------------------------------


@_rule(aten.sum.dim_IntList, aten.mean.dim)
def _reduce(padding: Padding, node: fx.Node) -> Found:
    part = padding.part(node.args[0])
    if part is None or not node.args[1]:
        return None
    dims = [d % len(part.shape) for d in node.args[1]]  # type: ignore[union-attr,operator]
    if part.dim in dims and node.target is aten.mean.dim:
        return None
    core = padding.emit(node, node.target, part.core, *node.args[1:], **node.kwargs)
    if part.dim in dims:
        return core
    kept = len(node.args) > 2 and bool(node.args[2])
    dim = part.dim if kept else part.dim - sum(d < part.dim for d in dims)
    return replace(part, core=core, shape=tuple(node.meta["val"].shape), dim=dim)


@_rule(aten.mm.default, aten.mv.default)
def _mm(padding: Padding, node: fx.Node) -> Found:
    part = padding.part(node.args[0], plain=False)
    if part is None or node.args[1] in padding.parts or part.dim == len(part.shape) - 1:
        return None
    inner = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    *outer, width = part.core.meta["val"].shape
    if not same_size(inner, width) or not all(isinstance(n, int) for n in (*outer[1:], width)):
        return None
    rows = padding.viewed(node, part.core, [-1, width])
    found = padding.emit(node, node.target, rows, node.args[1])
    columns = [] if node.target is aten.mv.default else [node.meta["val"].shape[-1]]
    if not all(isinstance(n, int) for n in columns):
        return None
    core = padding.viewed(node, found, [-1, *outer[1:], *columns])
    return replace(part, core=core, shape=(*part.shape[:-1], *columns))


@_rule(aten.bmm.default)
def _bmm(padding: Padding, node: fx.Node) -> Found:
    if all(a in padding.parts for a in node.args):
        return None
    (place,) = (i for i, a in enumerate(node.args) if a in padding.parts)
    part = padding.part(node.args[place])
    if part is None:
        return None
    contracted = 2 if place == 0 else 1
    other = node.args[1 - place]
    if part.dim in (0, contracted):
        along = 0 if part.dim == 0 else 3 - contracted
        other = padding.emit(node, aten.slice.Tensor, other, along, part.start, part.stop)
    args = (part.core, other) if place == 0 else (other, part.core)
    core = padding.emit(node, aten.bmm.default, *args)
    if part.dim == contracted:
        return core
    return replace(part, core=core, shape=tuple(node.meta["val"].shape))


@_rule(aten._softmax_backward_data.default)
def _softmax(padding: Padding, node: fx.Node) -> Found:
    gradient, result, dim, kind = node.args
    part = padding.part(gradient)
    if part is None or dim % len(part.shape) == part.dim or result in padding.parts:  # type: ignore
        return None
    result = padding.cropped(node, result, part)
    return replace(part, core=padding.emit(node, node.target, part.core, result, dim, kind))


@_rule(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
def _attention(padding: Padding, node: fx.Node) -> Found:
    """The gradient of attention where only some of the queries' results have one."""
    gradient, query, key, value, result, sizes, rate, causal = node.args
    others = (query, key, value, result, sizes)
    part = padding.part(gradient)
    if part is None or part.dim != 2 or any(n in padding.parts for n in others):
        return None
    shape = query.meta["val"].shape  # type: ignore[union-attr]
    square = same_size(shape[2], key.meta["val"].shape[2])  # type: ignore[union-attr]
    if not same_shape(shape[:3], part.shape[:3]) or (causal and not (part.start == -1 and square)):
        return None  # the last query looks at all keys
    crop = (2, part.start, part.stop)
    query, result, sizes = (
        padding.emit(node, aten.slice.Tensor, n, *crop) for n in (query, result, sizes)
    )
    kwargs = dict(node.kwargs)
    mask: Any = kwargs.get("attn_mask")
    if isinstance(mask, fx.Node):
        kwargs["attn_mask"] = padding.cropped(node, mask, part)
    args = (part.core, query, key, value, result, sizes, rate, False)
    made = padding.emit(node, node.target, *args, **kwargs)
    for user in list(node.users):
        found = padding.emit(node, operator.getitem, made, user.args[1])
        if user.args[1] == 0:
            padding.parts[user] = replace(part, core=found, shape=tuple(shape))
        else:
            user.replace_all_uses_with(found)
    return made
