"""Rules of elementwise ops: arithmetic, comparisons, activations."""

from __future__ import annotations

import math
from typing import Any

import torch

from graphopt.errors import UnsupportedError
from graphopt.private.builder import Builder, Plain, Shared, Value
from graphopt.private.rules.registry import Rule, aten, rule
from graphopt.private.rules.shapes import tensors
from graphopt.private.signs import is_nonnegative


@rule(aten.add)
def _add(b: Builder, x: Value, y: Any, *, alpha: float = 1) -> Value:
    return b.add(x, y if alpha == 1 else b.multiply(y, alpha))


@rule(aten.sub)
def _sub(b: Builder, x: Value, y: Any, *, alpha: float = 1) -> Value:
    return b.sub(x, y if alpha == 1 else b.multiply(y, alpha))


@rule(aten.rsub)
def _rsub(b: Builder, x: Value, y: Any, alpha: float = 1) -> Value:
    return b.sub(y, x if alpha == 1 else b.multiply(x, alpha))


@rule(aten.mul)
def _mul(b: Builder, x: Value, y: Any) -> Value:
    return b.multiply(x, y)


@rule(aten.div.Tensor, aten.div.Scalar)
def _div(b: Builder, x: Value, y: Any) -> Value:
    if isinstance(y, Shared):
        return b.multiply(x, _inverse(b, y))
    inverse = 1.0 / y if not isinstance(y, Plain) else Plain(1.0 / y.tensor.double(), y.secret)
    return b.multiply(x, inverse)


@rule(aten.reciprocal)
def _inverse(b: Builder, x: Value) -> Value:
    """Engines invert positive values; a sign that isn't known is taken out and put back."""
    if isinstance(x, Shared) and is_nonnegative(b, x):
        return b.unary("reciprocal", x)
    sign = b.sub(1.0, b.multiply(b.unary("negative", x), 2.0))
    return b.multiply(sign, b.unary("reciprocal", b.multiply(sign, x)))


@rule(aten.neg)
def _neg(b: Builder, x: Value) -> Value:
    return b.multiply(x, -1.0)


@rule(aten.square)
def _square(b: Builder, x: Value) -> Value:
    return b.multiply(x, x)


@rule(aten.pow.Tensor_Scalar)
def _pow(b: Builder, x: Value, exponent: float) -> Value:
    if exponent == -0.5:
        return b.unary("rsqrt", x)
    if exponent == -1:
        return _inverse(b, x)
    if exponent == 0.5:
        return b.multiply(x, b.unary("rsqrt", x))
    if exponent != int(exponent) or exponent < 1:
        raise UnsupportedError(f"a power of {exponent}")
    return b.power(x, int(exponent))


@rule(aten.addcmul)
def _addcmul(b: Builder, x: Value, y: Value, z: Value, *, value: float = 1) -> Value:
    return _add(b, x, b.multiply(y, z), alpha=value)


@rule(aten.sqrt)
def _sqrt(b: Builder, x: Value) -> Value:
    return b.multiply(x, b.unary("rsqrt", x))


@rule(aten.lerp.Scalar)
def _lerp(b: Builder, x: Value, y: Value, weight: float) -> Value:
    return b.add(x, b.multiply(b.sub(y, x), weight))


def _unary(op: str) -> Rule:
    return lambda b, x: b.unary(op, x)


for _op in ("relu", "exp", "rsqrt", "sigmoid", "tanh"):
    rule(getattr(aten, _op))(_unary(_op))


@rule(aten.hardtanh, aten.relu6)
def _hardtanh(b: Builder, x: Value, low: float | None = None, high: float | None = None) -> Value:
    return b.clamp(x, -1.0 if low is None else low, 1.0 if high is None else high)


rule(aten.relu6)(lambda b, x: b.clamp(x, 0.0, 6.0))


@rule(aten.clamp.default, aten.clip.default)
def _clamp(b: Builder, x: Value, min: float | None = None, max: float | None = None) -> Value:
    return b.clamp(x, min, max)


rule(aten.clamp_min.default)(lambda b, x, low: b.clamp(x, low, None))
rule(aten.clamp_max.default)(lambda b, x, high: b.clamp(x, None, high))


@rule(aten.leaky_relu)
def _leaky(b: Builder, x: Value, slope: float = 0.01) -> Value:
    return b.add(b.multiply(x, slope), b.multiply(b.relu(x), 1.0 - slope))


@rule(aten.prelu)
def _prelu(b: Builder, x: Value, weight: Value) -> Value:
    shape = [1, -1] + [1] * (len(x.shape) - 2) if len(x.shape) > 1 else [-1]
    slope = b.move(lambda w: w.reshape(shape), [weight], whole=False)
    above = b.relu(x)
    return b.add(above, b.multiply(slope, b.sub(x, above)))


@rule(aten.abs)
def _abs(b: Builder, x: Value) -> Value:
    return b.sub(b.multiply(b.relu(x), 2.0), x)


@rule(aten.maximum)
def _maximum(b: Builder, x: Value, y: Value) -> Value:
    return b.maximum(x, y)


@rule(aten.minimum)
def _minimum(b: Builder, x: Value, y: Value) -> Value:
    return b.sub(x, b.relu(b.sub(x, y)))


@rule(aten.sign)
def _sign(b: Builder, x: Value) -> Value:
    above, below = b.unary("negative", b.multiply(x, -1.0)), b.unary("negative", x)
    return b.sub(above, below)


@rule(aten.lt)
def _lt(b: Builder, x: Value, y: Any) -> Value:
    return b.unary("negative", b.sub(x, y))


@rule(aten.gt)
def _gt(b: Builder, x: Value, y: Any) -> Value:
    return b.unary("negative", b.sub(y, x))


@rule(aten.ge)
def _ge(b: Builder, x: Value, y: Any) -> Value:
    return b.sub(1.0, _lt(b, x, y))


@rule(aten.le)
def _le(b: Builder, x: Value, y: Any) -> Value:
    return b.sub(1.0, _gt(b, x, y))


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(b: Builder, condition: Value, x: Any, y: Any) -> Value:
    """``x`` where a condition holds, else ``y``."""
    if isinstance(condition, Plain) and not condition.secret:
        chosen = condition.tensor.bool()
        return b.move(lambda p, q: torch.where(chosen, p, q), tensors(x, y), whole=False)
    return b.add(y, b.multiply(condition, b.sub(x, y)))


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(b: Builder, x: Value, mask: Value, value: Any) -> Value:
    number = float(value.tensor) if isinstance(value, Plain) else float(value)
    return where(b, mask, max(number, -128.0) if number < -1e9 else number, x)


@rule(aten.silu)
def _silu(b: Builder, x: Value) -> Value:
    return b.multiply(x, b.unary("sigmoid", x))


@rule(aten.gelu)
def _gelu(b: Builder, x: Value, *, approximate: str = "none") -> Value:
    """By tanh in both forms: at most 5e-4 from the exact one (Hendrycks and Gimpel 2016)."""
    inner = b.multiply(b.add(x, b.multiply(b.power(x, 3), 0.044715)), math.sqrt(2 / math.pi))
    return b.multiply(b.multiply(x, 0.5), b.add(b.unary("tanh", inner), 1.0))


@rule(aten.hardsigmoid)
def _hardsigmoid(b: Builder, x: Value) -> Value:
    return b.multiply(b.clamp(b.add(x, 3.0), 0.0, 6.0), 1 / 6)


@rule(aten.hardswish)
def _hardswish(b: Builder, x: Value) -> Value:
    return b.multiply(x, _hardsigmoid(b, x))
