"""Ops that keep a floating tensor in eight or four bits an element: custom ops of plain PyTorch.

The elements, in an order of dimensions that is given, are cut into groups of 256; each group has a
header of eight bytes (its least value and the step between codes, as float32) and one code an
element, rounded to the nearest. A group with a value that is not finite comes back as NaN. After
Pan et al., "Mesa" (2021), and Chen et al., "ActNN" (ICML 2021), who round at random; for one fixed
batch the nearest code is nearer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

GROUP = 256
HEADER = 8
BITS = (8, 4)
# Groups that are packed at a time: scratch memory stays below some megabytes.
_BLOCK = 1024
_TINY = torch.finfo(torch.float32).tiny

_LIBRARY = torch.library.Library("graphopt", "FRAGMENT")
for _schema in (
    "quantise(Tensor x, int bits, int[] order) -> Tensor",
    "dequantise(Tensor packed, int bits, int[] order, SymInt[] size, ScalarType dtype) -> Tensor",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pointwise,))  # bound by memory: may run again


def packed_bytes(count: Any, bits: int) -> Any:
    """Bytes of `count` elements."""
    return -(-count // GROUP) * (HEADER + GROUP * bits // 8)


def quantise(x: Tensor, bits: int, order: Sequence[int]) -> Tensor:
    """Packs a tensor into `packed_bytes` bytes, block by block.

    Args:
        x: Of a floating dtype; copied first if it is laid out in another order.
        bits: 8 or 4.
        order: Dimensions, the outermost in memory first.
    """
    flat = x.permute(list(order)).contiguous().view(-1)
    packed = x.new_empty((packed_bytes(x.numel(), bits),), dtype=torch.uint8)
    for rows, part in _blocks(packed, bits, flat):
        groups = _in_groups(part.float())
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        step = (high - low).div_(2**bits - 1)
        codes = (groups - low).div_(step.clamp_min(_TINY)).round_().to(torch.uint8)
        rows[:, :HEADER] = torch.cat([low, step], 1).view(torch.uint8)
        rows[:, HEADER:] = codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed


def dequantise(
    packed: Tensor, bits: int, order: Sequence[int], size: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The tensor that `quantise` packed, each element within half a step of what it was.

    Its memory is laid out in the given order of dimensions.
    """
    out = _empty(packed, order, size, dtype)
    flat = out.permute(list(order)).view(-1)
    for rows, part in _blocks(packed, bits, flat):
        header = rows[:, :HEADER].contiguous().view(torch.float32)
        codes = rows[:, HEADER:]
        if bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], 2).view(len(rows), GROUP)
        values = codes.float().mul_(header[:, 1:]).add_(header[:, :1])
        part.copy_(values.view(-1)[: part.numel()])
    return out


def _blocks(packed: Tensor, bits: int, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Packed groups, one a row, and the elements that belong to them."""
    rows = packed.view(-1, HEADER + GROUP * bits // 8)
    return zip(rows.split(_BLOCK), flat.split(_BLOCK * GROUP), strict=True)


def _in_groups(flat: Tensor) -> Tensor:
    """Filled up with the last element, which leaves the range of the last group as it is."""
    missing = -flat.numel() % GROUP
    return (torch.cat([flat, flat[-1:].expand(missing)]) if missing else flat).view(-1, GROUP)


def _empty(like: Tensor, order: Sequence[int], size: Sequence[int], dtype: torch.dtype) -> Tensor:
    made = like.new_empty([size[dim] for dim in order], dtype=dtype)
    return made.permute([list(order).index(dim) for dim in range(len(order))])


def _fake_quantise(x: Tensor, bits: int, order: Sequence[int]) -> Tensor:
    return x.new_empty((packed_bytes(x.numel(), bits),), dtype=torch.uint8)


def _fake_dequantise(
    packed: Tensor, bits: int, order: Sequence[int], size: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return _empty(packed, order, size, dtype)


def memory_order(value: Tensor) -> list[int] | None:
    """Dimensions of a dense tensor, the outermost in memory first; None: it has gaps."""
    dims = list(range(value.dim()))
    if value.is_contiguous():
        return dims
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    known = formats.get(value.dim())
    if known is not None and value.is_contiguous(memory_format=known):
        return [0, *dims[2:], 1]
    return None


for _op, _fake in ((quantise, _fake_quantise), (dequantise, _fake_dequantise)):
    _LIBRARY.impl(_op.__name__, _op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{_op.__name__}", _fake, lib=_LIBRARY)
