"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphopt.errors import UnsupportedError
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.rules.base import Rule
from graphopt.passes.relevance.site import BIAS, Site


@dataclass(frozen=True)
class DetachedNorm(Rule):
    """A norm with its scale taken for a constant is linear: ``y = (x - mean(x)) g / s + b``.

    Ali et al. 2022 (conservative propagation); Achtibat et al. 2024, proposition 3.4.
    """

    name: ClassVar[str] = "detached-norm"
    families: ClassVar[tuple[Family, ...]] = (Family.NORM,)

    def prepare(self, site: Site) -> Linearised:
        """The linear map; what it needs of the input is small."""
        return NORMS[site.op.name](site)

    def propagate(self, site: Site) -> None:
        """Hand quotients on; the bias is booked."""
        quotient = site.quotient()
        norm: Linearised = site.prepared
        (operand,) = site.op.operands
        site.send(operand, norm.backward(quotient))
        site.send_followed(quotient)
        if norm.bias is not None:
            norm.book(site, quotient)


@dataclass(frozen=True)
class Folded(Rule):
    """A batch norm that is a part of the layer in front, whose rule sees the weights of both.

    Composites don't name it: `graphopt.passes.relevance.folding` says where it is.
    """

    name: ClassVar[str] = "folded"
    families: ClassVar[tuple[Family, ...]] = (Family.NORM,)

    def propagate(self, site: Site) -> None:
        """Relevance of the result is that of the layer's own."""
        (operand,) = site.op.operands
        site.send(operand, site.relevance(), "relevance")


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
    x, shape = site.argument(0), site.argument(1)
    dims = tuple(range(-len(shape), 0))
    eps = _given(site.argument(4), 1e-5)
    # the same call as the layer's own, of which it is a second result
    scale = torch.native_layer_norm(x, shape, weight, bias, eps)[2].to(x.dtype)

    def backward(c: Tensor) -> Tensor:
        c = c * weight if weight is not None else c
        return (c - c.mean(dims, keepdim=True)) * scale

    return Linearised(backward, bias)


def _rms_norm(site: Site) -> Linearised:
    x, weight = site.argument(0), site.argument(2)
    eps = _given(site.argument(3), torch.finfo(x.dtype).eps)
    dims = tuple(range(-len(site.argument(1)), 0))
    size = _wide(x).square().mean(dims, keepdim=True)
    scale = torch.rsqrt(size + eps).to(x.dtype)
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
    trains = "legit" not in site.op.name and site.op.name != "instance_norm" and site.argument(5)
    if trains or site.argument(3) is None or site.argument(4) is None:
        return _of_the_batch(site)
    scale, shift = batch_map(site)
    return Linearised(lambda c: c * _along_channels(scale, c), shift, 1)


def batch_map(site: Site) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel, ``[channels]``.

    Raises:
        UnsupportedError: They depend on the other samples of the batch.
    """
    weight, bias, mean, variance = (site.argument(i) for i in (1, 2, 3, 4))
    if mean is None or variance is None:
        raise UnsupportedError(
            "this norm has no running statistics: it mixes the samples of a batch",
            node=site.op.node,
            hint="use track_running_stats=True, or a group norm",
        )
    eps = site.argument(6 if "legit" in site.op.name else 7)
    scale = torch.rsqrt(variance + eps)
    scale = scale * weight if weight is not None else scale
    return scale, -mean * scale if bias is None else bias - mean * scale


def _of_the_batch(site: Site) -> Linearised:
    """A batch norm without running statistics: it takes those of its input."""
    x, weight, bias = (site.argument(i) for i in (0, 1, 2))
    eps = site.argument(6 if "legit" in site.op.name else 7)
    dims = tuple(d for d in range(x.ndim) if d != 1)
    scale = _reciprocal_deviation(x, dims, eps)

    def backward(c: Tensor) -> Tensor:
        c = c * _along_channels(weight, c) if weight is not None else c
        return (c - c.mean(dims, keepdim=True)) * scale

    return Linearised(backward, bias, 1)


def _reciprocal_deviation(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    return torch.rsqrt(_wide(x).var(dims, unbiased=False, keepdim=True) + eps).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """At least single precision: squares of half precision overflow beyond 256."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
}
