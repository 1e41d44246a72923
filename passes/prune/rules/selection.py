"""Operators that pick, put together or make elements by their place."""

from __future__ import annotations

import operator

import numpy as np
import torch
from torch import fx

from graphopt.passes.prune.rule import (
    Call,
    Edit,
    Result,
    Value,
    adapts,
    axes_of,
    axis_of,
    fixed,
    known,
    rule,
    shape_of,
)
from graphopt.passes.prune.units import Labels

aten = torch.ops.aten


def replaced(value: Value, axis: int, labels: Labels, zero: bool = True) -> Value:
    """A value with another axis in place of one of its own."""
    axes, zeros = list(value.axes), list(value.zero)
    axes[axis], zeros[axis] = labels, zeros[axis] and zero
    return Value(tuple(axes), tuple(zeros))


def without(value: Value, *gone: int) -> Value:
    """A value without some of its axes."""
    return value.take([i for i in range(len(value.axes)) if i not in gone])


@rule(operator.getitem)
def _getitem(call: Call) -> Result:
    source, index = call.node.args
    value = call.value(source)
    if isinstance(value, tuple) and isinstance(index, int):
        return value[index]
    return call.opaque("it is picked from an unknown structure")


@rule(*known(aten, "cat", "concat", "concatenate"))
def _cat(call: Call) -> Result:
    rank = len(call.shape)
    parts = [v for v in call["tensors"] if len(v.axes) == rank]  # an empty vector is no part
    if not parts:
        return call.opaque("it has no elements")
    axis = axis_of(call.raw("dim"), rank)
    first = parts[0]
    for part in parts[1:]:
        for other in range(rank):
            if other != axis:
                why = "it is joined to an axis that keeps its size"
                call.unify(first.axes[other], part.axes[other], why)
    joined = np.concatenate([part.axes[axis] for part in parts])
    zero = tuple(all(call.is_zero(part, i) for part in parts) for i in range(rank))
    return Value(replaced(first, axis, joined).axes, zero)


@rule(aten.stack)
def _stack(call: Call) -> Result:
    parts = call["tensors"]
    axis = axis_of(call.raw("dim"), len(call.shape))
    first = parts[0]
    for part in parts[1:]:
        for one, other in zip(first.axes, part.axes, strict=True):
            call.unify(one, other, "it is joined to an axis that keeps its size")
    rank = len(first.axes)
    zero = [all(call.is_zero(part, i) for part in parts) for i in range(rank)]
    axes = list(first.axes)
    axes.insert(axis, np.zeros(len(parts), dtype=np.int64))
    zero.insert(axis, True)
    return Value(tuple(axes), tuple(zero))


@rule(aten.split, aten.split_with_sizes, aten.chunk, *known(aten, "tensor_split"))
def _split(call: Call) -> Result:
    x = call.inputs[0]
    axis = axis_of(call.raw("dim"), len(x.axes))
    parts, start = [], 0
    for output in call.output:
        size = int(output.shape[axis])
        parts.append(replaced(x, axis, x.axes[axis][start : start + size]))
        start += size
    return tuple(parts)


@adapts(aten.split, aten.split_with_sizes, aten.chunk, *known(aten, "tensor_split"))
def _adapt_split(edit: Edit) -> None:
    axis = axis_of(edit.raw("dim"), len(edit.output[0].axes))
    sizes = [edit.count(part.axes[axis]) for part in edit.output]
    if sizes == [len(part.axes[axis]) for part in edit.output]:
        return
    new = edit.call(aten.split_with_sizes.default, edit.node.args[0], sizes, axis)
    edit.replace(new)


@rule(aten.unbind)
def _unbind(call: Call) -> Result:
    x = call.inputs[0]
    axis = axis_of(call.raw("dim"), len(x.axes))
    call.freeze(x.axes[axis], "each place of it is read by itself")
    return tuple(without(x, axis) for _ in call.output)


@rule(aten.select)
def _select(call: Call) -> Result:
    x, index = call.inputs[0], call.raw("index")
    axis = axis_of(call.raw("dim"), len(x.axes))
    place = slice(None) if isinstance(index, fx.Node) else [index]
    call.freeze(x.axes[axis][place], "this place of it is read by itself")
    return without(x, axis)


@adapts(aten.select)
def _adapt_select(edit: Edit) -> None:
    x, index = edit.input("self"), edit.raw("index")
    labels = x.axes[axis_of(edit.raw("dim"), len(x.axes))]
    if isinstance(index, int) and edit.count(labels) != len(labels):
        edit.set("index", int(edit.kept(labels)[: axis_of(index, len(labels))].sum()))


@rule(aten.slice, aten.narrow)
def _slice(call: Call) -> Result:
    x = call.inputs[0]
    axis = axis_of(call.raw("dim"), len(x.axes))
    labels = x.axes[axis]
    bounds = _bounds(call, len(labels))
    if bounds is None:
        call.freeze(labels, "where it is cut depends on a size")
        return replaced(x, axis, np.zeros(call.shape[axis], dtype=np.int64))
    start, end, step = bounds
    if step > 1 and call.units.is_free(labels):
        if len(labels) % step or end < len(labels) or start >= step:
            call.freeze(labels, f"every {step}th place of a part of it is taken")
        else:
            labels, places = call.split(labels, len(labels) // step, step)
            call.freeze(places, f"every {step}th place of it is taken")
            return replaced(x, axis, labels)
    return replaced(x, axis, labels[start:end:step])


def _bounds(call: Call, size: int) -> tuple[int, int, int] | None:
    if call.has("length"):
        start, length, step = call.raw("start"), call.raw("length"), 1
        end = start + length if isinstance(start, int) and isinstance(length, int) else None
        if end is None:
            return None
    else:
        start, end, step = call.raw("start"), call.raw("end"), call.raw("step")
    start = 0 if start is None else start
    end = size if end is None else end
    if not all(isinstance(bound, int) for bound in (start, end, step)):
        return None
    return *slice(start, end).indices(size)[:2], step


@adapts(aten.slice)
def _adapt_slice(edit: Edit) -> None:
    x = edit.input("self")
    labels = x.axes[axis_of(edit.raw("dim"), len(x.axes))]
    kept, step = edit.kept(labels), edit.raw("step")
    if kept.all():
        return
    start, end = edit.raw("start") or 0, edit.raw("end")
    end = len(labels) if end is None else end
    start, end, _ = slice(start, end).indices(len(labels))
    if step > 1:
        edit.set("end", int(kept.sum()))
    else:
        edit.set("start", int(kept[:start].sum()))
        edit.set("end", int(kept[:end].sum()))


@adapts(aten.narrow)
def _adapt_narrow(edit: Edit) -> None:
    x = edit.input("self")
    kept = edit.kept(x.axes[axis_of(edit.raw("dim"), len(x.axes))])
    start, length = edit.raw("start"), edit.raw("length")
    if not kept.all():
        start = axis_of(start, len(kept))
        edit.set("length", int(kept[start : start + length].sum()))
        edit.set("start", int(kept[:start].sum()))


@rule(aten.flip)
def _flip(call: Call) -> Result:
    x = call.inputs[0]
    for axis in axes_of(call.raw("dims"), len(x.axes)):
        x = replaced(x, axis, x.axes[axis][::-1])
    return x


@rule(aten.roll)
def _roll(call: Call) -> Result:
    x, shifts = call.inputs[0], call.raw("shifts")
    if not call.raw("dims") or not all(isinstance(shift, int) for shift in shifts):
        return call.opaque("it is rolled as a whole, or by a size")
    for axis, shift in zip(axes_of(call.raw("dims"), len(x.axes)), shifts, strict=True):
        x = replaced(x, axis, np.roll(x.axes[axis], shift))
    return x


@adapts(aten.roll)
def _adapt_roll(edit: Edit) -> None:
    """As many places as are left come from the end to the start."""
    x = edit.input("self")
    shifts = []
    for axis, shift in zip(axes_of(edit.raw("dims"), len(x.axes)), edit.raw("shifts"), strict=True):
        kept = edit.kept(x.axes[axis])
        shifts.append(shift if kept.all() else int(kept[len(kept) - shift % len(kept) :].sum()))
    edit.set("shifts", shifts)


@rule(aten.tril, aten.triu)
def _triangle(call: Call) -> Result:
    x = call.inputs[0]
    for labels in x.axes[-2:]:
        call.freeze(labels, "a triangle of it is taken")
    return x


@rule(*known(aten, "diagonal", "diag", "diag_embed", "trace"))
def _diagonal(call: Call) -> Result:
    return call.opaque("a diagonal of it is taken")


@rule(aten.embedding)
def _embedding(call: Call) -> Result:
    table, places = call["weight"], call["indices"]
    call.freeze(table.axes[0], "it is indexed by the model's data")
    return Value((*places.axes, table.axes[1]), (*places.zero, table.zero[1]))


@rule(aten.embedding_bag)
def _embedding_bag(call: Call) -> Result:
    """Sums, means or maxima of rows: of what is removed they are zero."""
    table, weights = call["weight"], call["per_sample_weights"]
    others = [call["indices"], call["offsets"], *([weights] if isinstance(weights, Value) else [])]
    for labels in (table.axes[0], *(labels for value in others for labels in value.axes)):
        call.freeze(labels, "it is indexed by the model's data")
    first, *rest = call.output
    bags = np.zeros(shape_of(first)[0], dtype=np.int64)
    return (Value((bags, table.axes[1]), (True, table.zero[1])), *fixed(rest))


@rule(aten.index_select)
def _index_select(call: Call) -> Result:
    x, places = call["self"], call["index"]
    axis = axis_of(call.raw("dim"), len(x.axes))
    call.freeze(x.axes[axis], "it is indexed by data")
    return replaced(x, axis, places.axes[0], zero=False)


@rule(aten.gather, *known(aten, "take_along_dim"))
def _gather(call: Call) -> Result:
    x, places = call["self"], call.first("index", "indices")
    picked = call.value(places)
    axis = axis_of(call.raw("dim"), len(x.axes))
    call.freeze(x.axes[axis], "it is indexed by data")
    for other, labels in enumerate(picked.axes):
        if other == axis:
            continue
        call.unify(labels, x.axes[other], "it is indexed by data")
        if len(labels) != len(x.axes[other]):
            call.freeze(x.axes[other], "a part of it is indexed")
    zero = tuple(i != axis and x.zero[i] for i in range(len(x.axes)))
    return Value(picked.axes, zero)


@rule(aten.index)
def _index(call: Call) -> Result:
    x, indices = call["self"], call["indices"]
    used = [i for i, index in enumerate(indices) if index is not None]
    for axis in used:
        call.freeze(x.axes[axis], "it is indexed by data")
        for labels in indices[axis].axes:
            call.freeze(labels, "it holds indices")
    if any(call.node.args[1][i].meta["val"].dtype == torch.bool for i in used):  # type: ignore[index]
        return call.opaque("it is indexed by a mask")
    size = max(len(indices[i].axes) for i in used)
    rest = without(x, *used)
    together = used == list(range(used[0], used[-1] + 1))
    at = used[0] if together else 0
    new = [np.zeros(n, dtype=np.int64) for n in call.shape[at : at + size]]
    axes, zero = list(rest.axes), list(rest.zero)
    axes[at:at], zero[at:at] = new, [True] * size
    return Value(tuple(axes), tuple(zero))


@rule(aten.pad, aten.constant_pad_nd)
def _pad(call: Call) -> Result:
    """Places that are added with zeros may be removed like any others."""
    x, amounts = call["self"], call.raw("pad")
    if any(isinstance(amount, fx.Node) for amount in amounts):
        return call.opaque("how much is added to it depends on a size")
    constant = call.node.target is aten.constant_pad_nd.default or call.raw("mode") == "constant"
    zeros = constant and (call.raw("value") or 0) == 0
    for pair in range(len(amounts) // 2):
        axis = len(x.axes) - 1 - pair
        before, after = amounts[2 * pair : 2 * pair + 2]
        if not before and not after:
            continue
        if not zeros or before < 0 or after < 0:
            call.freeze(x.axes[axis], "it is padded")
            x = replaced(x, axis, np.zeros(call.shape[axis], dtype=np.int64))
        else:
            ends = [call.units.fresh(amount) for amount in (before, after)]
            x = replaced(x, axis, np.concatenate([ends[0], x.axes[axis], ends[1]]))
    return x if constant and zeros else Value(x.axes, tuple(False for _ in x.zero))


@adapts(aten.pad, aten.constant_pad_nd)
def _adapt_pad(edit: Edit) -> None:
    amounts = list(edit.raw("pad"))
    for pair in range(len(amounts) // 2):
        labels = edit.output.axes[len(edit.output.axes) - 1 - pair]
        before, after = amounts[2 * pair : 2 * pair + 2]
        if before > 0:
            amounts[2 * pair] = edit.count(labels[:before])
        if after > 0:
            amounts[2 * pair + 1] = edit.count(labels[len(labels) - after :])
    edit.set("pad", amounts)


_MADE = known(
    aten, "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"
)


@rule(*_MADE)
def _made(call: Call) -> Result:
    """A tensor of one value has whatever size is asked for."""
    axes = tuple(
        call.units.fresh(size) if isinstance(traced, int) and size > 1 else np.zeros(size, np.int64)
        for size, traced in zip(call.shape, call.output.shape, strict=True)
    )
    packet = call.node.target.overloadpacket  # type: ignore[union-attr]
    zero = packet in (aten.zeros, aten.new_zeros)
    return Value(axes, (zero,) * len(axes))


@adapts(*_MADE)
def _adapt_made(edit: Edit) -> None:
    edit.set("size", edit.sizes(edit.raw("size"), edit.output.axes))


@rule(aten.arange, *known(aten, "linspace", "eye"))
def _counted(call: Call) -> Result:
    return call.opaque("its elements are numbered")
