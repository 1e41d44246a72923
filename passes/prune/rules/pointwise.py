"""Operators that work element by element, with broadcasting.

Axes of the same place are one axis; an axis of size 1 that is broadcast couples nothing.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import fx

from graphopt.ir import interpret
from graphopt.ir.ops import is_random
from graphopt.passes.prune.rule import Call, Result, Value, known, rule

aten = torch.ops.aten

_PRODUCTS = {*known(aten, "mul", "logical_and", "bitwise_and", "__and__")}
_QUOTIENTS = {*known(aten, "div", "true_divide")}
_CHOICES = {*known(aten, "where", "masked_fill")}
_DROPOUTS = {*known(aten, "dropout", "feature_dropout", "native_dropout")}
_COPIES = {
    *known(
        aten, "to", "_to_copy", "contiguous", "clone", "detach", "alias", "lift_fresh",
        "lift_fresh_copy", "type_as", "copy",
    )
}  # fmt: skip
_COMPOSITE = {
    *known(
        aten, "gelu", "silu", "mish", "relu6", "selu", "celu", "elu", "hardswish", "hardsigmoid",
        "hardtanh", "leaky_relu", "softplus", "softshrink", "tanhshrink", "hardshrink", "threshold",
        "logsigmoid", "log_sigmoid", "rrelu", "alpha_dropout", "square", "clamp", "clip", "fix",
        "softsign", "float_power", "rsub", "subtract", "multiply", "negative", "absolute",
        "zeros_like", "ones_like", "full_like", "empty_like", "nan_to_num", "conj", "conj_physical",
        "resolve_conj", "resolve_neg", "real", "imag",
    )
}  # fmt: skip
_NAMED = _PRODUCTS | _QUOTIENTS | _CHOICES | _DROPOUTS | _COPIES | _COMPOSITE


def is_pointwise(target: Any) -> bool:
    """Whether an operator works element by element."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target.overloadpacket in _NAMED or torch.Tag.pointwise in target.tags


def pointwise(call: Call) -> Result:
    """Couples the axes of all inputs that have the output's size."""
    if is_random(call.node) and call.node.target.overloadpacket not in _DROPOUTS:  # type: ignore[union-attr]
        return call.opaque("random numbers are drawn for each element")
    rank = len(call.shape)
    axes, zero = [], []
    for axis in range(rank):
        whole = [
            (value, axis - rank + len(value.axes))
            for value in call.inputs
            if axis - rank + len(value.axes) >= 0
            and len(value.axes[axis - rank + len(value.axes)]) == call.shape[axis]
        ]
        if not whole:
            return call.opaque("the sizes of its inputs do not explain its output")
        labels = whole[0][0].axes[whole[0][1]]
        for value, place in whole[1:]:
            call.unify(labels, value.axes[place], "it meets an axis that keeps its size")
        zero.append(_is_zero(call, axis, rank))
        if not zero[-1] and _breaks(call, axis, rank):
            call.freeze(labels, "zeros in place of what is removed would give no number")
        axes.append(labels)
    return Value(tuple(axes), tuple(zero))


def _along(call: Call, argument: Any, axis: int, rank: int) -> bool:
    """Whether an argument is zero where an axis of the output is removed."""
    value = call.value(argument)
    if not isinstance(value, Value):
        return not isinstance(argument, fx.Node) and value == 0
    place = axis - rank + len(value.axes)
    return place >= 0 and len(value.axes[place]) != 1 and value.zero[place]


def _is_zero(call: Call, axis: int, rank: int) -> bool:
    """Whether the output is zero where an axis is removed."""
    packet = call.node.target.overloadpacket  # type: ignore[union-attr]
    along = functools.partial(_along, call, axis=axis, rank=rank)
    arguments = call.node.args
    if packet in _PRODUCTS:
        return any(map(along, arguments[:2]))
    if packet in _QUOTIENTS:
        return along(arguments[0]) and not along(arguments[1])
    if packet in _DROPOUTS:
        return along(arguments[0])
    if packet in _CHOICES:
        chosen = arguments[1:] if packet is aten.where else (arguments[0], call.raw("value"))
        return len(chosen) > 0 and all(map(along, chosen))
    return all(map(along, _tensors(call))) and _of_zeros(call) == 0


def _breaks(call: Call, axis: int, rank: int) -> bool:
    """Whether the output is no finite number where an axis is removed."""
    packet = call.node.target.overloadpacket  # type: ignore[union-attr]
    along = functools.partial(_along, call, axis=axis, rank=rank)
    if packet in _QUOTIENTS:
        return along(call.node.args[1])
    if not all(map(along, _tensors(call))):
        return False
    made = _of_zeros(call)
    return made is not None and not math.isfinite(made)


def _tensors(call: Call) -> list[fx.Node]:
    return [a for a in call.node.all_input_nodes if isinstance(call.values.get(a), Value)]


def _of_zeros(call: Call) -> float | None:
    """What an operator gives for zeros: it is asked; None where that can't be told."""
    try:
        rank = max(len(value.axes) for value in call.inputs)

        def zeros(node: fx.Node) -> Any:
            fake = node.meta["val"]
            return torch.zeros((1,) * rank, dtype=fake.dtype)

        with torch.no_grad():
            return float(interpret.call(call.node, zeros).abs().max())
    except Exception:  # an argument that is no tensor, or no kernel for these: nothing is known
        return None


@rule(aten.prelu)
def _prelu(call: Call) -> Result:
    x, slope = call["self"], call["weight"]
    if len(x.axes) > 1:
        call.unify(x.axes[1], slope.axes[0], "it meets an axis that keeps its size")
    return x


@rule(aten.scalar_tensor)
def _scalar(call: Call) -> Result:
    return call.opaque("its sizes are fixed")
