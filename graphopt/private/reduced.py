"""Comparing ops written in ReLUs, on tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import UnsupportedError
from graphopt.private.rules.pooling import windows

aten = torch.ops.aten

Relu = Callable[[Tensor], Tensor]
Reduced = Callable[..., Any]
REDUCED: dict[Any, Reduced] = {}
"""Functions of a ReLU and the op's arguments, by packet."""


def _reduces(*packets: Any) -> Callable[[Reduced], Reduced]:
    def register(function: Reduced) -> Reduced:
        REDUCED.update(dict.fromkeys(packets, function))
        return function

    return register


_reduces(aten.relu)(lambda relu, x: relu(x))
_reduces(aten.relu6)(lambda relu, x: _clamp(relu, x, 0.0, 6.0))


@_reduces(aten.clamp, aten.clip)
def _clamp(relu: Relu, x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """``low + relu(x - low) - relu(x - high)``."""
    if min is None:
        return x if max is None else max - relu(max - x)
    above = min + relu(x - min)
    return above if max is None else above - relu(x - max)


@_reduces(aten.hardtanh)
def _hardtanh(relu: Relu, x: Tensor, min_val: Any = -1.0, max_val: Any = 1.0) -> Tensor:
    return _clamp(relu, x, min_val, max_val)


_reduces(aten.clamp_min)(lambda relu, x, min: _clamp(relu, x, min, None))
_reduces(aten.clamp_max)(lambda relu, x, max: _clamp(relu, x, None, max))


@_reduces(aten.leaky_relu)
def _leaky(relu: Relu, x: Tensor, negative_slope: float = 0.01) -> Tensor:
    return negative_slope * x + (1.0 - negative_slope) * relu(x)


@_reduces(aten.prelu)
def _prelu(relu: Relu, x: Tensor, weight: Tensor) -> Tensor:
    slope = weight.view(1, -1, *[1] * (x.dim() - 2)) if x.dim() > 1 else weight
    above = relu(x)
    return above + slope * (x - above)


_reduces(aten.abs)(lambda relu, x: 2.0 * relu(x) - x)


@_reduces(aten.maximum)
def _maximum(relu: Relu, x: Tensor, y: Tensor) -> Tensor:
    return y + relu(x - y)


_reduces(aten.minimum)(lambda relu, x, y: x - relu(x - y))


@_reduces(aten.max_pool2d)
def _max_pool2d(
    relu: Relu, x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:  # fmt: skip
    if ceil_mode:
        raise UnsupportedError("max pooling with ceil_mode, written in ReLUs")
    height, width = x.shape[-2:]
    places = torch.arange(1, height * width + 1, dtype=torch.float64).view(1, height, width)
    found = windows(places, kernel, stride, padding, dilation)[0]
    # Padding must not win: a place of the window stands in for it.
    index = torch.where(found == 0, found.amax(-1, keepdim=True), found).long() - 1
    return _largest(relu, x.flatten(-2)[..., index.to(x.device)])


@_reduces(aten.max_pool1d)
def _max_pool1d(
    relu: Relu, x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:  # fmt: skip
    def wide(value: Any, first: int) -> Any:
        own = list(value) if isinstance(value, (list, tuple)) else [value]
        return [first, *own] if own else own

    found = _max_pool2d(
        relu, x.unsqueeze(-2), wide(kernel, 1), wide(stride, 1), wide(padding, 0),
        wide(dilation, 1), ceil_mode,
    )  # fmt: skip
    return found.squeeze(-2)


def _largest(relu: Relu, x: Tensor) -> Tensor:
    """The maximum over the last dimension, as a tournament."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
        x = torch.cat([_maximum(relu, first, second), rest], -1)
    return x.squeeze(-1)
