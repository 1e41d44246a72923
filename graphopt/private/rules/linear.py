"""Rules of matrix products and convolutions."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.errors import UnsupportedError
from graphopt.private.builder import Builder, Value
from graphopt.private.rules.registry import aten, rule
from graphopt.private.rules.shapes import by_channel, transposed, wide


@rule(aten.linear)
def _linear(b: Builder, x: Value, weight: Value, bias: Value | None = None) -> Value:
    result = b.matmul(x, transposed(b, weight))
    return result if bias is None else b.add(result, bias)


@rule(aten.matmul, aten.mm, aten.bmm)
def _matmul(b: Builder, x: Value, y: Value) -> Value:
    return b.matmul(x, y)


@rule(aten.addmm, aten.baddbmm)
def _addmm(b: Builder, c: Value, x: Value, y: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    product = b.matmul(x, y)
    return b.add(b.multiply(c, beta), b.multiply(product, alpha))


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv1d.padding, aten.conv2d.padding)
def _conv(
    b: Builder,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    rank = len(weight.shape) - 2
    stride, dilation = wide(stride, rank), wide(dilation, rank)
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(t % 2 for t in total):
            pads = [p for t in reversed(total) for p in (t // 2, t - t // 2)]
            x = b.move(lambda t: torch.nn.functional.pad(t, pads), [x], whole=False)
            total = [0] * rank
        padding = tuple(t // 2 for t in total)
    padding = wide(padding, rank)
    if len(x.shape) != rank + 2:
        raise UnsupportedError("a convolution of an input without a batch dimension")
    outer = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    shape = (x.shape[0], weight.shape[0], *outer)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    result: Value = b.emit("conv", [b.shared(x), b.shared(weight)], shape, **options)
    return result if bias is None else b.add(result, by_channel(b, bias, rank))


@rule(aten.convolution.default)
def _convolution(
    b: Builder, x: Value, weight: Value, bias: Value | None, stride: Any, padding: Any,
    dilation: Any, transposed: bool, output_padding: Any, groups: int,
) -> Value:  # fmt: skip
    if transposed:
        return _transposed(b, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _conv(b, x, weight, bias, stride, padding, dilation, groups)


@rule(aten.conv_transpose1d, aten.conv_transpose2d.input)
def _transposed(
    b: Builder, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Value:  # fmt: skip
    """A convolution, by the flipped kernel, of the input with zeros in between."""
    rank = len(weight.shape) - 2
    stride, padding, dilation = (wide(v, rank) for v in (stride, padding, dilation))
    before = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
    after = [p + extra for p, extra in zip(before, wide(output_padding, rank), strict=True)]
    pads = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]

    def spread(t: torch.Tensor) -> torch.Tensor:
        sizes = [(n - 1) * s + 1 for n, s in zip(t.shape[2:], stride, strict=True)]
        apart = t.new_zeros(*t.shape[:2], *sizes)
        apart[(..., *[slice(None, None, s) for s in stride])] = t
        return torch.nn.functional.pad(apart, pads)

    def flip(w: torch.Tensor) -> torch.Tensor:
        split = w.reshape(groups, -1, *w.shape[1:]).transpose(1, 2)
        return split.reshape(-1, split.shape[2], *w.shape[2:]).flip(tuple(range(2, rank + 2)))

    x = b.move(spread, [x], whole=False)
    return _conv(b, x, b.move(flip, [weight], whole=False), bias, 1, 0, dilation, groups)
