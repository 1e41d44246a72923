"""Measured peak bytes, saved bytes, FLOPs and seconds of a training step or a forward pass.

A *step* is one forward, the loss, and one backward, after a warm-up, with gradients allocated
beforehand.  Everything is measured above what was live before the step: parameters, gradients,
buffers and inputs don't count.  The outputs are let go as soon as the loss is there, as in
``loss(model(x)).backward()``; a loop that keeps them in a variable holds their bytes on top (see
``hold_outputs``).  The module is left as it was found: gradients, buffers, random
state, mode and grad mode.  Autocast counts as it is at the time of the call: forward and loss run
under it, backward outside of it, and its cache of cast weights is emptied in between, as when a
training loop enters ``torch.autocast`` anew for each step.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.cost.allocator import MemoryTrace, trace_memory
from graphopt.cost.flops import FlopCounter
from graphopt.cost.losses import Loss, LossMeasurement, default_loss, loss_value, measure_loss
from graphopt.cost.preserve import preserved
from graphopt.ir.untouched import autocast_off

__all__ = [
    "LossMeasurement",
    "MemoryTrace",
    "PairedSeconds",
    "StepMeasurement",
    "StepSeconds",
    "default_loss",
    "forward_seconds",
    "measure_loss",
    "measure_step",
    "step_flops",
    "step_seconds",
    "trace_memory",
]


_LEAST_PAIRS = 8
_MOST_PAIRS = 200


@dataclass(frozen=True)
class StepMeasurement:
    """Allocator bytes of one step, above what was live before it.

    Attributes:
        peak: Most live bytes at any moment of the step.
        saved: Live bytes after forward and loss: the loss and what backward needs.
        forward_peak: Most live bytes until the loss is there.
        backward_peak: Most live bytes from then on; 0 for a forward pass alone.
        live: Live bytes at the end of the step.
        loss: The loss, or None for a forward pass alone.
        timeline: ``(nanoseconds since the start, live bytes)`` after every allocation and release.
        boundary: Nanoseconds since the start at which the loss was there.
    """

    peak: int
    saved: int
    forward_peak: int
    backward_peak: int
    live: int
    loss: float | None = None
    timeline: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    boundary: int = 0


@dataclass(frozen=True)
class StepSeconds:
    """Time of a step, alone or against a reference that ran in turns with it.

    Attributes:
        seconds: Median of the module's own steps.
        reference_seconds: Median of the reference's steps, or None without one.
        ratios: Module against reference, pair by pair.
        ratio: Median of ``ratios``, or None without a reference.  Drift of the machine's speed
            cancels in a pair, so compare this instead of seconds.
    """

    seconds: float
    reference_seconds: float | None = None
    ratios: tuple[float, ...] = ()
    ratio: float | None = None


@dataclass(frozen=True)
class PairedSeconds:
    """Seconds of two modules' forwards that ran in turns: lower quartiles.

    Other work on the machine only ever adds time, and in turns it meets both modules alike.

    Attributes:
        seconds: Of the module.
        reference: Of the reference.
        pairs: How often both ran.
    """

    seconds: float
    reference: float
    pairs: int


def measure_step(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss | None = None,
    warmup: int = 1,
    forward_only: bool = False,
    hold_outputs: bool = False,
) -> StepMeasurement:
    """Measure the allocator's peak and the saved bytes of one step.

    Args:
        module: Any module; it runs in the mode in which it is.
        args: Its positional inputs.
        kwargs: Its keyword inputs.
        loss: ``loss(outputs)`` gives a scalar; default: `default_loss`.
        warmup: Unmeasured steps before the measured one.
        forward_only: Measure the forward pass alone, under ``no_grad``.
        hold_outputs: Keep the outputs alive during backward.

    Returns:
        The measurement, in bytes.

    Raises:
        NothingToTrainError: The loss doesn't depend on anything that requires a gradient.
    """
    with preserved(module, args, kwargs) as (inputs, keywords):
        step = _Step(module, inputs, keywords, loss, forward_only, hold_outputs)
        for _ in range(warmup):
            step()
        trace = trace_memory(step.traced, device=_device_of(module, inputs, keywords))
    marks = dict(trace.marks)
    return StepMeasurement(
        peak=trace.peak,
        saved=trace.live_at("loss"),
        forward_peak=trace.peak_between(None, "loss"),
        backward_peak=0 if forward_only else trace.peak_between("loss", None),
        live=trace.live,
        loss=trace.result,
        timeline=trace.timeline,
        boundary=marks["loss"],
    )


def step_flops(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss | None = None,
    forward_only: bool = False,
) -> int:
    """FLOPs of one step: ops of `torch.utils.flop_counter` and RNN cells, multiply-add = 2.

    Args and errors as in `measure_step`.
    """
    with preserved(module, args, kwargs) as (inputs, keywords), FlopCounter() as counter:
        _Step(module, inputs, keywords, loss, forward_only)()
    return counter.total


def step_seconds(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss: Loss | None = None,
    reference: nn.Module | None = None,
    repeats: int = 5,
    warmup: int = 1,
    forward_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> StepSeconds:
    """Time a step, in turns with a reference if one is given.

    Args:
        module: The module to time.
        args: Its positional inputs; the reference gets the same.
        kwargs: Its keyword inputs.
        loss: As in `measure_step`.
        reference: A module to compare with.
        repeats: Timed steps, or pairs of them.
        warmup: Unmeasured steps (or pairs) before.
        forward_only: Time the forward pass alone, under ``no_grad``.
        progress: Called with ``(steps done, steps in all)``.

    Returns:
        Seconds and ratios.
    """
    modules = [module] if reference is None else [module, reference]
    times: list[list[float]] = [[] for _ in modules]
    with contextlib.ExitStack() as stack:
        steps = []
        for one in modules:
            inputs, keywords = stack.enter_context(preserved(one, args, kwargs))
            steps.append(_Step(one, inputs, keywords, loss, forward_only))
        device = _device_of(module, args, kwargs or {})
        for turn in range(warmup + repeats):
            for position, step in enumerate(steps):
                seconds = _timed(step, device)
                if turn >= warmup:
                    times[position].append(seconds)
            if progress is not None:
                progress(turn + 1, warmup + repeats)
    own = statistics.median(times[0])
    if reference is None:
        return StepSeconds(own)
    ratios = tuple(a / b for a, b in zip(*times, strict=True))
    return StepSeconds(own, statistics.median(times[1]), ratios, statistics.median(ratios))


def forward_seconds(
    module: nn.Module,
    reference: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    limit: float = 1.0,
) -> PairedSeconds:
    """Time the forward of two modules in turns, in eval mode, without gradients.

    Args:
        module: A module.
        reference: What to compare with.
        args: Positional inputs of both.
        kwargs: Keyword inputs.
        limit: Seconds after which to stop, once there are `_LEAST_PAIRS` pairs.
    """
    times: list[tuple[float, float]] = []
    with preserved(module, args, kwargs) as (inputs, keywords), preserved(reference, (), None):
        both = (module.eval(), reference.eval())
        steps = [_Step(one, inputs, keywords, None, forward_only=True) for one in both]
        device = _device_of(module, inputs, keywords)
        for step in steps * 2:  # to warm up
            step()
        end = time.perf_counter() + limit
        while len(times) < _LEAST_PAIRS or (time.perf_counter() < end and len(times) < _MOST_PAIRS):
            times.append((_timed(steps[0], device), _timed(steps[1], device)))
    own, other = (sorted(column)[len(times) // 4] for column in zip(*times, strict=True))
    return PairedSeconds(own, other, len(times))


@dataclass
class _Step:
    """One step of a module on inputs, run by calling it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Loss | None
    forward_only: bool
    hold_outputs: bool = False

    def __call__(self) -> float | None:
        return self.traced(mark=lambda name: None)

    def traced(self, mark: Callable[[str], None]) -> float | None:
        torch.clear_autocast_cache()
        if self.forward_only:
            with torch.no_grad():
                outputs = self.module(*self.args, **self.kwargs)
            torch.clear_autocast_cache()
            mark("loss")
            return None
        with torch.enable_grad():
            outputs = self.module(*self.args, **self.kwargs)
            value = loss_value(self.loss, outputs)
        if not self.hold_outputs:
            del outputs
        torch.clear_autocast_cache()
        mark("loss")
        with autocast_off():
            value.backward()
        return float(value.detach())


def _timed(step: _Step, device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def _device_of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    return next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
