"""Scales and shifts by known numbers: ``scale x + shift``, one pair for all or one a channel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Sources = tuple[str, ...]
"""Names of the parameters and buffers that a number is made of, each once."""


def joined(*sources: Iterable[str]) -> Sources:
    """All of several sources."""
    return tuple(dict.fromkeys(name for each in sources for name in each))


@dataclass(frozen=True, eq=False)
class Affine:
    """``scale x + shift``.

    Attributes:
        scale: float64; ``[]``, or ``[channels]`` along an axis.
        shift: float64, of the same shape.
        axis: The axis, counted from the end (negative), or None where both are single numbers.
        sources: What they are made of.
    """

    scale: Tensor
    shift: Tensor
    axis: int | None = None
    sources: Sources = ()

    @property
    def scales(self) -> bool:
        """Whether it multiplies by anything but one."""
        return bool((self.scale != 1).any())

    @property
    def shifts(self) -> bool:
        """Whether it adds anything but zero."""
        return bool((self.shift != 0).any())

    @property
    def channels(self) -> int | None:
        """Channels, or None where one pair is for all."""
        return None if self.axis is None else len(self.scale)

    def fits(self, other: Affine) -> bool:
        """Whether both lie along one axis."""
        return None in (self.axis, other.axis) or self.axis == other.axis

    def after(self, first: Affine) -> Affine:
        """This one of the first one's result; both lie along one axis."""
        axis = first.axis if self.axis is None else self.axis
        scale = self.scale * first.scale
        shift = self.scale * first.shift + self.shift
        return made(scale, shift, axis, joined(first.sources, self.sources))

    def along(self, axis: int | None, scale: Tensor, shift: Tensor) -> Affine:
        """Other numbers of the same sources."""
        return made(scale, shift, axis, self.sources)

    def only_scale(self) -> Affine:
        """Without the shift."""
        return self.along(self.axis, self.scale, torch.zeros_like(self.scale))

    def only_shift(self) -> Affine:
        """Without the scale."""
        return self.along(self.axis, torch.ones_like(self.shift), self.shift)


def made(scale: Tensor, shift: Tensor, axis: int | None, sources: Sources = ()) -> Affine:
    """An affine map whose two parts have one shape."""
    scale, shift = torch.broadcast_tensors(scale, shift)
    return Affine(scale, shift, axis, sources)


def number(scale: float = 1.0, shift: float = 0.0) -> Affine:
    """The same two numbers for all elements."""
    double = torch.float64
    return Affine(torch.tensor(scale, dtype=double), torch.tensor(shift, dtype=double))
