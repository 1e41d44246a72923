"""Operators that go element by element."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.prune.generated import Pick, Step, operator

_SMOOTH = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "softplus": F.softplus, "cos": torch.cos, "abs": torch.abs, "square": torch.square,
    "elu": F.elu, "leaky": F.leaky_relu, "hardswish": F.hardswish, "mish": F.mish,
    "shifted": lambda x: x + 1, "scaled": lambda x: 0.5 * x, "rsub": lambda x: 1 - x,
    "clamp": lambda x: x.clamp(-1, 0.7), "exp": lambda x: torch.exp(-x.square()),
    "dropout": lambda x: F.dropout(x, 0.3, False), "step": lambda x: x * (x > 0),
    "safe": lambda x: x / (1 + x.abs()), "log": lambda x: torch.log1p(x.abs()),
}  # fmt: skip


@operator
def activation(pick: Pick) -> Step:
    return Step(_SMOOTH[pick.of(sorted(_SMOOTH))], [pick.value()])


@operator
def binary(pick: Pick) -> Step:
    one = pick.value()
    functions = [
        torch.add, torch.mul, torch.sub, torch.maximum, torch.minimum,
        lambda a, b: a / (1 + b.square()), lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: torch.lerp(a, b, 0.3), lambda a, b: a + 2 * b.sigmoid(),
    ]  # fmt: skip
    return Step(pick.of(functions), [one, pick.like(one)])


@operator
def gate(pick: Pick) -> Step:
    """Broadcasts what one axis or more are reduced to."""
    place = pick.value()
    axis = pick.axis(place)
    form = pick.of([torch.mul, torch.add, lambda a, b: a * b.sigmoid()])
    made = pick.of([
        lambda x: x.mean(axis, keepdim=True), lambda x: x.amax(axis, keepdim=True),
        lambda x: x.narrow(axis, 0, 1), lambda x: x.sum(axis, keepdim=True) * 0.1,
    ])  # fmt: skip
    return Step(lambda x: form(x, made(x)), [place])


@operator
def bare(pick: Pick) -> Step:
    """A scale, or a bias, along some axes."""
    place = pick.value()
    shape = list(pick.values[place].shape)[1:]
    sizes = [n if pick.yes() else 1 for n in shape]
    if pick.yes():
        while sizes and sizes[0] == 1:
            sizes = sizes[1:]
    form = pick.of([torch.mul, torch.add])
    return Step(lambda x, p: form(x, p), [place], nn.Parameter(torch.ones(sizes)))
