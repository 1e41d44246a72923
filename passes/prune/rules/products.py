"""Products: linear layers, matrix products, convolutions, attention.

An axis that is summed over may lose a place whose summand is zero in the masked model.  That is so
where a parameter is one of the factors, or a value made from parameters of what is removed.
"""

from __future__ import annotations

import math
import string
from typing import Any

import numpy as np
import torch

from graphopt.passes.prune.rule import Call, Edit, Result, Value, adapts, known, rule
from graphopt.passes.prune.units import Labels

aten = torch.ops.aten

_MEETS = "it meets an axis that keeps its size"
_SUMMED = "it is summed over, and what is removed from it is not zero"


def contract(call: Call, one: Value, i: int, other: Value, j: int) -> None:
    """Sum over an axis of two factors."""
    call.unify(one.axes[i], other.axes[j], _MEETS)
    if not call.is_zero(one, i) and not call.is_zero(other, j):
        call.freeze(one.axes[i], _SUMMED)
    if len(one.axes[i]) != len(other.axes[j]):  # one of them is broadcast
        call.freeze(one.axes[i], _MEETS)
        call.freeze(other.axes[j], _MEETS)


def _biased(call: Call, labels: Labels, zero: bool, bias: Any) -> bool:
    """Whether an output axis stays zero with a bias along it."""
    if not isinstance(bias, Value):
        return zero
    if not bias.axes or len(bias.axes[-1]) != len(labels):
        return False
    call.unify(labels, bias.axes[-1], _MEETS)
    return zero and bias.zero[-1]


@rule(aten.linear)
def _linear(call: Call) -> Result:
    x, weight, bias = call["input"], call["weight"], call["bias"]
    contract(call, x, -1, weight, -1)
    plain = not isinstance(bias, Value)
    lead = tuple(z and plain for z in x.zero[:-1])
    if len(weight.axes) == 1:
        return Value(x.axes[:-1], lead)
    zero = _biased(call, weight.axes[0], weight.zero[0], bias)
    return Value((*x.axes[:-1], weight.axes[0]), (*lead, zero))


@rule(aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot, aten.inner)
def _matmul(call: Call) -> Result:
    one, other = map(call.value, call.node.args[:2])
    packet = call.node.target.overloadpacket  # type: ignore[union-attr]
    if packet is aten.inner and len(other.axes) > 1:
        return call.opaque("there is no rule for this product")
    return product(call, one, other)


def product(call: Call, one: Value, other: Value) -> Value:
    """A matrix product with broadcast batches."""
    row, column = len(one.axes) > 1, len(other.axes) > 1
    contract(call, one, -1, other, -2 if column else -1)
    batch = _broadcast(call, one.take(range(len(one.axes) - 2)) if row else None,
                       other.take(range(len(other.axes) - 2)) if column else None)  # fmt: skip
    parts = [batch]
    if row:
        parts.append(one.take([len(one.axes) - 2]))
    if column:
        parts.append(other.take([len(other.axes) - 1]))
    return Value(tuple(a for p in parts for a in p.axes), tuple(z for p in parts for z in p.zero))


def _broadcast(call: Call, one: Value | None, other: Value | None) -> Value:
    """Batch axes of a product, which is zero where either factor is."""
    sides = [side for side in (one, other) if side is not None]
    rank = max((len(side.axes) for side in sides), default=0)
    axes, zero = [], []
    for axis in range(-rank, 0):
        here = [side for side in sides if -axis <= len(side.axes)]
        whole = [side for side in here if len(side.axes[axis]) != 1] or here[:1]
        for side in whole[1:]:
            call.unify(whole[0].axes[axis], side.axes[axis], _MEETS)
        axes.append(whole[0].axes[axis])
        zero.append(any(side.zero[axis] for side in whole))
    return Value(tuple(axes), tuple(zero))


@rule(aten.addmm, aten.baddbmm, aten.addmv)
def _addmm(call: Call) -> Result:
    added, one, other = map(call.value, call.node.args[:3])
    made = product(call, one, other)
    zero = list(made.zero)
    for axis in range(-len(made.axes), 0):
        here = -axis <= len(added.axes) and len(added.axes[axis]) == len(made.axes[axis])
        if here:
            call.unify(made.axes[axis], added.axes[axis], _MEETS)
        zero[axis] = zero[axis] and here and added.zero[axis]
    return Value(made.axes, tuple(zero))


@rule(aten.outer, *known(aten, "ger"))
def _outer(call: Call) -> Result:
    one, other = map(call.value, call.node.args[:2])
    return Value((*one.axes, *other.axes), (*one.zero, *other.zero))


@rule(aten.einsum)
def _einsum(call: Call) -> Result:
    """One letter is one axis; a letter that the result lacks is summed over."""
    operands = call["tensors"]
    terms, result = _terms(call.raw("equation"), [len(value.axes) for value in operands])
    if any(len(t) != len(v.axes) for t, v in zip(terms, operands, strict=True)):
        return call.opaque("there is no rule for this form of einsum")
    places: dict[str, list[tuple[Value, int]]] = {}
    for term, value in zip(terms, operands, strict=True):
        if len(set(term)) != len(term):
            return call.opaque("a diagonal of it is taken")
        for axis, letter in enumerate(term):
            places.setdefault(letter, []).append((value, axis))
    for letter, found in places.items():
        first, at = found[0]
        for value, axis in found[1:]:
            call.unify(first.axes[at], value.axes[axis], _MEETS)
        if letter not in result and not any(call.is_zero(v, a) for v, a in found):
            call.freeze(first.axes[at], _SUMMED)
    axes = [max((v.axes[a] for v, a in places[letter]), key=len) for letter in result]
    zero = [any(v.zero[a] for v, a in places[letter]) for letter in result]
    return Value(tuple(axes), tuple(zero))


def _terms(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The letters of each operand and of the result; further axes (``...``) get letters too."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        single = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
        result = "..." * ("..." in left) + single
    spare = "".join(c for c in string.ascii_letters if c not in equation)
    further = [rank - len(t) + 3 for t, rank in zip(terms, ranks, strict=True) if "..." in t]
    spare = spare[: max(further, default=0)]
    filled = [
        t.replace("...", spare[len(spare) - (rank - len(t) + 3) :] if "..." in t else "")
        for t, rank in zip(terms, ranks, strict=True)
    ]
    return filled, result.replace("...", spare)


_CONVOLUTIONS = known(aten, "conv1d", "conv2d", "conv3d")
_TRANSPOSED = known(aten, "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@rule(*_CONVOLUTIONS)
def _convolution(call: Call) -> Result:
    return _convolved(call, transposed=False)


@rule(*_TRANSPOSED)
def _transposed(call: Call) -> Result:
    return _convolved(call, transposed=True)


@rule(aten.convolution)
def _general(call: Call) -> Result:
    return _convolved(call, transposed=bool(call.raw("transposed")))


def _convolved(call: Call, transposed: bool) -> Result:
    x, weight, bias, groups = call["input"], call["weight"], call["bias"], call.raw("groups")
    spatial = len(weight.axes) - 2
    channels = len(x.axes) - spatial - 1
    for labels in (*x.axes[channels + 1 :], *weight.axes[2:]):
        call.freeze(labels, "a window slides over it")
    whole, within = (0, 1) if transposed else (1, 0)  # axes of the weight: all inputs or outputs
    # The weight holds, of one side, a group's channels only; of the other those of all groups.
    shared, inner = call.split(x.axes[channels], groups, len(x.axes[channels]) // groups)
    if transposed:
        per_group, own = call.split(weight.axes[0], groups, len(weight.axes[0]) // groups)
        call.unify(own, inner, _MEETS)
        outputs = call.units.merge(shared, weight.axes[1])
    else:
        call.unify(weight.axes[1], inner, _MEETS)
        per_group, own = call.split(weight.axes[0], groups, len(weight.axes[0]) // groups)
        outputs = call.units.merge(shared, own)
    call.unify(per_group, shared, _MEETS)
    summed = Value((inner,), (x.zero[channels],))
    if not call.is_zero(summed, 0) and not weight.zero[whole]:
        call.freeze(inner, _SUMMED)
    zero = _biased(call, outputs, weight.zero[within] and (groups == 1 or weight.zero[0]), bias)
    image = [np.zeros(size, dtype=np.int64) for size in call.shape[channels + 1 :]]
    lead = tuple(z and not isinstance(bias, Value) for z in x.zero[:channels])
    return Value((*x.axes[:channels], outputs, *image), (*lead, zero, *[True] * spatial))


@adapts(*_CONVOLUTIONS, *_TRANSPOSED, aten.convolution)
def _adapt_groups(edit: Edit) -> None:
    groups = edit.raw("groups")
    if groups > 1:
        weight = edit.input("weight")
        channels = edit.input("input").axes[-(len(weight.axes) - 1)]
        left = int(edit.kept(channels).reshape(groups, -1).any(axis=1).sum())
        if left != groups:
            edit.set("groups", left)


@rule(aten.scaled_dot_product_attention)
def _attention(call: Call) -> Result:
    query, key, value, mask = call["query"], call["key"], call["value"], call["attn_mask"]
    grouped = call.raw("enable_gqa") and len(query.axes[-3]) != len(key.axes[-3])
    if grouped:
        _group_heads(call, query, key, value)
    contract(call, query, -1, key, -1)
    call.unify(key.axes[-2], value.axes[-2], _MEETS)
    call.freeze(key.axes[-2], "softmax is taken over it")
    if isinstance(mask, Value):
        call.freeze(mask.axes[-1], "softmax is taken over it")
        for axis in range(-len(mask.axes), -1):
            call.unify(query.axes[axis], mask.axes[axis], _MEETS)
    for axis in range(-len(query.axes), -2):
        for other in (key, value):
            call.unify(query.axes[axis], other.axes[axis], _MEETS)
    # A row of weights sums to one whatever the query, so that only the values make zeros.
    lead = [value.zero[i] and not grouped for i in range(len(value.axes) - 2)]
    return Value((*query.axes[:-1], value.axes[-1]), (*lead, False, value.zero[-1]))


def _group_heads(call: Call, query: Value, key: Value, value: Value) -> None:
    """Each head of keys and values serves a run of heads of queries."""
    heads, groups = len(query.axes[-3]), len(key.axes[-3])
    shared, _ = call.split(query.axes[-3], groups, heads // groups)
    for other in (key, value):
        call.unify(shared, other.axes[-3], _MEETS)


@adapts(aten.scaled_dot_product_attention)
def _adapt_attention(edit: Edit) -> None:
    """The scale stays that of the full head."""
    width = edit.input("query").axes[-1]
    if edit.count(width) != len(width) and edit.raw("scale") is None:
        edit.set("scale", 1 / math.sqrt(len(width)))


@rule(aten.bilinear)
def _bilinear(call: Call) -> Result:
    one, other, weight, bias = (call[n] for n in ("input1", "input2", "weight", "bias"))
    contract(call, one, -1, weight, 1)
    contract(call, other, -1, weight, 2)
    for a, b in zip(one.axes[:-1], other.axes[:-1], strict=True):
        call.unify(a, b, _MEETS)
    zero = _biased(call, weight.axes[0], weight.zero[0], bias)
    return Value((*one.axes[:-1], weight.axes[0]), (*(False for _ in one.axes[:-1]), zero))
