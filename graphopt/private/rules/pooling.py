"""Rules of pooling and of resizing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import interpolate, unfold

from graphopt.errors import UnsupportedError
from graphopt.private.builder import Builder, Plain, Value
from graphopt.private.rules.registry import aten, rule
from graphopt.private.rules.shapes import wide


@rule(aten.max_pool2d)
def _max_pool2d(
    b: Builder, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Value:  # fmt: skip
    if ceil_mode:
        raise UnsupportedError("max pooling with ceil_mode")

    def windows(places: torch.Tensor) -> torch.Tensor:
        found = _windows(places, kernel, stride, padding, dilation)
        # Padding must not win: a place of the window stands in for it.
        return torch.where(found == 0, found.amax(-1, keepdim=True), found)

    best = b.largest(b.move(windows, [x], whole=False), len(x.shape))
    return b.move(lambda t: t.squeeze(-1), [best], whole=False)


rule(aten.max_pool2d_with_indices)(lambda b, *args: (_max_pool2d(b, *args), None))


@rule(aten.avg_pool2d)
def _avg_pool2d(
    b: Builder, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Value:  # fmt: skip
    padded = any(wide(padding, 2)) and not count_include_pad
    if ceil_mode or padded:
        raise UnsupportedError("average pooling with ceil_mode or without its padding counted")
    found = b.move(lambda t: _windows(t, kernel, stride, padding, 1), [x], whole=False)
    return b.sum(found, [-1], divisor=divisor_override or found.shape[-1])


def _windows(x: torch.Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """(..., h, w) -> (..., h', w', elements of a window)."""
    kernel, padding, dilation = wide(kernel, 2), wide(padding, 2), wide(dilation, 2)
    steps = wide(stride, 2) if stride not in ((), [], None) else kernel
    height, width = x.shape[-2:]
    images = x.reshape(-1, 1, height, width)
    columns = unfold(images, kernel, dilation, padding, steps)
    rows = (height + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // steps[0] + 1
    return columns.transpose(1, 2).reshape(*x.shape[:-2], rows, -1, math.prod(kernel))


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
