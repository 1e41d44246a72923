"""Which weights of a program are zero by choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Mask:
    """Of one parameter, the places that are kept.

    Attributes:
        bits: uint8, one bit a place in the parameter's own order, first place first; 1 is kept.
        shape: The parameter's shape.
        pattern: ``n:m`` where each group of m places along ``axis`` keeps at most n, else empty.
        axis: The axis that products with the parameter sum over, or None where that is not known.
    """

    bits: torch.Tensor
    shape: tuple[int, ...]
    pattern: str = ""
    axis: int | None = None

    @classmethod
    def of(cls, kept: torch.Tensor, pattern: str = "", axis: int | None = None) -> Mask:
        """The mask of a bool tensor."""
        packed = np.packbits(kept.detach().cpu().numpy().reshape(-1))
        return cls(torch.from_numpy(packed), tuple(kept.shape), pattern, axis)

    @property
    def kept(self) -> torch.Tensor:
        """Bool, of the parameter's shape, on the CPU: True where a weight is kept."""
        size = int(np.prod(self.shape, dtype=np.int64))
        bits = np.unpackbits(self.bits.numpy(), count=size)
        return torch.from_numpy(bits.astype(bool)).reshape(self.shape)

    def narrow(self, places: Mapping[int, tuple[int, ...]]) -> Mask:
        """The mask of a parameter of which only some places of some axes are left."""
        kept = self.kept
        for axis, left in places.items():
            kept = kept.index_select(axis, torch.tensor(left))
        pattern = "" if self.axis in places else self.pattern  # groups are cut
        return Mask.of(kept, pattern, self.axis)


Masks = Mapping[str, Mask]
"""Masks by name in the ``state_dict``; all names of a tied parameter have it."""


def masked_state(masks: Masks, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with zeros where a mask keeps nothing; entries of other shapes stay as they are."""
    return {
        name: _masked(masks[name], value) if name in masks else value
        for name, value in state.items()
    }


def _masked(mask: Mask, value: Any) -> Any:
    if tuple(getattr(value, "shape", ())) != mask.shape:
        return value
    return value.masked_fill(~mask.kept.to(value.device), 0)


def to_dict(masks: Masks, add: Any) -> dict[str, Any]:
    """JSON-able form.

    Args:
        masks: The masks.
        add: Told of each tensor of bits and a name for it; returns the key that stands for it.
    """
    return {
        name: [add(m.bits, f"_graphopt.mask.{name}"), list(m.shape), m.pattern, m.axis]
        for name, m in masks.items()
    }


def from_dict(data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Masks:
    """Reads what `to_dict` wrote.

    Raises:
        ValueError: Bits that don't fit their shape.
    """
    masks = {}
    for name, (key, shape, pattern, axis) in data.items():
        bits = tensors[key]
        if bits.dtype != torch.uint8 or bits.numel() != -(-int(np.prod(shape)) // 8):
            raise ValueError(f"the mask of {name} does not fit its shape")
        masks[str(name)] = Mask(bits, tuple(map(int, shape)), str(pattern), axis)
    return masks
