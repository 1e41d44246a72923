"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphopt.passes.relevance.rules.base import Rule
from graphopt.passes.relevance.site import BIAS, Site


@dataclass(frozen=True)
class DetachedNorm(Rule):
    """A norm with its scale taken for a constant is linear: ``y = (x - mean(x)) g / s + b``.

    Ali et al. 2022 (conservative propagation); Achtibat et al. 2024, proposition 3.4.
    """

    name: ClassVar[str] = "detached-norm"

    def prepare(self, site: Site) -> Linearised:
        """The linear map; what it needs of the input is small."""
        return NORMS[site.op.name](site)

    def propagate(self, site: Site) -> None:
        """Hand quotients on; the bias is booked."""
        quotient = site.quotient()
        norm: Linearised = site.prepared
        (operand,) = site.op.operands
        site.send(operand, norm.backward(quotient))
        if norm.bias is not None:
            norm.book(site, quotient)


@dataclass(frozen=True)
class Linearised:
    """A norm as a linear map.

    Attributes:
        backward: The map's transpose.
        bias: What is added, or None.
        channel: The dimension that the bias lies along; None: the last ones.
    """

    backward: Callable[[Tensor], Tensor]
    bias: Tensor | None = None
    channel: int | None = None

    def book(self, site: Site, quotient: Tensor) -> None:
        """Book what the bias takes."""
        assert self.bias is not None
        if self.channel is not None:
            site.book_bias(self.bias, quotient, self.channel)
        elif self.bias.ndim == 1:
            site.book_bias(self.bias, quotient, -1)
        else:
            site.book(BIAS, quotient * self.bias)


def _layer_norm(site: Site) -> Linearised:
    weight, bias = site.argument(2), site.argument(3)
    dims = tuple(range(-len(site.argument(1)), 0))
    scale = _reciprocal_deviation(site.argument(0), dims, _given(site.argument(4), 1e-5))

    def backward(c: Tensor) -> Tensor:
        c = c * weight if weight is not None else c
        return (c - c.mean(dims, keepdim=True)) * scale

    return Linearised(backward, bias)


def _rms_norm(site: Site) -> Linearised:
    x, weight = site.argument(0), site.argument(2)
    eps = _given(site.argument(3), torch.finfo(x.dtype).eps)
    dims = tuple(range(-len(site.argument(1)), 0))
    scale = torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    return Linearised(lambda c: (c * weight if weight is not None else c) * scale)


def _group_norm(site: Site) -> Linearised:
    name = site.op.name
    if name == "native_group_norm":
        weight, bias, groups, eps = (site.argument(i) for i in (1, 2, 6, 7))
    elif name == "instance_norm":
        weight, bias, groups, eps = site.argument(1), site.argument(2), None, site.argument(7)
        if not site.argument(5):
            return _batch_norm(site)
    else:
        groups, weight, bias, eps = (site.argument(i) for i in (1, 2, 3, 4))
        eps = _given(eps, 1e-5)

    def grouped(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], groups or x.shape[1], -1)

    scale = _reciprocal_deviation(grouped(site.argument(0)), (-1,), eps)

    def backward(c: Tensor) -> Tensor:
        weighted = c * _along_channels(weight, c) if weight is not None else c
        inner = grouped(weighted)
        return ((inner - inner.mean(-1, keepdim=True)) * scale).reshape(c.shape)

    return Linearised(backward, bias, 1)


def _batch_norm(site: Site) -> Linearised:
    weight, bias, mean, variance = (site.argument(i) for i in (1, 2, 3, 4))
    eps = site.argument(6 if "legit" in site.op.name else 7)
    if mean is None or variance is None:
        return _of_the_batch(site, weight, bias, eps)
    scale = torch.rsqrt(variance + eps)
    scale = scale * weight if weight is not None else scale
    shift = -mean * scale if bias is None else bias - mean * scale
    return Linearised(lambda c: c * _along_channels(scale, c), shift, 1)


def _of_the_batch(site: Site, weight: Any, bias: Any, eps: float) -> Linearised:
    """A batch norm without running statistics: it takes those of its input."""
    x = site.argument(0)
    dims = tuple(d for d in range(x.ndim) if d != 1)
    scale = _reciprocal_deviation(x, dims, eps)

    def backward(c: Tensor) -> Tensor:
        c = c * _along_channels(weight, c) if weight is not None else c
        return (c - c.mean(dims, keepdim=True)) * scale

    return Linearised(backward, bias, 1)


def _reciprocal_deviation(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    return torch.rsqrt(x.var(dims, unbiased=False, keepdim=True) + eps)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _along_channels(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 2))


NORMS: dict[str, Callable[[Site], Any]] = {
    "layer_norm": _layer_norm,
    "native_layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "_fused_rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "native_group_norm": _group_norm,
    "instance_norm": _group_norm,
    "batch_norm": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
}
