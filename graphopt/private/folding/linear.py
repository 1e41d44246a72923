"""Linear operators with known weights: ``aten.linear`` and convolutions, transposed ones too."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.private.folding.affine import Affine, Sources, joined

Sizes = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear operator.

    Attributes:
        weight: float64, in ATen's order: ``[out, in / groups, *kernel]``; transposed
            ``[in, out / groups, *kernel]``.
        bias: float64 ``[out]``, or None.
        dims: Dimensions of the kernel; 0 is ``aten.linear``.
        stride: Of each dimension, as the next four.
        padding: Zeros on either side.
        dilation: Steps between taps.
        output_padding: Of a transposed convolution, what is added behind.
        transposed: Whether it is a transposed convolution.
        groups: Groups of channels.
        sources: What weight and bias are made of.
        home: Name of the weight in the source.
    """

    weight: Tensor
    bias: Tensor | None
    dims: int = 0
    stride: Sizes = ()
    padding: Sizes = ()
    dilation: Sizes = ()
    output_padding: Sizes = ()
    transposed: bool = False
    groups: int = 1
    sources: Sources = ()
    home: str = ""

    @property
    def axis(self) -> int:
        """The axis of the channels of input and output, counted from the end."""
        return -1 - self.dims

    @property
    def kernel(self) -> Sizes:
        """Sizes of the kernel."""
        return tuple(self.weight.shape[2:])

    @property
    def outputs(self) -> int:
        """Channels of the output."""
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def inputs(self) -> int:
        """Channels of the input."""
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    @property
    def is_pointwise(self) -> bool:
        """Whether each place of the output depends on the same place of the input alone."""
        plain = {*self.kernel, *self.stride} <= {1}
        return plain and not any(self.padding) and not any(self.output_padding)

    @property
    def adds_zeros(self) -> bool:
        """Whether a constant input may give another output at the border than inside."""
        return not self.is_pointwise and (self.transposed or any(self.padding))

    def offset(self) -> Tensor:
        """The bias, or zeros."""
        return self.weight.new_zeros(self.outputs) if self.bias is None else self.bias

    def then(self, affine: Affine) -> Linear:
        """Followed by a scale and shift of its output channels."""
        scale = affine.scale.expand(self.outputs)
        bias = None if self.bias is None else self.bias * scale
        if affine.shifts:
            bias = self.offset() * scale + affine.shift.expand(self.outputs)
        return self.of(affine, self.weight * self._over_outputs(scale), bias)

    def behind(self, affine: Affine) -> Linear:
        """Applied to a scaled and shifted input; a shift only where it adds no zeros."""
        bias = self.bias
        if affine.shifts:
            shift = affine.shift.expand(self.inputs)
            taps = self.weight * self._over_inputs(shift)
            taps = taps.reshape(*taps.shape[:2], -1).sum(2)
            bias = self.offset() + self._over_groups(taps)
        scale = affine.scale.expand(self.inputs)
        return self.of(affine, self.weight * self._over_inputs(scale), bias)

    def of(self, affine: Affine, weight: Tensor, bias: Tensor | None) -> Linear:
        """With other numbers."""
        sources = joined(self.sources, affine.sources)
        return dataclasses.replace(self, weight=weight, bias=bias, sources=sources)

    def _over_outputs(self, values: Tensor) -> Tensor:
        if self.transposed:
            return self._grouped(values, self.inputs)
        return values.reshape(-1, *[1] * (self.weight.dim() - 1))

    def _over_inputs(self, values: Tensor) -> Tensor:
        if self.transposed:
            return values.reshape(-1, *[1] * (self.weight.dim() - 1))
        return self._grouped(values, self.outputs)

    def _grouped(self, values: Tensor, rows: int) -> Tensor:
        """Values of the weight's second axis, group by group, for each row."""
        by_group = values.reshape(self.groups, 1, -1).expand(-1, rows // self.groups, -1)
        return by_group.reshape(rows, -1, *[1] * self.dims)

    def _over_groups(self, taps: Tensor) -> Tensor:
        """What the output channels get of ``taps``, ``[rows, columns]`` of the weight."""
        if not self.transposed:
            return taps.sum(1)
        return taps.reshape(self.groups, -1, taps.shape[1]).sum(1).reshape(-1)

    def dense(self) -> Linear:
        """The same without groups; no transposed convolution."""
        if self.groups == 1:
            return self
        rows, columns = self.outputs // self.groups, self.weight.shape[1]
        weight = self.weight.new_zeros(self.outputs, self.inputs, *self.kernel)
        for group in range(self.groups):
            here = slice(group * rows, (group + 1) * rows)
            there = slice(group * columns, (group + 1) * columns)
            weight[here, there] = self.weight[here]
        return dataclasses.replace(self, weight=weight, groups=1)

    def products(self, given: list[int], result: list[int]) -> int:
        """Multiply-adds for an input and an output of these sizes."""
        sides = given if self.transposed else result
        places = sides[-self.dims :] if self.dims else sides[:-1]
        batch = sides[: self.axis] if self.dims else []
        return self.weight.numel() * math.prod(places) * math.prod(batch)


def identity(channels: int, groups: int, dims: int) -> Tensor:
    """The weight ``[channels, channels / groups, 1, ...]`` that changes nothing."""
    each = channels // groups
    weight = torch.eye(each, dtype=torch.float64).repeat(groups, 1)
    return weight.reshape(channels, each, *[1] * dims)
