"""Neighbouring linear operators become one where that is exact and pays.

    conv(k1, s1) then conv(k2, s2), no zeros added in between  ->  conv(k1 + (k2 - 1) s1, s1 s2)
    s x + t + conv(x)                                          ->  conv with s at its middle tap
    conv(x) + conv'(x)                                         ->  conv of the sum of the weights

The first is exact where the second adds no zeros: it would see zeros where the merged one sees
outputs of the first beyond the border.  It is exact as well where the first has a 1x1 kernel and no
bias, since it makes zeros of zeros.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.private.folding.affine import Affine, joined
from graphopt.private.folding.linear import Linear, identity
from graphopt.private.folding.pays import Op, Pays
from graphopt.private.folding.read import addends
from graphopt.private.folding.sheet import Sheet, example

Site = tuple[Linear, fx.Node]


def merge(sheet: Sheet, pays: Pays) -> int:
    """Merge neighbours; returns how many operators went."""
    count = 0
    for node in sheet.nodes():
        if sheet.linear(node) is not None:
            count += _with_data(sheet, node, pays)
        elif addends(sheet, node) is not None:
            count += _terms(sheet, node, pays)
    sheet.sweep()
    return count


def _with_data(sheet: Sheet, node: fx.Node, pays: Pays) -> bool:
    """Merge an operator with the one that makes its input."""
    data = sheet.data(node)
    first, second = sheet.linear(data), sheet.linear(node)
    if first is None or second is None or not sheet.is_private(data):
        return False
    if not _alike(sheet, first, second):
        return False
    outline = composed(_weightless(first), _weightless(second))
    if outline is None:
        return False
    given, between, result = (_sizes(n) for n in (sheet.data(data), data, node))
    before = [Op(first, given, between), Op(second, between, result)]
    if not pays(before, Op(outline, given, result)):
        return False
    merged = composed(first, second)
    assert merged is not None
    sheet.change(node, merged, sheet.data(data))
    return True


def _alike(sheet: Sheet, first: Linear, second: Linear) -> bool:
    """Whether both are secret or both public."""
    return sheet.is_public(first.sources) == sheet.is_public(second.sources)


def _weightless(linear: Linear) -> Linear:
    """The same with sizes alone: a merged weight may be too large to make."""
    bias = None if linear.bias is None else linear.bias.to("meta")
    return dataclasses.replace(linear, weight=linear.weight.to("meta"), bias=bias)


def _sizes(node: fx.Node) -> list[int]:
    return example(node.meta["val"].shape)


# one after the other ------------------------------------------------------------------------------


def composed(first: Linear, second: Linear) -> Linear | None:
    """Both in one, or None where that isn't exact."""
    if first.dims != second.dims or second.transposed:
        return None
    if first.transposed:
        return _mixed(first, second) if second.is_pointwise else None
    zeros_stay = first.bias is None and set(first.kernel) <= {1} and not any(first.padding)
    if any(second.padding) and not zeros_stay:
        return None
    if first.groups != second.groups:
        first, second = first.dense(), second.dense()
    if first.dims == 0:
        weight = second.weight @ first.weight
        return _joined(first, second, weight, {})
    weight, dilation = _kernel(first, second)
    padding = [
        p + q * s for p, q, s in zip(first.padding, second.padding, first.stride, strict=True)
    ]
    stride = [a * b for a, b in zip(first.stride, second.stride, strict=True)]
    shape = {"padding": tuple(padding), "stride": tuple(stride), "dilation": dilation}
    return _joined(first, second, weight, shape)


def _joined(first: Linear, second: Linear, weight: Tensor, shape: dict[str, Any]) -> Linear:
    """The merged operator; its bias is the second's of the first's."""
    bias = second.bias
    if first.bias is not None:
        taps = second.weight.reshape(*second.weight.shape[:2], -1).sum(2)
        by_group = first.bias.reshape(second.groups, -1, 1)
        through = taps.reshape(second.groups, -1, taps.shape[1]) @ by_group
        bias = second.offset() + through.reshape(-1)
    sources = joined(first.sources, second.sources)
    return dataclasses.replace(
        first, weight=weight, bias=bias, groups=second.groups, sources=sources, **shape
    )


def _kernel(first: Linear, second: Linear) -> tuple[Tensor, tuple[int, ...]]:
    """``sum_m second[o, m, b] first[m, i, a]`` at tap ``a d1 + b d2 s1``, and the dilation."""
    steps = [d * s for d, s in zip(second.dilation, first.stride, strict=True)]
    dilation, taps = [], []
    for k1, k2, d1, step in zip(first.kernel, second.kernel, first.dilation, steps, strict=True):
        if k2 == 1:  # taps lie as the first's do: no zeros in between
            dilation.append(d1)
            taps.append((1, 1))
        elif k1 == 1:
            dilation.append(step)
            taps.append((1, 1))
        else:
            dilation.append(1)
            taps.append((step, d1))
    run = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[first.dims - 1]
    options: dict[str, Any] = {
        "stride": [s for s, _ in taps], "dilation": [d for _, d in taps],
    }  # fmt: skip
    rows, middle = second.outputs // second.groups, first.outputs // first.groups
    parts = [
        run(
            second.weight[group * rows : (group + 1) * rows],
            first.weight[group * middle : (group + 1) * middle],
            **options,
        )
        for group in range(first.groups)
    ]
    return torch.cat(parts), tuple(dilation)


def _mixed(first: Linear, second: Linear) -> Linear | None:
    """A transposed convolution whose output channels are mixed."""
    if first.groups != 1 or second.groups != 1:
        return None
    mixing = second.weight.flatten(1)
    weight = torch.einsum("po,io...->ip...", mixing, first.weight)
    bias = second.bias
    if first.bias is not None:
        bias = second.offset() + mixing @ first.bias
    sources = joined(first.sources, second.sources)
    return dataclasses.replace(first, weight=weight, bias=bias, sources=sources)


# beside each other --------------------------------------------------------------------------------


def _terms(sheet: Sheet, node: fx.Node, pays: Pays) -> bool:
    """Merge the two terms of a sum, both linear in one value."""
    found = addends(sheet, node)
    assert found is not None
    (first, second), sign = found
    for one, other, signs in ((first, second, (1.0, sign)), (second, first, (sign, 1.0))):
        linear = sheet.linear(one)
        if linear is None or not sheet.is_private(one) or one is other:
            continue
        beside = _beside(sheet, other, sheet.data(one), linear)
        merged = None if beside is None else summed(linear, beside, signs)
        if merged is None or beside is None or not sheet.takes(linear.sources, beside.sources):
            continue
        given, result = _sizes(sheet.data(one)), _sizes(node)
        before = [Op(linear, given, result)]
        if other in sheet.forms and sheet.linear(other) is not None:
            before.append(Op(beside, given, result))
        if pays(before, Op(merged, given, result)):
            sheet.change(node, merged, sheet.data(one))
            return True
    return False


def _beside(sheet: Sheet, node: fx.Node, data: fx.Node, like: Linear) -> Linear | None:
    """A term as a linear operator on a value: a convolution of it, the value itself, scaled."""
    if node is data:
        return _diagonal(like, None)
    if node not in sheet.forms or sheet.data(node) is not data or not sheet.is_private(node):
        return None
    affine = sheet.affine(node)
    if affine is None:
        return sheet.linear(node)
    along = affine.axis is None or affine.axis == like.axis
    return _diagonal(like, affine) if along else None


def _diagonal(like: Linear, affine: Affine | None) -> Linear | None:
    """The operator that only scales and shifts, in the groups of another one."""
    if like.inputs != like.outputs or like.transposed:
        return None
    ones, nothing = (1,) * like.dims, (0,) * like.dims
    plain = dataclasses.replace(
        like, weight=identity(like.inputs, like.groups, like.dims), bias=None, stride=ones,
        padding=nothing, dilation=ones, output_padding=nothing, sources=(),
    )  # fmt: skip
    return plain if affine is None else plain.then(affine)


def summed(one: Linear, other: Linear, signs: tuple[float, float]) -> Linear | None:
    """The sum of two operators on one value, or None where no single one is that."""
    if one.dims != other.dims or one.transposed or other.transposed:
        return None
    if one.groups != other.groups or one.stride != other.stride:
        return None
    if math.prod(other.kernel) > math.prod(one.kernel):
        one, other, signs = other, one, (signs[1], signs[0])
    place = _place(one, other)
    if place is None:
        return None
    weight = signs[0] * one.weight
    weight[(slice(None), slice(None), *place)] += signs[1] * other.weight
    bias = None
    if one.bias is not None or other.bias is not None:
        bias = signs[0] * one.offset() + signs[1] * other.offset()
    sources = joined(one.sources, other.sources)
    return dataclasses.replace(one, weight=weight, bias=bias, sources=sources)


def _place(one: Linear, other: Linear) -> tuple[slice, ...] | None:
    """Where the taps of a smaller kernel lie in a larger one."""
    place = []
    for axis, (size, small) in enumerate(zip(one.kernel, other.kernel, strict=True)):
        step = one.dilation[axis]
        if small > 1 and other.dilation[axis] != step:
            return None
        start, rest = divmod(one.padding[axis] - other.padding[axis], step)
        if rest or start < 0 or start + small > size:
            return None
        place.append(slice(start, start + small))
    return tuple(place)
