"""What is perturbed as one: a pixel, a patch of an image, a token, a segment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import InputMismatch, NonFiniteError, UsageError

POSITIONS = "positions"
ELEMENTS = "elements"


@dataclass(frozen=True, eq=False)
class Units:
    """A partition of one sample's elements.

    Attributes:
        labels: Which unit an element belongs to, ``0 .. count - 1``, or -1 for one that is never
            perturbed; of the shape of one sample.
        count: How many units there are.
        batch: How many samples.
    """

    labels: Tensor
    count: int
    batch: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input: the batch and the shape of one sample."""
        return (self.batch, *self.labels.shape)

    def gather(self, values: Tensor, *, what: str = "the relevance") -> Tensor:
        """Sum what a relevance holds over each unit.

        Args:
            values: ``(batch, count)``, or of the input's shape, or of it without its channels
                (dimension 1 of an image, the last one of embedded tokens).
            what: Its name in errors.

        Returns:
            ``(batch, count)``, float64.

        Raises:
            InputMismatch: Another shape.
            NonFiniteError: NaN or infinity among them.
        """
        if not isinstance(values, Tensor):
            raise UsageError(f"{what} must be a tensor, not {type(values).__name__}")
        if not torch.isfinite(values).all():
            raise NonFiniteError(
                f"{what} holds NaN or infinity",
                hint="look at the ledger of the method: which node divides by zero?",
            )
        labels = self._labels_for(tuple(values.shape), what)
        values = values.detach().to(torch.float64).reshape(self.batch, -1)
        if labels is None:
            return values
        labels = labels.reshape(-1).to(values.device)
        sums = values.new_zeros(self.batch, self.count + 1)
        sums.index_add_(1, torch.where(labels < 0, self.count, labels), values)
        return sums[:, : self.count]

    def spread(self, values: Tensor) -> Tensor:
        """Give each element its unit's value: ``(batch, count)`` -> the input's shape."""
        padded = torch.cat([values, values.new_zeros(len(values), 1)], 1)
        return padded[:, self.labels.to(values.device)]  # -1: the last one, which is none

    def perturb(self, inputs: Tensor, baseline: Tensor, removed: Tensor) -> Tensor:
        """Replace the removed units of ``inputs`` by those of ``baseline``.

        Args:
            inputs: ``(rows, *sample)``.
            baseline: Of the same shape.
            removed: ``(rows, count)``, bool.
        """
        return torch.where(self.spread(removed), baseline, inputs)

    def _labels_for(self, shape: tuple[int, ...], what: str) -> Tensor | None:
        """The labels of a relevance's elements; None where it has one value for each unit."""
        if shape == self.shape:
            return self.labels
        if shape == (self.batch, self.count):
            return None
        for axis in (0, self.labels.dim() - 1):
            rest = self.shape[1 : axis + 1] + self.shape[axis + 2 :]
            if self.labels.dim() > 1 and shape in ((self.batch, *rest), _kept(self.shape, axis)):
                first = self.labels.select(axis, 0)
                if bool((self.labels == first.unsqueeze(axis)).all()):
                    return first
        raise InputMismatch(
            f"{what} has shape {shape}; the input's is {self.shape}, of {self.count} units",
            hint=f"one value an element, or one a unit: {(self.batch, self.count)}",
        )


def _kept(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[: axis + 1], 1, *shape[axis + 2 :])


def units_of(inputs: Tensor, spec: Any = None) -> Units:
    """Read what is perturbed as one.

    Args:
        inputs: ``(batch, *sample)``: token ids ``(batch, length)``, embedded tokens
            ``(batch, length, width)``, an image ``(batch, channels, height, width)``.
        spec: The side of square patches of an image, or ``(height, width)`` of them (patches at
            the rim are smaller where the image's side is no multiple); ``positions``: all that
            stands at one position (all channels of a pixel, the whole of an embedding);
            ``elements``: each number by itself; or a tensor of labels, of one sample's shape or of
            an image's ``(height, width)``, negative for what is never perturbed. None: positions.

    Raises:
        UsageError: A spec that doesn't fit the input.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() < 2 or 0 in inputs.shape:
        raise UsageError(
            "what is perturbed must be a non-empty tensor with a batch and at least one more axis",
            hint="of inputs (batch, ...), say which with argument=",
        )
    sample = inputs.shape[1:]
    if isinstance(spec, Tensor):
        labels = _given(sample, spec)
    elif spec in (None, POSITIONS):
        labels = _patches(sample, 1, 1) if len(sample) == 3 else _positions(sample)
    elif spec == ELEMENTS:
        labels = torch.arange(math.prod(sample)).reshape(sample)
    else:
        labels = _patches(sample, *_sides(spec, sample))
    labels = labels.to(inputs.device)
    return Units(labels, int(labels.max()) + 1, len(inputs))


def _positions(sample: torch.Size) -> Tensor:
    """The first axis of a sample is the position."""
    shape = (sample[0], *[1] * (len(sample) - 1))
    return torch.arange(sample[0]).reshape(shape).expand(sample).contiguous()


def _sides(spec: Any, sample: torch.Size) -> tuple[int, int]:
    sides = (spec, spec) if isinstance(spec, int) else spec
    fits = (
        isinstance(sides, (tuple, list))
        and len(sides) == 2
        and all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    )
    if not fits or len(sample) != 3:
        raise UsageError(
            f"units {spec!r} for an input of shape (batch, {', '.join(map(str, sample))})",
            hint="a patch's side (images only), 'positions', 'elements', or a tensor of labels",
        )
    if not all(1 <= side <= limit for side, limit in zip(sides, sample[1:], strict=True)):
        raise UsageError(f"patches of {sides[0]}x{sides[1]} in an image of {sample[1]}x{sample[2]}")
    return sides[0], sides[1]


def _patches(sample: torch.Size, height: int, width: int) -> Tensor:
    """Row by row."""
    rows = torch.arange(sample[1]) // height
    columns = torch.arange(sample[2]) // width
    labels = rows[:, None] * (int(columns[-1]) + 1) + columns
    return labels.expand(sample).contiguous()


def _given(sample: torch.Size, labels: Tensor) -> Tensor:
    fits = labels.shape == sample or (len(sample) == 3 and labels.shape == sample[1:])
    if not fits or labels.is_floating_point() or labels.dtype == torch.bool:
        raise UsageError(
            f"labels of shape {tuple(labels.shape)} ({labels.dtype}) for samples of shape "
            f"{tuple(sample)}",
            hint="integers, one for each element",
        )
    found = labels[labels >= 0].unique()
    if not torch.equal(found, torch.arange(len(found), device=found.device)) or not len(found):
        raise UsageError("labels must be 0, 1, ... without a gap; -1 for what stays as it is")
    return labels.long().clamp(min=-1).expand(sample).contiguous()
