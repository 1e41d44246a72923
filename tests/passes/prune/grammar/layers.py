"""Operators with parameters: layers, norms, tables, recurrences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.passes.prune.generated import WIDTHS, Pick, Step, UnfitError, fitting, operator


@operator
def linear(pick: Pick) -> Step:
    place = pick.value()
    layer = nn.Linear(pick.values[place].shape[-1], pick.of(WIDTHS), bias=pick.yes())
    act = pick.of([None, torch.relu_, F.gelu])
    return Step(lambda x, f: act(f(x)) if act else f(x), [place], layer)


@operator
def hidden(pick: Pick) -> Step:
    """A residual block of two layers."""
    place = pick.value()
    width, inner = pick.values[place].shape[-1], pick.of(WIDTHS)
    one, two = nn.Linear(width, inner), nn.Linear(inner, width)
    return Step(lambda x, f, g: x + g(F.gelu(f(x))), [place], one, two)


@operator
def shared(pick: Pick) -> Step:
    """A layer again, on another value or the same."""
    before = pick.of(fitting([s for s in pick.steps if len(s.layers) == 1 and len(s.sources) == 1]))
    like = pick.values[before.sources[0]]
    place = pick.value(like.ndim, size=lambda v: v.shape == like.shape)
    return Step(before.function, [place], *before.layers)


@operator
def transposed_weight(pick: Pick) -> Step:
    """A layer's weight, backwards."""
    layers = [s.layers[0] for s in pick.steps if len(s.layers) == 1]
    layer = pick.of(fitting([f for f in layers if isinstance(f, nn.Linear)]))
    place = pick.value(size=lambda v: v.shape[-1] == layer.out_features)
    return Step(lambda x, f: F.linear(x, f.weight.t()), [place], layer)


@operator
def convolution(pick: Pick) -> Step:
    place = pick.value(3, 4)
    value = pick.values[place]
    a, kernel = value.shape[1], pick.of([1, 3])
    b = pick.of(WIDTHS)
    groups = pick.of([g for g in (1, 1, 2, 3, 4, a) if a % g == 0 and (b % g == 0 or g == a)])
    if groups == a:
        b = a * pick.of([1, 2])
    kind = {3: nn.Conv1d, 4: nn.Conv2d}[value.ndim]
    layer = kind(a, b, kernel, padding=kernel // 2, groups=groups, bias=pick.yes())
    act = pick.of([None, torch.relu_, F.silu])
    return Step(lambda x, f: act(f(x)) if act else f(x), [place], layer)


@operator
def deconvolution(pick: Pick) -> Step:
    place = pick.value(4)
    a, b = pick.values[place].shape[1], pick.of(WIDTHS)
    groups = pick.of([g for g in (1, 2, 4) if a % g == 0 and b % g == 0])
    return Step(
        lambda x, f: f(x), [place], nn.ConvTranspose2d(a, b, 2, 2, groups=groups, bias=pick.yes())
    )


@operator
def norm(pick: Pick) -> Step:
    place = pick.value()
    shape = pick.values[place].shape
    groups = [g for g in (1, 2, 3, 4) if shape[1] % g == 0]
    options = [nn.LayerNorm(shape[-1]), nn.LayerNorm(shape[-1], elementwise_affine=False),
               nn.RMSNorm(shape[-1]), nn.GroupNorm(pick.of(groups), shape[1])]  # fmt: skip
    options.append(nn.LayerNorm(shape[-1], bias=False))
    if len(shape) > 2:
        options.append(nn.LayerNorm(shape[-2:]))
    if len(shape) in (2, 3):
        options.append(nn.BatchNorm1d(shape[1]))
    if len(shape) == 4:
        options += [nn.BatchNorm2d(shape[1]), nn.InstanceNorm2d(shape[1], affine=pick.yes())]
    return Step(lambda x, f: f(x), [place], pick.of(options))


@operator
def norm_by_hand(pick: Pick) -> Step:
    place = pick.value()
    axis = pick.axis(place)
    options = [
        lambda x: x * torch.rsqrt(x.pow(2).mean(axis, keepdim=True) + 0.1),
        lambda x: (x - x.mean(axis, keepdim=True)) / (x.var(axis, keepdim=True) + 0.1).sqrt(),
        lambda x: (x - x.mean(axis, keepdim=True)) / (x.std(axis, keepdim=True) + 1),
        lambda x: F.normalize(x + 0.01, dim=axis, eps=1e-2),
        lambda x: x / (x.norm(dim=axis, keepdim=True) + 1),
    ]
    return Step(pick.of(options), [place])


@operator
def recurrent(pick: Pick) -> Step:
    place = pick.value(3)
    cell, both = pick.of([nn.LSTM, nn.GRU, nn.RNN]), pick.yes()
    more = {"proj_size": 3} if cell is nn.LSTM and pick.of([False, False, True]) else {}
    layer = cell(
        pick.values[place].shape[-1], 6, pick.of([1, 2]), batch_first=True, bidirectional=both,
        bias=pick.yes(), **more,
    )  # fmt: skip
    return Step(lambda x, f: f(x)[0], [place], layer)


@operator
def table(pick: Pick) -> Step:
    """Rows of a table of embeddings, by constant places."""
    place = pick.value()
    length, width = pick.values[place].shape[-2:] if pick.values[place].ndim > 2 else (0, 0)
    if not length:
        raise UnfitError
    return Step(lambda x, f: x + f(torch.arange(length)), [place], nn.Embedding(length + 1, width))
