"""Attention, and products of two activations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.prune.generated import WIDTHS, Pick, Step, operator


@operator
def attention(pick: Pick) -> Step:
    place = pick.value(3)
    width, heads, each = pick.values[place].shape[-1], pick.of([1, 2, 4]), pick.of([2, 4])
    groups = pick.of([g for g in (1, 2, heads) if heads % g == 0])
    q, k, v = (nn.Linear(width, n * each, pick.yes()) for n in (heads, groups, groups))
    out, fused = nn.Linear(heads * each, width), pick.of(["sdpa", "gqa", "written", "repeat"])

    def forward(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> Tensor:
        b, t, _ = x.shape
        query = q(x).view(b, t, heads, each).transpose(1, 2)
        key, value = (f(x).view(b, t, groups, -1).transpose(1, 2) for f in (k, v))
        if fused != "gqa":
            if fused == "repeat":
                key, value = (
                    y[:, :, None].expand(-1, -1, heads // groups, -1, -1).reshape(b, heads, t, each)
                    for y in (key, value)
                )
            else:
                key, value = (y.repeat_interleave(heads // groups, 1) for y in (key, value))
        if fused == "written":
            y = (query @ key.transpose(-2, -1) / math.sqrt(each)).softmax(-1) @ value
        else:
            y = F.scaled_dot_product_attention(query, key, value, enable_gqa=fused == "gqa")
        return x + out(y.transpose(1, 2).reshape(b, t, heads * each))

    return Step(forward, [place], q, k, v, out)


@operator
def module_attention(pick: Pick) -> Step:
    place = pick.value(3, size=lambda v: v.shape[-1] % 2 == 0)
    layer = nn.MultiheadAttention(pick.values[place].shape[-1], 2, batch_first=True)
    weights = pick.yes()
    return Step(lambda x, f: f(x, x, x, need_weights=weights)[0], [place], layer)


@operator
def fused_projection(pick: Pick) -> Step:
    """One layer for three values, taken apart in one of several ways."""
    place = pick.value(3)
    width, heads, each = pick.values[place].shape[-1], 2, pick.of([2, 4])
    form = pick.of(["inner", "outer", "chunk"])

    def forward(x: Tensor, f: nn.Module) -> Tensor:
        b, t, _ = x.shape
        y = f(x)
        if form == "outer":
            q, k, v = y.view(b, t, 3, heads, each).unbind(2)
        elif form == "inner":
            q, k, v = y.view(b, t, heads, 3 * each).chunk(3, -1)
        else:
            q, k, v = (z.view(b, t, heads, each) for z in y.chunk(3, -1))
        weights = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", weights, v).flatten(2)

    return Step(forward, [place], nn.Linear(width, 3 * heads * each))


@operator
def rotary(pick: Pick) -> Step:
    """Halves, or pairs, of an axis are turned."""
    place = pick.value(size=lambda v: v.shape[-1] % 2 == 0)
    half = pick.values[place].shape[-1] // 2
    paired = pick.yes()

    def forward(x: Tensor) -> Tensor:
        if paired:
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack([a * 0.6 - b * 0.8, a * 0.8 + b * 0.6], -1).flatten(-2)
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * 0.6 + turned * 0.8

    return Step(forward, [place])


@operator
def product(pick: Pick) -> Step:
    """Activations times activations."""
    place = pick.value(3)
    forms = [
        lambda x: (x @ x.transpose(1, 2)) @ x * 0.1, lambda x: x.transpose(1, 2) @ x * 0.1,
        lambda x: torch.einsum("bij,bkj->bik", x, x) * 0.1,
        lambda x: x.transpose(1, 2).softmax(-1) @ x,
    ]  # fmt: skip
    return Step(pick.of(forms), [place])


@operator
def pairs(pick: Pick) -> Step:
    """All products of two places of an axis."""
    place = pick.value(2, size=lambda v: v.shape[1] <= 12)
    keep = pick.yes()
    function = lambda x: x[:, :, None] * x[:, None, :]  # noqa: E731
    return Step(lambda x: function(x) if keep else function(x).flatten(1), [place])


@operator
def matrix(pick: Pick) -> Step:
    """A bare matrix from the left or the right, or by einsum."""
    place = pick.value(3)
    _, rows, columns = pick.values[place].shape
    width = pick.of(WIDTHS)
    side = pick.of(["left", "right", "einsum", "heads"])
    if side == "left":
        return Step(lambda x, p: p @ x, [place], nn.Parameter(torch.ones(width, rows)))
    if side == "right":
        return Step(lambda x, p: x @ p, [place], nn.Parameter(torch.ones(columns, width)))
    if side == "einsum":
        p = nn.Parameter(torch.ones(rows, columns, width))
        return Step(lambda x, p: torch.einsum("bij,ijk->bik", x, p), [place], p)
    p = nn.Parameter(torch.ones(columns, 2, width))
    return Step(lambda x, p: torch.einsum("bij,jhk->bhik", x, p), [place], p)
