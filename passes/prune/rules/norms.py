"""Normalisations.

Statistics that are taken over a removed axis would change.  The masked model has zeros there, so
that they can be had from what is left: the sum over what is left is that over all, and the number
of places is known.  A norm that loses places is written out with the full number (see `moments`).

    y = layer_norm(x, (D,))  ->  m = sum(x) / D;  v = sum(x * (x - m)) / D
                                 y = (x - m) * rsqrt(v + eps) * weight + bias
"""

from __future__ import annotations

import math

import torch
from torch import fx

from graphopt.passes.prune.rule import Call, Edit, Result, Value, adapts, known, rule
from graphopt.passes.prune.rules.moments import Moments

aten = torch.ops.aten

_MEETS = "it meets an axis that keeps its size"
_STATISTIC = "a statistic is taken over it, and what is removed from it is not zero"


@rule(aten.batch_norm, *known(aten, "_native_batch_norm_legit"), aten.instance_norm)
def _batch_norm(call: Call) -> Result:
    """Channels are normalised one by one."""
    x = call["input"]
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = call[name]
        if isinstance(value, Value):
            call.unify(x.axes[1], value.axes[0], _MEETS)
    for axis in range(len(x.axes)):
        if axis != 1:
            call.freeze(x.axes[axis], "a statistic is taken over it")
    return Value(x.axes, _affine_zero(call, x, 1))


def _affine_zero(call: Call, x: Value, *axes: int) -> tuple[bool, ...]:
    """Only a weight and a bias that are removed too make zeros."""
    weight, bias = call["weight"], call["bias"]
    zero = isinstance(weight, Value) and all(weight.zero)
    zero = zero and (bias is None or (isinstance(bias, Value) and all(bias.zero)))
    return tuple(zero if axis in axes else False for axis in range(len(x.axes)))


@rule(aten.layer_norm, *known(aten, "rms_norm"))
def _layer_norm(call: Call) -> Result:
    x = call["input"]
    rank, normed = len(x.axes), len(call.raw("normalized_shape"))
    for name in ("weight", "bias"):
        value = call[name]
        if isinstance(value, Value):
            for axis in range(-normed, 0):
                call.unify(x.axes[axis], value.axes[axis], _MEETS)
    for axis in range(rank - normed, rank):
        _statistic(call, x, axis)
    zero = _affine_zero(call, x, *range(rank - normed, rank))
    bias = call["bias"]
    lead = tuple(z and not isinstance(bias, Value) for z in x.zero[: rank - normed])
    return Value(x.axes, (*lead, *zero[rank - normed :]))


def _statistic(call: Call, x: Value, axis: int) -> None:
    if not call.compensates:
        call.freeze(x.axes[axis], "a statistic is taken over it")
    elif call.units.is_free(x.axes[axis]):
        call.must_be_zero(x, axis, _STATISTIC)


@adapts(aten.layer_norm, *known(aten, "rms_norm"))
def _adapt_layer_norm(edit: Edit) -> None:
    x, shape = edit.input("input"), edit.raw("normalized_shape")
    axes = x.axes[-len(shape) :]
    if all(edit.count(labels) == len(labels) for labels in axes):
        return
    is_rms = edit.node.target.overloadpacket is getattr(aten, "rms_norm", None)  # type: ignore[union-attr]
    left, total = math.prod(map(edit.count, axes)), math.prod(map(len, axes))
    made = _Normalised(edit, list(range(-len(shape), 0)), left, total, centred=not is_rms)
    result = made.of(edit.raw("input"), _epsilon(edit))
    for name, op in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
        if isinstance(edit.raw(name), fx.Node):
            result = edit.call(op, result, edit.raw(name))
    edit.replace(made.narrowed(result))


def _epsilon(edit: Edit) -> float:
    eps = edit.raw("eps")
    dtype = edit.original.all_input_nodes[0].meta["val"].dtype
    return torch.finfo(dtype).eps if eps is None else eps


class _Normalised:
    """Writes a normalisation out, with the number of places of the full model."""

    def __init__(self, edit: Edit, dims: list[int], left: int, total: int, centred: bool) -> None:
        self.edit, self.centred = edit, centred
        self.moments = Moments(edit, dims, left, total)
        self.dtype = edit.original.all_input_nodes[0].meta["val"].dtype
        weight = edit.raw("weight")
        edit.compensated.append(str(weight.target if weight is not None else edit.original.name))

    def of(self, x: fx.Node, eps: float) -> fx.Node:
        """(x - mean) / sqrt(variance + eps), in single precision at least."""
        call = self.edit.call
        if self.dtype in (torch.float16, torch.bfloat16):
            x = call(aten.to.dtype, x, torch.float32)
        centred = call(aten.sub.Tensor, x, self.moments.mean(x)) if self.centred else x
        variance = self.moments.variance(x, centred)
        scale = call(aten.rsqrt.default, call(aten.add.Tensor, variance, eps))
        return call(aten.mul.Tensor, centred, scale)

    def narrowed(self, x: fx.Node) -> fx.Node:
        """The result in the type of the input."""
        if self.dtype in (torch.float16, torch.bfloat16):
            return self.edit.call(aten.to.dtype, x, self.dtype)
        return x


@rule(aten.group_norm)
def _group_norm(call: Call) -> Result:
    """Whole groups go freely; places within groups as in a layer norm."""
    x, groups = call["input"], call.raw("num_groups")
    _, inner = call.split(x.axes[1], groups, len(x.axes[1]) // groups)
    for name in ("weight", "bias"):
        value = call[name]
        if isinstance(value, Value):
            call.unify(x.axes[1], value.axes[0], _MEETS)
    _statistic(call, Value((inner,), (x.zero[1],)), 0)
    for labels in x.axes[2:]:
        call.freeze(labels, "a statistic is taken over it")
    return Value(x.axes, _affine_zero(call, x, 1))


@adapts(aten.group_norm)
def _adapt_group_norm(edit: Edit) -> None:
    labels, groups = edit.input("input").axes[1], edit.raw("num_groups")
    grid = edit.kept(labels).reshape(groups, -1)
    left, within = int(grid.any(axis=1).sum()), int(grid.any(axis=0).sum())
    if within == grid.shape[1]:
        edit.set("num_groups", left)
        return
    rank = len(edit.output.axes)
    x = edit.call(aten.unflatten.int, edit.raw("input"), 1, [left, within])
    made = _Normalised(edit, list(range(2, rank + 1)), within, grid.shape[1], centred=True)
    result = edit.call(aten.flatten.using_ints, made.of(x, edit.raw("eps")), 1, 2)
    for name, op in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
        if isinstance(edit.raw(name), fx.Node):
            shaped = edit.call(aten.view.default, edit.raw(name), [-1, *[1] * (rank - 2)])
            result = edit.call(op, result, shaped)
    edit.replace(made.narrowed(result))


@rule(aten._weight_norm, *known(aten, "_weight_norm_interface"))
def _weight_norm(call: Call) -> Result:
    """G * v / |v|, with norms over all axes but one; places that are zero add nothing."""
    direction, size, dim = call["v"], call["g"], call.raw("dim")
    for axis, labels in enumerate(direction.axes):
        if axis != dim:
            call.must_be_zero(direction, axis, _STATISTIC)
        call.unify(labels, size.axes[axis], _MEETS)
    # Where a whole row is zero, zero is divided by zero.
    call.freeze(direction.axes[dim], "its norm would be zero")
    made = Value(direction.axes, direction.zero)
    return (made, size) if isinstance(call.output, (tuple, list)) else made
