"""Rules of norms: of the batch, of layers, of groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.errors import UnsupportedError
from graphopt.private.builder import Builder, Plain, Value
from graphopt.private.rules.registry import aten, rule
from graphopt.private.rules.shapes import by_channel


@rule(aten.batch_norm)
def _batch_norm(
    b: Builder, x: Value, weight: Any, bias: Any, mean: Any, var: Any, training: bool,
    momentum: float, eps: float, cudnn: bool = True,
) -> Value:  # fmt: skip
    if training or not (isinstance(mean, Plain) and isinstance(var, Plain)):
        raise UnsupportedError("batch normalisation over the batch", hint="use eval mode")
    scale = b.unary("rsqrt", b.add(var, eps))
    scale = scale if weight is None else b.multiply(scale, weight)
    offset = b.multiply(b.multiply(mean, scale), -1.0)
    offset = offset if bias is None else b.add(offset, bias)
    rank = len(x.shape) - 2
    return b.add(b.multiply(x, by_channel(b, scale, rank)), by_channel(b, offset, rank))


rule(aten._native_batch_norm_legit_no_training)(
    lambda b, x, weight, bias, mean, var, momentum, eps: (
        _batch_norm(b, x, weight, bias, mean, var, False, momentum, eps),
        None,
        None,
    )
)


@rule(aten.layer_norm)
def _layer_norm(
    b: Builder, x: Value, normalized: Sequence[int], weight: Any = None, bias: Any = None,
    eps: float = 1e-5, cudnn: bool = True,
) -> Value:  # fmt: skip
    result = _standardised(b, x, [-i - 1 for i in range(len(normalized))], eps)
    result = result if weight is None else b.multiply(result, weight)
    return result if bias is None else b.add(result, bias)


@rule(aten.rms_norm)
def _rms_norm(
    b: Builder, x: Value, normalized: Sequence[int], weight: Any = None, eps: float | None = None
) -> Value:
    dims = [-i - 1 for i in range(len(normalized))]
    power = b.add(b.mean(b.multiply(x, x), dims, True), 1e-7 if eps is None else eps)
    result = b.multiply(x, b.unary("rsqrt", power))
    return result if weight is None else b.multiply(result, weight)


@rule(aten.group_norm)
def _group_norm(
    b: Builder, x: Value, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn: bool = True,
) -> Value:  # fmt: skip
    shape = x.shape
    split = b.move(lambda t: t.reshape(shape[0], groups, -1), [x], whole=False)
    normal = _standardised(b, split, [-1], eps)
    result = b.move(lambda t: t.reshape(shape), [normal], whole=False)
    rank = len(shape) - 2
    result = result if weight is None else b.multiply(result, by_channel(b, weight, rank))
    return result if bias is None else b.add(result, by_channel(b, bias, rank))


def _standardised(b: Builder, x: Value, dims: Sequence[int], eps: float) -> Value:
    centred = b.sub(x, b.mean(x, dims, True))
    variance = b.mean(b.multiply(centred, centred), dims, True)
    return b.multiply(centred, b.unary("rsqrt", b.add(variance, eps)))
