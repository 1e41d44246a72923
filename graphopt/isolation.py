"""Running a model without leaving a trace on it or on global state."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def random_state(seed: int | None = None) -> Iterator[None]:
    """Restore all generators that a model may draw from; optionally seed them inside.

    Args:
        seed: Seed of Python's and torch's generators inside the block; None keeps their state.
    """
    python = random.getstate()
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    if seed is not None:
        random.seed(seed)
        torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def isolated(module: nn.Module, *, seed: int | None = None) -> Iterator[None]:
    """Restore a module's buffers, gradients and modes, and all generators, on leaving the block.

    Inside, every gradient is None and gradients are enabled.

    Args:
        module: The module to protect.
        seed: Seed of the generators inside the block.
    """
    modes = [(m, m.training) for m in module.modules()]
    buffers = [
        (m, name, buffer, None if buffer is None else buffer.detach().clone())
        for m in module.modules()
        for name, buffer in m._buffers.items()
    ]
    gradients = [(p, p.grad) for p in module.parameters()]
    try:
        with random_state(seed), torch.enable_grad():
            for parameter, _ in gradients:
                parameter.grad = None
            yield
    finally:
        for submodule, training in modes:
            submodule.training = training
        with torch.no_grad():
            for owner, name, buffer, value in buffers:
                owner._buffers[name] = buffer
                if buffer is not None:
                    buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
