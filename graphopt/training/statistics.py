"""Running statistics of batch norms, measured anew."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.batches import Batch
from graphopt.errors import UsageError
from graphopt.ir.randomness import seed_torch
from graphopt.training.reading import Batches, arguments, only_targets
from graphopt.training.surroundings import surroundings

_NAMES = ("running_mean", "running_var")


@torch.no_grad()
def recalibrate(
    module: nn.Module,
    data: Iterable[Any],
    *,
    pairs: bool = False,
    batches: int | None = None,
    seed: int = 0,
) -> tuple[str, ...]:
    """Set the running statistics of batch norms to their means over data.

    A batch norm's own average forgets slowly; a network whose weights were changed carries the
    statistics of the old ones. What is set here is the plain mean over batches of what each batch
    shows in train mode: means, and variances with Bessel's correction.

    Nothing needs to be known of the norms: a buffer named as torch names them moves in train mode
    to ``(1 - m) buffer + m statistic``, and two runs of one batch from different values tell m.

    Args:
        module: Changed in place, in its buffers alone.
        data: Batches as the model takes them.
        pairs: Whether they are pairs of that and targets.
        batches: How many to use at most; None: all.
        seed: Of dropout.

    Returns:
        The names of the buffers that were set: those that move.

    Raises:
        UsageError: The data holds no batch.
    """
    read = Batches(data, only_targets if pairs else None, arguments(module))
    buffers = {n: b for n, b in module.named_buffers() if n.rpartition(".")[2] in _NAMES}
    if not buffers:
        return ()
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    rates: dict[str, float] = {}
    totals = {name: torch.zeros_like(buffer) for name, buffer in buffers.items()}
    count = 0
    with surroundings(module, None, ()), torch.no_grad():
        module.train()
        try:
            for batch in itertools.islice(read, batches):
                rates = rates or _rates(module, batch, buffers, seed)
                for name, found in _shown(module, batch, buffers, 0.0, seed).items():
                    totals[name] += found
                count += 1
        finally:
            for name, buffer in module.named_buffers():
                buffer.copy_(kept[name])
    if not count:
        raise UsageError("the data holds no batch")
    moving = tuple(name for name, rate in rates.items() if rate > 0)
    for name in moving:
        buffers[name].copy_(totals[name] / (count * rates[name]))
    return moving


def _rates(
    module: nn.Module, batch: Batch, buffers: dict[str, Tensor], seed: int
) -> dict[str, float]:
    """How far each buffer moves towards what a batch shows: m."""
    low = _shown(module, batch, buffers, 0.0, seed)
    rates = {}
    for name, start in low.items():
        scale = 1.0 + float(start.abs().max())  # such that rounding doesn't matter
        high = _shown(module, batch, {name: buffers[name]}, scale, seed)[name]
        moved = 1 - float(((high - start) / scale).double().mean())
        rates[name] = 0.0 if moved < 1e-4 else moved
    return rates


def _shown(
    module: nn.Module, batch: Batch, buffers: dict[str, Tensor], start: float, seed: int
) -> dict[str, Tensor]:
    """Where a batch takes the buffers from a value."""
    for buffer in buffers.values():
        buffer.fill_(start)
    seed_torch(seed)
    batch.outputs(module)
    return {name: buffer.clone() for name, buffer in buffers.items()}
