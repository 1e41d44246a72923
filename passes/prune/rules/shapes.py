"""Operators that arrange the same elements in other axes."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import fx

from graphopt.passes.prune.rule import (
    Call,
    Edit,
    Result,
    Sizes,
    Value,
    adapts,
    axes_of,
    axis_of,
    known,
    rule,
)
from graphopt.passes.prune.units import Labels

aten = torch.ops.aten


@rule(
    aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.squeeze,
    aten.unsqueeze, aten.view_as, aten.reshape_as, aten.ravel,
)  # fmt: skip
def _reshape(call: Call) -> Result:
    x: Value = call.inputs[0]
    if not isinstance(call.output, torch.Tensor) or call.output.dtype != _dtype(call):
        return call.opaque("its elements are read as another type")
    return reshaped(call, x, call.shape)


def _dtype(call: Call) -> Any:
    return call.node.all_input_nodes[0].meta["val"].dtype


def reshaped(call: Call, x: Value, shape: Sizes) -> Result:
    """The axes of a tensor whose elements stay in order."""
    if not math.prod(shape):
        return call.opaque("it has no elements")
    axes: list[Labels] = []
    zero: list[bool] = []
    for before, after in blocks(x.shape, shape):
        parts, is_zero = _block(call, x.take(before), [shape[i] for i in after])
        axes += parts
        zero += [is_zero] * len(parts)
    return Value(tuple(axes), tuple(zero))


def _block(call: Call, x: Value, sizes: list[int]) -> tuple[list[Labels], bool]:
    free = [call.units.is_free(labels) for labels in x.axes]
    zero = all(z for z, f in zip(x.zero, free, strict=True) if f)
    if not any(free):
        return [np.zeros(size, dtype=np.int64) for size in sizes], True
    if list(x.shape) == sizes:
        return list(x.axes), zero
    flat = x.axes[0]
    for labels in x.axes[1:]:
        flat = call.units.merge(flat, labels)
    parts: list[Labels] = []
    for size in sizes[:-1]:
        outer, flat = call.split(flat, size, len(flat) // size)
        parts.append(outer)
    return [*parts, flat], zero


def blocks(before: Sizes, after: Sizes) -> Iterator[tuple[list[int], list[int]]]:
    """Runs of axes of two shapes that hold the same number of elements, as short as can be."""
    i = j = 0
    while i < len(before) or j < len(after):
        mine, theirs = [], []
        left = right = 1
        while True:
            if left <= right and i < len(before) and (left < right or not mine):
                left *= before[i]
                mine.append(i)
                i += 1
            elif right <= left and j < len(after) and (right < left or not theirs):
                right *= after[j]
                theirs.append(j)
                j += 1
            elif left == right:
                break
            else:  # only axes of one are left
                rest = range(i, len(before)) if left < right else range(j, len(after))
                (mine if left < right else theirs).extend(rest)
                i, j = len(before), len(after)
                break
        yield mine, theirs


@adapts(aten.view, aten.reshape, aten._unsafe_view)
def _adapt_view(edit: Edit) -> None:
    name = edit.names[1][0]
    edit.set(name, edit.sizes(edit.raw(name), edit.output.axes))


@adapts(aten.unflatten)
def _adapt_unflatten(edit: Edit) -> None:
    sizes = edit.raw("sizes")
    axis = axis_of(edit.raw("dim"), len(edit.input("self").axes))
    edit.set("sizes", edit.sizes(sizes, edit.output.axes[axis : axis + len(sizes)]))


@rule(aten.permute)
def _permute(call: Call) -> Result:
    x = call["self"]
    return x.take([axis_of(i, len(x.axes)) for i in call.raw("dims")])


@rule(*known(aten, "transpose", "swapaxes", "swapdims"))
def _transpose(call: Call) -> Result:
    x = call.inputs[0]
    order = list(range(len(x.axes)))
    if order:
        one, other = (axis_of(i, len(order)) for i in call.node.args[1:3])  # type: ignore[arg-type]
        order[one], order[other] = order[other], order[one]
    return x.take(order)


@rule(*known(aten, "t", "mT", "numpy_T", "adjoint", "matrix_H", "mH"))
def _reversed(call: Call) -> Result:
    x = call.inputs[0]
    order = list(range(len(x.axes)))
    return x.take([*order[:-2], *order[-2:][::-1]])


@rule(*known(aten, "movedim", "moveaxis"))
def _movedim(call: Call) -> Result:
    x = call.inputs[0]
    rank = len(x.axes)
    source = axes_of(call.raw("source"), rank)
    goal = axes_of(call.raw("destination"), rank)
    rest = iter([i for i in range(rank) if i not in source])
    return x.take([source[goal.index(i)] if i in goal else next(rest) for i in range(rank)])


@rule(aten.expand, aten.expand_as, aten.broadcast_to)
def _expand(call: Call) -> Result:
    """Copies along an axis may each be removed, as long as somebody else doesn't want them all."""
    x, shape = call.inputs[0], call.shape
    new = len(shape) - len(x.axes)
    axes, zero = [], []
    for axis, size in enumerate(shape):
        if axis >= new and len(x.axes[axis - new]) == size:
            axes.append(x.axes[axis - new])
            zero.append(x.zero[axis - new])
        else:
            axes.append(_copies(call, axis, size))
            zero.append(False)
    return Value(tuple(axes), tuple(zero))


def _copies(call: Call, axis: int, size: int) -> Labels:
    like = call.raw("other")
    if isinstance(like, fx.Node):
        return call.values[like].axes[axis]  # type: ignore[union-attr]
    is_number = isinstance(call.output.shape[axis], int)
    return call.units.fresh(size) if is_number and size > 1 else np.zeros(size, dtype=np.int64)


@adapts(aten.expand, aten.broadcast_to)
def _adapt_expand(edit: Edit) -> None:
    edit.set("size", edit.sizes(edit.raw("size"), edit.output.axes))


@rule(aten.repeat, aten.tile)
def _repeat(call: Call) -> Result:
    x, shape = call.inputs[0], call.shape
    new = len(shape) - len(x.axes)
    axes, zero = [np.zeros(size, dtype=np.int64) for size in shape[:new]], [True] * new
    for labels, is_zero, size in zip(x.axes, x.zero, shape[new:], strict=True):
        axes.append(np.tile(labels, size // max(len(labels), 1)))
        zero.append(is_zero)
    return Value(tuple(axes), tuple(zero))


@rule(aten.repeat_interleave)
def _repeat_interleave(call: Call) -> Result:
    x, times, axis = call.inputs[0], call.raw("repeats"), call.raw("dim")
    if not isinstance(times, int) or axis is None:
        return call.opaque("how often elements are repeated depends on data")
    axis = axis_of(axis, len(x.axes))
    axes = list(x.axes)
    axes[axis] = np.repeat(axes[axis], times)
    return Value(tuple(axes), x.zero)


@adapts(aten.repeat_interleave)
def _adapt_repeat_interleave(edit: Edit) -> None:
    """The size that it promises, if it does."""
    axes, dim = edit.output.axes, edit.raw("dim")
    if isinstance(edit.raw("output_size"), int):
        edit.set("output_size", edit.count(axes[axis_of(dim, len(axes))]))


@rule(aten.pixel_shuffle)
def _pixel_shuffle(call: Call) -> Result:
    x, factor = call["self"], call.raw("upscale_factor")
    channels, places = call.split(x.axes[-3], len(x.axes[-3]) // factor**2, factor**2)
    call.freeze(places, "pixels are made of these channels")
    return _with_image(call, x, channels)


@rule(aten.pixel_unshuffle)
def _pixel_unshuffle(call: Call) -> Result:
    x, factor = call["self"], call.raw("downscale_factor")
    return _with_image(call, x, np.repeat(x.axes[-3], factor**2))


def _with_image(call: Call, x: Value, channels: Labels) -> Value:
    for labels in x.axes[-2:]:
        call.freeze(labels, "it is an axis of an image")
    image = [np.zeros(size, dtype=np.int64) for size in call.shape[-2:]]
    return Value((*x.axes[:-3], channels, *image), (*x.zero[:-2], True, True))


@rule(*known(aten, "channel_shuffle", "native_channel_shuffle"))
def _channel_shuffle(call: Call) -> Result:
    x, groups = call["self"], call.raw("groups")
    outer, inner = call.split(x.axes[1], groups, len(x.axes[1]) // groups)
    return Value((x.axes[0], call.units.merge(inner, outer), *x.axes[2:]), x.zero)


@adapts(*known(aten, "channel_shuffle", "native_channel_shuffle"))
def _adapt_channel_shuffle(edit: Edit) -> None:
    labels, groups = edit.input("self").axes[1], edit.raw("groups")
    edit.set("groups", int(edit.kept(labels).reshape(groups, -1).any(axis=1).sum()))


@rule(aten.im2col)
def _im2col(call: Call) -> Result:
    x, window = call["self"], math.prod(call.raw("kernel_size"))
    for labels in x.axes[-2:]:
        call.freeze(labels, "it is an axis of an image")
    places = np.zeros(call.shape[-1], dtype=np.int64)
    return Value((*x.axes[:-3], np.repeat(x.axes[-3], window), places), (*x.zero[:-2], True))


@rule(*known(aten, "sym_size", "sym_numel", "sym_stride", "sym_storage_offset"))
def _size(call: Call) -> Result:
    return None


@adapts(aten.sym_size)
def _adapt_size(edit: Edit) -> None:
    """Numbers that code computes from sizes stay those of the full model."""
    value = edit.input("self")
    axis = axis_of(edit.raw("dim"), len(value.axes))
    left, total = edit.count(value.axes[axis]), len(value.axes[axis])
    if left != total:
        _scale(edit, total, left)


@adapts(*known(aten, "sym_numel"))
def _adapt_numel(edit: Edit) -> None:
    value = edit.input("self")
    left = math.prod(map(edit.count, value.axes))
    if left != math.prod(value.shape):
        _scale(edit, math.prod(value.shape), left)


def _scale(edit: Edit, times: int, over: int) -> None:
    with edit.graph.inserting_after(edit.node):
        scaled = edit.graph.call_function(operator.mul, (edit.node, times))
    with edit.graph.inserting_after(scaled):
        whole = edit.graph.call_function(operator.floordiv, (scaled, over))
    edit.node.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not scaled)
