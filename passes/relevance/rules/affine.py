"""Linear layers and convolutions as functions of their input, with changed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.flow import times
from graphopt.passes.relevance.rules.norms import batch_map
from graphopt.passes.relevance.site import BIAS, Site

Change = Callable[[Tensor], Tensor]


def same(weight: Tensor) -> Tensor:
    """No change."""
    return weight


def positive(t: Tensor) -> Tensor:
    """The positive part."""
    return t.clamp(min=0)


def negative(t: Tensor) -> Tensor:
    """The negative part."""
    return t.clamp(max=0)


class Affine:
    """A layer ``z = W x + b``, of which rules change the weights.

    A batch norm right behind the layer that only the layer feeds is a part of it: then ``W``, ``b``
    and ``z`` are those of both together (see `graphopt.passes.relevance.folding`).

    Args:
        site: The layer.

    Attributes:
        site: The layer.
        input: The operand that is ``x``.
        x: Its value.
        z: The result.
        bias: What is added to ``W x``, or None; a vector lies along the channels of the result.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        op = site.op
        self._bias_node = op.argument(op.spec.bias)
        (self.input,) = [n for n in op.operands if n is not self._bias_node]
        self._weight_nodes = [n for n in op.constants if n is not self._bias_node]
        self._factor: Any = op.node.kwargs.get("alpha", 1)  # of addmm and its like
        self.x = site.value(self.input)
        self.z = site.result
        self._scale: Tensor | None = None
        self.bias = self._bias()
        behind = site.behind()
        if behind is not None:
            self._scale, shift = batch_map(behind)
            self.bias = shift if self.bias is None else self.bias * self._scale + shift
            self.z = behind.result

    def _bias(self) -> Tensor | None:
        bias = self.site.argument(self.site.op.spec.bias)
        beta: Any = self.site.op.node.kwargs.get("beta", 1)
        if not isinstance(bias, Tensor):
            return None
        bias = bias if beta == 1 else bias * beta
        size = self.z.shape[channel(self.site)]
        return bias.expand(size) if bias.ndim < 2 else bias

    @property
    def has_data_bias(self) -> bool:
        """Whether what is added carries relevance."""
        return self._bias_node in self.site.op.operands

    @property
    def weight(self) -> Tensor:
        """The weights as they are stored."""
        (node,) = self._weight_nodes
        return self.site.value(node)

    def unscaled(self, weight: Tensor) -> Tensor:
        """Weights divided by the scale of a batch norm behind the layer."""
        return weight if self._scale is None else scaled(self.site, weight, 1 / self._scale)

    def run(self, x: Tensor, weight: Change) -> Tensor:
        """``W' x`` for changed weights and another input, without the bias."""
        value = self.site.whole

        def lookup(node: Any) -> Any:
            if node is self.input:
                return x
            if node is self._bias_node:
                return torch.zeros_like(value(node))
            return self._changed(value(node), weight) if node in self._weight_nodes else value(node)

        return self.site.op.run(lookup)

    def _changed(self, weight: Tensor, change: Change) -> Tensor:
        if self._scale is not None:
            weight = scaled(self.site, weight, self._scale)
        if self._factor in (0, 1):
            return change(weight)
        return change(weight * self._factor) / self._factor

    def vjp(self, weight: Change, cotangent: Tensor) -> Tensor:
        """``W'^T c`` for changed weights."""
        leaf = torch.zeros_like(self.x).requires_grad_()
        with torch.enable_grad():
            result = self.run(leaf, weight)
        (grad,) = torch.autograd.grad(result, leaf, self.site.op.cotangent(cotangent))
        return grad

    def pulled(self, cotangent: Tensor) -> dict[Any, Tensor]:
        """``W^T c`` for the weights as they are; what else was asked for gets its gradient too."""
        if self._scale is not None:
            cotangent = cotangent * self.along(self._scale)
        return self.site.vjp(cotangent)

    def pull(self, cotangent: Tensor) -> Tensor:
        """``W^T c`` for the weights as they are."""
        return self.vjp(same, cotangent)

    def along(self, values: Tensor) -> Tensor:
        """A vector along the channels of the result."""
        return values.reshape(-1, *[1] * (-channel(self.site) - 1))

    def sum_of(self, for_positive: Change, for_negative: Change) -> Tensor:
        """Contributions of positive inputs through some weights, of negative ones by others."""
        total = self.run(positive(self.x), for_positive)
        if self.site.is_nonnegative(self.input):
            return total
        return total + self.run(negative(self.x), for_negative)

    def by_sign(
        self, for_positive: Callable[[], Tensor], for_negative: Callable[[], Tensor]
    ) -> Any:
        """One quotient for positive inputs, another one for negative ones."""
        above = for_positive()
        if self.site.is_nonnegative(self.input):
            return above
        return torch.where(self.x >= 0, above, for_negative())

    def send(self, tensor: Tensor, form: Any = "quotient") -> None:
        """Hand on to the input."""
        self.site.send(self.input, tensor, form)

    def added(self, total: Tensor, change: Change = same) -> Tensor:
        """A sum and the changed bias."""
        if self.bias is None:
            return total
        bias = change(self.bias)
        return total + (self.along(bias) if bias.ndim == 1 else bias)

    def take(self, quotient: Tensor, change: Change = same) -> None:
        """What the bias takes: booked, or handed on where it is data."""
        if self.bias is None:
            return
        bias = change(self.bias)
        if self.has_data_bias:
            value = self.site.value(self._bias_node)
            part = times(quotient, self.added(torch.zeros_like(quotient), change))
            self.site.send(self._bias_node, part.sum_to_size(value.shape), "relevance")
        elif bias.ndim == 1:
            self.site.book_bias(bias, quotient, channel(self.site))
        else:
            self.site.book(BIAS, times(quotient, bias))


def channel(site: Site) -> int:
    """The dimension of the result that the bias lies along, counted from the end."""
    if site.op.family is not Family.CONV:
        return -1
    weight: Any = site.argument(site.op.spec.weight)
    return -(weight.ndim - 2) - 1


def scaled(site: Site, weight: Tensor, scale: Tensor) -> Tensor:
    """Weights with a factor for each channel of the result."""
    op = site.op
    if op.family is not Family.CONV:
        return weight * (scale[:, None] if op.name == "linear" else scale)
    spread = [1] * (weight.ndim - 2)
    if not is_transposed(op):
        return weight * scale.reshape(-1, 1, *spread)
    groups = op.argument(8 if "convolution" in op.name else 6) or 1
    grouped = weight.unflatten(0, (groups, -1)) * scale.reshape(groups, 1, -1, *spread)
    return grouped.flatten(0, 1)


def is_transposed(op: Any) -> bool:
    """Whether a convolution is a transposed one."""
    return "transpose" in op.name or ("convolution" in op.name and bool(op.argument(6)))
