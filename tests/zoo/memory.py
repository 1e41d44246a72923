"""What a step really allocates: the tests' own measurement, apart from ``graphopt.measure``.

CPU bytes are the cumulative sum of the allocator events that ``torch.profiler`` records. A dispatch
mode with weak references misses the temporaries inside ops and prolongs lifetimes itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Footprint:
    """Bytes above those held at the start.

    Attributes:
        peak: largest at any time in the measured region.
        live: still held at its end.
        saved: held after forward and loss, before backward (0 if not asked).
    """

    peak: int
    live: int
    saved: int = 0


def allocator_events(run: Callable[[], Any]) -> list[int]:
    """Sizes of the allocations (positive) and releases (negative) in ``run()``, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as session:
        result = run()
    del result
    events = [
        (event.start_ns(), event.nbytes())
        for event in session.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    ]
    return [size for _, size in sorted(events, key=lambda event: event[0])]


def footprint(run: Callable[[], Any]) -> Footprint:
    """Peak and remaining bytes of ``run()``; its result must be released by itself."""
    held = peak = 0
    for size in allocator_events(run):
        held += size
        peak = max(peak, held)
    return Footprint(peak, held)


def allocate_gradients(module: nn.Module) -> None:
    """Give every trainable parameter a zero gradient, so that a step only accumulates."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def training_step(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Callable[[Any], Tensor],
) -> None:
    """One forward, loss and backward."""
    loss(module(*args, **kwargs)).backward()


def step_footprint(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Callable[[Any], Tensor],
) -> Footprint:
    """Footprint of one training step after a warm-up step, gradients allocated beforehand."""
    allocate_gradients(module)
    training_step(module, args, kwargs, loss)
    whole = footprint(lambda: training_step(module, args, kwargs, loss))
    kept: list[Tensor] = []
    forward = footprint(lambda: kept.append(loss(module(*args, **kwargs))))
    kept.clear()
    return Footprint(whole.peak, whole.live, forward.live)


def forward_footprint(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Footprint:
    """Footprint of one forward pass under ``no_grad`` after a warm-up pass."""
    with torch.no_grad():
        module(*args, **kwargs)
        return footprint(lambda: module(*args, **kwargs))
