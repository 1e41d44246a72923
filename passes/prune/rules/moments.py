"""Means and variances over axes that lose places, as of the full model.

What is removed is zero in the masked model, so that both moments follow from what is left: where N
is the full number of places,

    m = sum(x) / N;  v = sum(x * (x - m)) / (N - correction)

since x * (x - m) sums to the squares of x - m over all N places.  It is zero wherever x is, so that
a program that was pruned can be pruned again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.passes.prune.rule import Call, Edit, Result, adapts, known, rule
from graphopt.passes.prune.rules.reductions import dims_of, reduced

aten = torch.ops.aten

_VARIANCES = known(aten, "var", "std", "var_mean", "std_mean")
_ROOTS = known(aten, "std", "std_mean")


@dataclass(frozen=True)
class Moments:
    """Writes out the moments of a tensor.

    Attributes:
        edit: Where nodes go.
        dims: The axes that are reduced.
        left: How many places are left of them.
        total: How many places the full model has.
    """

    edit: Edit
    dims: list[int]
    left: int
    total: int

    def mean(self, x: fx.Node, keepdim: bool = True, total: float | None = None) -> fx.Node:
        """The sum, over the full number of places or another one."""
        if not self.left:  # a mean of nothing would be no number
            return self.edit.call(aten.sum.dim_IntList, x, self.dims, keepdim)
        mean = self.edit.call(aten.mean.dim, x, self.dims, keepdim)
        share = self.left / (self.total if total is None else total)
        return self.edit.call(aten.mul.Tensor, mean, share)

    def variance(
        self, x: fx.Node, centred: fx.Node, keepdim: bool = True, correction: float = 0.0
    ) -> fx.Node:
        """The variance, given the tensor less its mean."""
        squares = self.edit.call(aten.mul.Tensor, x, centred)
        return self.mean(squares, keepdim, self.total - correction)


@rule(*_VARIANCES)
def _variance(call: Call) -> Result:
    x = call.inputs[0]
    dims = dims_of(call, len(x.axes))
    for axis in dims:
        if call.compensates and math.prod(len(x.axes[i]) for i in dims) > _correction(call):
            call.must_be_zero(x, axis, "its variance is taken, and what is removed is not zero")
        else:
            call.freeze(x.axes[axis], "a statistic is taken over it")
    return reduced(call, x, dims, zero=True)


def _correction(call: Call | Edit) -> float:
    if call.has("unbiased"):
        return float(bool(call.raw("unbiased")))
    correction = call.raw("correction")
    return 1.0 if correction is None else float(correction)


@adapts(*_VARIANCES)
def _adapt_variance(edit: Edit) -> None:
    x = edit.input("self")
    dims = dims_of(edit, len(x.axes))
    left = math.prod(edit.count(x.axes[i]) for i in dims)
    total = math.prod(len(x.axes[i]) for i in dims)
    if left == total:
        return
    source, keepdim = edit.raw("self"), bool(edit.raw("keepdim"))
    made = Moments(edit, dims, left, total)
    mean = made.mean(source)
    centred = edit.call(aten.sub.Tensor, source, mean)
    value = made.variance(source, centred, keepdim, _correction(edit))
    if edit.node.target.overloadpacket in _ROOTS:  # type: ignore[union-attr]
        value = edit.call(aten.sqrt.default, value)
    edit.compensated.append(edit.original.name)
    if isinstance(edit.output, tuple):
        edit.replace_parts([value, mean if keepdim else made.mean(source, keepdim=False)])
    else:
        edit.replace(value)
