"""Operators that slide over or resample an image: channels go through one by one."""

from __future__ import annotations

import numpy as np
import torch

from graphopt.passes.prune.rule import Call, Result, Value, known, rule

aten = torch.ops.aten

_DIMENSIONS = {
    1: known(
        aten, "avg_pool1d", "max_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d",
        "max_pool1d_with_indices", "upsample_linear1d", "upsample_nearest1d", "reflection_pad1d",
        "replication_pad1d", "_upsample_nearest_exact1d",
    ),
    2: known(
        aten, "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
        "max_pool2d_with_indices", "upsample_nearest2d", "upsample_bilinear2d",
        "upsample_bicubic2d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa", "reflection_pad2d", "replication_pad2d", "max_unpool2d",
        "fractional_max_pool2d",
    ),
    3: known(
        aten, "avg_pool3d", "max_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d",
        "max_pool3d_with_indices", "upsample_nearest3d", "upsample_trilinear3d",
        "reflection_pad3d", "replication_pad3d",
    ),
}  # fmt: skip
_RANK = {packet: rank for rank, packets in _DIMENSIONS.items() for packet in packets}


@rule(*_RANK)
def _image(call: Call) -> Result:
    """All of these give zero for zeros."""
    x = call.inputs[0]
    spatial = _RANK[call.node.target.overloadpacket]  # type: ignore[union-attr]
    for value in call.inputs:
        for labels in value.axes[-spatial:]:
            call.freeze(labels, "a window slides over it")
    lead = len(x.axes) - spatial
    several = isinstance(call.output, (tuple, list))
    made = []
    for output in call.output if several else [call.output]:
        image = [np.zeros(int(n), dtype=np.int64) for n in output.shape[lead:]]
        zero = output.dtype == x_dtype(call)
        made.append(
            Value(
                (*x.axes[:lead], *image), (*(z and zero for z in x.zero[:lead]), *[True] * spatial)
            )
        )
    return tuple(made) if several else made[0]


def x_dtype(call: Call) -> torch.dtype:
    """Type of the image."""
    return call.node.all_input_nodes[0].meta["val"].dtype


@rule(*known(aten, "grid_sampler", "grid_sampler_2d", "grid_sampler_3d"))
def _grid_sample(call: Call) -> Result:
    x, grid = call["input"], call["grid"]
    for labels in (*x.axes[2:], *grid.axes[1:]):
        call.freeze(labels, "it is sampled")
    call.unify(x.axes[0], grid.axes[0], "it meets an axis that keeps its size")
    image = [np.zeros(n, dtype=np.int64) for n in call.shape[2:]]
    return Value((*x.axes[:2], *image), (*x.zero[:2], *[True] * len(image)))
