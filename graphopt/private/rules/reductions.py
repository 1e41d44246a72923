"""Rules of sums, maxima, softmax and attention."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.errors import UnsupportedError
from graphopt.private.builder import Builder, Plain, Value
from graphopt.private.rules.elementwise import where
from graphopt.private.rules.registry import aten, rule
from graphopt.private.rules.shapes import axes, transposed


@rule(aten.sum.dim_IntList, aten.sum.default)
def _sum(
    b: Builder, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Value:
    return b.sum(x, axes(x, dim), keepdim)


@rule(aten.mean.dim, aten.mean.default)
def _mean(
    b: Builder, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Value:
    return b.mean(x, axes(x, dim), keepdim)


@rule(aten.amax)
def _amax(b: Builder, x: Value, dim: Any = (), keepdim: bool = False) -> Value:
    dims = sorted(d % len(x.shape) for d in axes(x, dim))
    for d in dims:
        x = b.largest(x, d)
    if keepdim:
        return x
    return b.move(lambda t: t.squeeze(tuple(dims)), [x], whole=False)


@rule(aten.softmax.int, aten._softmax)
def _softmax(b: Builder, x: Value, dim: int, dtype: Any = None) -> Value:
    powers = b.unary("exp", b.sub(x, b.largest(x, dim % len(x.shape))))
    return b.multiply(powers, b.unary("reciprocal", b.sum(powers, [dim], True)))


@rule(aten.scaled_dot_product_attention)
def _attention(
    b: Builder, q: Value, k: Value, v: Value, attn_mask: Value | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:  # fmt: skip
    if enable_gqa:
        raise UnsupportedError("grouped heads inside of an attention op")
    q = b.multiply(q, q.shape[-1] ** -0.5 if scale is None else scale)
    scores = b.matmul(q, transposed(b, k))
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        attn_mask = Plain(causal)
    if isinstance(attn_mask, Plain) and attn_mask.tensor.dtype is torch.bool:
        scores = where(b, attn_mask, scores, -128.0)
    elif attn_mask is not None:
        scores = b.add(scores, attn_mask)
    return b.matmul(_softmax(b, scores, -1), v)
