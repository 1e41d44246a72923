"""Ops through which a scale, perhaps a shift, may move: they are linear in each channel."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.private.folding.affine import Affine
from graphopt.private.folding.sheet import Sheet, sizes

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Through:
    """An op that a scale may pass.

    Attributes:
        data: What it reads.
        shifts: Whether a shift may pass as well: it maps a constant to that constant.
        axes: Axis of its input (from the end) -> that axis in its output, or None where there is
            none; and the other way round.
        repeats: Input axis -> how often each channel comes, one after the other, in the output's
            last axis, where the op lays it together with all that follows.
    """

    data: fx.Node
    shifts: bool
    axes: dict[int, int]
    repeats: dict[int, int] = dataclasses.field(default_factory=dict)

    def onward(self, form: Affine) -> Affine | None:
        """What a scale and shift of the input is of the output."""
        if form.shifts and not self.shifts:
            return None
        if form.axis is None:
            return form
        if form.axis in self.axes:
            return form.along(self.axes[form.axis], form.scale, form.shift)
        if form.axis in self.repeats:
            times = self.repeats[form.axis]
            parts = (v.repeat_interleave(times) for v in (form.scale, form.shift))
            return form.along(-1, *parts)
        return None

    def back(self, form: Affine) -> Affine | None:
        """What a scale and shift of the output is of the input."""
        if form.shifts and not self.shifts:
            return None
        if form.axis is None:
            return form
        for before, after in self.axes.items():
            if after == form.axis:
                return form.along(before, form.scale, form.shift)
        return None


Reader = Callable[[fx.Node, fx.Node], Through | None]
_READERS: dict[Any, Reader] = {}


def through(sheet: Sheet, node: Any) -> Through | None:
    """How scales pass a node, or None where they don't."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node in sheet.barred:
        return None
    reader = _READERS.get(getattr(node.target, "overloadpacket", None))
    data = node.args[0] if node.args else None
    if reader is None or not isinstance(data, fx.Node):
        return None
    values = (node.meta.get("val"), data.meta.get("val"))
    if not all(isinstance(v, Tensor) and v.is_floating_point() for v in values):
        return None
    if node.meta["val"].dtype != data.meta["val"].dtype:
        return None
    return reader(node, data)


def _reads(*packets: str) -> Callable[[Reader], Reader]:
    def register(function: Reader) -> Reader:
        _READERS.update({getattr(aten, p): function for p in packets})
        return function

    return register


def _inner(node: fx.Node, count: int) -> dict[int, int]:
    """All axes but the last ones."""
    return {-i: -i for i in range(count + 1, node.meta["val"].dim() + 1)}


def _spatial(node: fx.Node) -> int:
    found = re.search(r"(\d)d", str(node.target))
    assert found is not None
    return int(found[1])


@_reads("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _average(node: fx.Node, data: fx.Node) -> Through:
    args = dict(enumerate(node.args))
    padding, counts_zeros = args.get(3, 0), args.get(5, True)
    divisor = args.get(6)
    pads = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    constant = not (pads and counts_zeros) and divisor is None and not node.kwargs
    return Through(data, constant, _inner(node, _spatial(node)))


@_reads("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def _adaptive(node: fx.Node, data: fx.Node) -> Through:
    return Through(data, True, _inner(node, _spatial(node)))


@_reads(
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
    "upsample_linear1d", "upsample_trilinear3d",
)  # fmt: skip
def _upsampled(node: fx.Node, data: fx.Node) -> Through:
    return Through(data, True, _inner(node, node.meta["val"].dim() - 2))


@_reads("mean", "sum")
def _reduced(node: fx.Node, data: fx.Node) -> Through | None:
    rank = data.meta["val"].dim()
    if str(node.target).split(".")[-1] not in ("dim", "dim_IntList") or len(node.args) < 2:
        return None
    if not isinstance(node.args[1], list) or not node.args[1]:
        return None
    gone = {d % rank for d in node.args[1]}  # type: ignore[operator]
    keeps = node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2])
    left = [i for i in range(rank) if keeps or i not in gone]
    axes = {i - rank: p - len(left) for p, i in enumerate(left) if i not in gone}
    return Through(data, node.target is aten.mean.dim, axes)


@_reads("permute", "transpose")
def _permuted(node: fx.Node, data: fx.Node) -> Through:
    rank = data.meta["val"].dim()
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    else:
        first, second = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        order[first], order[second] = order[second], order[first]
    return Through(data, True, {source - rank: p - rank for p, source in enumerate(order)})


@_reads("flatten", "view", "reshape", "_unsafe_view", "unflatten", "contiguous", "clone")
def _reshaped(node: fx.Node, data: fx.Node) -> Through:
    """Of a new arrangement of sizes: axes in front that stay, and one that takes all behind it."""
    before, after = sizes(data), sizes(node)
    axes: dict[int, int] = {}
    repeats: dict[int, int] = {}
    for place, size in enumerate(before):
        if before[:place] != after[:place]:
            break
        rest = before[place + 1 :]
        if after[place : place + 1] == [size] and isinstance(size, int):
            axes[place - len(before)] = place - len(after)
        elif len(after) == place + 1 and all(isinstance(s, int) for s in [size, *rest]):
            repeats[place - len(before)] = math.prod(s for s in rest if isinstance(s, int))
    for place in range(1, min(len(before), len(after)) + 1):  # axes behind that stay
        if before[-place:] != after[-place:]:
            break
        if -place not in axes and isinstance(before[-place], int):
            axes.setdefault(-place, -place)
    return Through(data, True, axes, repeats)
