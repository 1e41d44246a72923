"""Indices of max pooling at one byte an output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt.ir.joint import JointView
from graphopt.planning.rewrites import Rewrite, Site, insert, sizes_of
from graphopt.report import ShareRefusal

aten = torch.ops.aten

_LIBRARY = torch.library.Library("graphopt", "FRAGMENT")
_WINDOW = "SymInt width, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation"
for _schema in (
    f"pack_offsets(Tensor indices, {_WINDOW}) -> Tensor",
    f"unpack_offsets(Tensor offsets, {_WINDOW}) -> Tensor",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pointwise,))  # bound by memory: may run again
_MOST = 256  # places in a window that a byte can tell apart

Pair = Sequence[int]


@dataclass(frozen=True)
class PackedIndices(Rewrite):
    """The index of a maximum, 8 bytes, becomes its place in its window, 1 byte.

    Before: indices -> max_pool2d_with_indices_backward.  After: indices -> place -> indices' -> it.
    """

    name: ClassVar[str] = "byte index"

    def apply(self, view: JointView) -> Sequence[Site | ShareRefusal]:
        """Rewrites every two-dimensional max pooling with a window of at most 256 places."""
        graph = view.graph
        sites: list[Site | ShareRefusal] = []
        target = aten.max_pool2d_with_indices_backward.default
        for node in graph.find_nodes(op="call_function", target=target):
            _, _, kernel, stride, padding, dilation, _, indices = node.args
            kernel = _pair(kernel)
            if kernel[0] * kernel[1] > _MOST:
                reason = f"a byte can't number the {kernel[0] * kernel[1]} places of its window"
                sites.append(ShareRefusal(indices.name, self.name, reason))
                continue
            if _is_packed(indices):
                continue
            pool = indices.args[0]
            with graph.inserting_after(indices):
                width = sizes_of(graph, pool.args[0])[-1]
            window = (width, kernel, _pair(stride or kernel), _pair(padding), _pair(dilation))
            after = width if isinstance(width, fx.Node) else indices
            with graph.inserting_after(after):
                places = insert(graph, torch.ops.graphopt.pack_offsets.default, indices, *window)
            with graph.inserting_before(node):
                again = insert(graph, torch.ops.graphopt.unpack_offsets.default, places, *window)
            node.update_arg(7, again)
            sites.append(Site((indices.name, places.name, again.name), self.name))
        return sites


def _is_packed(indices: fx.Node) -> bool:
    return indices.target is torch.ops.graphopt.unpack_offsets.default


def _pair(value: Any) -> list[int]:
    pair = list(value) if isinstance(value, (list, tuple)) else [value]
    return pair * 2 if len(pair) == 1 else pair


def _origins(shape: Sequence[int], stride: Pair, padding: Pair, like: Tensor) -> tuple[Any, Any]:
    """First row and first column of the window of every output."""
    rows = torch.arange(shape[-2], device=like.device, dtype=torch.int32).unsqueeze(-1)
    columns = torch.arange(shape[-1], device=like.device, dtype=torch.int32)
    return rows * stride[0] - padding[0], columns * stride[1] - padding[1]


def _pack_offsets(
    indices: Tensor, width: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    first_row, first_column = _origins(indices.shape, stride, padding, indices)
    places = indices.to(torch.int32)
    rows = places.div(width, rounding_mode="floor")
    columns = places.sub_(rows * width).sub_(first_column)
    rows = rows.sub_(first_row)
    if dilation[0] > 1 or dilation[1] > 1:
        rows = rows.div_(dilation[0], rounding_mode="floor")
        columns = columns.div_(dilation[1], rounding_mode="floor")
    return rows.mul_(kernel[1]).add_(columns).to(torch.uint8)


def _unpack_offsets(
    offsets: Tensor, width: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    first_row, first_column = _origins(offsets.shape, stride, padding, offsets)
    rows = offsets.div(kernel[1], rounding_mode="floor")
    columns = offsets.sub(rows * kernel[1]).to(torch.int64)
    rows = rows.to(torch.int64)
    rows.mul_(dilation[0]).add_(first_row)
    columns.mul_(dilation[1]).add_(first_column)
    return rows.mul_(width).add_(columns)


def _fake_offsets(indices: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(indices, dtype=torch.uint8)


def _fake_indices(offsets: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(offsets, dtype=torch.int64)


for _name, _op, _fake in (
    ("pack_offsets", _pack_offsets, _fake_offsets),
    ("unpack_offsets", _unpack_offsets, _fake_indices),
):
    _LIBRARY.impl(_name, _op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{_name}", _fake, lib=_LIBRARY)
