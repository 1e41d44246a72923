"""How ATen ops read as arithmetic on secret values.

A rule takes the builder and the op's arguments, tensors as `Shared` or `Plain` values, and returns
what the op returns.  Ops on known values alone need no rule: they run in the clear.  A package that
puts ops of its own into graphs says with `rule` what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import interpolate, unfold

from graphopt.errors import UnsupportedError
from graphopt.private.builder import Builder, Plain, Shared, Value
from graphopt.private.signs import is_nonnegative

aten = torch.ops.aten

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for ops (overloads or packets of ATen) or functions that graphs call."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def find_rule(target: Any) -> Rule | None:
    """The rule of an overload, else that of all its packet's overloads."""
    found = RULES.get(target)
    return found or RULES.get(getattr(target, "overloadpacket", None))


# elementwise --------------------------------------------------------------------------------------


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
def _where(b: Builder, condition: Value, x: Any, y: Any) -> Value:
    if isinstance(condition, Plain) and not condition.secret:
        chosen = condition.tensor.bool()
        return b.move(lambda p, q: torch.where(chosen, p, q), _tensors(x, y), whole=False)
    return b.add(y, b.multiply(condition, b.sub(x, y)))


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(b: Builder, x: Value, mask: Value, value: Any) -> Value:
    number = float(value.tensor) if isinstance(value, Plain) else float(value)
    return _where(b, mask, max(number, -128.0) if number < -1e9 else number, x)


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


def _tensors(*values: Any) -> list[Value]:
    return [
        v if isinstance(v, (Shared, Plain)) else Plain(torch.tensor(float(v), dtype=torch.float64))
        for v in values
    ]


# linear maps --------------------------------------------------------------------------------------


def _t(b: Builder, x: Value) -> Value:
    return b.move(lambda t: t.transpose(-1, -2), [x], whole=False)


@rule(aten.linear)
def _linear(b: Builder, x: Value, weight: Value, bias: Value | None = None) -> Value:
    result = b.matmul(x, _t(b, weight))
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
    stride, dilation = _wide(stride, rank), _wide(dilation, rank)
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(t % 2 for t in total):
            pads = [p for t in reversed(total) for p in (t // 2, t - t // 2)]
            x = b.move(lambda t: torch.nn.functional.pad(t, pads), [x], whole=False)
            total = [0] * rank
        padding = tuple(t // 2 for t in total)
    padding = _wide(padding, rank)
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
    return result if bias is None else b.add(result, _channels(b, bias, rank))


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
    stride, padding, dilation = (_wide(v, rank) for v in (stride, padding, dilation))
    before = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
    after = [p + extra for p, extra in zip(before, _wide(output_padding, rank), strict=True)]
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


def _wide(value: Any, rank: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * rank if len(values) == 1 else values


def _channels(b: Builder, vector: Value, rank: int) -> Value:
    return b.move(lambda t: t.reshape(-1, *[1] * rank), [vector], whole=False)


# reductions ---------------------------------------------------------------------------------------


@rule(aten.sum.dim_IntList, aten.sum.default)
def _sum(
    b: Builder, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Value:
    return b.sum(x, _dims(x, dim), keepdim)


@rule(aten.mean.dim, aten.mean.default)
def _mean(
    b: Builder, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Value:
    return b.mean(x, _dims(x, dim), keepdim)


@rule(aten.amax)
def _amax(b: Builder, x: Value, dim: Any = (), keepdim: bool = False) -> Value:
    dims = sorted(d % len(x.shape) for d in _dims(x, dim))
    for d in dims:
        x = b.largest(x, d)
    if keepdim:
        return x
    return b.move(lambda t: t.squeeze(tuple(dims)), [x], whole=False)


def _dims(x: Value, dim: Any) -> list[int]:
    if dim is None or dim in ((), []):
        return list(range(len(x.shape)))
    return [dim] if isinstance(dim, int) else list(dim)


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
    scores = b.matmul(q, _t(b, k))
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        attn_mask = Plain(causal)
    if isinstance(attn_mask, Plain) and attn_mask.tensor.dtype is torch.bool:
        scores = _where(b, attn_mask, scores, -128.0)
    elif attn_mask is not None:
        scores = b.add(scores, attn_mask)
    return b.matmul(_softmax(b, scores, -1), v)


# normalisation ------------------------------------------------------------------------------------


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
    return b.add(b.multiply(x, _channels(b, scale, rank)), _channels(b, offset, rank))


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
    result = result if weight is None else b.multiply(result, _channels(b, weight, rank))
    return result if bias is None else b.add(result, _channels(b, bias, rank))


def _standardised(b: Builder, x: Value, dims: Sequence[int], eps: float) -> Value:
    centred = b.sub(x, b.mean(x, dims, True))
    variance = b.mean(b.multiply(centred, centred), dims, True)
    return b.multiply(centred, b.unary("rsqrt", b.add(variance, eps)))


# pooling ------------------------------------------------------------------------------------------


@rule(aten.max_pool2d)
def _max_pool2d(
    b: Builder, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Value:  # fmt: skip
    if ceil_mode:
        raise UnsupportedError("max pooling with ceil_mode")

    def gather(places: torch.Tensor) -> torch.Tensor:
        found = windows(places, kernel, stride, padding, dilation)
        # Padding must not win: a place of the window stands in for it.
        return torch.where(found == 0, found.amax(-1, keepdim=True), found)

    best = b.largest(b.move(gather, [x], whole=False), len(x.shape))
    return b.move(lambda t: t.squeeze(-1), [best], whole=False)


rule(aten.max_pool2d_with_indices)(lambda b, *args: (_max_pool2d(b, *args), None))


@rule(aten.avg_pool2d)
def _avg_pool2d(
    b: Builder, x: Value, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Value:  # fmt: skip
    padded = any(_wide(padding, 2)) and not count_include_pad
    if ceil_mode or padded:
        raise UnsupportedError("average pooling with ceil_mode or without its padding counted")
    found = b.move(lambda t: windows(t, kernel, stride, padding, 1), [x], whole=False)
    return b.sum(found, [-1], divisor=divisor_override or found.shape[-1])


def windows(x: torch.Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """(..., h, w) -> (..., h', w', elements of a window)."""
    kernel, padding, dilation = _wide(kernel, 2), _wide(padding, 2), _wide(dilation, 2)
    steps = _wide(stride, 2) if stride not in ((), [], None) else kernel
    height, width = x.shape[-2:]
    images = x.reshape(-1, 1, height, width)
    columns = unfold(images, kernel, dilation, padding, steps)
    rows = (height + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // steps[0] + 1
    return columns.transpose(1, 2).reshape(*x.shape[:-2], rows, -1, math.prod(kernel))


@rule(aten.adaptive_avg_pool2d, aten._adaptive_avg_pool2d)
def _adaptive_avg_pool2d(b: Builder, x: Value, size: Any) -> Value:
    rows, columns = _wide(size, 2)
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
