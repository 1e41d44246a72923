"""Rules of pooling and of resizing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import interpolate, pad, unfold

from graphopt.private.builder import Builder, Plain, Value
from graphopt.private.rules.registry import aten, rule
from graphopt.private.rules.shapes import wide


@rule(aten.max_pool2d)
def _max_pool2d(
    b: Builder, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Value:  # fmt: skip
    def gather(places: torch.Tensor) -> torch.Tensor:
        found = windows(places, kernel, stride, padding, dilation, ceil_mode)
        # Padding must not win: a place of the window stands in for it.
        return torch.where(found == 0, found.amax(-1, keepdim=True), found)

    best = b.largest(b.move(gather, [x], whole=False), len(x.shape))
    return b.move(lambda t: t.squeeze(-1), [best], whole=False)


rule(aten.max_pool2d_with_indices)(lambda b, *args: (_max_pool2d(b, *args), None))


@rule(aten.max_pool1d)
def _max_pool1d(
    b: Builder, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Value:  # fmt: skip
    sizes = (_flat(kernel, 1), _flat(stride, 1), _flat(padding, 0), _flat(dilation, 1))
    return _as_image(b, x, lambda y: _max_pool2d(b, y, *sizes, ceil_mode))


@rule(aten.avg_pool2d)
def _avg_pool2d(
    b: Builder, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Value:  # fmt: skip
    def gather(t: torch.Tensor) -> torch.Tensor:
        return windows(t, kernel, stride, padding, 1, ceil_mode)

    found = b.move(gather, [x], whole=False)
    ones = torch.ones(1, 1, *x.shape[-2:], dtype=torch.float64)
    average = aten.avg_pool2d(
        ones, wide(kernel, 2), wide(stride, 2) if stride else [], wide(padding, 2), ceil_mode,
        count_include_pad, divisor_override,
    )  # fmt: skip
    shares = (average / gather(ones).sum(-1))[0, 0]
    divisor = 1.0 / float(shares.flatten()[0])
    if bool((shares == shares.flatten()[0]).all()) and abs(divisor - round(divisor)) < 1e-9:
        return b.sum(found, [-1], divisor=round(divisor))
    return b.multiply(b.sum(found, [-1]), Plain(shares))  # fewer elements at the edges


@rule(aten.avg_pool1d)
def _avg_pool1d(
    b: Builder, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Value:  # fmt: skip
    sizes = (_flat(kernel, 1), _flat(stride, 1), _flat(padding, 0))
    return _as_image(b, x, lambda y: _avg_pool2d(b, y, *sizes, ceil_mode, count_include_pad))


def _flat(size: Any, other: int) -> Any:
    """A size of sequences as one of images of one row."""
    return (other, *wide(size, 1)) if size not in ((), [], None) else ()


def _as_image(b: Builder, x: Value, pool: Callable[[Value], Value]) -> Value:
    """Pool sequences as images of one row."""
    pooled = pool(b.move(lambda t: t.unsqueeze(-2), [x], whole=False))
    return b.move(lambda t: t.squeeze(-2), [pooled], whole=False)


def windows(
    x: torch.Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool = False
) -> torch.Tensor:
    """(..., h, w) -> (..., h', w', elements of a window), zeros where there are none."""
    kernel, padding, dilation = wide(kernel, 2), wide(padding, 2), wide(dilation, 2)
    steps = wide(stride, 2) if stride not in ((), [], None) else kernel
    images = x.reshape(-1, 1, *x.shape[-2:])
    shape = aten.max_pool2d(images[:1], kernel, steps, padding, dilation, ceil_mode).shape[-2:]
    pads = []
    for axis in (1, 0):  # the last dimension first
        reach = (shape[axis] - 1) * steps[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        missing = reach - x.shape[axis - 2] - padding[axis]
        pads += [padding[axis], max(missing, padding[axis])]
    columns = unfold(pad(images, pads), kernel, dilation, 0, steps)
    rows = columns.transpose(1, 2).reshape(*x.shape[:-2], -1, shape[1], math.prod(kernel))
    return rows[..., : shape[0], :, :]


@rule(aten.adaptive_avg_pool2d, aten._adaptive_avg_pool2d)
def _adaptive_avg_pool2d(b: Builder, x: Value, size: Any) -> Value:
    rows, columns = wide(size, 2)
    if (rows, columns) == (1, 1):
        return b.mean(x, [-2, -1], True)
    left = Plain(_averages(x.shape[-2], rows))
    right = Plain(_averages(x.shape[-1], columns).t())
    return b.matmul(b.matmul(left, x), right)


def _averages(size: int, count: int) -> torch.Tensor:
    """(count, size): each row averages the elements of one adaptive window."""
    identity = torch.eye(size, dtype=torch.float64)
    return torch.nn.functional.adaptive_avg_pool1d(identity, count).t()


@rule(aten.upsample_bilinear2d.vec)
def _bilinear(
    b: Builder, x: Value, size: Any, align_corners: bool, scale_factors: Any = None
) -> Value:
    """Separable and linear: a public matrix from each side, made of interpolated unit vectors."""
    factors = [None, None] if scale_factors is None else scale_factors
    sides = []
    for axis in (0, 1):
        unit = torch.eye(x.shape[axis - 2], dtype=torch.float64)[None]
        how: dict[str, Any] = (
            {"size": size[axis]} if size is not None else {"scale_factor": factors[axis]}
        )
        made = interpolate(unit, mode="linear", align_corners=align_corners, **how)
        sides.append(Plain(made[0]))
    left = b.move(lambda t: t.transpose(0, 1), [sides[0]], whole=False)
    return b.matmul(b.matmul(left, x), sides[1])
