"""Packed bits and codes, against the formula element by element."""

from __future__ import annotations

import pytest
import torch

from graphopt.passes.share.packing import pack_bits, pack_codes, unpack_bits, unpack_levels

SIZES = [(0,), (1,), (7,), (8,), (3, 5), (4, 16), (2, 3, 33)]


@pytest.mark.parametrize("size", SIZES)
def test_bits(size: tuple[int, ...]) -> None:
    mask = torch.rand(size) < 0.5
    packed = pack_bits(mask)
    assert packed.numel() == -(-mask.numel() // 8)
    for index, flag in enumerate(mask.flatten().tolist()):
        assert (int(packed[index // 8]) >> (index % 8)) & 1 == flag
    assert torch.equal(unpack_bits(packed, size), mask)


@pytest.mark.parametrize("size", SIZES)
def test_codes(size: tuple[int, ...]) -> None:
    codes = torch.randint(0, 4, size, dtype=torch.uint8)
    packed = pack_codes(codes)
    assert packed.numel() == -(-codes.numel() // 4)
    for index, code in enumerate(codes.flatten().tolist()):
        assert (int(packed[index // 4]) >> (2 * (index % 4))) & 3 == code
    levels = torch.randn(4, dtype=torch.float64)
    assert torch.equal(unpack_levels(packed, levels, size), levels[codes.long()])


def test_any_layout() -> None:
    mask = (torch.rand(6, 5) < 0.5).t()
    assert torch.equal(unpack_bits(pack_bits(mask), mask.shape), mask)


def test_as_ops() -> None:
    mask = torch.rand(3, 11) < 0.5
    torch.library.opcheck(torch.ops.graphopt.pack_bits.default, (mask,))
    torch.library.opcheck(torch.ops.graphopt.unpack_bits.default, (pack_bits(mask), [3, 11]))
