"""Attributions by name: those that need nothing but the model, ours, and the peers'.

An attribution takes a `Task` and gives the relevance of its first input: of its shape, or of an
image's ``(samples, height, width)``, or one value for each unit that is removed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import graphopt
from graphopt.passes.relevance.judging import leave_one_out
from tests.benchmarks.faithful_tasks import Task
from tests.benchmarks.peer_attributions import PEERS

Attribution = Callable[[Task], Tensor]

_STEPS = 32
_NOISE, _DRAWS = 0.15, 16


def random_relevance(task: Task) -> Tensor:
    """Normal noise."""
    generator = torch.Generator().manual_seed(task.seed)
    return torch.randn(task.inputs[0].shape, generator=generator)


def _gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(f(x).sum(), x)[0]


def _folded(task: Task, values: Tensor) -> Tensor:
    """Sum over the embedding axis, or over the channels of an image."""
    return values.sum(-1 if task.embedding else 1)


def gradient(task: Task) -> Tensor:
    """Magnitude of the gradient, summed over channels (Simonyan et al. 2014)."""
    x, _, f = task.leaf()
    return _folded(task, _gradient(f, x).abs())


def gradient_x_input(task: Task) -> Tensor:
    """Gradient times input (Shrikumar et al. 2016)."""
    x, _, f = task.leaf()
    return _folded(task, _gradient(f, x) * x)


def integrated_gradients(task: Task) -> Tensor:
    """Mean gradient on the straight way from the baseline (Sundararajan et al. 2017, eq. 3)."""
    x, base, f = task.leaf()
    total = torch.zeros_like(x, dtype=torch.float64)
    for step in range(_STEPS):
        total += _gradient(f, base + (step + 0.5) / _STEPS * (x - base))
    return _folded(task, total / _STEPS * (x - base))


def smooth_grad(task: Task) -> Tensor:
    """Magnitude of the mean gradient under noise of 0.15 of the range (Smilkov et al. 2017)."""
    x, _, f = task.leaf()
    generator = torch.Generator().manual_seed(task.seed)
    axes = tuple(range(1, x.dim()))
    spread = _NOISE * (x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True))
    total = torch.zeros_like(x, dtype=torch.float64)
    for _ in range(_DRAWS):
        total += _gradient(f, x + spread * torch.randn(x.shape, generator=generator))
    return _folded(task, total.abs())


def left_out(task: Task) -> Tensor:
    """What the output loses without each unit: the metric's own removal, one at a time."""
    removal = task.removal
    if removal.allowed is not None and len(removal.allowed) != len(task.targets):
        raise ValueError("leave-one-out takes the whole task")
    return leave_one_out(task.model, task.inputs, targets=task.targets, removal=removal)


_CAPTURED: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def _captured(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """The captured model, which all composites share."""
    if model not in _CAPTURED:
        _CAPTURED[model] = graphopt.capture(model, inputs).emit()
    return _CAPTURED[model]


def composite(given: Any) -> Attribution:
    """Ours: the relevance of the first argument under a composite of `graphopt.explain`.

    The explanation is made once; each chunk has its own targets.
    """

    def attribute(task: Task) -> Tensor:
        parts = list(task.parts())
        first = parts[0]
        model = _captured(task.model, first.inputs)
        module: Any = graphopt.explain(model, first.inputs, composite=given, target=first.targets)
        found = []
        for part in parts:
            relevance = module.at(part.targets)(*part.inputs).relevance
            found.append(next(iter(relevance.values())).detach())
        return torch.cat(found)

    return attribute


def in_parts(method: Attribution) -> Attribution:
    """A method that sees a chunk of the samples at a time."""
    return lambda task: torch.cat([method(part) for part in task.parts()])


BASIC: dict[str, Attribution] = {
    "random": random_relevance,
    "gradient": in_parts(gradient),
    "gradient x input": in_parts(gradient_x_input),
    "integrated gradients": in_parts(integrated_gradients),
    "SmoothGrad": in_parts(smooth_grad),
    "leave-one-out": left_out,
}

COMPOSITES = (
    "cp-lrp", "cp-lrp-activated", "attnlrp", "lrp-0", "epsilon", "epsilon-plus",
    "epsilon-plus-flat", "epsilon-gamma", "epsilon-gamma-box", "epsilon-alpha2-beta1",
    "epsilon-alpha2-beta1-flat", "excitation", "mamba-lrp", "dynamic", "gradient-x-input",
)  # fmt: skip

METHODS: dict[str, Attribution] = {
    **BASIC,
    **{f"ours: {name}": composite(name) for name in COMPOSITES},
    **{name: in_parts(method) for name, method in PEERS.items()},
}
