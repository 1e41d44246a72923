"""Sums, means and others over axes, and what works along one axis."""

from __future__ import annotations

import math

import numpy as np
import torch

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
    provenance,
    rule,
)

aten = torch.ops.aten

_SUMS = known(aten, "sum", "mean", "linalg_vector_norm", "norm", "frobenius_norm", "nansum")
_OTHERS = known(
    aten, "amax", "amin", "max", "min", "argmax", "argmin", "prod", "logsumexp", "any", "all",
    "median", "mode", "count_nonzero",
)  # fmt: skip
# Of zeros they don't give zero.
_NOT_OF_ZEROS = known(aten, "logsumexp", "all")
_ALONG = known(
    aten, "softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "cummax",
    "logcumsumexp", "sort", "topk", "argsort", "softmin", "diff", "renorm",
)  # fmt: skip


def dims_of(call: Call | Edit, rank: int) -> list[int]:
    """The axes that a call reduces."""
    dims = call.first("dim", "dims", "axis")
    if dims is None and call.has("ord") and not call.has("dim"):
        return list(range(rank))
    return axes_of(dims, rank)


def reduced(call: Call, x: Value, dims: list[int], zero: bool) -> Result:
    """A tensor of which some axes are reduced; all outputs of a call are alike."""
    outputs = call.output if isinstance(call.output, (tuple, list)) else [call.output]
    keeps = len(outputs[0].shape) == len(x.axes)
    one = np.zeros(1, dtype=np.int64)
    axes = [one if i in dims else labels for i, labels in enumerate(x.axes)]
    zeros = [zero and z for z in x.zero]
    if not keeps:
        left = [i for i in range(len(axes)) if i not in dims]
        axes, zeros = [axes[i] for i in left], [zeros[i] for i in left]
    made = Value(tuple(axes), tuple(zeros))
    return tuple(made for _ in outputs) if isinstance(call.output, (tuple, list)) else made


@rule(*_SUMS)
def _sum(call: Call) -> Result:
    """What is removed must be zero; then the sum is that of the full model."""
    x = call.inputs[0]
    dims = dims_of(call, len(x.axes))
    order = call.first("ord", "p")
    power = order is None or (isinstance(order, (int, float)) and 0 < order < math.inf)
    mean = call.node.target.overloadpacket is aten.mean  # type: ignore[union-attr]
    for axis in dims:
        if mean and not call.compensates:
            call.freeze(x.axes[axis], "a mean is taken over it")
        elif power:
            call.must_be_zero(x, axis, "it is summed over, and what is removed from it is not zero")
        else:
            call.freeze(x.axes[axis], "a norm is taken over it")
    return reduced(call, x, dims, zero=True)


@adapts(aten.mean)
def _adapt_mean(edit: Edit) -> None:
    """The mean is over the full number of places."""
    x = edit.input("self")
    axes = [x.axes[i] for i in dims_of(edit, len(x.axes))]
    left, total = math.prod(map(edit.count, axes)), math.prod(map(len, axes))
    if left == total:
        return
    with edit.graph.inserting_after(edit.node):
        scaled = edit.graph.call_function(aten.mul.Tensor, (edit.node, left / total))
    scaled.meta = provenance(edit.node)
    edit.compensated.append(edit.original.name)
    edit.node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


@rule(*_OTHERS)
def _other(call: Call) -> Result:
    x = call.inputs[0]
    if len(call.inputs) > 1 or not call.has("dim"):
        return call.opaque("it is reduced over all of its axes")
    dims = dims_of(call, len(x.axes))
    for axis in dims:
        call.freeze(x.axes[axis], "it is reduced, and every place of it counts")
    packet = call.node.target.overloadpacket  # type: ignore[union-attr]
    return reduced(call, x, dims, zero=packet not in _NOT_OF_ZEROS)


@rule(*_ALONG)
def _along(call: Call) -> Result:
    x = call.inputs[0]
    if not x.axes:
        return fixed(call.output)
    axis = axis_of(-1 if call.raw("dim") is None else call.raw("dim"), len(x.axes))
    call.freeze(x.axes[axis], "its places are compared or summed one by one")
    sums = call.node.target.overloadpacket in (aten.cumsum, aten.cumprod)  # type: ignore[union-attr]
    outputs = call.output if isinstance(call.output, (tuple, list)) else [call.output]
    made = []
    for output in outputs:
        axes = list(x.axes)
        axes[axis] = np.zeros(int(output.shape[axis]), dtype=np.int64)
        made.append(Value(tuple(axes), tuple(sums and z for z in x.zero)))
    return tuple(made) if isinstance(call.output, (tuple, list)) else made[0]


@rule(aten.glu)
def _glu(call: Call) -> Result:
    x = call["self"]
    axis = axis_of(call.raw("dim"), len(x.axes))
    half = len(x.axes[axis]) // 2
    value, gate = x.axes[axis][:half], x.axes[axis][half:]
    call.unify(value, gate, "it meets an axis that keeps its size")
    axes = list(x.axes)
    axes[axis] = value
    return Value(tuple(axes), x.zero)
