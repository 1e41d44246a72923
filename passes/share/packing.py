"""Ops that pack small numbers into bytes, and unpack them: custom ops of plain PyTorch.

Eight flags of a byte each are the eight bytes of one 64-bit number; one multiplication brings
their bits together in its top byte. Four codes of two bits are a 32-bit number likewise. Unpacking
looks each byte up in a table. The first element stands at the lower end, as in LowMemoryBP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("graphopt", "FRAGMENT")
for _schema in (
    "pack_bits(Tensor mask) -> Tensor",
    "unpack_bits(Tensor packed, SymInt[] size) -> Tensor",
    "pack_codes(Tensor codes) -> Tensor",
    "unpack_levels(Tensor packed, Tensor levels, SymInt[] size) -> Tensor",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pointwise,))  # bound by memory: may run again

_GATHER_BITS = 0x0102040810204080
_GATHER_CODES = (1 << 24) | (1 << 18) | (1 << 12) | (1 << 6)


def _in_groups(flat: Tensor, count: int) -> Tensor:
    """Filled up with zeros to a whole number of groups."""
    missing = -flat.numel() % count
    return torch.nn.functional.pad(flat, (0, missing)) if missing else flat


def pack_bits(mask: Tensor) -> Tensor:
    """Packs a bool tensor: ceil(n / 8) bytes, element 8j + k at bit k of byte j."""
    flat = _in_groups(mask.contiguous().view(torch.uint8).view(-1), 8)
    gathered = flat.view(torch.int64) * _GATHER_BITS
    return gathered.bitwise_right_shift_(56).to(torch.uint8)


def unpack_bits(packed: Tensor, size: Sequence[int]) -> Tensor:
    """The bool tensor of the given size that `pack_bits` packed."""
    flags = _bit_table(packed.device)[packed.int()].view(torch.bool)
    return flags[: math.prod(size)].view(list(size))


def pack_codes(codes: Tensor) -> Tensor:
    """Packs a uint8 tensor of numbers 0 to 3: ceil(n / 4) bytes, element 4j + k at bits 2k."""
    flat = _in_groups(codes.contiguous().view(-1), 4)
    gathered = flat.view(torch.int32) * _GATHER_CODES
    return gathered.bitwise_right_shift_(24).to(torch.uint8)


def unpack_levels(packed: Tensor, levels: Tensor, size: Sequence[int]) -> Tensor:
    """What `pack_codes` packed, each code replaced by its level; of the levels' dtype."""
    codes = torch.arange(256, device=packed.device)
    digits = torch.stack([codes // 4**k % 4 for k in range(4)], dim=1)
    table = levels[digits]
    return table[packed.int()].view(-1)[: math.prod(size)].view(list(size))


@cache
def _bit_table(device: torch.device) -> Tensor:
    """For every byte its bits as eight bytes, in one 64-bit number."""
    numbers = torch.arange(256, dtype=torch.int64).unsqueeze(1)
    bits = (numbers >> torch.arange(8)) & 1
    return bits.to(torch.uint8).view(torch.int64).view(-1).to(device)


def _fake_pack_bits(mask: Tensor) -> Tensor:
    return mask.new_empty(((mask.numel() + 7) // 8,), dtype=torch.uint8)


def _fake_unpack_bits(packed: Tensor, size: Sequence[int]) -> Tensor:
    return packed.new_empty(list(size), dtype=torch.bool)


def _fake_pack_codes(codes: Tensor) -> Tensor:
    return codes.new_empty(((codes.numel() + 3) // 4,))


def _fake_unpack_levels(packed: Tensor, levels: Tensor, size: Sequence[int]) -> Tensor:
    return levels.new_empty(list(size))


for _op, _fake in (
    (pack_bits, _fake_pack_bits),
    (unpack_bits, _fake_unpack_bits),
    (pack_codes, _fake_pack_codes),
    (unpack_levels, _fake_unpack_levels),
):
    _LIBRARY.impl(_op.__name__, _op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{_op.__name__}", _fake, lib=_LIBRARY)
